"""Two terms over one head, a divergence and the labels' cross-entropy: which rows count, who divides, and autograd.

    loss = kd_weight sum_i u_i kd_i / kd_num_items + ce_weight sum_i u_i ce_i / ce_num_items

The gradients of both are formed in one walk over the head, in its dtype. Two factors as small as 1/num_items would
underflow in fp16: the walk sees them relative to the larger one, and the larger one is multiplied in last, in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fleetune_kernels.backends import once, scalar
from fleetune_kernels.head import accumulator, scaled
from fleetune_kernels.reference import Distilled, only_rows, or_infinity, supervised_rows, supervised_weight


class Terms(NamedTuple):
    """Scalars on the device, in the dtype of the loss."""

    kd_scale: torch.Tensor  # kd_weight / kd_num_items / common
    ce_scale: torch.Tensor
    common: torch.Tensor
    kd_items: torch.Tensor
    ce_items: torch.Tensor

    def distilled(self, loss: torch.Tensor, sums: torch.Tensor) -> Distilled:
        kd, ce = sums.detach().unbind()
        return Distilled(loss * self.common, kd / self.kd_items, ce / self.ce_items)


def check_labelled(ce_weight: float, labels: torch.Tensor | None) -> None:
    """Raises ValueError where a cross-entropy is asked for that would be left out in silence."""
    if ce_weight and labels is None:
        raise ValueError(f"ce_weight: {ce_weight}; needs labels, and there are none")


def only_supervised(
    hidden: torch.Tensor,  # (..., D)
    mask: torch.Tensor | None,  # (...)
    labels: torch.Tensor | None,  # (...)
    rows: torch.Tensor | None,  # (R,)
    ignore_index: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mask and labels as they count: without a mask the rows that have a label, and never a row that `rows` leaves."""
    if mask is None and labels is not None:
        mask = labels != ignore_index
    if rows is not None:
        if mask is None:
            mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
        mask = only_rows(mask, rows, False)
        labels = None if labels is None else only_rows(labels, rows, ignore_index)
    return mask, labels


def terms(
    hidden: torch.Tensor,  # (..., D)
    mask: torch.Tensor | None,  # (...)
    labels: torch.Tensor | None,  # (...)
    token_weights: torch.Tensor | None,  # (...)
    weights: tuple[float, float],
    num_items: tuple[torch.Tensor | None, torch.Tensor | None],
    ignore_index: int,
) -> Terms:
    """The weights and divisors, of the divergence and of the cross-entropy."""
    kd_items, ce_items = num_items
    if kd_items is None:
        kd_items = supervised_rows(hidden[..., 0], mask, token_weights)
    if labels is None:
        ce_items = torch.zeros((), device=hidden.device)
    elif ce_items is None:
        ce_items = supervised_weight(labels, token_weights=token_weights, ignore_index=ignore_index)
    dtype = accumulator(hidden.dtype)
    names = ("kd_num_items", "ce_num_items")
    divisors = [
        or_infinity(scalar(name, items, hidden), dtype) for name, items in zip(names, (kd_items, ce_items), strict=True)
    ]
    factors = [weight / divisor for weight, divisor in zip(weights, divisors, strict=True)]
    larger = torch.maximum(factors[0].abs(), factors[1].abs())
    common = torch.where(larger > 0, larger, 1.0)
    return Terms(factors[0] / common, factors[1] / common, common, *divisors)


def counted(
    mask: torch.Tensor | None,  # (N,)
    labels: torch.Tensor | None,  # (N,)
    rows: torch.Tensor | None,  # (R,)
    ignore_index: int,
) -> torch.Tensor | None:
    """The rows that count, where the host knows them or, on a CPU, finds them; None for all of them."""
    if rows is not None or mask is None or mask.device.type != "cpu":
        return None if rows is None else rows.long()
    kept = mask if labels is None else mask | (labels != ignore_index)
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def picked(tensor: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None or rows is None else tensor.index_select(0, rows)


def register(op: Any, name: str, tensors: int) -> None:
    """Shapes and autograd of an op with this signature, so many of whose first arguments are tensors or lists of them:

    (hidden, weight, bias, ..., want_hidden, want_weight, want_bias, low_memory, backend, *options)
        -> (loss, sums (2,), of_hidden, of_weight, of_bias)
    """

    def fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
        hidden, flags = inputs[0], inputs[tensors : tensors + 4]
        wide = accumulator(hidden.dtype)
        shapes = [
            tensor.shape if tensor is not None and wanted and not flags[3] else (0,)
            for tensor, wanted in zip(inputs[:3], flags[:3], strict=True)
        ]
        loss = hidden.new_empty((), dtype=wide)
        of_hidden = hidden.new_empty(shapes[0])
        return loss, loss.new_empty(2), of_hidden, loss.new_empty(shapes[1]), loss.new_empty(shapes[2])

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *ctx.wanted, ctx.again = inputs[tensors : tensors + 4]
        ctx.rest = inputs[tensors + 4 :]
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in inputs[:3]]
        ctx.lengths = [len(tensor) if isinstance(tensor, list | tuple) else None for tensor in inputs[:tensors]]
        ctx.save_for_backward(*(_flat(inputs[:tensors]) if ctx.again else output[2:]))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, of_loss: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
        once(name)
        gradients: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
        if of_loss is not None:
            found = ctx.saved_tensors
            if ctx.again:
                _, _, *found = op(*_nested(found, ctx.lengths), *ctx.wanted, False, *ctx.rest)
            for at, (gradient, dtype, wanted) in enumerate(zip(found, ctx.dtypes, ctx.wanted, strict=True)):
                gradients[at] = scaled(gradient, of_loss, dtype) if wanted else None
        return *gradients, *(None,) * (4 + len(ctx.rest))

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=save)


def _flat(inputs: tuple[Any, ...]) -> list[torch.Tensor | None]:
    return [tensor for item in inputs for tensor in (item if isinstance(item, list | tuple) else [item])]


def _nested(tensors: tuple[torch.Tensor | None, ...], lengths: list[int | None]) -> list[Any]:
    """What `_flat` was given."""
    left = iter(tensors)
    return [next(left) if length is None else [next(left) for _ in range(length)] for length in lengths]
