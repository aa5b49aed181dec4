"""The loss terms.

A term over examples is (name, weight, divisor, forward): the divisor is counted from the batch without the model; the
loop sums it over all ranks and micro-batches of the window and hands it to forward as `num_items`, and nobody else
scales anything. A penalty is a term over parameters, formed once for each optimizer step on the fp32 shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from fleetune.schema import CrossEntropy, L1Penalty, L2Penalty, MeanSquaredError, Recipe, losses_of
from fleetune.train.batches import MicroBatch
from fleetune_kernels import cross_entropy, supervised_weight


@dataclass(frozen=True)
class Term:
    name: str
    weight: float
    divisor: Callable[[MicroBatch], torch.Tensor]  # -> scalar, before the model runs
    forward: Callable[
        [torch.Tensor, MicroBatch, torch.Tensor], torch.Tensor
    ]  # logits (B, C), batch, num_items -> scalar


@dataclass(frozen=True)
class Penalty:
    """weight * sum |p| or weight * sum p², over the parameters whose names match."""

    name: str
    weight: float
    patterns: tuple[str, ...]
    power: int  # 1 or 2

    def matches(self, parameter: str) -> bool:
        return any(fnmatchcase(parameter, pattern) for pattern in self.patterns)

    def value(self, shard: torch.Tensor) -> torch.Tensor:
        return self.weight * (shard.abs().sum() if self.power == 1 else shard.square().sum())

    def gradient(self, shard: torch.Tensor) -> torch.Tensor:
        return self.weight * (shard.sign() if self.power == 1 else 2.0 * shard)


def build_terms(recipe: Recipe, device: torch.device) -> list[Term]:
    terms = []
    for loss in losses_of(recipe):
        if isinstance(loss, CrossEntropy):
            terms.append(_cross_entropy(loss, device, recipe.kernels))
        elif isinstance(loss, MeanSquaredError):
            terms.append(
                Term("mse", loss.weight, lambda batch: batch.weights.sum(dtype=torch.float64), _mean_squared_error)
            )
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

    def forward(logits: torch.Tensor, batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = cross_entropy(
            logits,
            batch.labels,
            weight=weight,
            token_weights=batch.weights,
            label_smoothing=loss.label_smoothing,
            num_items=num_items,
            backend=kernels,
        )
        return value

    return Term("cross_entropy", loss.weight, divisor, forward)


def _mean_squared_error(logits: torch.Tensor, batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
    """sum_i u_i (y_i - x_i)² / num_items, in fp32."""
    scores = logits.squeeze(-1)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    errors = (scores - batch.labels.to(scores.dtype)).square() * batch.weights
    return errors.sum() / num_items.to(errors.dtype).clamp(min=torch.finfo(errors.dtype).tiny)
