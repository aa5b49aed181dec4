"""What a micro-batch's terms come to, and those over a whole accumulation window that are no sums over micro-batches.

For these there is gradient caching: a first pass without gradient collects every micro-batch's features; the loss and
its gradient by them are formed of all at once; then each micro-batch runs as ever, with the random states it had, and
its features are multiplied by that gradient. One forward pass more, and the features of the window. Gao et al., arXiv
2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.terms import Features, Term, divided, join


@dataclass(frozen=True)
class Cached:
    """Of one term and one micro-batch."""

    loss: torch.Tensor  # over the window, of all ranks; alike on each
    gradients: list[torch.Tensor]  # by the layers of this micro-batch's features


@dataclass(frozen=True)
class Replay:
    """What one micro-batch's second pass takes from the first."""

    random_state: tuple[torch.Tensor, torch.Tensor | None] | None = None  # None: there was no first pass
    cached: dict[str, Cached] | None = None  # by the term's name

    def restore(self) -> None:
        """Draws dropout as the first pass did."""
        if self.random_state is not None:
            torch.set_rng_state(self.random_state[0])
            if self.random_state[1] is not None:
                torch.cuda.set_rng_state(self.random_state[1])


def look_ahead(
    forward: Callable[[MicroBatch, Callable[[Outputs], list[Features]]], list[Features]],
    terms: list[Term],
    window: list[MicroBatch],
) -> list[Replay]:
    """One for each micro-batch; without a first pass where no term asks for one, or there is but one micro-batch, whose
    loss is formed in its own pass. A collective."""
    asking = {term.name: term.statistic for term in terms if term.statistic is not None}
    if not asking or len(window) == 1:
        return [Replay()] * len(window)
    states, seen = [], []
    with torch.no_grad():
        for micro in window:
            states.append(_random_state())

            def collect(outputs: Outputs, micro: MicroBatch = micro) -> list[Features]:
                return [statistic.collect(outputs, micro) for statistic in asking.values()]

            seen.append(forward(micro, collect))
    found: list[dict[str, Cached]] = [{} for _ in window]
    for number, (name, statistic) in enumerate(asking.items()):
        leaves = [_leaves(features[number]) for features in seen]
        loss = statistic.value(join(leaves))
        flat = [layer for features in leaves for layer in features.layers]
        gradients = torch.autograd.grad(loss, flat) if loss.requires_grad else [torch.zeros_like(leaf) for leaf in flat]
        per_micro = len(flat) // len(window)
        for at, cached in enumerate(found):
            cached[name] = Cached(loss.detach(), list(gradients[at * per_micro : (at + 1) * per_micro]))
    return [Replay(state, cached) for state, cached in zip(states, found, strict=True)]


def weighted(
    terms: Sequence[Term],
    done: float,
    taught: list[Outputs],
    micro: MicroBatch,
    replay: Replay,
    counts: Sequence[torch.Tensor] | torch.Tensor,
    outputs: Outputs,
) -> torch.Tensor:
    """(terms + 1,): each one's loss times its weight when this share of training is done; and their sum, which alone
    has the gradient."""
    names = [term.name for term in terms]
    weights = [1.0 if term.reversal is not None else term.weight_at(done) for term in terms]
    values: dict[str, torch.Tensor] = {}
    summed: list[torch.Tensor] = []
    for i, term in enumerate(terms):
        if term.pair is not None:
            other = names.index(term.pair.other)
            both = (counts[i], counts[other]), (weights[i], weights[other])
            together, own, others = term.pair.forward(outputs, taught, micro, *both)
            values[term.name], values[names[other]] = weights[i] * own, weights[other] * others
            summed.append(together)
    for i, term in enumerate(terms):
        if replay.cached is not None and term.name in replay.cached:
            value = replayed(term, replay.cached[term.name], outputs, micro, counts[i])
        elif term.name not in values:
            value = term.forward(outputs, taught, micro, counts[i])
        else:
            continue
        values[term.name] = weights[i] * value
        summed.append(values[term.name])
    return torch.stack([*(values[name].detach() for name in names), torch.stack(summed).sum()])


def replayed(term: Term, cached: Cached, student: Outputs, batch: MicroBatch, num_items: torch.Tensor) -> torch.Tensor:
    """The loss's value, of which each rank's micro-batch counts an equal part, with this micro-batch's gradient."""
    assert term.statistic is not None
    layers = term.statistic.collect(student, batch).layers
    share = torch.stack([(layer * by).sum() for layer, by in zip(layers, cached.gradients, strict=True)]).sum()
    return divided(cached.loss, num_items) + (share - share.detach())


def _leaves(features: Features) -> Features:
    source, target = (
        [layer.detach().requires_grad_() for layer in side] for side in (features.source, features.target)
    )
    return replace(features, source=source, target=target)


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
