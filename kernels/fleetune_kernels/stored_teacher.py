"""Whether what a stored teacher gives, some classes of each row with their log-probabilities, can be what it says."""

from __future__ import annotations

import torch

from fleetune_kernels.backends import floating, one_of, readable, same_device, same_rows, same_shape

TAILS = ("zero", "uniform", "sampled")
# How far above 0 a log-probability may be that was rounded on its way.
ROUNDING = 0.01
# Bytes of a block of rows by classes in which repeated ids are looked for.
BLOCK_BYTES = 2**22


def checked_teacher(
    hidden_states: torch.Tensor,  # (..., D)
    ids: torch.Tensor,  # (..., k)
    log_probs: torch.Tensor,
    weights: torch.Tensor | None,
    tail: str,
    vocab_size: int,
) -> torch.Tensor:
    """Which places are filled."""
    one_of("tail", tail, TAILS)
    if (tail == "sampled") != (weights is not None):
        raise ValueError(f"teacher_weights: should be given with tail 'sampled', and only then; tail is {tail!r}")
    same_rows("teacher_ids", ids, "k", hidden_states, "hidden_states")
    if not ids.shape[-1]:
        raise ValueError(f"teacher_ids: shape {tuple(ids.shape)}; should have at least one class by row")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"teacher_ids: {ids.dtype}; should be integers")
    for name, tensor in (("teacher_log_probs", log_probs), ("teacher_weights", weights)):
        same_shape(name, tensor, ids.shape, "place of teacher_ids")
        if tensor is not None:
            floating(name, tensor)
    same_device(hidden_states, "hidden_states", teacher_ids=ids, teacher_log_probs=log_probs, teacher_weights=weights)
    filled = log_probs > -torch.inf
    if readable(ids):
        wrong = ids[filled & ((ids < 0) | (ids >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"teacher_ids: {int(wrong[0])} is no class; should be 0 to {vocab_size - 1}")
    return filled


def check_values(
    ids: torch.Tensor,  # (..., k)
    log_probs: torch.Tensor,  # (..., k)
    weights: torch.Tensor | None,  # (..., k)
    mask: torch.Tensor | None,  # (...): the rows that count
    vocab_size: int,
) -> None:
    """Where looking does not wait for a device.

    Raises:
        ValueError: in a row that counts no log-probability, a negative weight, or a class twice.
    """
    if not (readable(ids) and readable(log_probs)):
        return
    counts = torch.ones(ids.shape[:-1], dtype=torch.bool) if mask is None else mask
    counts = counts.unsqueeze(-1)
    wrong = log_probs[counts & ~(log_probs <= ROUNDING)]
    if wrong.numel():
        raise ValueError(f"teacher_log_probs: {wrong[0]:.4g}; should be 0 or less, logarithms of probabilities")
    filled = counts & (log_probs > -torch.inf)
    wrong = log_probs[:0] if weights is None else weights[filled & ~(weights >= 0)]
    if wrong.numel():
        raise ValueError(f"teacher_weights: {wrong[0]:.4g}; should be 0 or more, the share of the draws")
    places = ids.shape[-1]
    repeated = _repeated(ids.reshape(-1, places), filled.reshape(-1, places), vocab_size)
    if repeated is not None:
        raise ValueError(f"teacher_ids: {repeated} is twice in a row; should be distinct classes")


def _repeated(ids: torch.Tensor, filled: torch.Tensor, vocab_size: int) -> int | None:  # (N, k) each
    """A class that two places of one row have.

    Each place writes its number at its class and reads it again: where a class is repeated, one finds the other's. A
    sort takes longer where classes are few, as long as the loss itself.
    """
    places = torch.arange(ids.shape[1], dtype=torch.int32)
    columns = torch.where(filled, ids, vocab_size + places).long()
    block = max(1, BLOCK_BYTES // (4 * (vocab_size + len(places))))
    written = torch.empty(min(block, len(ids)), vocab_size + len(places), dtype=torch.int32)
    for part in torch.split(columns, block):
        own, at = places.expand_as(part), written[: len(part)]
        found = at.scatter_(1, part, own).gather(1, part)
        if not torch.equal(found, own):
            return int(part[found != own][0])
    return None
