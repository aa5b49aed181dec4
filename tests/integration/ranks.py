"""Several runs, one after the other, by one group of real ranks: starting Python and torch costs more than training.

As a program: what each rank runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fleetune import runs
from fleetune.cluster.local import _free_port, rank_environment
from fleetune.recipe import parse_recipe

ROOT = Path(__file__).parents[2]


def make_run(values: dict[str, Any], world_size: int) -> runs.Run:
    import yaml

    recipe = parse_recipe(yaml.safe_dump(values), "test")
    return runs.open_run(recipe, {"nodes": 1, "nproc_per_node": world_size, "threads": 1})


def train_together(folders: list[runs.Run], world_size: int, timeout: float = 300.0) -> None:
    """Raises AssertionError with a rank's output where one fails."""
    paths = os.pathsep.join([str(ROOT / "launcher"), str(ROOT / "kernels")])
    environment = rank_environment() | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": paths,
    }
    command = [sys.executable, __file__, *(str(run.path) for run in folders)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world_size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


def main() -> None:
    import torch

    from fleetune.train import distributed
    from fleetune.train.loop import train

    torch.set_num_threads(1)
    world = distributed.start()
    for folder in sys.argv[1:]:
        train(runs.Run(Path(folder)), world, Path(folder))
    distributed.stop()


if __name__ == "__main__":
    main()
