"""The ranks: who this one is, and the few collectives that the loop uses."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(timeout_minutes: float = 30.0) -> World:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe."""
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    return World(rank, world_size, local_rank, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    """All ranks; None where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place, and returned."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flags: list[bool], world: World) -> list[bool]:
    """Each flag as it is on at least one rank: what all ranks agree on at a step's boundary."""
    return [bool(flag) for flag in max_over_ranks([float(flag) for flag in flags], world)]


def max_over_ranks(values: list[float], world: World) -> list[float]:
    """Each figure as it is on the rank where it is largest: alike on all of them."""
    if world.world_size == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [float(value) for value in largest.tolist()]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value on every rank, in rank order."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
