"""Rows that several ranks hold, brought together without gradient; each rank knows how many the others have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed

Sizes = Sequence[tuple[int, int]]  # rows of source and of target, of every rank


def check_sizes(group: distributed.ProcessGroup | None, sizes: Sizes | None, rows: tuple[int, int]) -> Sizes:
    """The rows of every rank; of this process alone where there is no group.

    Raises:
        ValueError: what is no group, sizes without a group or a group without them, or sizes that do not fit the group
            or the own rows.
    """
    if group is None:
        if sizes is not None:
            raise ValueError("sizes: given without a group; should be None, or give the group too")
        return [rows]
    if not isinstance(group, distributed.ProcessGroup):
        raise ValueError(f"group: {type(group).__name__}; should be a process group or None")
    world_size = distributed.get_world_size(group)
    if sizes is None:
        raise ValueError(f"sizes: None; should list (source rows, target rows) of the group's {world_size} ranks")
    if len(sizes) != world_size:
        raise ValueError(f"sizes: {len(sizes)} entries; should be one for each of the group's {world_size} ranks")
    mine = sizes[distributed.get_rank(group)]
    if tuple(mine) != rows:
        raise ValueError(f"sizes: {tuple(mine)} for this rank; source and target have {rows} rows")
    return sizes


def gather(rows: torch.Tensor, counts: Sequence[int], group: distributed.ProcessGroup) -> torch.Tensor:
    """All ranks' rows in order of rank, detached. The short are padded for the transfer."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    received = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(received, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


def with_own(own: torch.Tensor, counts: Sequence[int], group: distributed.ProcessGroup | None) -> torch.Tensor:
    """All ranks' rows, this rank's with their gradient: what is computed of them has the exact global gradient."""
    if group is None:
        return own
    everyone, start = gather(own, counts, group), offset(counts, group)
    return torch.cat([everyone[:start], own, everyone[start + len(own) :]])


def total(tensor: torch.Tensor, group: distributed.ProcessGroup | None) -> torch.Tensor:
    """The sum over ranks, detached."""
    tensor = tensor.detach()
    if group is not None:
        tensor = tensor.clone()
        distributed.all_reduce(tensor, group=group)
    return tensor


def offset(counts: Sequence[int], group: distributed.ProcessGroup | None) -> int:
    """Where this rank's rows stand among all."""
    return 0 if group is None else sum(counts[: distributed.get_rank(group)])
