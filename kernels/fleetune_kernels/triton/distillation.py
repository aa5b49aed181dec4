"""A divergence between teacher and student over the rows of a chunk, and the labels' cross-entropy in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fleetune_kernels.launch import on, programs, settings
from fleetune_kernels.triton.cross_entropy import capped_logits, uncapped_gradient

# Below every logit, and finite: -inf - -inf is no number.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def joined(largest, x):
    """(the larger, what a sum of exp(. - largest) shrinks by, exp(x - the larger)), by one exponential."""
    less = tl.exp(-tl.abs(x - largest))
    more = x > largest
    return tl.maximum(largest, x), tl.where(more, less, 1.0), tl.where(more, 1.0, less)


@triton.jit
def log_sum(largest, total):
    """Of each lane's own sum: (the largest of all, the logarithm of the whole sum, what to weigh a lane's mean with).

    The two parts of the log-sum-exp stay apart: beside a large logit the second would lose its digits.
    """
    peak = tl.max(largest, 0)
    scales = tl.exp(largest - peak)
    whole = tl.sum(total * scales, 0)
    return peak, tl.log(whole), scales / whole


@triton.jit
def loaded(logits, at, inside, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr):
    """The capped logits in fp32; -inf beyond the vocabulary."""
    x = tl.load(logits + at, mask=inside, other=float("-inf"))
    return tl.where(inside, capped_logits(x, SOFTCAP, LOGIT_SCALE), float("-inf"))


@triton.jit
def log_ratio(p, middle):
    """p log(p / middle), 0 at p = 0; what is near the smallest number has lost its ratio already."""
    return tl.where(p > 1e-37, p * tl.log(p / middle), 0.0)


@triton.jit
def rows_kernel(
    student,  # (N, V or more)
    gradient,  # (N, V or more), may be the student's logits themselves
    teacher,  # (N, V or more)
    mask,  # (N,), 0 where the divergence does not count
    kd_coefficients,  # (N,): what row i's loss is multiplied by in the gradient
    labels,  # (N,)
    ce_coefficients,  # (N,)
    kd_losses,  # (N,)
    ce_losses,  # (N,)
    N,
    V,  # columns that count
    WIDTH,  # columns of the gradient
    student_stride,
    gradient_stride,
    teacher_stride,
    ignore_index,
    inverse_temperature,
    loss_scale,
    beta,
    label_smoothing,
    DIVERGENCE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    STUDENT_LOGIT_SCALE: tl.constexpr,
    TEACHER_LOGIT_SCALE: tl.constexpr,
    TEMPERED: tl.constexpr,  # another temperature than 1: the labels' softmax is another one
    MASKED: tl.constexpr,
    LABELED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Few programs, each with a row at a time: every later read of a row then meets it in the L2 cache.
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        of_student = student + tl.cast(row, tl.int64) * student_stride
        of_teacher = teacher + tl.cast(row, tl.int64) * teacher_stride
        target = gradient + tl.cast(row, tl.int64) * gradient_stride
        columns = tl.arange(0, BLOCK)
        by_teacher = True
        if MASKED:
            by_teacher = tl.load(mask + row) != 0
        by_label = False
        label = -1
        if LABELED:
            label = tl.load(labels + row)
            by_label = label != ignore_index

        if by_teacher or by_label:
            x_label = 0.0
            if LABELED:
                # Before the reductions below, whose barriers stand between it and the first write in place. A label
                # that is no class gives nan, which stops a training run.
                x_label = tl.load(of_student + label, mask=(label >= 0) & (label < V), other=float("nan"))
                x_label = capped_logits(x_label, STUDENT_SOFTCAP, STUDENT_LOGIT_SCALE)
            # Each lane's own; they meet once, at the end.
            s_top = tl.full((BLOCK,), LOWEST, tl.float32)
            t_top = tl.full((BLOCK,), LOWEST, tl.float32)
            x_top = tl.full((BLOCK,), LOWEST, tl.float32)
            s_total = tl.zeros((BLOCK,), tl.float32)
            t_total = tl.zeros((BLOCK,), tl.float32)
            x_total = tl.zeros((BLOCK,), tl.float32)
            x_sum = tl.zeros((BLOCK,), tl.float32)
            cross = tl.zeros((BLOCK,), tl.float32)  # sum exp(t) (t - s), or exp(s) (s - t)
            for start in range(0, V, BLOCK):
                at = start + columns
                inside = at < V
                x = loaded(of_student, at, inside, STUDENT_SOFTCAP, STUDENT_LOGIT_SCALE)
                t = loaded(of_teacher, at, inside, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE) * inverse_temperature
                s = x * inverse_temperature
                s_top, s_shrunk, s_exp = joined(s_top, s)
                t_top, t_shrunk, t_exp = joined(t_top, t)
                s_total = s_total * s_shrunk + s_exp
                t_total = t_total * t_shrunk + t_exp
                if DIVERGENCE == "forward_kl":
                    cross = cross * t_shrunk + tl.where(t_exp > 0, t_exp * (t - s), 0.0)
                elif DIVERGENCE == "reverse_kl":
                    cross = cross * s_shrunk + tl.where(s_exp > 0, s_exp * (s - t), 0.0)
                if LABELED:
                    if TEMPERED:
                        x_top, x_shrunk, x_exp = joined(x_top, x)
                        x_total = x_total * x_shrunk + x_exp
                    if SMOOTHED:
                        x_sum += tl.where(inside, x, 0.0)
            s_peak, s_log, s_scales = log_sum(s_top, s_total)
            t_peak, t_log, t_scales = log_sum(t_top, t_total)
            more = (t_peak - s_peak) + (t_log - s_log)  # lse of the teacher less the student's

            mean = 0.0  # under S, of what the gradient is centred by
            if DIVERGENCE == "forward_kl":
                divergence = tl.sum(cross * t_scales, 0) - more
            elif DIVERGENCE == "reverse_kl":
                mean = tl.sum(cross * s_scales, 0)
                divergence = mean + more
            else:
                first = tl.zeros((BLOCK,), tl.float32)
                second = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, V, BLOCK):
                    at = start + columns
                    inside = at < V
                    s = loaded(of_student, at, inside, STUDENT_SOFTCAP, STUDENT_LOGIT_SCALE) * inverse_temperature
                    t = loaded(of_teacher, at, inside, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE) * inverse_temperature
                    p, q = tl.exp(t - t_peak - t_log), tl.exp(s - s_peak - s_log)
                    if DIVERGENCE == "jsd":
                        middle = beta * p + (1 - beta) * q
                        first += log_ratio(p, middle)
                        second += log_ratio(q, middle)
                    else:
                        first += tl.abs(q - p)
                        second += tl.where(q > p, q, tl.where(q < p, -q, 0.0))
                mean = tl.sum(second, 0)
                if DIVERGENCE == "jsd":
                    # What an input that is nan gives `first`, its guard may hide.
                    divergence = beta * tl.sum(first, 0) + (1 - beta) * mean + 0 * more
                else:
                    divergence = 0.5 * tl.sum(first, 0)
            tl.store(kd_losses + row, tl.where(by_teacher, loss_scale * divergence, 0.0))

            x_peak, x_log = s_peak, s_log
            if LABELED:
                if TEMPERED:
                    x_peak, x_log, _ = log_sum(x_top, x_total)
                loss = x_peak - x_label + x_log
                if SMOOTHED:
                    loss = (1 - label_smoothing) * loss + label_smoothing * (x_peak - tl.sum(x_sum, 0) / V + x_log)
                tl.store(ce_losses + row, tl.where(by_label, loss, 0.0))

            if WITH_GRADIENT:
                of_divergence = tl.load(kd_coefficients + row) * loss_scale * inverse_temperature
                of_loss = 0.0
                if LABELED:
                    of_loss = tl.where(by_label, tl.load(ce_coefficients + row), 0.0)
                for start in range(0, WIDTH, BLOCK):
                    at = start + columns
                    inside = at < V
                    x = loaded(of_student, at, inside, STUDENT_SOFTCAP, STUDENT_LOGIT_SCALE)
                    t = loaded(of_teacher, at, inside, TEACHER_SOFTCAP, TEACHER_LOGIT_SCALE) * inverse_temperature
                    s = x * inverse_temperature
                    q = tl.exp(s - s_peak - s_log)
                    if DIVERGENCE == "forward_kl":
                        g = q - tl.exp(t - t_peak - t_log)
                    elif DIVERGENCE == "reverse_kl":
                        g = tl.where(q > 0, q * (s - t - mean), 0.0)
                    elif DIVERGENCE == "jsd":
                        middle = beta * tl.exp(t - t_peak - t_log) + (1 - beta) * q
                        g = (1 - beta) * (log_ratio(q, middle) - q * mean)
                    else:
                        p = tl.exp(t - t_peak - t_log)
                        g = 0.5 * (tl.where(q > p, q, tl.where(q < p, -q, 0.0)) - q * mean)
                    # A row that does not count may hold anything, nan too.
                    g = tl.where(by_teacher, of_divergence * g, 0.0)
                    if LABELED:
                        h = tl.exp(x - x_peak - x_log) if TEMPERED else q
                        if SMOOTHED:
                            h -= tl.where(at == label, 1 - label_smoothing, 0.0) + label_smoothing / V
                        else:
                            h -= tl.where(at == label, 1.0, 0.0)
                        g += of_loss * h
                    g = uncapped_gradient(g, tl.where(inside, x, 0.0), STUDENT_SOFTCAP, STUDENT_LOGIT_SCALE)
                    # The columns beyond V are padding: their gradient is 0.
                    g = tl.where(inside, g, 0.0)
                    tl.store(target + at, g.to(gradient.dtype.element_ty), mask=at < WIDTH)
        else:
            tl.store(kd_losses + row, 0.0)
            if LABELED:
                tl.store(ce_losses + row, 0.0)
            if WITH_GRADIENT:
                for start in range(0, WIDTH, BLOCK):
                    at = start + columns
                    zero = tl.zeros((BLOCK,), gradient.dtype.element_ty)
                    tl.store(target + at, zero, mask=at < WIDTH)


def rows(
    student: torch.Tensor,  # (N, V or more), the last axis contiguous
    gradient: torch.Tensor | None,  # (N, V or more), may be the student's logits themselves
    teacher: torch.Tensor,  # (N, V or more), the last axis contiguous
    mask: torch.Tensor | None,  # (N,) bool
    kd_coefficients: torch.Tensor,  # (N,) fp32
    labels: torch.Tensor | None,  # (N,)
    ce_coefficients: torch.Tensor | None,  # (N,) fp32
    losses: torch.Tensor,  # (2, N) fp32, rows contiguous: written; the second with labels only
    *,
    vocab_size: int,
    temperature: float,
    divergence: str,
    beta: float,
    student_softcap: float,
    teacher_softcap: float,
    student_logit_scale: float,
    teacher_logit_scale: float,
    ignore_index: int,
    label_smoothing: float,
    loss_scale: float,
) -> None:
    launch = settings("distillation", student.device)
    width = student.shape[1]
    if not len(student):
        return
    with on(student):
        rows_kernel[(programs(len(student), student.device),)](
            student,
            student if gradient is None else gradient,
            teacher,
            None if mask is None else mask.contiguous().view(torch.uint8),
            kd_coefficients.contiguous(),
            None if labels is None else labels.contiguous(),
            None if ce_coefficients is None else ce_coefficients.contiguous(),
            losses[0],
            losses[1],
            len(student),
            vocab_size,
            width,
            student.stride(0),
            0 if gradient is None else gradient.stride(0),
            teacher.stride(0),
            ignore_index,
            1 / temperature,
            loss_scale,
            beta,
            label_smoothing,
            DIVERGENCE=divergence,
            STUDENT_SOFTCAP=student_softcap,
            TEACHER_SOFTCAP=teacher_softcap,
            STUDENT_LOGIT_SCALE=student_logit_scale,
            TEACHER_LOGIT_SCALE=teacher_logit_scale,
            TEMPERED=temperature != 1.0,
            MASKED=mask is not None,
            LABELED=labels is not None,
            SMOOTHED=label_smoothing > 0,
            WITH_GRADIENT=gradient is not None,
            BLOCK=min(launch.block[0], triton.next_power_of_2(width)),
            num_warps=launch.num_warps,
        )
