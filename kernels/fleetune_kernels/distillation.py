"""Distillation from logits: one divergence between teacher and student, with its gradient formed in the forward pass.

    S = softmax(s / tau), T = softmax(t / tau), or the mean of several, tau: temperature; M = beta T + (1 - beta) S
    forward_kl  tau² KL(T || S)                                    d/ds_c = tau (S_c - T_c)
    reverse_kl  tau² KL(S || T)                                    tau S_c (log S_c/T_c - KL(S || T))
    jsd         tau² (beta KL(T || M) + (1 - beta) KL(S || M))     tau (1 - beta) S_c (log S_c/M_c - KL(S || M))
    tvd         ½ sum_c |S_c - T_c|                                1/tau S_c (h_c - sum_d S_d h_d), h = ½ sgn(S - T)
    loss = sum_i u_i loss_i / num_items over the supervised rows

Memory beyond the logits: the student's gradient, in its own dtype, and in torch blocks of rows that fit the cache. The
logits are read twice (jsd and tvd: three times), of which all but the first reading meet them in the L2 cache. tau² as
Hinton et al. have it (arXiv 1503.02531); the divergences as in GKD (arXiv 2306.13649) and f-distillation (2307.15190).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fleetune_kernels import reference
from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import choose, floating, once, one_of, same_device, same_rows, same_shape, scalar
from fleetune_kernels.divergences import Options, checked_options, rows
from fleetune_kernels.reference import as_list, or_infinity, supervised_rows
from fleetune_kernels.softmax_cross_entropy import REDUCTIONS, SMALL


@checked
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | Sequence[torch.Tensor],
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    mask: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: torch.Tensor | float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The loss in fp32 (fp64 for fp64): a scalar, or one by row for reduction none.

    mean divides by `num_items`, which the caller counted over all ranks and micro-batches, or else by the weight of
    the rows that are supervised here. Where none is, the loss is 0 and so is the gradient. `student_logits` alone is
    differentiated, and once: its gradient is handed out by the first backward pass.

    Args:
        student_logits: (..., V), floating-point.
        teacher_logits: (..., V), or a list of them: then the mean of their probabilities is the target.
        temperature: tau, a finite number above 0.
        divergence: forward_kl, reverse_kl, jsd or tvd.
        beta: the teacher's share of jsd's middle, between 0 and 1.
        mask: (...) bool, True where a row counts; by default all.
        token_weights: (...), the weight of each row.
        vocab_size: how many of the first columns of both are classes; the rest is padding.
        reduction: none, mean or sum.
        num_items: what mean divides by: a number, or a tensor of one element on the device.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: an argument that is wrong, by name.
        RuntimeError: a second backward pass through the same loss, or one with create_graph=True.
    """
    floating("student_logits", student_logits)
    teachers = [logits.detach() for logits in as_list(teacher_logits)]
    columns = check_teachers(student_logits, teachers, vocab_size)
    checked_options(Options(columns, temperature, divergence, beta))
    check_rows(student_logits, "student_logits", mask, token_weights)
    one_of("reduction", reduction, REDUCTIONS)
    num_items = None if num_items is None else scalar("num_items", num_items, student_logits)
    which = choose(backend, student_logits)
    if which == "reference" or (backend == "auto" and student_logits.numel() <= SMALL and not student_logits.is_cuda):
        return reference.distillation_loss(
            student_logits,
            teachers,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            mask=mask,
            token_weights=token_weights,
            vocab_size=vocab_size,
            reduction=reduction,
            num_items=num_items,
        )
    leading = student_logits.shape[:-1]
    divisor = _mean_divisor(student_logits, mask, token_weights, num_items, reduction)
    late = student_logits.dtype == torch.float16  # as in cross_entropy: 1/num_items would underflow
    loss, _ = torch.ops.fleetune.distillation(
        student_logits.reshape(-1, student_logits.shape[-1]),
        [logits.reshape(-1, logits.shape[-1]) for logits in teachers],
        None if mask is None else mask.reshape(-1),
        None if token_weights is None else token_weights.detach().reshape(-1),
        torch.ones_like(divisor) if late else divisor,
        reduction != "none",
        student_logits.requires_grad and torch.is_grad_enabled(),
        which,
        columns,
        temperature,
        divergence,
        beta,
    )
    found: torch.Tensor = loss.reshape(leading) if reduction == "none" else loss / divisor if late else loss
    return found


