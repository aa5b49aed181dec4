"""Softmax cross-entropy over the rows of a chunk of logits: the loss, its figures by row, and the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fleetune_kernels.launch import on, programs, settings


@triton.jit
def capped_logits(x, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """c tanh(scale x / c), in fp32; tanh by its sigmoid, which every target and the interpreter have."""
    x = x.to(tl.float32) * LOGIT_SCALE
    if SOFTCAP > 0:
        x = SOFTCAP * (2 * tl.sigmoid(2 * x / SOFTCAP) - 1)
    return x


@triton.jit
def uncapped_gradient(gradient, x, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """The gradient with respect to the raw logits, from that with respect to the capped ones, x."""
    if SOFTCAP > 0:
        gradient *= 1 - (x / SOFTCAP) * (x / SOFTCAP)
    return gradient * LOGIT_SCALE


@triton.jit
def rows_kernel(
    logits,  # (N, V)
    gradient,  # (N, V), may be the logits themselves
    labels,  # (N,)
    coefficients,  # (N,): what row i's loss is multiplied by in the gradient
    class_weight,  # (V,)
    class_weight_sum,  # scalar
    losses,  # (N,)
    stats,  # (4, N): lse, entropy, accuracy, target's log-probability
    N,
    V,  # columns that count
    WIDTH,  # columns that there are
    logits_stride,
    gradient_stride,
    ignore_index,
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    WITH_STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Few programs, each with a row at a time: the second read of a row then meets it in the L2 cache.
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + row)
        kept = label != ignore_index
        source = logits + tl.cast(row, tl.int64) * logits_stride
        target = gradient + tl.cast(row, tl.int64) * gradient_stride
        columns = tl.arange(0, BLOCK)

        largest = tl.full((BLOCK,), float("-inf"), tl.float32)  # each lane's own: they meet once, at the end
        total = tl.zeros((BLOCK,), tl.float32)  # of exp(x - largest)
        weighted = tl.zeros((BLOCK,), tl.float32)  # of w (x - x_label), for the label smoothing
        moment = tl.zeros((BLOCK,), tl.float32)  # of exp(x - largest) (x - x_label), for the entropy
        if kept:
            # Before the reductions below, whose barriers stand between it and the first write in place. A label that is
            # no class gives nan, which stops a training run, where other memory's content would not.
            x_label = tl.load(source + label, mask=(label >= 0) & (label < V), other=float("nan"))
            x_label = capped_logits(x_label, SOFTCAP, LOGIT_SCALE)
            for start in range(0, V, BLOCK):
                inside = start + columns < V
                x = tl.load(source + start + columns, mask=inside, other=float("-inf"))
                x = tl.where(inside, capped_logits(x, SOFTCAP, LOGIT_SCALE), float("-inf"))
                above = tl.maximum(largest, x)
                # A lane that has seen nothing finite has -inf twice, and -inf - -inf is no number.
                shift = tl.where(above == float("-inf"), 0.0, above)
                shrunk, e = tl.exp(largest - shift), tl.exp(x - shift)
                total = total * shrunk + e
                if WITH_STATS:
                    moment = moment * shrunk + tl.where(e > 0, e * (x - x_label), 0.0)
                if LABEL_SMOOTHING > 0:
                    w = tl.load(class_weight + start + columns, mask=inside, other=0.0) if WEIGHTED else 1.0
                    weighted += tl.where(inside, w * (x - x_label), 0.0)
                largest = above

            peak = tl.max(largest, 0)
            scales = tl.exp(largest - peak)
            total_sum = tl.sum(total * scales, 0)
            log_sum = tl.log(total_sum)
            lse = peak + log_sum
            # Differences of logits, never of the log-sum-exp and a logit: exact however large the logits are.
            loss_label = log_sum + (peak - x_label)
            w_label, w_sum = 1.0, 1.0 * V
            if WEIGHTED:
                w_label = tl.load(class_weight + label, mask=(label >= 0) & (label < V), other=0.0)
                w_sum = tl.load(class_weight_sum)
            loss = (1 - LABEL_SMOOTHING) * w_label * loss_label + Z_LOSS * w_label * lse * lse
            if LABEL_SMOOTHING > 0:
                loss += LABEL_SMOOTHING / V * (w_sum * loss_label - tl.sum(weighted, 0))
            tl.store(losses + row, loss)
            if WITH_STATS:
                tl.store(stats + row, lse)
                tl.store(stats + N + row, loss_label - tl.sum(moment * scales, 0) / total_sum)
                tl.store(stats + 2 * N + row, (x_label >= peak).to(tl.float32))
                tl.store(stats + 3 * N + row, -loss_label)

            if WITH_GRADIENT:
                coefficient = tl.load(coefficients + row)
                of_softmax = (1 - LABEL_SMOOTHING) * w_label + 2 * Z_LOSS * w_label * lse
                if LABEL_SMOOTHING > 0:
                    of_softmax += LABEL_SMOOTHING / V * w_sum
                of_softmax /= total_sum
                of_label = (1 - LABEL_SMOOTHING) * w_label
                for start in range(0, WIDTH, BLOCK):
                    at = start + columns
                    inside = at < V
                    x = tl.load(source + at, mask=inside, other=float("-inf"))
                    x = tl.where(inside, capped_logits(x, SOFTCAP, LOGIT_SCALE), float("-inf"))
                    g = of_softmax * tl.exp(x - peak) - tl.where(at == label, of_label, 0.0)
                    if LABEL_SMOOTHING > 0:
                        w = tl.load(class_weight + at, mask=inside, other=0.0) if WEIGHTED else 1.0
                        g -= LABEL_SMOOTHING / V * w
                    g = uncapped_gradient(g, tl.where(inside, x, 0.0), SOFTCAP, LOGIT_SCALE)
                    # The columns beyond V are padding: their gradient is 0.
                    g = tl.where(inside, coefficient * g, 0.0)
                    tl.store(target + at, g.to(gradient.dtype.element_ty), mask=at < WIDTH)
        else:
            tl.store(losses + row, 0.0)
            if WITH_STATS:
                for which in tl.static_range(4):
                    tl.store(stats + which * N + row, 0.0)
            if WITH_GRADIENT:
                for start in range(0, WIDTH, BLOCK):
                    at = start + columns
                    zero = tl.zeros((BLOCK,), gradient.dtype.element_ty)
                    tl.store(target + at, zero, mask=at < WIDTH)


def rows(
    logits: torch.Tensor,  # (N, V), the last axis contiguous
    gradient: torch.Tensor | None,  # (N, V), may be the logits themselves
    labels: torch.Tensor,  # (N,)
    coefficients: torch.Tensor | None,  # (N,) fp32, with the gradient
    class_weight: torch.Tensor | None,  # (V,) fp32
    *,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (N,) in fp32, and the figures (4, N) where they are asked for; the gradient is written."""
    count, width = logits.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    stats = torch.empty(4, count, dtype=torch.float32, device=logits.device) if with_stats else None
    plain = not (label_smoothing or softcap or with_stats or class_weight is not None)
    launch = settings("cross_entropy" if plain else "cross_entropy_options", logits.device)
    if count:
        with on(logits):
            rows_kernel[(programs(count, logits.device),)](
                logits,
                logits if gradient is None else gradient,
                labels.contiguous(),
                None if coefficients is None else coefficients.contiguous(),
                None if class_weight is None else class_weight.contiguous(),
                None if class_weight is None else class_weight.sum(),
                losses,
                stats,
                count,
                vocab_size,
                width,
                logits.stride(0),
                0 if gradient is None else gradient.stride(0),
                ignore_index,
                LABEL_SMOOTHING=label_smoothing,
                Z_LOSS=z_loss,
                SOFTCAP=softcap,
                LOGIT_SCALE=logit_scale,
                WEIGHTED=class_weight is not None,
                WITH_GRADIENT=gradient is not None,
                WITH_STATS=with_stats,
                BLOCK=min(launch.block[0], triton.next_power_of_2(width)),
                num_warps=launch.num_warps,
            )
    return losses, stats


@triton.jit
def scale_kernel(gradient, factor, size, BLOCK: tl.constexpr):
    """gradient *= factor, in place; nothing is read or written where the factor is 1, as it mostly is."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gradient + at, mask=at < size).to(tl.float32)
        tl.store(gradient + at, (g * by).to(gradient.dtype.element_ty), mask=at < size)


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    launch = settings("scale", gradient.device)
    if gradient.numel():
        grid = (triton.cdiv(gradient.numel(), launch.block[0]),)
        with on(gradient):
            scale_kernel[grid](gradient, factor, gradient.numel(), BLOCK=launch.block[0], num_warps=launch.num_warps)
