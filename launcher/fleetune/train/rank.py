"""A rank as a program: signals heard, the process group joined, an exit code from whatever happens."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from fleetune import runs
from fleetune.schema import RecipeError
from fleetune.train import signals

if TYPE_CHECKING:
    from fleetune.train.distributed import World


def run_rank(body: Callable[[World], int]) -> NoReturn:
    """Runs `body` as the rank that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say, and exits."""
    signals.listen()
    # The user's lines go to stdout; whatever the libraries print goes to stderr, which is this rank's log.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    code = _exit_code(body)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through interpreter shutdown: after an error, the process group would wait for ranks that are gone.
    os._exit(code)


def _exit_code(body: Callable[[World], int]) -> int:
    # Imported here, so that a signal that comes meanwhile is heard.
    import torch

    from fleetune.train import distributed
    from fleetune.train.data import DataError
    from fleetune.train.loop import NonFiniteLoss
    from fleetune.train.manifest import DamagedCheckpoint
    from fleetune.train.model import ModelError

    try:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        code = body(distributed.start())
        signals.beat("exit")
        distributed.stop()
        return code
    except (NonFiniteLoss, DataError, ModelError, RecipeError, DamagedCheckpoint) as error:
        print(f"fleetune: error: {error}", file=sys.stderr, flush=True)
        return runs.FAILED_FOR_GOOD
    except Exception as error:
        traceback.print_exc()
        print(f"fleetune: error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return runs.FAILED