def check_teachers(student: torch.Tensor, teachers: Sequence[torch.Tensor], vocab_size: int | None) -> int:
    """The columns that count."""
    if not teachers:
        raise ValueError("teacher_logits: an empty list; should be one tensor or several")
    names = ["teacher_logits"] if len(teachers) == 1 else [f"teacher_logits[{i}]" for i in range(len(teachers))]
    width = student.shape[-1]
    for name, logits in zip(names, teachers, strict=True):
        floating(name, logits)
        same_rows(name, logits, "V", student, "student_logits")
        if vocab_size is None and logits.shape[-1] != width:
            raise ValueError(f"{name}: {logits.shape[-1]} columns, student_logits have {width}; vocab_size cuts both")
    same_device(student, "student_logits", **dict(zip(names, teachers, strict=True)))
    return checked_columns(vocab_size, min(width, *(logits.shape[-1] for logits in teachers)))


def checked_columns(vocab_size: int | None, width: int) -> int:
    if vocab_size is not None and not 0 < vocab_size <= width:
        raise ValueError(f"vocab_size: {vocab_size}; should be 1 to {width}, the narrower width")
    return width if vocab_size is None else vocab_size


def check_rows(
    of: torch.Tensor,  # (..., V) or (..., D): its leading shape counts
    name: str,
    mask: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    labels: torch.Tensor | None = None,
) -> None:
    for argument, tensor in (("mask", mask), ("token_weights", token_weights), ("labels", labels)):
        same_shape(argument, tensor, of.shape[:-1], f"row of {name}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask: {mask.dtype}; should be bool, True where a row is supervised")
    same_device(of, name, mask=mask, token_weights=token_weights, labels=labels)


def _mean_divisor(
    student: torch.Tensor,
    mask: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    num_items: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """What the sum is divided by, as a scalar on the device, in the dtype of the loss."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if reduction != "mean":
        return torch.ones((), dtype=dtype, device=student.device)
    if num_items is None:
        num_items = supervised_rows(student[..., 0], mask, token_weights)
    return or_infinity(num_items.to(student.device), dtype)


@torch.library.custom_op("fleetune::distillation", mutates_args=())
def _op(
    student: torch.Tensor,  # (N, V or more)
    teachers: list[torch.Tensor],  # (N, V or more) each
    mask: torch.Tensor | None,  # (N,)
    token_weights: torch.Tensor | None,  # (N,)
    divisor: torch.Tensor,  # scalar
    reduce: bool,
    with_gradient: bool,
    backend: str,
    vocab_size: int,
    temperature: float,
    divergence: str,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient (N, V) of the reduced loss (nothing where it is not reduced)."""
    options = Options(vocab_size, temperature, divergence, beta)
    student = student if student.stride(-1) == 1 else student.contiguous()
    scale = divisor.new_ones(len(student)) if token_weights is None else token_weights.to(divisor.dtype)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if with_gradient and reduce else None
    losses = rows(student, gradient, teachers, mask, scale / divisor, None, None, options, backend)[0]
    losses = losses * scale
    return losses.sum() / divisor if reduce else losses, student.new_empty(0) if gradient is None else gradient


@_op.register_fake
def _(student, teachers, mask, token_weights, divisor, reduce, with_gradient, *options):  # type: ignore[no-untyped-def]
    return (
        divisor.new_empty(() if reduce else student.shape[:1]),
        student.new_empty(student.shape if with_gradient and reduce else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    student, teachers, mask, token_weights, divisor, ctx.reduce, _, ctx.backend, *ctx.options = inputs
    ctx.teachers = len(teachers)
    # The gradient is there already; by row it depends on what comes back, so it is formed then.
    ctx.save_for_backward(*((output[1],) if ctx.reduce else (student, mask, token_weights, divisor, *teachers)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_loss: torch.Tensor | None, *_: object) -> tuple[Any, ...]:
    once("distillation_loss")
    none = ([None] * ctx.teachers, *(None,) * (6 + len(ctx.options)))
    if of_loss is None:
        return None, *none
    if ctx.reduce:
        (gradient,) = ctx.saved_tensors
        # In place: a second backward pass then finds a tensor that was changed, and autograd refuses it.
        torch.ops.fleetune.scale_(gradient, of_loss, ctx.backend)
        return gradient, *none
    student, mask, token_weights, divisor, *teachers = ctx.saved_tensors
    scale = of_loss if token_weights is None else of_loss * token_weights
    _, gradient = torch.ops.fleetune.distillation(
        student, teachers, mask, scale, torch.ones_like(divisor), True, True, ctx.backend, *ctx.options
    )
    return gradient, *none


_op.register_autograd(_backward, setup_context=_save)
