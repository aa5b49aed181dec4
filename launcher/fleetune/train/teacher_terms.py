"""The loss terms of a student and its teachers: soft targets, and layers drawn together."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from fleetune.losses import Attention, CrossEntropy, Distillation, Embedding, HiddenStates
from fleetune.schema import Recipe, losses_of, teachers_of
from fleetune.train import zero
from fleetune.train.alignment import Match, Outputs, StoredTokens
from fleetune.train.batches import IGNORED, MicroBatch
from fleetune.train.head import Head
from fleetune.train.terms import Pair, Term, divided, precise
from fleetune_kernels import Distilled, distillation_loss, linear_distillation_loss, topk_distillation_loss


def alignment_term(loss: HiddenStates | Embedding | Attention, matches: list[Match], shares: Sequence[float]) -> Term:
    """Over tokens, between the layers that are matched."""
    compare: Callable[..., torch.Tensor]
    if not isinstance(loss, Attention):
        compare = functools.partial(_features, loss)
    elif loss.compare == "maps":
        compare = _maps
    else:
        compare = functools.partial(_relations, loss.relation_heads)
    return Term(loss.kind, loss.weight, _tokens_weight, functools.partial(compare, matches, shares))


def distillation_term(loss: Distillation, shares: Sequence[float], kernels: str, vocab_size: int | None) -> Term:
    settings = _settings(loss, kernels)

    def against(student: Outputs, teachers: list[Outputs], batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        if student.head is not None:
            more = {"kd_num_items": num_items, "vocab_size": vocab_size}
            found: torch.Tensor = _distilled(loss, kernels, student.head, teachers, batch, more).loss
            return found
        value: torch.Tensor = distillation_loss(
            _cut(student.logits, vocab_size),
            _mixed([_cut(teacher.logits, vocab_size) for teacher in teachers], shares, loss.temperature),
            mask=_supervised(batch),
            token_weights=batch.weights,
            num_items=num_items,
            **settings,
        )
        return value

    def forward(student: Outputs, teachers: list[Outputs], batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        if loss.combine == "losses":
            values = [against(student, [teacher], batch, num_items) for teacher in teachers]
            return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()
        return against(student, teachers, batch, num_items)

    return Term("distillation", loss.weight, _supervised_weight, forward)


def _settings(loss: Distillation, kernels: str) -> dict[str, Any]:
    return {
        "temperature": loss.temperature,
        "divergence": loss.divergence,
        "beta": 0.5 if loss.beta is None else loss.beta,
        "backend": kernels,
    }


def _distilled_with_labels(
    labels: CrossEntropy,
    targets: Distillation,
    kernels: str,
    student: Outputs,
    teachers: list[Outputs],
    batch: MicroBatch,
    num_items: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both terms in one walk over the student's head: their weighted sum, and each one's value, detached."""
    assert student.head is not None
    more: dict[str, Any] = {
        "labels": batch.labels,
        "label_smoothing": labels.label_smoothing,
        **dict(zip(("kd_num_items", "ce_num_items"), num_items, strict=True)),
        **dict(zip(("kd_weight", "ce_weight"), weights, strict=True)),
    }
    found = _distilled(targets, kernels, student.head, teachers, batch, more)
    return found.loss, found.kd, found.ce


def _distilled(
    loss: Distillation, kernels: str, student: Head, teachers: list[Outputs], batch: MicroBatch, more: dict[str, Any]
) -> Distilled:
    """Without any logits; `more` are arguments of the kernels."""
    if (stored := teachers[0].stored) is not None:
        return _distilled_tokens(student, stored, batch, {"temperature": loss.temperature, "backend": kernels, **more})
    return _distilled_heads(student, teachers, batch, {**_settings(loss, kernels), **more})


def _distilled_heads(student: Head, teachers: list[Outputs], batch: MicroBatch, settings: dict[str, Any]) -> Distilled:
    """Of several teachers the plain mean of their soft targets."""
    heads = [teacher.head for teacher in teachers if teacher.head is not None]
    assert len(heads) == len(teachers)
    with zero.gathered([weight for head in heads for weight in (head.weight, head.bias) if weight is not None]):
        return linear_distillation_loss(
            student.hidden_states,
            student.weight,
            [head.hidden_states for head in heads],
            [head.weight for head in heads],
            student_bias=student.bias,
            teacher_bias=[head.bias for head in heads],
            mask=_supervised(batch),
            token_weights=batch.weights,
            student_softcap=student.softcap,
            teacher_softcap=heads[0].softcap,
            student_logit_scale=student.logit_scale,
            teacher_logit_scale=heads[0].logit_scale,
            rows=batch.supervised,
            **settings,
        )


def _distilled_tokens(student: Head, stored: StoredTokens, batch: MicroBatch, settings: dict[str, Any]) -> Distilled:
    """Of the tokens that are learnt, whose classes the teacher has stored."""
    hidden = student.hidden_states.flatten(0, 1)[batch.supervised]  # (R, D)
    settings = {**settings, "vocab_size": stored.vocabulary}
    if "labels" in settings:
        settings["labels"] = settings["labels"].flatten()[batch.supervised]
    return topk_distillation_loss(
        hidden,
        student.weight,
        stored.ids,
        stored.log_probs,
        teacher_weights=stored.weights,
        tail=stored.tail,
        bias=student.bias,
        token_weights=batch.weights.flatten()[batch.supervised],
        softcap=student.softcap,
        logit_scale=student.logit_scale,
        **settings,
    )


def _supervised(batch: MicroBatch) -> torch.Tensor | None:
    """(B, L), of language models."""
    return None if batch.supervised is None else batch.labels != IGNORED


