"""Softmax cross-entropy from logits, with its gradient formed in the forward pass.

    x = softcap(logit_scale logits);  lse_i = log sum_c exp x_ic;  eps, w, u = label_smoothing, weight, token_weights
    CE_i = (1 - eps) w[y_i] (lse_i - x_i[y_i]) + eps/V sum_c w_c (lse_i - x_ic)
    loss = sum_i u_i (CE_i + z_loss lse_i² w[y_i]) / num_items

    d/dx_ic = u_i/num_items (A_i softmax(x_i)_c - (1 - eps) w[y_i] [c = y_i] - eps/V w_c),
    A_i = (1 - eps) w[y_i] + eps/V sum_c w_c + 2 z_loss w[y_i] lse_i

Memory beyond the logits: their gradient, in their own dtype, and in torch a block of rows that fits the cache. The
logits are read once from memory (the second reading meets them in the L2 cache) and the gradient written once.
Label smoothing and class weights as in PyTorch; the z-loss is PaLM's (arXiv 2204.02311).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fleetune_kernels import reference
from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import (
    choose,
    floating,
    full_precision,
    integers,
    once,
    one_of,
    same_device,
    same_shape,
    scalar,
)
from fleetune_kernels.labels import check_classes
from fleetune_kernels.reference import Stats, or_infinity, supervised_weight

REDUCTIONS = ("none", "mean", "sum")
# Bytes of a block of rows that the passes of the torch backend share: small enough for the cache.
BLOCK_BYTES = 2**24
# Below it a call of the plain functions costs less than the bookkeeping of a fused one.
SMALL = 2**15


@dataclass(frozen=True)
class Options:
    """What the loss of a row depends on beside its logits, its label and the class weights."""

    vocab_size: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    with_stats: bool = False


@checked
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
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
    backend: str = "auto",
) -> Any:
    """The loss in fp32 (fp64 for fp64): a scalar, or one by row for reduction none; (loss, Stats) with `return_stats`.

    mean divides by `num_items`, which the caller counted over all ranks and micro-batches, or else by the weight of
    the rows that are supervised here. Rows with `ignore_index` count nothing; where all are, the loss is 0 and so are
    the gradients. `logits` alone is differentiated, and once: its gradient is handed out by the first backward pass.

    Args:
        logits: (..., V), floating-point.
        labels: (...), integer classes, or `ignore_index` where a row has none.
        weight: (V,), or (vocab_size,) where that is given: the weight of each class.
        token_weights: (...), the weight of each row.
        ignore_index: the label of a row that has none.
        label_smoothing: the share of the target, 0 to 1, that is spread over all classes.
        z_loss: multiplies lse², which is added to each row's loss.
        softcap: c of c tanh(logit / c), which keeps logits between -c and c; None leaves them.
        logit_scale: multiplies the logits, before the cap.
        vocab_size: how many of the first columns are classes; the rest is padding.
        reduction: none, mean or sum.
        num_items: what mean divides by: a number, or a tensor of one element on the device.
        return_stats: whether `Stats` by row come beside the loss.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: an argument that is wrong, by name; a label that is no class (on a GPU such a label makes the loss
            nan instead, since a check would wait for the device; see `check_labels`).
        RuntimeError: a second backward pass through the same loss, or one with create_graph=True.
    """
    options = checked_options(
        logits.shape[-1], vocab_size, ignore_index, label_smoothing, z_loss, softcap, logit_scale, return_stats
    )
    floating("logits", logits)
    labels = integers("labels", labels)
    num_items = None if num_items is None else scalar("num_items", num_items, logits)
    check_rows(logits, "logits", labels, weight, token_weights, options.vocab_size, reduction)
    which = choose(backend, logits)
    if which == "reference" or (backend == "auto" and logits.numel() <= SMALL and not logits.is_cuda):
        check_classes(labels, options.vocab_size, options.ignore_index)
        return reference.cross_entropy(
            logits,
            labels,
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
    divisor = mean_divisor(logits, labels, weight, token_weights, ignore_index, num_items, reduction)
    # In fp16 the gradient of the sum is kept, and divided on its way back: 1/num_items would underflow before a loss
    # scale can reach it.
    late = logits.dtype == torch.float16
    loss, _, stats = torch.ops.fleetune.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        None if weight is None else weight.detach(),
        None if token_weights is None else token_weights.detach().reshape(-1),
        torch.ones_like(divisor) if late else divisor,
        reduction != "none",
        logits.requires_grad and torch.is_grad_enabled(),
        which,
        *asdict(options).values(),
    )
    loss = loss.reshape(labels.shape) if reduction == "none" else loss / divisor if late else loss
    return (loss, Stats(*stats.detach().reshape(4, *labels.shape))) if return_stats else loss


def checked_options(
    width: int,
    vocab_size: int | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
) -> Options:
    if vocab_size is not None and not 0 < vocab_size <= width:
        raise ValueError(f"vocab_size: {vocab_size}; should be 1 to {width}, the width of the logits")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: {label_smoothing}; should be 0 to 1")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: {softcap}; should be a finite number above 0, or None")
    columns = width if vocab_size is None else vocab_size
    return Options(columns, ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale, return_stats)


def check_rows(
    scores: torch.Tensor,  # (..., V) or (..., D): its leading shape counts
    name: str,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    vocab_size: int,
    reduction: str,
) -> None:
    one_of("reduction", reduction, REDUCTIONS)
    same_shape("labels", labels, scores.shape[:-1], f"row of {name}")
    same_shape("token_weights", token_weights, labels.shape, f"row of {name}")
    same_shape("weight", weight, [vocab_size], "class")
    same_device(scores, name, labels=labels, weight=weight, token_weights=token_weights)


def mean_divisor(
    scores: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    ignore_index: int,
    num_items: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """What the sum is divided by, as a scalar on the device, in the dtype of the loss."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=scores.device)
    if num_items is None:
        num_items = supervised_weight(labels, weight=weight, token_weights=token_weights, ignore_index=ignore_index)
    return or_infinity(num_items.to(scores.device), dtype)


