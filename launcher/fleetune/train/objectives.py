"""The loss terms.

A term over examples is (name, weight, divisor, forward): the divisor is counted from the batch without the model; the
loop sums it over all ranks and micro-batches of the window and hands it to forward as `num_items`, and nobody else
scales anything. A penalty is a term over parameters, formed once for each optimizer step on the fp32 shards.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import functional

from fleetune.losses import (
    OF_DOMAINS,
    Attention,
    CrossEntropy,
    Distillation,
    Embedding,
    HiddenStates,
    L1Penalty,
    L2Penalty,
    MeanSquaredError,
)
from fleetune.schema import Recipe, has_weights, losses_of
from fleetune.train import zero
from fleetune.train.alignment import PROJECTIONS, Match, Outputs, StoredTokens
from fleetune.train.batches import IGNORED, MicroBatch
from fleetune.train.domains import DISCRIMINATORS, domain_term
from fleetune.train.head import Head
from fleetune.train.terms import Term, divided, precise
from fleetune_kernels import (
    cross_entropy,
    distillation_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    supervised_weight,
    topk_distillation_loss,
)


@dataclass(frozen=True)
class Penalty:
    """weight * sum |p| or weight * sum p², over the parameters whose names match."""

    name: str
    weight: float
    patterns: tuple[str, ...]
    power: int  # 1 or 2

    def matches(self, parameter: str) -> bool:
        is_own = not parameter.startswith((f"{PROJECTIONS}.", f"{DISCRIMINATORS}."))  # these serve a loss alone
        return is_own and any(fnmatchcase(parameter, pattern) for pattern in self.patterns)

    def value(self, shard: torch.Tensor) -> torch.Tensor:
        return self.weight * (shard.abs().sum() if self.power == 1 else shard.square().sum())

    def gradient(self, shard: torch.Tensor) -> torch.Tensor:
        return self.weight * (shard.sign() if self.power == 1 else 2.0 * shard)


def build_terms(
    recipe: Recipe,
    device: torch.device,
    matches: Sequence[Match] = (),
    shares: Sequence[float] = (),
    vocab_size: int | None = None,
) -> list[Term]:
    """One for each of the recipe's losses but the penalties; several of a kind are numbered.

    `shares` are the teachers', and `matches` the layers that are drawn to theirs; `vocab_size` is of the tokens that
    language models share with their teachers, where a head has more rows.
    """
    terms: list[Term] = []
    for index, loss in enumerate(losses_of(recipe)):
        own = [match for match in matches if match.loss == index]
        if isinstance(loss, CrossEntropy):
            term = _cross_entropy(loss, device, recipe.kernels)
        elif isinstance(loss, MeanSquaredError):
            term = Term("mse", loss.weight, _examples_weight, _mean_squared_error)
        elif isinstance(loss, Distillation):
            term = _distillation(loss, shares, recipe.kernels, vocab_size)
        elif isinstance(loss, HiddenStates | Embedding):
            term = Term(loss.kind, loss.weight, _tokens_weight, functools.partial(_features, loss, own, shares))
        elif isinstance(loss, Attention):
            compare = _maps if loss.compare == "maps" else functools.partial(_relations, loss.relation_heads)
            term = Term(loss.kind, loss.weight, _tokens_weight, functools.partial(compare, own, shares))
        elif loss.kind in OF_DOMAINS:
            term = domain_term(loss, index, recipe.kernels, weighted=has_weights(recipe))
        else:
            continue
        same = sum(known.name.startswith(term.name) for known in terms)
        terms.append(term if not same else dataclasses.replace(term, name=f"{term.name}_{same + 1}"))
    return terms


def build_penalties(recipe: Recipe, parameter_names: Iterable[str]) -> list[Penalty]:
    """Raises ValueError for a penalty that no trainable parameter matches."""
    names = list(parameter_names)
    penalties: list[Penalty] = []
    for index, loss in enumerate(losses_of(recipe)):
        if not isinstance(loss, L1Penalty | L2Penalty):
            continue
        same = sum(penalty.name.startswith(loss.kind) for penalty in penalties)
        name = loss.kind if not same else f"{loss.kind}_{same + 1}"
        penalty = Penalty(name, loss.weight, tuple(loss.parameters), 1 if isinstance(loss, L1Penalty) else 2)
        for pattern in penalty.patterns:
            if not any(fnmatchcase(parameter, pattern) for parameter in names):
                raise ValueError(
                    f"losses.{index}.parameters: `{pattern}` matches no trainable parameter; "
                    f"the model has e.g. {', '.join(names[:3])}"
                )
        penalties.append(penalty)
    return penalties


def _cross_entropy(loss: CrossEntropy, device: torch.device, kernels: str) -> Term:
    weight = None if loss.class_weights is None else torch.tensor(loss.class_weights, device=device)

    def divisor(batch: MicroBatch) -> torch.Tensor:
        return supervised_weight(batch.labels, weight=weight, token_weights=batch.weights)

    def forward(student: Outputs, _: list[Outputs], batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        settings: dict[str, Any] = {
            "weight": weight,
            "token_weights": batch.weights,
            "label_smoothing": loss.label_smoothing,
            "num_items": num_items,
            "backend": kernels,
        }
        return _cross_entropy_of(student, batch, settings)

    return Term("cross_entropy", loss.weight, divisor, forward)


def _cross_entropy_of(student: Outputs, batch: MicroBatch, settings: dict[str, Any]) -> torch.Tensor:
    """Of the logits, or without them where there is a head."""
    head = student.head
    value: torch.Tensor
    if head is None:
        assert student.logits is not None
        value = cross_entropy(student.logits, batch.labels, **settings)
    else:
        value = linear_cross_entropy(
            head.hidden_states,
            head.weight,
            batch.labels,
            bias=head.bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            rows=batch.supervised,
            **settings,
        )
    return value


def negative_log_likelihood(outputs: Outputs, batch: MicroBatch, kernels: str) -> torch.Tensor:
    """Of a language model's supervised tokens, summed; what perplexity is made of."""
    return _cross_entropy_of(outputs, batch, {"reduction": "sum", "backend": kernels})


