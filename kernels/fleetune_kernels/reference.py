"""The mathematics in plain PyTorch: the specification that every kernel is held to.

Everything is computed in fp32 whatever the inputs are, and in fp64 for fp64. `reduction`, here and in the kernels, is
none (a value by row), sum, or mean: the sum over `num_items`, or over the weight of the supervised rows. Nothing
supervised gives 0 with zero gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import integers


class Stats(NamedTuple):
    """By row, detached, 0 where the row is ignored; each of the labels' shape."""

    lse: torch.Tensor  # log sum_c exp(logits_c)
    entropy: torch.Tensor  # of softmax(logits), in nats
    accuracy: torch.Tensor  # 1 where no logit is above the label's
    target_log_prob: torch.Tensor


class Distilled(NamedTuple):
    loss: torch.Tensor  # kd_weight * kd + ce_weight * ce
    kd: torch.Tensor  # detached
    ce: torch.Tensor  # detached; 0 where there are no labels


def cross_entropy(
    logits: torch.Tensor,  # (..., V)
    labels: torch.Tensor,  # (...), integer classes or ignore_index
    *,
    weight: torch.Tensor | None = None,  # (V,)
    token_weights: torch.Tensor | None = None,  # (...)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: torch.Tensor | None = None,  # scalar
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """u_i (CE_i + z_loss lse_i² w[y_i]), CE as in `torch.nn.functional.cross_entropy`, of capped and scaled logits."""
    scores = capped(_cut(logits, vocab_size), softcap, logit_scale)
    kept = labels != ignore_index
    weight = None if weight is None else weight.detach().to(scores.dtype)
    targets = labels.masked_fill(~kept, 0).long()
    losses = functional.cross_entropy(
        scores.reshape(-1, scores.shape[-1]),
        targets.reshape(-1),
        weight=weight,
        label_smoothing=label_smoothing,
        reduction="none",
    ).reshape(labels.shape)
    lse = scores.logsumexp(-1)
    losses = losses + z_loss * lse.square() * (1.0 if weight is None else weight[targets])
    losses = losses.masked_fill(~kept, 0.0)
    loss = reduced(
        losses,
        token_weights,
        reduction,
        num_items,
        supervised_weight(labels, weight=weight, token_weights=token_weights, ignore_index=ignore_index),
    )
    return (loss, _stats(scores.detach(), lse.detach(), targets, kept)) if return_stats else loss


def linear_cross_entropy(
    hidden_states: torch.Tensor,  # (..., D)
    lm_head_weight: torch.Tensor,  # (V, D)
    labels: torch.Tensor,  # (...)
    *,
    bias: torch.Tensor | None = None,  # (V,)
    rows: torch.Tensor | None = None,  # (R,), of the flattened rows: the others count as ignored
    ignore_index: int = -100,
    **options: object,  # as in cross_entropy
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """cross_entropy(hidden_states lm_head_weightᵀ + bias, labels)."""
    logits = functional.linear(hidden_states, lm_head_weight, bias)
    labels = only_rows(labels, rows, ignore_index)
    return cross_entropy(logits, labels, ignore_index=ignore_index, **options)  # type: ignore[arg-type]


def distillation_loss(
    student_logits: torch.Tensor,  # (..., V)
    teacher_logits: torch.Tensor | Sequence[torch.Tensor],  # (..., V); of several, the mean of the soft targets
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",  # forward_kl | reverse_kl | jsd | tvd
    beta: float = 0.5,
    mask: torch.Tensor | None = None,  # (...), True where supervised
    token_weights: torch.Tensor | None = None,  # (...)
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: torch.Tensor | None = None,  # scalar
) -> torch.Tensor:
    """With T = softmax(t/tau), S = softmax(s/tau): tau² KL(T || S) (Hinton et al., arXiv 1503.02531), tau² KL(S || T),
    tau² (beta KL(T || M) + (1 - beta) KL(S || M)) with M = beta T + (1 - beta) S, or ½ sum |T - S|."""
    student = torch.log_softmax(widened(_cut(student_logits, vocab_size)) / temperature, dim=-1)
    teachers = [teacher_logits] if isinstance(teacher_logits, torch.Tensor) else list(teacher_logits)
    teacher = torch.stack(
        [torch.log_softmax(widened(_cut(logits.detach(), vocab_size)) / temperature, dim=-1) for logits in teachers]
    ).logsumexp(0) - math.log(len(teachers))
    if divergence == "forward_kl":
        losses = temperature**2 * _kl(teacher, student)
    elif divergence == "reverse_kl":
        losses = temperature**2 * _kl(student, teacher)
    elif divergence == "jsd":
        # Where both are -inf the derivative of their sum would be nan, which no factor of 0 undoes.
        lowest = torch.finfo(student.dtype).min / 4
        middle = torch.logaddexp(
            teacher.clamp(min=lowest) + math.log(beta), student.clamp(min=lowest) + math.log1p(-beta)
        )
        losses = temperature**2 * (beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle))
    else:
        losses = 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)
    if mask is not None:
        losses = losses.masked_fill(~mask, 0.0)
    return reduced(losses, token_weights, reduction, num_items, supervised_rows(losses, mask, token_weights))


