"""Two softmaxes of a chunk's rows, at a temperature and at 1, and their combination in the place of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fleetune_kernels.launch import on, programs, settings
from fleetune_kernels.triton.cross_entropy import uncapped_gradient
from fleetune_kernels.triton.distillation import LOWEST, joined, loaded, log_sum


@triton.jit
def softmaxes_kernel(
    logits,  # (N, V) contiguous
    of_tempered,  # (N,)
    of_plain,  # (N,)
    background,  # (N,)
    figures,  # (4, N): the largest, the logarithms of both sums of exp(. - the largest), the sum
    N,
    V,
    inverse_temperature,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    TEMPERED: tl.constexpr,  # another temperature than 1
    PLAIN: tl.constexpr,  # of_plain is there
    SUMMED: tl.constexpr,  # background is there
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Few programs, each with a row at a time: the second read of a row then meets it in the L2 cache.
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        source = logits + tl.cast(row, tl.int64) * V
        columns = tl.arange(0, BLOCK)
        s_top = tl.full((BLOCK,), LOWEST, tl.float32)  # each lane's own: they meet once, at the end
        x_top = tl.full((BLOCK,), LOWEST, tl.float32)
        s_total = tl.zeros((BLOCK,), tl.float32)
        x_total = tl.zeros((BLOCK,), tl.float32)
        x_sum = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            at = start + columns
            inside = at < V
            x = loaded(source, at, inside, SOFTCAP, LOGIT_SCALE)
            s_top, shrunk, e = joined(s_top, x * inverse_temperature)
            s_total = s_total * shrunk + e
            if SUMMED:
                x_sum += tl.where(inside, x, 0.0)
            if TEMPERED and PLAIN:
                x_top, shrunk, e = joined(x_top, x)
                x_total = x_total * shrunk + e
            elif TEMPERED:
                x_top = tl.maximum(x_top, x)
        s_peak, s_log, _ = log_sum(s_top, s_total)
        x_peak, x_log = s_peak, s_log
        if TEMPERED and PLAIN:
            x_peak, x_log, _ = log_sum(x_top, x_total)
        elif TEMPERED:
            x_peak = tl.max(x_top, 0)
        tl.store(figures + row, x_peak)
        tl.store(figures + N + row, s_log)
        tl.store(figures + 2 * N + row, x_log)
        tl.store(figures + 3 * N + row, tl.sum(x_sum, 0))

        if WITH_GRADIENT:
            tempered = tl.load(of_tempered + row)
            plain = tl.load(of_plain + row) if PLAIN else 0.0
            less = tl.load(background + row) if SUMMED else 0.0
            counts = (tempered != 0) | (plain != 0) | (less != 0)
            for start in range(0, V, BLOCK):
                at = start + columns
                inside = at < V
                x = loaded(source, at, inside, SOFTCAP, LOGIT_SCALE)
                q = tl.exp(x * inverse_temperature - s_peak - s_log)
                g = tempered * q + plain * (tl.exp(x - x_peak - x_log) if TEMPERED and PLAIN else q)
                g = uncapped_gradient(g - less, tl.where(inside, x, 0.0), SOFTCAP, LOGIT_SCALE)
                g = tl.where(counts, g, 0.0)  # a row that does not count may hold anything, nan too
                tl.store(source + at, g.to(logits.dtype.element_ty), mask=inside)


def softmaxes(
    logits: torch.Tensor,  # (r, V) contiguous: overwritten where the gradient is asked for
    with_gradient: bool,
    of_tempered: torch.Tensor,  # (r,) fp32
    of_plain: torch.Tensor | None,  # (r,) fp32
    background: torch.Tensor | None,  # (r,) fp32
    temperature: float,
    softcap: float,
    logit_scale: float,
) -> torch.Tensor:
    count, width = logits.shape
    launch = settings("softmaxes", logits.device)
    figures = of_tempered.new_empty(4, count)
    with on(logits):
        softmaxes_kernel[(programs(count, logits.device),)](
            logits,
            of_tempered,
            of_plain,
            background,
            figures,
            count,
            width,
            1 / temperature,
            SOFTCAP=softcap,
            LOGIT_SCALE=logit_scale,
            TEMPERED=temperature != 1.0,
            PLAIN=of_plain is not None,
            SUMMED=background is not None,
            WITH_GRADIENT=with_gradient,
            BLOCK=min(launch.block[0], triton.next_power_of_2(width)),
            num_warps=launch.num_warps,
        )
    return figures