def _examples_weight(batch: MicroBatch) -> torch.Tensor:
    return batch.weights.sum(dtype=torch.float64)


def _mean_squared_error(student: Outputs, _: list[Outputs], batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
    """sum_i u_i (y_i - x_i)² / num_items, in fp32."""
    assert student.logits is not None
    scores = precise(student.logits.squeeze(-1))
    errors = (scores - batch.labels.to(scores.dtype)).square() * batch.weights
    return divided(errors.sum(), num_items)


# ---------------------------------------------------------------- from a teacher


def _distillation(loss: Distillation, shares: Sequence[float], kernels: str, vocab_size: int | None) -> Term:
    settings: dict[str, Any] = {
        "temperature": loss.temperature,
        "divergence": loss.divergence,
        "beta": 0.5 if loss.beta is None else loss.beta,
        "backend": kernels,
    }

    def against(student: Outputs, teachers: list[Outputs], batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        if student.head is not None and teachers[0].stored is not None:
            return _distilled_tokens(student.head, teachers[0].stored, batch, num_items, loss.temperature, kernels)
        if student.head is not None:
            return _distilled_heads(student.head, teachers, batch, num_items, {**settings, "vocab_size": vocab_size})
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


def _distilled_heads(
    student: Head, teachers: list[Outputs], batch: MicroBatch, num_items: torch.Tensor, settings: dict[str, Any]
) -> torch.Tensor:
    """Without any logits; of several teachers the plain mean of their soft targets."""
    heads = [teacher.head for teacher in teachers if teacher.head is not None]
    assert len(heads) == len(teachers)
    with zero.gathered([weight for head in heads for weight in (head.weight, head.bias) if weight is not None]):
        found = linear_distillation_loss(
            student.hidden_states,
            student.weight,
            [head.hidden_states for head in heads],
            [head.weight for head in heads],
            student_bias=student.bias,
            teacher_bias=[head.bias for head in heads],
            kd_num_items=num_items,
            mask=_supervised(batch),
            token_weights=batch.weights,
            student_softcap=student.softcap,
            teacher_softcap=heads[0].softcap,
            student_logit_scale=student.logit_scale,
            teacher_logit_scale=heads[0].logit_scale,
            rows=batch.supervised,
            **settings,
        )
    value: torch.Tensor = found.loss
    return value


def _distilled_tokens(
    student: Head,
    stored: StoredTokens,
    batch: MicroBatch,
    num_items: torch.Tensor,
    temperature: float,
    kernels: str,
) -> torch.Tensor:
    """Of the tokens that are learnt, whose classes the teacher has stored."""
    hidden = student.hidden_states.flatten(0, 1)[batch.supervised]  # (R, D)
    found = topk_distillation_loss(
        hidden,
        student.weight,
        stored.ids,
        stored.log_probs,
        teacher_weights=stored.weights,
        tail=stored.tail,
        temperature=temperature,
        bias=student.bias,
        kd_num_items=num_items,
        token_weights=batch.weights.flatten()[batch.supervised],
        softcap=student.softcap,
        logit_scale=student.logit_scale,
        vocab_size=stored.vocabulary,
        backend=kernels,
    )
    value: torch.Tensor = found.loss
    return value


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
