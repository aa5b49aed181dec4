"""What every rank runs: `python -m fleetune.train RUN`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fleetune import runs
from fleetune.train.rank import run_rank

if TYPE_CHECKING:
    from fleetune.train.distributed import World


def main(world: World) -> int:
    from fleetune.train.loop import train

    run = runs.Run(Path(sys.argv[1]))
    finished = train(run, world, Path(os.environ.get("FLEETUNE_LOGS", run.path / "logs")))
    return runs.DONE if finished else runs.SAVED


if __name__ == "__main__":
    run_rank(main)
