"""Distillation between two linear heads, without the N x V logits of either.

    s = softcap(scale (x Wᵀ + b)), t likewise of the teacher or of each of several, then
    loss = kd_weight kd + ce_weight ce: a divergence of `distillation.py`, and the cross-entropy of the labels

The walk over the student's head (`head.py`) makes the teacher's logits of the same rows beside it; one pass turns the
student's into the gradient of both terms. Memory: one chunk for the student and one for each teacher, and the
student's gradients, dW in fp32. `low_memory` forms them in the backward pass instead, for one more walk.

Chunks as in Liger-Kernel's fused JSD (arXiv 2410.10989), with tau², any of four divergences, and two divisors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from fleetune_kernels import reference
from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import as_autocast, choose, integers, same_rows, scalar
from fleetune_kernels.distillation import check_rows, checked_columns
from fleetune_kernels.divergences import Options, checked_options
from fleetune_kernels.divergences import rows as divergences
from fleetune_kernels.head import Wanted, walk
from fleetune_kernels.head_terms import check_labelled, counted, only_supervised, picked, register, terms
from fleetune_kernels.labels import check_classes
from fleetune_kernels.linear_cross_entropy import check_head
from fleetune_kernels.products import makes_its_own, product
from fleetune_kernels.reference import Distilled, as_list


@checked
def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | Sequence[torch.Tensor],
    teacher_weight: torch.Tensor | Sequence[torch.Tensor],
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    labels: torch.Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    kd_num_items: torch.Tensor | float | None = None,
    ce_num_items: torch.Tensor | float | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    mask: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    rows: torch.Tensor | None = None,
    low_memory: bool = False,
    backend: str = "auto",
) -> Distilled:
    """`Distilled`, scalars in fp32 (fp64 for fp64): the loss; kd and ce, detached, without their weights.

    Each term is divided by its num_items, counted by the caller over all ranks and micro-batches, or else by the
    weight of its own supervised rows here; a term without any is 0. `rows` leaves all other rows out of every GEMM. On
    a CPU they are found here; on a GPU looking for them would wait for the device. The student alone is differentiated.

    Args:
        student_hidden: (..., D), floating-point.
        student_weight: (V, D), in their dtype.
        teacher_hidden: (..., E), or a list of them: then the mean of their probabilities is the target.
        teacher_weight: (V, E), or one for each teacher.
        student_bias: (V,), of the student's head.
        teacher_bias: (V,), or one, or None, for each teacher.
        labels: (...), integer classes, or `ignore_index` where a row has none.
        kd_weight: multiplies the divergence.
        ce_weight: multiplies the labels' cross-entropy.
        kd_num_items: what the divergence is divided by: a number, or a tensor of one element on the device.
        ce_num_items: what the cross-entropy is divided by, likewise.
        temperature: tau, a finite number above 0.
        divergence: forward_kl, reverse_kl, jsd or tvd.
        beta: the teacher's share of jsd's middle, between 0 and 1.
        mask: (...) bool, True where a row counts; by default where it has a label, or all.
        token_weights: (...), the weight of each row.
        ignore_index: the label of a row that has none.
        label_smoothing: the share of the target, 0 to 1, that is spread over all classes.
        student_softcap: c of c tanh(logit / c), which keeps logits between -c and c; None leaves them.
        teacher_softcap: the teacher's, likewise.
        student_logit_scale: multiplies the student's logits, before the cap.
        teacher_logit_scale: multiplies the teacher's.
        vocab_size: how many of the first rows of both heads are classes; the rest is padding.
        rows: (R,), distinct indices of the flattened rows that count in either term, where the host knows them.
        low_memory: whether gradients are formed in the backward pass: less memory, for one more product.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: an argument that is wrong, by name; a label that is no class (nan on a GPU, see `check_labels`);
            on a CPU rows that are none, or one twice.
        RuntimeError: a backward pass with create_graph=True.
    """
    student_hidden, student_weight, student_bias = as_autocast(student_hidden, student_weight, student_bias)
    hiddens, weights, biases = _teachers(student_hidden, teacher_hidden, teacher_weight, teacher_bias)
    columns = _check_heads(student_hidden, student_weight, student_bias, hiddens, weights, biases, rows, vocab_size)
    options = checked_options(
        Options(
            columns,
            temperature,
            divergence,
            beta,
            checked_softcap("student_softcap", student_softcap),
            checked_softcap("teacher_softcap", teacher_softcap),
            student_logit_scale,
            teacher_logit_scale,
            ignore_index,
            label_smoothing,
        )
    )
    check_labelled(ce_weight, labels)
    labels = None if labels is None else integers("labels", labels)
    kd_num_items = None if kd_num_items is None else scalar("kd_num_items", kd_num_items, student_hidden)
    ce_num_items = None if ce_num_items is None else scalar("ce_num_items", ce_num_items, student_hidden)
    check_rows(student_hidden, "student_hidden", mask, token_weights, labels)
    check_classes(labels, columns, ignore_index)
    which = choose(backend, student_hidden)
    mask, labels = only_supervised(student_hidden, mask, labels, rows, ignore_index)
    if which == "reference":
        return reference.linear_distillation_loss(
            student_hidden,
            student_weight,
            hiddens,
            weights,
            student_bias=student_bias,
            teacher_bias=biases,
            labels=labels,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            kd_num_items=kd_num_items,
            ce_num_items=ce_num_items,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            mask=mask,
            token_weights=token_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            vocab_size=vocab_size,
        )
    both = terms(
        student_hidden,
        mask,
        labels,
        token_weights,
        (kd_weight, ce_weight),
        (kd_num_items, ce_num_items),
        ignore_index,
    )
    differentiable = torch.is_grad_enabled()
    loss, sums, *_ = torch.ops.fleetune.linear_distillation(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        [hidden.reshape(-1, hidden.shape[-1]) for hidden in hiddens],
        weights,
        [weight.new_empty(0) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)],
        None if mask is None else mask.reshape(-1),
        None if labels is None else labels.reshape(-1),
        None if token_weights is None else token_weights.detach().reshape(-1),
        rows,
        both.kd_scale,
        both.ce_scale,
        differentiable and student_hidden.requires_grad,
        differentiable and student_weight.requires_grad,
        differentiable and student_bias is not None and student_bias.requires_grad,
        low_memory,
        which,
        *asdict(options).values(),
    )
    return both.distilled(loss, sums)


def _teachers(
    student_hidden: torch.Tensor,
    hidden: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor | Sequence[torch.Tensor],
    bias: torch.Tensor | Sequence[torch.Tensor | None] | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    hiddens, weights = as_list(hidden), as_list(weight)
    biases = [bias] * (len(hiddens) if bias is None else 1) if bias is None or torch.is_tensor(bias) else list(bias)
    if not hiddens:
        raise ValueError("teacher_hidden: an empty list; should be one tensor or several")
    for name, tensors in (("teacher_weight", weights), ("teacher_bias", biases)):
        if len(tensors) != len(hiddens):
            raise ValueError(f"{name}: {len(tensors)} for {len(hiddens)} teachers; should be one for each")
    for tensor in hiddens:
        same_rows("teacher_hidden", tensor, "E", student_hidden, "student_hidden")
        if tensor.device != student_hidden.device:
            raise ValueError(f"teacher_hidden: on {tensor.device}; student_hidden is on {student_hidden.device}")
    return (
        as_autocast(*(tensor.detach() for tensor in hiddens)),
        as_autocast(*(tensor.detach() for tensor in weights)),
        as_autocast(*(None if tensor is None else tensor.detach() for tensor in biases)),
    )


def _check_heads(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    hiddens: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    rows: torch.Tensor | None,
    vocab_size: int | None,
) -> int:
    """The columns that count."""
    width = check_head(
        student_hidden, student_weight, student_bias, rows, "student_", "student_weight", "student_hidden"
    )
    widths = [
        check_head(hidden, weight, bias, None, "teacher_", "teacher_weight", "teacher_hidden")
        for hidden, weight, bias in zip(hiddens, weights, biases, strict=True)
    ]
    for index, other in enumerate(widths):
        if vocab_size is None and other != width:
            name = f"teacher_weight[{index}]" if widths[1:] else "teacher_weight"
            raise ValueError(f"{name}: {other} rows; student_weight has {width}, and vocab_size cuts both")
    return checked_columns(vocab_size, min(width, *widths))


def checked_softcap(name: str, softcap: float | None) -> float:
    """0 for none."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{name}: {softcap}; should be a finite number above 0, or None")
    return softcap or 0.0


