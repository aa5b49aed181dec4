"""Two softmaxes of a chunk's rows, at a temperature and at 1, in one pass: all that a target of few classes needs."""

from __future__ import annotations

import torch

from fleetune_kernels.divergences import BLOCK_BYTES, divided_, softmax_, tempered


def softmaxes(
    logits: torch.Tensor,  # (r, V) contiguous: overwritten
    with_gradient: bool,
    of_tempered: torch.Tensor,  # (r,)
    of_plain: torch.Tensor | None,  # (r,); None: no softmax at temperature 1
    background: torch.Tensor | None,  # (r,); None: nothing, and no sum of x
    temperature: float,
    softcap: float,  # 0: none
    logit_scale: float,
    backend: str,
) -> torch.Tensor:
    """By row (4, r), for x = softcap(scale logits): the largest x, log sum exp((x - the largest) / temperature), the
    same at temperature 1, and the sum of x.

    With a gradient, what stands in the place of the logits is the gradient with respect to them from

        d/dx_c = of_tempered softmax(x / temperature)_c + of_plain softmax(x)_c - background

    and 0 in rows whose factors are all 0. The figures at temperature 1 and of the sum are of use where `of_plain` and
    `background` are given.
    """
    if backend == "triton":
        from fleetune_kernels.triton.softmaxes import softmaxes as softmaxes_on_gpu

        return softmaxes_on_gpu(
            logits, with_gradient, of_tempered, of_plain, background, temperature, softcap, logit_scale
        )
    figures = of_tempered.new_zeros(4, len(logits))
    largest, log_sum, log_sum_plain, total = figures
    count = max(1, BLOCK_BYTES // (logits.shape[1] * figures.element_size()))
    shape = (min(count, len(logits)), logits.shape[1])
    own = None if logits.dtype == figures.dtype else figures.new_empty(shape)
    plain = figures.new_empty(shape) if temperature != 1.0 and of_plain is not None else None
    capped = figures.new_empty(shape) if softcap else None
    for start in range(0, len(logits), count):
        at = slice(start, min(start + count, len(logits)))
        size, source = at.stop - start, logits[at]
        x = tempered(source if own is None else own[:size], source, softcap, logit_scale)
        if background is not None:
            total[at] = x.sum(1)
        if capped is not None:
            capped[:size].copy_(x)
        if plain is not None:
            _, log_sum_plain[at] = softmax_(plain[:size].copy_(x))
        largest[at] = x.amax(1)
        _, log_sum[at] = softmax_(divided_(x, temperature))
        if not with_gradient:
            continue
        factor = of_tempered[at]
        if of_plain is not None and plain is None:
            factor = factor + of_plain[at]
        x.mul_(factor.unsqueeze(1))
        if of_plain is not None and plain is not None:
            x.addcmul_(plain[:size], of_plain[at].unsqueeze(1))
        if background is not None:
            x.sub_(background[at].unsqueeze(1))
        if capped is not None:
            x.addcmul_(x, capped[:size].div_(softcap).square_(), value=-1)
        if logit_scale != 1.0:
            x.mul_(logit_scale)
        if own is not None:
            logits[at] = x
    if of_plain is not None and temperature == 1.0:
        log_sum_plain.copy_(log_sum)
    return figures