@torch.library.custom_op("fleetune::cross_entropy", mutates_args=())
def _op(
    logits: torch.Tensor,  # (N, V)
    labels: torch.Tensor,  # (N,)
    weight: torch.Tensor | None,  # (V,)
    token_weights: torch.Tensor | None,  # (N,)
    divisor: torch.Tensor,  # scalar
    reduce: bool,
    with_gradient: bool,
    backend: str,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the gradient (N, V) of the reduced loss (nothing where it is not reduced), the stats (4, N)."""
    options = Options(vocab_size, ignore_index, label_smoothing, z_loss, softcap, logit_scale, with_stats)
    check_classes(labels, options.vocab_size, options.ignore_index)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    scale = divisor.new_ones(labels.shape) if token_weights is None else token_weights.to(divisor.dtype)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if with_gradient and reduce else None
    losses, stats = rows(logits, gradient, labels, scale / divisor, weight, options, backend)
    losses = losses * scale
    return (
        losses.sum() / divisor if reduce else losses,
        logits.new_empty(0) if gradient is None else gradient,
        losses.new_empty(4, 0) if stats is None else stats,
    )


@_op.register_fake
def _(logits, labels, weight, token_weights, divisor, reduce, with_gradient, *options):  # type: ignore[no-untyped-def]
    return (
        divisor.new_empty(() if reduce else labels.shape),
        logits.new_empty(logits.shape if with_gradient and reduce else (0,)),
        divisor.new_empty((4, labels.shape[0] if options[-1] else 0)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, labels, weight, token_weights, divisor, ctx.reduce, _, ctx.backend, *ctx.options = inputs
    # The gradient is there already; by row it depends on what comes back, so it is formed then.
    ctx.save_for_backward(*((output[1],) if ctx.reduce else (logits, labels, weight, token_weights, divisor)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_loss: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
    once("cross_entropy")
    none = (None,) * (7 + len(ctx.options))
    if of_loss is None:
        return None, *none
    if ctx.reduce:
        (gradient,) = ctx.saved_tensors
        # In place: a second backward pass then finds a tensor that was changed, and autograd refuses it.
        torch.ops.fleetune.scale_(gradient, of_loss, ctx.backend)
        return gradient, *none
    logits, labels, weight, token_weights, divisor = ctx.saved_tensors
    scale = of_loss if token_weights is None else of_loss * token_weights
    one = torch.ones_like(divisor)
    _, gradient, _ = torch.ops.fleetune.cross_entropy(
        logits, labels, weight, scale, one, True, True, ctx.backend, *ctx.options
    )
    return gradient, *none


_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fleetune::scale_", mutates_args=("gradient",))
def scale_(gradient: torch.Tensor, factor: torch.Tensor, backend: str) -> None:
    """gradient *= factor; a factor of 1 costs nothing."""
    if backend == "triton":
        from fleetune_kernels.triton.cross_entropy import scale_ as scale_on_gpu

        scale_on_gpu(gradient, factor)
    elif gradient.device.type != "cpu" or factor != 1.0:
        # Of one dimension, or the factor would be rounded to the gradient's dtype first.
        gradient.mul_(factor.reshape(1))


def rows(
    logits: torch.Tensor,  # (N, V), the last axis contiguous
    gradient: torch.Tensor | None,  # (N, V) to write it to; may be the logits themselves
    labels: torch.Tensor,  # (N,)
    coefficients: torch.Tensor,  # (N,)
    weight: torch.Tensor | None,  # (V,)
    options: Options,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses (N,), without the token weights, and the stats (4, N).

    Writes the gradient of sum_i coefficients_i loss_i. The columns beyond the vocabulary get 0.
    """
    weight = None if weight is None else weight.to(coefficients.dtype)
    if backend == "triton":
        from fleetune_kernels.triton.cross_entropy import rows as rows_on_gpu

        return rows_on_gpu(logits, gradient, labels, coefficients, weight, **asdict(options))
    losses = torch.empty_like(coefficients)
    stats = coefficients.new_empty(4, len(labels)) if options.with_stats else None
    block = max(1, BLOCK_BYTES // (options.vocab_size * coefficients.element_size()))
    shape = (min(block, len(labels)), options.vocab_size)
    in_place = gradient is not None and gradient.dtype == losses.dtype and gradient.shape[1] == options.vocab_size
    buffer = None if in_place else losses.new_empty(shape)
    # The capped logits are wanted again for the gradient, the logits for the entropy.
    spare = losses.new_empty(shape) if options.softcap or options.with_stats else None
    for start in range(0, len(labels), block):
        at = slice(start, min(start + block, len(labels)))
        x = gradient[at] if buffer is None else buffer[: at.stop - start]  # type: ignore[index]
        if buffer is not None or gradient is not logits:
            x.copy_(logits[at, : options.vocab_size])
        target = gradient is not None
        kept = None if spare is None else spare[: at.stop - start]
        figures = None if stats is None else stats[:, at]
        with full_precision(x):
            losses[at] = _block(x, labels[at], coefficients[at] if target else None, weight, options, kept, figures)
        if gradient is not None and buffer is not None:
            gradient[at, : options.vocab_size] = x
            gradient[at, options.vocab_size :] = 0
    return losses, stats


def _block(
    x: torch.Tensor,  # (R, V): the logits; the gradient is left in their place
    labels: torch.Tensor,  # (R,)
    coefficients: torch.Tensor | None,  # (R,), where the gradient is wanted
    weight: torch.Tensor | None,  # (V,)
    options: Options,
    kept: torch.Tensor | None,  # (R, V), for a copy of the capped logits
    stats: torch.Tensor | None,  # (4, R), written
) -> torch.Tensor:
    """The losses (R,) of a block of rows that fits the cache, by PyTorch's own operators, in place."""
    smoothing, columns = options.label_smoothing, x.shape[1]
    if options.logit_scale != 1.0:
        x.mul_(options.logit_scale)
    if options.softcap:
        x.div_(options.softcap).tanh_().mul_(options.softcap)
    supervised = labels != options.ignore_index
    no_class = supervised & ((labels < 0) | (labels >= columns))  # on a GPU, where nobody has looked yet
    targets = labels.masked_fill(~supervised | no_class, 0).long()
    of_row = supervised.to(x.dtype).masked_fill(no_class, math.nan)
    of_label = of_row if weight is None else of_row * weight[targets]
    largest = x.amax(1)
    below = largest - x.gather(1, targets.unsqueeze(1)).squeeze(1)  # how far the label's logit is below the largest
    if not options.softcap and (smoothing or kept is not None):
        x.sub_(largest.unsqueeze(1))  # sums over the columns stay exact, however large the logits are
    if kept is not None:
        kept.copy_(x)
    if smoothing:
        total = float(columns) if weight is None else weight.sum()
        weighted = x.sum(1) if weight is None else x @ weight
    # One pass over each row, in place, where max, exp, sum and division one by one would be five. Of the largest logit
    # the probability is 1/sum exp(x - largest).
    torch.ops.aten._softmax.out(x, 1, False, out=x)
    log_sum = -x.amax(1).log()
    lse = largest + log_sum
    lse_of_x = lse if options.softcap else log_sum  # of what stands in `kept` and went into `weighted`

    losses = of_label * ((1 - smoothing) * (log_sum + below) + options.z_loss * lse.square())
    of_softmax = of_label * ((1 - smoothing) + 2 * options.z_loss * lse)
    if smoothing:
        losses += of_row * (smoothing / columns) * (total * lse_of_x - weighted)
        of_softmax = of_softmax + of_row * (smoothing / columns * total)
    if stats is not None:
        assert kept is not None
        # A masked class is at -inf, with probability 0.
        mean = torch.linalg.vecdot(x, kept) if options.softcap else kept.mul_(x).nan_to_num_(nan=0.0).sum(1)
        entropy = lse_of_x - mean
        torch.stack([lse, entropy, (below <= 0).to(lse.dtype), -below - log_sum], out=stats)
        stats.masked_fill_(~supervised, 0.0)
    if coefficients is not None:
        coefficients = coefficients * of_row
        factor = coefficients * of_softmax
        if factor.device.type != "cpu" or not bool(
            (factor == 1.0).all()
        ):  # a pass saved where asking does not wait for a device
            x.mul_(factor.unsqueeze(1))
        if smoothing and weight is None:
            x.sub_((coefficients * (smoothing / columns)).unsqueeze(1))
        elif smoothing and weight is not None:
            x.addcmul_(coefficients.unsqueeze(1), weight, value=-smoothing / columns)
        x.scatter_add_(1, targets.unsqueeze(1), ((smoothing - 1) * coefficients * of_label).unsqueeze(1))
        if options.softcap:
            assert kept is not None
            x.addcmul_(x, kept.div_(options.softcap).square_(), value=-1)
        if options.logit_scale != 1.0:
            x.mul_(options.logit_scale)
    return losses
