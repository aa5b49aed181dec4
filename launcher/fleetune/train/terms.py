"""What a loss term is, for the loop and for those that make one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch


@dataclass(frozen=True)
class Features:
    """What is compared of the two domains: this rank's rows of one micro-batch, or of several."""

    source: list[torch.Tensor]  # of each layer (n, D_l)
    target: list[torch.Tensor]  # (n, D_l)
    labels: torch.Tensor  # (n,) the source's
    weights: torch.Tensor  # (n,) the source's
    probabilities: torch.Tensor  # (n, C) the target's, by the model itself; without gradient
    everyone: tuple[int, ...]  # the rows of either side of every rank

    @property
    def layers(self) -> list[torch.Tensor]:
        return [*self.source, *self.target]


def join(pieces: Sequence[Features]) -> Features:
    def rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))

    return Features(
        [rows(layer) for layer in zip(*(piece.source for piece in pieces), strict=True)],
        [rows(layer) for layer in zip(*(piece.target for piece in pieces), strict=True)],
        rows([piece.labels for piece in pieces]),
        rows([piece.weights for piece in pieces]),
        rows([piece.probabilities for piece in pieces]),
        tuple(map(sum, zip(*(piece.everyone for piece in pieces), strict=True))),
    )


@dataclass(frozen=True)
class Statistic:
    """A loss of two sets of rows as a whole: over ranks, and over a window's micro-batches if the recipe says so."""

    collect: Callable[[Outputs, MicroBatch], Features]
    compare: Callable[[Features], torch.Tensor]  # a collective: of all ranks' rows, with this rank's share of gradient
    least: int  # rows on a side, below which it is 0

    def value(self, features: Features) -> torch.Tensor:
        if sum(features.everyone) < self.least:
            return torch.zeros((), device=features.labels.device)
        return self.compare(features)


@dataclass(frozen=True)
class Pair:
    """A distillation and the cross-entropy of the labels, which share the logits of a language model's head."""

    other: str  # the term of the cross-entropy
    forward: Callable[
        [Outputs, list[Outputs], MicroBatch, tuple[torch.Tensor, torch.Tensor], tuple[float, float]],
        tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ]  # as a term's, but with num_items and weights of both -> their weighted sum; each one's value, detached


@dataclass(frozen=True)
class Term:
    name: str
    weight: float
    divisor: Callable[[MicroBatch], torch.Tensor]  # -> scalar, before the model runs
    forward: Callable[
        [Outputs, list[Outputs], MicroBatch, torch.Tensor], torch.Tensor
    ]  # the student's, each teacher's, batch, num_items -> scalar
    schedule: str = "constant"
    statistic: Statistic | None = None  # where it is to be formed over the whole window
    reversal: str | None = None  # the discriminator whose reversed gradient has the weight; the term itself has none
    pair: Pair | None = None  # with which a distillation is formed in one pass

    def weight_at(self, done: float) -> float:
        """When this share of training is done."""
        grown = {"constant": 1.0, "linear": done, "sigmoid": 2 / (1 + math.exp(-10 * done)) - 1}
        return self.weight * grown[self.schedule]


def precise(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def divided(total: torch.Tensor, num_items: torch.Tensor) -> torch.Tensor:
    """0 where nothing counts."""
    return total / num_items.to(total.dtype).clamp(min=torch.finfo(total.dtype).tiny)
