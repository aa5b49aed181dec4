"""What every node of a run does: its processors, its memory, its GPUs.

wandb's own figures are those of the one machine that its process runs on; these are logged with the steps, so they are
there offline, too, and of every node.
"""

from __future__ import annotations

import math
import os
import statistics

import psutil
import torch

from fleetune.train.distributed import World, sum_over_ranks

MOST_NODES = 32  # that are logged one by one


def node_load(world: World) -> dict[str, float]:
    """`nodes/0/cpu_percent` and the like, of every node since the last call; of many nodes, the least,
    the most and the mean. What cannot be read is left out.

    A collective. Every rank gives its share of its node: its own GPU, and the rest as all of the node's ranks see it.
    """
    mine = _load_here(world)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    table = torch.zeros(world.world_size // ranks, len(mine), device=world.device)
    node = int(os.environ.get("NODE_RANK", world.rank // ranks))
    table[node] = torch.tensor(list(mine.values()), device=world.device) / ranks
    rows = sum_over_ranks(table).tolist()
    names = [str(number) for number in range(len(rows))]
    if len(rows) > MOST_NODES:
        columns = [list(column) for column in zip(*rows, strict=True)]
        names = ["least", "most", "mean"]
        rows = [[of(column) for column in columns] for of in (min, max, statistics.fmean)]
    return {
        f"nodes/{of}/{name}": round(value, 1)
        for of, row in zip(names, rows, strict=True)
        for name, value in zip(mine, row, strict=True)
        if math.isfinite(value)
    }


def _load_here(world: World) -> dict[str, float]:
    load = {"cpu_percent": psutil.cpu_percent(), "memory_percent": psutil.virtual_memory().percent}
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        load |= {"gpu_percent": _gpu_percent(world), "gpu_memory_percent": 100.0 * (1.0 - free / total)}
    return load


def _gpu_percent(world: World) -> float:
    try:
        return float(torch.cuda.utilization(world.device))
    except Exception:  # no NVML here, or a part of a GPU, of which it tells nothing
        return math.nan
