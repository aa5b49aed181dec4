"""What every rank runs: `python -m fleetune.train RUN`.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say which rank of which job it is.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from fleetune.train import signals


def main() -> int:
    signals.listen()
    # The user's lines go to stdout; whatever the libraries print goes to stderr, which is this rank's log.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from fleetune import runs
    from fleetune.schema import RecipeError
    from fleetune.train import distributed
    from fleetune.train.data import DataError
    from fleetune.train.loop import NonFiniteLoss, train
    from fleetune.train.model import ModelError

    run = runs.Run(Path(sys.argv[1]))
    try:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        finished = train(run, distributed.start(), Path(os.environ.get("FLEETUNE_LOGS", run.path / "logs")))
        signals.beat("exit")
        distributed.stop()
    except (NonFiniteLoss, DataError, ModelError, RecipeError) as error:
        print(f"fleetune: error: {error}", file=sys.stderr, flush=True)
        return runs.FAILED_FOR_GOOD
    except Exception as error:
        traceback.print_exc()
        print(f"fleetune: error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return runs.FAILED
    return runs.DONE if finished else runs.SAVED


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through interpreter shutdown: after an error, the process group would wait for ranks that are gone.
    os._exit(code)