def _supervised_weight(batch: MicroBatch) -> torch.Tensor:
    mask = _supervised(batch)
    return (batch.weights if mask is None else batch.weights * mask).sum(dtype=torch.float64)


def _cut(logits: torch.Tensor | None, vocab_size: int | None) -> torch.Tensor:
    """Without the rows that fill a vocabulary up, which may differ between student and teacher."""
    assert logits is not None
    return logits[..., :vocab_size]


def _mixed(logits: list[torch.Tensor], shares: Sequence[float], temperature: float) -> torch.Tensor:
    """Logits (B, C) whose soft targets at this temperature are the weighted mean of the teachers'."""
    if len(logits) == 1:
        return logits[0]
    targets = [
        functional.log_softmax(precise(one) / temperature, -1) + math.log(share)
        for one, share in zip(logits, shares, strict=True)
    ]
    return temperature * torch.logsumexp(torch.stack(targets), 0)


def _token_weights(batch: MicroBatch) -> torch.Tensor:
    """(B, L): each token's weight is its example's, and padding has none."""
    return batch.weights if batch.weights.dim() == 2 else batch.inputs["attention_mask"] * batch.weights[:, None]


def _tokens_weight(batch: MicroBatch) -> torch.Tensor:
    return _token_weights(batch).sum(dtype=torch.float64)


def _features(
    loss: HiddenStates | Embedding,
    matches: list[Match],
    shares: Sequence[float],
    student: Outputs,
    teachers: list[Outputs],
    batch: MicroBatch,
    num_items: torch.Tensor,
) -> torch.Tensor:
    """Over tokens: the mean over features of (s - t)², or 1 - cos(s, t); the mean over the pairs of layers."""

    def compare(match: Match) -> torch.Tensor:
        plain = student.hidden_states[match.student_layer + 1]
        mine = precise(student.projected.get(match.name, plain))
        theirs = teachers[match.teacher].hidden_states[match.teacher_layer + 1].to(mine.dtype)
        if loss.distance == "cosine":
            return 1 - functional.cosine_similarity(mine, theirs, dim=-1)
        return (mine - theirs).square().mean(-1)

    return _over_tokens(compare, matches, shares, batch, num_items)


def _maps(
    matches: list[Match],
    shares: Sequence[float],
    student: Outputs,
    teachers: list[Outputs],
    batch: MicroBatch,
    num_items: torch.Tensor,
) -> torch.Tensor:
    """Over tokens, the mean over heads of KL(teacher's attention || student's)."""

    def compare(match: Match) -> torch.Tensor:
        mine = precise(student.attentions[match.student_layer])  # (B, H, L, L)
        theirs = teachers[match.teacher].attentions[match.teacher_layer].to(mine.dtype)
        # In bf16 they sum to 1 only nearly, and the divergence of such could be below 0.
        mine, theirs = (each / each.sum(-1, keepdim=True) for each in (mine, theirs))
        tiny = torch.finfo(mine.dtype).tiny  # a padded key has probability 0 in both
        return (torch.xlogy(theirs, theirs) - theirs * mine.clamp(min=tiny).log()).sum(-1).mean(1)

    return _over_tokens(compare, matches, shares, batch, num_items)


def _relations(
    heads: int | None,
    matches: list[Match],
    shares: Sequence[float],
    student: Outputs,
    teachers: list[Outputs],
    batch: MicroBatch,
    num_items: torch.Tensor,
) -> torch.Tensor:
    """MiniLM's value relation: KL of softmax(V Vᵀ / sqrt(d)), head by head (arXiv 2002.10957, 2012.15828)."""
    padding = batch.inputs["attention_mask"][:, None, None, :] == 0

    def relation(values: torch.Tensor, cut: int) -> torch.Tensor:
        each = precise(values).view(*values.shape[:2], cut, -1).transpose(1, 2)  # (B, H, L, d)
        scores: torch.Tensor = each @ each.mT / math.sqrt(each.shape[-1])
        return scores.masked_fill(padding, torch.finfo(scores.dtype).min).log_softmax(-1)

    def compare(match: Match) -> torch.Tensor:
        cut = heads or match.heads
        mine = relation(student.values[match.student_layer], cut)
        theirs = relation(teachers[match.teacher].values[match.teacher_layer], cut).to(mine.dtype)
        return (theirs.exp() * (theirs - mine)).sum(-1).mean(1)

    return _over_tokens(compare, matches, shares, batch, num_items)


def _over_tokens(
    compare: Callable[[Match], torch.Tensor],  # -> (B, L)
    matches: list[Match],
    shares: Sequence[float],
    batch: MicroBatch,
    num_items: torch.Tensor,
) -> torch.Tensor:
    """sum over tokens of u_i, the teachers' shares and the mean over their pairs of layers, / num_items."""
    weights = _token_weights(batch)
    pairs = len(matches) / len(shares)  # of one teacher
    totals = [shares[match.teacher] * (compare(match) * weights).sum() for match in matches]
    return divided(torch.stack(totals).sum() / pairs, num_items)


def pair_of(recipe: Recipe, term: Term, vocab_size: int | None) -> Pair | None:
    """For the one distillation of a language model's head with one cross-entropy beside it, over the same classes."""
    losses = losses_of(recipe)
    labels = [loss for loss in losses if isinstance(loss, CrossEntropy)]
    targets = [loss for loss in losses if isinstance(loss, Distillation)]
    if term.name != "distillation" or len(labels) != 1 or len(targets) != 1:
        return None
    if recipe.task != "causal_lm" or recipe.kernels == "reference" or vocab_size is not None:
        return None
    if labels[0].class_weights is not None or (targets[0].combine == "losses" and len(teachers_of(recipe)) > 1):
        return None
    return Pair("cross_entropy", functools.partial(_distilled_with_labels, labels[0], targets[0], recipe.kernels))
