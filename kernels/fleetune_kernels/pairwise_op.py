"""The sums of `pairwise` as one operator of PyTorch, which torch.compile takes as it is."""

from __future__ import annotations

from typing import Any

import torch

from fleetune_kernels.backends import once
from fleetune_kernels.pairwise import Pairs

SCHEMA = (
    "(Tensor[] rows, Tensor[] columns, Tensor[] row_weights, Tensor[] column_weights, int[] offsets, "
    "Tensor bandwidths, bool[] means, bool[] wanted, int num_kernels, float factor, bool unbiased, bool uniform, "
    "str backend) -> Tensor[]"
)


def _forward(
    rows: list[torch.Tensor],
    columns: list[torch.Tensor],  # empty where they are the rows
    row_weights: list[torch.Tensor],
    column_weights: list[torch.Tensor],  # empty where they are the rows'
    offsets: list[int],
    bandwidths: torch.Tensor,
    means: list[bool],
    wanted: list[bool],
    num_kernels: int,
    factor: float,
    unbiased: bool,
    uniform: bool,
    backend: str,
) -> list[torch.Tensor]:
    """[loss, a gradient for each of the rows]: see `Pairs`. The loss is in fp64, gradients in fp32 or fp64."""
    pairs = Pairs(
        rows,
        columns or rows,
        row_weights,
        column_weights or row_weights,
        offsets,
        bandwidths,
        means,
        wanted,
        num_kernels,
        factor,
        unbiased,
        uniform,
    )
    if backend == "triton" and pairs.layers == 1 and not pairs.weighted_by_class:
        from fleetune_kernels.triton.mmd import sweep
    else:
        from fleetune_kernels.tiles import sweep
    loss, gradients = sweep(pairs)
    if unbiased:
        for side, weights in enumerate(row_weights):  # k = K with itself, and a gradient of zero
            diagonal = num_kernels**pairs.layers * pairs.same_side[side].double()
            loss = loss - diagonal * weights.double().square().sum()
    return [loss, *gradients]


def _fake(
    rows: list[torch.Tensor],
    columns: Any,
    row_weights: Any,
    column_weights: Any,
    offsets: Any,
    bandwidths: Any,
    means: Any,
    wanted: list[bool],
    *options: Any,
) -> list[torch.Tensor]:
    dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    gradients = [
        one.new_empty(one.shape if want else (0, 0), dtype=dtype) for one, want in zip(rows, wanted, strict=True)
    ]
    return [rows[0].new_empty((), dtype=torch.float64), *gradients]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    rows, columns, *_, wanted = inputs[:8]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.wanted, ctx.dtype, ctx.columns = wanted, rows[0].dtype, len(columns)


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    once("mmd")
    scale = grads[0]
    found: list[torch.Tensor | None] = []
    in_place = not _keeps_graph()
    for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True):
        if scale is None or not wanted:
            found.append(None)
            continue
        factor = scale.to(gradient.dtype)
        found.append((gradient.mul_(factor) if in_place else gradient * factor).to(ctx.dtype))
    return found, [None] * ctx.columns, [None] * 2, [None] * (2 if ctx.columns else 0), *[None] * 9


def _keeps_graph() -> bool:
    """Whether a second backward pass may come (retain_graph=True); if not, gradients are scaled where they lie."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


sum_over_pairs = torch.library.custom_op("fleetune::sum_over_pairs", _forward, mutates_args=(), schema=SCHEMA)
sum_over_pairs.register_fake(_fake)
sum_over_pairs.register_autograd(_backward, setup_context=_setup)
