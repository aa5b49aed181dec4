"""Cross-entropy of a linear head, without the N x V logits.

    logits = hidden_states lm_head_weightᵀ + bias, then the loss of `softmax_cross_entropy.py`.

The gradients are formed in the forward pass, chunk by chunk (`head.py`), and scaled in the backward pass: no GEMM is
done twice. They are held in between: dW in fp32. `low_memory` forms them in the backward pass instead, for one more
GEMM; so does reduction none, where they depend on what comes back.

Chunks over tokens as in Liger-Kernel (arXiv 2410.10989), rather than over the vocabulary as in Cut Cross-Entropy
(arXiv 2411.09009): nothing is recomputed, and nothing is left out.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from fleetune_kernels import reference
from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import (
    as_autocast,
    choose,
    floating,
    integers,
    once,
    readable,
    same_device,
    same_shape,
    scalar,
)
from fleetune_kernels.head import Wanted, accumulator, scaled, walk
from fleetune_kernels.head_terms import counted
from fleetune_kernels.labels import check_classes
from fleetune_kernels.reference import Stats, only_rows
from fleetune_kernels.softmax_cross_entropy import (
    Options,
    check_rows,
    checked_options,
    mean_divisor,
)
from fleetune_kernels.softmax_cross_entropy import rows as softmax_rows


@checked
def linear_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: torch.Tensor | float | None = None,
    return_stats: bool = False,
    rows: torch.Tensor | None = None,
    low_memory: bool = False,
    backend: str = "auto",
) -> Any:
    """The loss as `cross_entropy` gives it; with `return_stats`, (loss, Stats).

    `rows` leaves all other rows out of every GEMM, as if they were ignored. On a CPU they are found here; on a GPU
    looking for them would wait for the device, so the caller passes what the host knows from making the batch.

    Args:
        hidden_states: (..., D), floating-point.
        lm_head_weight: (V, D), in their dtype.
        labels: (...), integer classes, or `ignore_index` where a row has none.
        bias: (V,), of the head.
        weight: (V,), or (vocab_size,) where that is given: the weight of each class.
        token_weights: (...), the weight of each row.
        ignore_index: the label of a row that has none.
        label_smoothing: the share of the target, 0 to 1, that is spread over all classes.
        z_loss: multiplies lse², which is added to each row's loss.
        softcap: c of c tanh(logit / c), which keeps logits between -c and c; None leaves them.
        logit_scale: multiplies the logits, before the cap.
        vocab_size: how many of the head's first rows are classes; the rest is padding.
        reduction: none, mean or sum.
        num_items: what mean divides by: a number, or a tensor of one element on the device.
        return_stats: whether `Stats` by row come beside the loss.
        rows: (R,), distinct indices of the flattened rows that count, where the host knows them.
        low_memory: whether gradients are formed in the backward pass: less memory, for one more product.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: an argument that is wrong, by name; a label that is no class (nan on a GPU, see `check_labels`);
            on a CPU rows that are none, or one twice.
        RuntimeError: a backward pass with create_graph=True.
    """
    hidden_states, lm_head_weight, bias = as_autocast(hidden_states, lm_head_weight, bias)
    labels = integers("labels", labels)
    num_items = None if num_items is None else scalar("num_items", num_items, hidden_states)
    width = check_head(hidden_states, lm_head_weight, bias, rows)
    options = checked_options(
        width, vocab_size, ignore_index, label_smoothing, z_loss, softcap, logit_scale, return_stats
    )
    check_rows(hidden_states, "hidden_states", labels, weight, token_weights, options.vocab_size, reduction)
    which = choose(backend, hidden_states)
    if which == "reference":
        check_classes(labels, options.vocab_size, options.ignore_index)
        return reference.linear_cross_entropy(
            hidden_states,
            lm_head_weight,
            labels,
            bias=bias,
            rows=rows,
            weight=weight,
            token_weights=token_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            vocab_size=vocab_size,
            reduction=reduction,
            num_items=num_items,
            return_stats=return_stats,
        )
    differentiable = torch.is_grad_enabled()
    loss, *_, stats = torch.ops.fleetune.linear_cross_entropy(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        lm_head_weight,
        bias,
        labels.reshape(-1),
        None if weight is None else weight.detach(),
        None if token_weights is None else token_weights.detach().reshape(-1),
        rows,
        reduction != "none",
        differentiable and hidden_states.requires_grad,
        differentiable and lm_head_weight.requires_grad,
        differentiable and bias is not None and bias.requires_grad,
        low_memory,
        which,
        *asdict(options).values(),
    )
    if reduction == "none":
        loss = loss.reshape(labels.shape)
    elif reduction == "mean":
        kept = only_rows(labels, rows, ignore_index) if num_items is None else labels
        loss = loss / mean_divisor(hidden_states, kept, weight, token_weights, ignore_index, num_items, reduction)
    return (loss, Stats(*stats.detach().reshape(4, *labels.shape))) if return_stats else loss


def check_head(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    prefix: str = "",
    weight_name: str = "lm_head_weight",
    hidden_name: str = "hidden_states",
) -> int:
    """The width of the head's logits. Raises ValueError for a head that does not fit."""
    floating(hidden_name, hidden_states)
    shape = tuple(lm_head_weight.shape)
    if lm_head_weight.ndim != 2 or shape[1] != hidden_states.shape[-1]:
        hint = "; under ZeRO-3 the loss must run inside the head's own forward" if 0 in shape else ""
        raise ValueError(f"{weight_name}: shape {shape}; should be (V, {hidden_states.shape[-1]}){hint}")
    if lm_head_weight.dtype != hidden_states.dtype:
        raise ValueError(f"{weight_name}: {lm_head_weight.dtype}; {hidden_name} has {hidden_states.dtype}")
    if bias is not None and bias.dtype != lm_head_weight.dtype:
        raise ValueError(f"{prefix}bias: {bias.dtype}; {weight_name} has {lm_head_weight.dtype}")
    same_shape(f"{prefix}bias", bias, shape[:1], f"row of {weight_name}")
    same_device(hidden_states, hidden_name, **{weight_name: lm_head_weight, f"{prefix}bias": bias, "rows": rows})
    if rows is not None and (rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool):
        raise ValueError(f"rows: {rows.dtype} of shape {tuple(rows.shape)}; should be the indices (R,) of rows")
    if rows is not None:
        _check_indices(rows, hidden_states.shape[:-1].numel(), hidden_name)
    return int(shape[0])