def linear_distillation_loss(
    student_hidden: torch.Tensor,  # (..., D)
    student_weight: torch.Tensor,  # (V, D)
    teacher_hidden: torch.Tensor | Sequence[torch.Tensor],  # (..., E)
    teacher_weight: torch.Tensor | Sequence[torch.Tensor],  # (V, E)
    *,
    student_bias: torch.Tensor | None = None,  # (V,)
    teacher_bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,  # (V,)
    labels: torch.Tensor | None = None,  # (...)
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    kd_num_items: torch.Tensor | None = None,
    ce_num_items: torch.Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    mask: torch.Tensor | None = None,  # (...); where labels are given, by default the rows that have one
    token_weights: torch.Tensor | None = None,  # (...)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Distilled:
    """kd_weight distillation_loss + ce_weight cross_entropy, of the two heads' logits."""
    hiddens, weights = as_list(teacher_hidden), as_list(teacher_weight)
    biases = teacher_bias if isinstance(teacher_bias, list | tuple) else [teacher_bias] * len(hiddens)
    student = capped(
        functional.linear(student_hidden, student_weight, student_bias), student_softcap, student_logit_scale
    )
    teachers = [
        capped(functional.linear(hidden, weight, bias), teacher_softcap, teacher_logit_scale)
        for hidden, weight, bias in zip(hiddens, weights, biases, strict=True)
    ]
    if mask is None and labels is not None:
        mask = labels != ignore_index
    kd = distillation_loss(
        student,
        teachers,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        mask=mask,
        token_weights=token_weights,
        vocab_size=vocab_size,
        num_items=kd_num_items,
    )
    return _with_labels(
        kd,
        student,
        labels,
        kd_weight,
        ce_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weights=token_weights,
        vocab_size=vocab_size,
        num_items=ce_num_items,
    )


def topk_distillation_loss(
    hidden_states: torch.Tensor,  # (..., D)
    lm_head_weight: torch.Tensor,  # (V, D)
    teacher_ids: torch.Tensor,  # (..., k), distinct in a row
    teacher_log_probs: torch.Tensor,  # (..., k), at the temperature; -inf marks an empty place
    *,
    teacher_weights: torch.Tensor | None = None,  # (..., k), count / R; for `sampled`
    tail: str = "zero",  # zero | uniform | sampled
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    kd_num_items: torch.Tensor | None = None,
    ce_num_items: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> Distilled:
    """tau² sum_c a_c (log p_c - log q_c), q = softmax(logits/tau), beside ce_weight cross_entropy.

    zero: a = p on the k ids, 0 elsewhere. uniform: what p lacks to 1 is spread over the other ids. sampled: a is
    teacher_weights, p the teacher's own: unbiased for the whole forward KL (arXiv 2503.16870).
    """
    logits = capped(_cut(functional.linear(hidden_states, lm_head_weight, bias), vocab_size), softcap, logit_scale)
    student = torch.log_softmax(logits / temperature, dim=-1)
    log_probs = teacher_log_probs.detach().to(student.dtype)
    if mask is None and labels is not None:
        mask = labels != ignore_index
    filled = log_probs != -math.inf  # a nan is no empty place: it makes the loss nan
    filled = filled if mask is None else filled & mask.unsqueeze(-1)
    shares = (log_probs.exp() if teacher_weights is None else teacher_weights.to(student.dtype)).masked_fill(~filled, 0)
    at_ids = student.gather(-1, teacher_ids.long())
    losses = torch.where(filled, shares * (log_probs.masked_fill(~filled, 0) - at_ids), 0).sum(-1)
    if tail == "uniform":
        others = student.shape[-1] - filled.sum(-1)
        rest = (1 - shares.sum(-1)).clamp(min=0)
        share = rest / others.clamp(min=1)
        elsewhere = student.sum(-1) - at_ids.masked_fill(~filled, 0).sum(-1)
        losses = losses + torch.where(others > 0, torch.xlogy(rest, share) - share * elsewhere, 0)
    losses = temperature**2 * losses
    if mask is not None:
        losses = losses.masked_fill(~mask, 0.0)
    divisor = supervised_rows(losses, mask, token_weights)
    return _with_labels(
        reduced(losses, token_weights, "mean", kd_num_items, divisor),
        logits,
        labels,
        kd_weight,
        ce_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weights=token_weights,
        num_items=ce_num_items,
    )


@checked
def supervised_weight(
    labels: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The divisor of the mean: sum_i u_i w[y_i] over supervised labels, as an fp64 scalar: any cut sums to the same.

    Args:
        labels: (...), integer classes, or `ignore_index` where a row has none.
        weight: (V,), the weight of each class.
        token_weights: (...), the weight of each row.
        ignore_index: the label of a row that has none.
    """
    labels = integers("labels", labels)
    kept = labels != ignore_index
    total = kept.double()
    if token_weights is not None:
        total = total * token_weights
    if weight is not None:
        # Kept inside, for a GPU to work on: a label that is no class is found elsewhere, or makes the loss nan.
        total = total * weight[labels.masked_fill(~kept, 0).long().clamp(0, len(weight) - 1)]
    return total.sum()


def supervised_rows(
    rows: torch.Tensor,  # (...): of this shape
    mask: torch.Tensor | None,  # (...)
    token_weights: torch.Tensor | None,  # (...)
) -> torch.Tensor:
    """The divisor of a distillation's mean: sum_i u_i over supervised rows, as an fp64 scalar."""
    total = torch.ones_like(rows, dtype=torch.float64) if mask is None else mask.double()
    return (total if token_weights is None else total * token_weights).sum()


def reduced(
    losses: torch.Tensor,  # (...)
    token_weights: torch.Tensor | None,  # (...)
    reduction: str,
    num_items: torch.Tensor | None,
    divisor: torch.Tensor,
) -> torch.Tensor:
    if token_weights is not None:
        losses = losses * token_weights.detach().to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / or_infinity(divisor if num_items is None else num_items, losses.dtype)


def or_infinity(divisor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A divisor, or infinity where it is 0: nothing supervised is then 0, and so are its gradients at any scale."""
    divisor = divisor.to(dtype)
    return divisor.where(divisor > 0, math.inf)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def capped(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """c tanh(scale x / c), as Gemma caps its logits, in fp32 or fp64."""
    scores = widened(logits) if logit_scale == 1.0 else widened(logits) * logit_scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def only_rows(labels: torch.Tensor, rows: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    if rows is None:
        return labels
    others = torch.ones(labels.numel(), dtype=torch.bool, device=labels.device).index_fill(0, rows.long(), False)
    return labels.masked_fill(others.reshape(labels.shape), ignore_index)


def as_list(tensors: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _cut(logits: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    return logits if vocab_size is None else logits[..., :vocab_size]


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum p (log p - log q), over the last axis; 0 where p is 0."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(-1)


def _stats(scores: torch.Tensor, lse: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> Stats:
    at_target = scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p = torch.softmax(scores, dim=-1)
    entropy = lse - torch.where(p > 0, p * scores, 0.0).sum(-1)  # a masked class is at -inf
    accuracy = (at_target >= scores.amax(-1)).to(scores.dtype)
    return Stats(*(value.masked_fill(~kept, 0.0) for value in (lse, entropy, accuracy, at_target - lse)))


def _with_labels(
    kd: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    kd_weight: float,
    ce_weight: float,
    **options: object,
) -> Distilled:
    if labels is None:
        return Distilled(kd_weight * kd, kd.detach(), torch.zeros_like(kd))
    ce = cross_entropy(logits, labels, **options)  # type: ignore[arg-type]
    assert isinstance(ce, torch.Tensor)
    return Distilled(kd_weight * kd + ce_weight * ce, kd.detach(), ce.detach())
