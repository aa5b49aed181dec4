"""The loss terms.

A term over examples is (name, weight, divisor, forward): the divisor is counted from the batch without the model; the
loop sums it over all ranks and micro-batches of the window and hands it to forward as `num_items`, and nobody else
scales anything. A penalty is a term over parameters, formed once for each optimizer step on the fp32 shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

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
from fleetune.train.alignment import PROJECTIONS, Match, Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.domains import DISCRIMINATORS, domain_term
from fleetune.train.teacher_terms import alignment_term, distillation_term, pair_of
from fleetune.train.terms import Term, divided, precise
from fleetune_kernels import (
    cross_entropy,
    linear_cross_entropy,
    supervised_weight,
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
            term = distillation_term(loss, shares, recipe.kernels, vocab_size)
        elif isinstance(loss, HiddenStates | Embedding | Attention):
            term = alignment_term(loss, own, shares)
        elif loss.kind in OF_DOMAINS:
            term = domain_term(loss, index, recipe.kernels, weighted=has_weights(recipe))
        else:
            continue
        same = sum(known.name.startswith(term.name) for known in terms)
        terms.append(term if not same else dataclasses.replace(term, name=f"{term.name}_{same + 1}"))
    return [dataclasses.replace(term, pair=pair_of(recipe, term, vocab_size)) for term in terms]


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