def _check_indices(rows: torch.Tensor, count: int, name: str) -> None:
    """Where looking does not wait for a device."""
    if not readable(rows):
        return
    wrong = rows[(rows < 0) | (rows >= count)]
    if wrong.numel():
        raise ValueError(f"rows: {int(wrong[0])} is no row; should be 0 to {count - 1}, the flattened rows of {name}")
    if len(rows) > int(torch.zeros(count, dtype=torch.bool).index_fill(0, rows.long(), True).sum()):
        raise ValueError("rows: one is there twice; should be distinct")


@torch.library.custom_op("fleetune::linear_cross_entropy", mutates_args=())
def _op(
    hidden: torch.Tensor,  # (N, D)
    head: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    labels: torch.Tensor,  # (N,)
    weight: torch.Tensor | None,  # (V,)
    token_weights: torch.Tensor | None,  # (N,)
    rows: torch.Tensor | None,  # (R,)
    reduce: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    low_memory: bool,
    backend: str,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses, or the losses by row; its gradients where they are wanted and known; the stats (4, N)."""
    options = Options(vocab_size, ignore_index, label_smoothing, z_loss, softcap, logit_scale, with_stats)
    now = reduce and not low_memory
    wanted = Wanted(want_hidden and now, want_weight and now, want_bias and now)
    check_classes(labels, options.vocab_size, options.ignore_index)
    rows = counted(labels != ignore_index, None, rows, ignore_index)
    dtype = accumulator(hidden.dtype)
    scale = torch.ones_like(labels, dtype=dtype) if token_weights is None else token_weights.to(dtype)
    picked, coefficients = (labels, scale) if rows is None else (labels[rows], scale[rows])
    losses = torch.empty_like(coefficients)
    stats = losses.new_empty(4, len(picked) if with_stats else 0)

    def turn(logits: torch.Tensor, at: slice) -> None:
        gradient = logits if wanted.any else None
        losses[at], figures = softmax_rows(logits, gradient, picked[at], coefficients[at], weight, options, backend)
        if figures is not None:
            stats[:, at] = figures

    gradients = walk(hidden, head, bias, rows, vocab_size, wanted, turn)
    losses *= coefficients
    if rows is not None:
        losses = losses.new_zeros(labels.shape).index_copy_(0, rows, losses)
        if with_stats:
            stats = stats.new_zeros(4, len(labels)).index_copy_(1, rows, stats)
    return losses.sum() if reduce else losses, gradients.hidden, gradients.weight, gradients.bias, stats


@_op.register_fake
def _(hidden, head, bias, labels, weight, token_weights, rows, reduce, hidden_, weight_, bias_, low_memory, *options):  # type: ignore[no-untyped-def]
    now = reduce and not low_memory
    wide = accumulator(hidden.dtype)
    return (
        hidden.new_empty(() if reduce else labels.shape, dtype=wide),
        hidden.new_empty(hidden.shape if hidden_ and now else (0,)),
        head.new_empty(head.shape if weight_ and now else (0,), dtype=wide),
        head.new_empty(bias.shape if bias_ and now else (0,), dtype=wide),
        hidden.new_empty((4, labels.shape[0] if options[-1] else 0), dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tensors, (ctx.reduce, *ctx.wanted, low_memory, ctx.backend), ctx.options = inputs[:7], inputs[7:13], inputs[13:]
    ctx.again = low_memory or not ctx.reduce  # the gradients are formed in the backward pass
    ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in tensors[:3]]
    ctx.save_for_backward(*(tensors if ctx.again else output[1:4]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_loss: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
    once("linear_cross_entropy")
    none = (None,) * (10 + len(ctx.options))
    if of_loss is None:
        return None, None, None, *none
    gradients = ctx.saved_tensors
    if ctx.again:
        hidden, head, bias, labels, weight, token_weights, rows = ctx.saved_tensors
        if not ctx.reduce:  # by row: what comes back is a weight of the row
            token_weights = of_loss if token_weights is None else of_loss * token_weights
            of_loss = torch.ones((), dtype=of_loss.dtype, device=of_loss.device)
        _, *gradients, _ = torch.ops.fleetune.linear_cross_entropy(
            hidden, head, bias, labels, weight, token_weights, rows, True, *ctx.wanted, False, ctx.backend, *ctx.options
        )
    return *(
        scaled(gradient, of_loss, dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
    ), *none


_op.register_autograd(_backward, setup_context=_save)