@torch.library.custom_op("fleetune::linear_distillation", mutates_args=())
def _op(
    hidden: torch.Tensor,  # (N, D)
    head: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    teacher_hiddens: list[torch.Tensor],  # (N, E) each
    teacher_heads: list[torch.Tensor],  # (V, E) each
    teacher_biases: list[torch.Tensor],  # (V,) each; (0,) where there is none
    mask: torch.Tensor | None,  # (N,)
    labels: torch.Tensor | None,  # (N,)
    token_weights: torch.Tensor | None,  # (N,)
    rows: torch.Tensor | None,  # (R,)
    kd_scale: torch.Tensor,  # scalars: what the sums of the two terms are multiplied by
    ce_scale: torch.Tensor,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    low_memory: bool,
    backend: str,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the sums (2,) of its terms, and the gradients of the loss where they are wanted and known."""
    options = Options(
        vocab_size,
        temperature,
        divergence,
        beta,
        student_softcap,
        teacher_softcap,
        student_logit_scale,
        teacher_logit_scale,
        ignore_index,
        label_smoothing,
    )
    wanted = Wanted(want_hidden and not low_memory, want_weight and not low_memory, want_bias and not low_memory)
    rows = counted(mask, labels, rows, ignore_index)
    mask, labels, weights = (picked(tensor, rows) for tensor in (mask, labels, token_weights))
    if mask is not None and mask.device.type == "cpu" and bool(mask.all()):
        mask = None
    count = len(hidden) if rows is None else len(rows)
    weights = kd_scale.new_ones(count) if weights is None else weights.to(kd_scale.dtype)
    kd_coefficients, ce_coefficients = weights * kd_scale, weights * ce_scale
    losses = weights.new_zeros(2, count)
    logits_of_teachers = _TeacherLogits(teacher_hiddens, teacher_heads, teacher_biases, rows, vocab_size)

    def turn(logits: torch.Tensor, at: slice) -> None:
        losses[:, at] = divergences(
            logits,
            logits if wanted.any else None,
            logits_of_teachers(at),
            None if mask is None else mask[at],
            kd_coefficients[at],
            None if labels is None else labels[at],
            None if labels is None else ce_coefficients[at],
            options,
            backend,
        )

    gradients = walk(hidden, head, bias, rows, vocab_size, wanted, turn)
    sums = (losses * weights).sum(1)  # no matrix product: autocast would round it
    loss = kd_scale * sums[0] + ce_scale * sums[1]
    return loss, sums, gradients.hidden, gradients.weight, gradients.bias


register(_op, "linear_distillation_loss", tensors=12)


class _TeacherLogits:
    """Those of a chunk of rows, in a buffer for each teacher that all chunks share where the product takes one."""

    def __init__(
        self,
        hiddens: list[torch.Tensor],
        heads: list[torch.Tensor],
        biases: list[torch.Tensor],
        rows: torch.Tensor | None,
        vocab_size: int,
    ) -> None:
        self.hiddens, self.rows = hiddens, rows
        self.heads = [head[:vocab_size] for head in heads]
        self.biases = [bias[:vocab_size] for bias in biases]
        self.buffers: list[torch.Tensor | None] = [None] * len(heads)

    def __call__(self, at: slice) -> list[torch.Tensor]:
        found = []
        for number, (hidden, head, bias) in enumerate(zip(self.hiddens, self.heads, self.biases, strict=True)):
            x = hidden[at] if self.rows is None else hidden.index_select(0, self.rows[at])
            if self.buffers[number] is None and not makes_its_own(x, head.T):
                self.buffers[number] = head.new_empty(len(x), len(head))  # the first chunk is the largest
            shared = self.buffers[number]
            out = None if shared is None else shared[: len(x)]
            found.append(product(x, head.T, bias if len(bias) else None, out=out))
        return found
