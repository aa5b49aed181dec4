"""Jobs for groups of real ranks: training runs and gradients, one after the other, one group after the other.

Starting Python and torch costs more than a tiny model's training, so one process imports everything and forks the ranks
of every group. As a program: that process.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleetune import opening, runs
from fleetune.cluster.local import _free_port, rank_environment
from fleetune.recipe import parse_recipe

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """Trains the run in `folder`, or writes one of its gradients to `gradient`.

    With `values` the folder is opened first, as this recipe on as many ranks.
    """

    folder: str
    gradient: str | None = None
    batch: int = 0
    float64: bool = False
    values: dict[str, Any] | None = None


def make_run(values: dict[str, Any], world_size: int) -> runs.Run:
    import yaml

    recipe = parse_recipe(yaml.safe_dump(values), "test")
    return opening.open_run(recipe, {"nodes": 1, "nproc_per_node": world_size, "threads": 1})


def group_environment() -> dict[str, str]:
    """Of every rank on this machine."""
    return rank_environment() | {
        "CUDA_VISIBLE_DEVICES": "",  # several ranks cannot share a GPU
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "launcher"), str(ROOT / "kernels")]),
    }


def rank_variables(rank: int = 0, world_size: int = 1, port: int | None = None) -> dict[str, str]:
    """Of one rank; by itself it finds a port."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    return {name: str(value) for name, value in {**ranks, "MASTER_PORT": port or _free_port()}.items()}


def train_together(folders: list[runs.Run], world_size: int, timeout: float = 600.0) -> None:
    """Raises AssertionError with the ranks' output where one fails."""
    work_together([(world_size, [Job(str(run.path)) for run in folders])], timeout)


def work_together(groups: list[tuple[int, list[Job]]], timeout: float = 600.0) -> None:
    """Each group's jobs by its number of ranks. Raises AssertionError with the ranks' output where one fails."""
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps([[size, [asdict(job) for job in jobs]] for size, jobs in groups])],
        env=group_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]


def _import_everything() -> None:
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401

    from fleetune.train import gradient, loop  # noqa: F401

    torch.set_num_threads(1)  # threads do not live through a fork
    gc.freeze()  # ZeRO-3 collects garbage whenever it starts, and need not look through all of that


def _work(rank: int, world_size: int, port: int, jobs: list[Job]) -> None:
    """What each rank does."""
    from fleetune.train import distributed
    from fleetune.train.gradient import batch_gradient, save_gradient
    from fleetune.train.loop import train

    os.environ |= rank_variables(rank, world_size, port)
    world = distributed.start()
    for job in jobs:
        run = runs.Run(Path(job.folder))
        if job.gradient is None:
            train(run, world, run.path)
            continue
        found = batch_gradient(run, world, job.batch, job.float64)
        if world.is_main:
            save_gradient(found, Path(job.gradient))
    distributed.barrier()
    distributed.stop()


def main() -> None:
    _import_everything()
    from torch.multiprocessing import start_processes

    for world_size, described in json.loads(sys.argv[1]):
        jobs = [Job(**job) for job in described]
        for job in jobs:
            if job.values is not None:
                make_run(job.values, world_size)
        arguments = (world_size, _free_port(), jobs)
        start_processes(_work, arguments, nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
