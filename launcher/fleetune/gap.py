"""How much of the gap between the source alone and the target's own labels a method closes. Nothing here imports torch.

Of runs with the same `data.target`: the oracle is trained on rows of a target's labelled file; the source alone has no
loss between domains and no `reweight`; both start from pretrained weights where any run does. On a split that the
oracle is not trained on, by the metric that chooses checkpoints,
closed = (method - source alone) / (oracle - source alone).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fleetune.data_section import Source
from fleetune.losses import OF_DOMAINS
from fleetune.schema import Recipe, best_metric_of, training_sources

Figures = dict[str, dict[str, Any]]  # by name, as `comparison.summary` has them


def gaps_closed(rows: Sequence[tuple[Recipe, Figures]]) -> list[dict[str, float]]:
    """For each row its figures, as `DOMAIN METRIC`; none where there is not one oracle and one source alone."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for one in _comparisons([recipe for recipe, _ in rows]):
        if len(one.oracles) != 1 or len(one.plain) != 1:
            continue
        recipe = rows[one.oracles[0]][0]
        for split in _unseen(recipe, one.target):
            key = f"{split}/{one.target}/{best_metric_of(recipe)}"
            means = {i: rows[i][1].get(key, {}).get("mean") for i in one.rows}
            low, high = means[one.plain[0]], means[one.oracles[0]]
            if low is not None and high is not None and low != high:
                line = f"{one.target} {best_metric_of(recipe)}"
                for i, mean in means.items():
                    if mean is not None:
                        found[i][line] = (mean - low) / (high - low)
                break
    return found


def missing_ends(recipes: Sequence[Recipe]) -> list[str]:
    """A line for each target that an oracle is here for and no gap can be told of."""
    return [
        f"no gap to close is told of {one.target}: that takes one run (of one or several seeds) trained on its labels "
        f"and one on the source alone; here are {len(one.oracles)} and {len(one.plain)}"
        for one in _comparisons(recipes)
        if one.oracles and (len(one.oracles) != 1 or len(one.plain) != 1)
    ]


@dataclass(frozen=True)
class _Comparison:
    """Rows, by number, that have the same `data.target`."""

    target: str
    rows: list[int]
    oracles: list[int]
    plain: list[int]  # the source alone


def _comparisons(recipes: Sequence[Recipe]) -> Iterator[_Comparison]:
    for name, targets in sorted({(name, _targets(recipe)) for recipe in recipes for name in recipe.data.target}):
        rows = [i for i, recipe in enumerate(recipes) if _targets(recipe) == targets]
        pretrained = [i for i in rows if not recipes[i].model.from_scratch] or rows
        oracles = [i for i in pretrained if is_oracle(recipes[i], name)]
        plain = [i for i in pretrained if not is_oracle(recipes[i], name) and not _adapts(recipes[i])]
        yield _Comparison(name, rows, oracles, plain)


def is_oracle(recipe: Recipe, name: str) -> bool:
    """Whether it trains on the file of the target's labelled rows; where several domains stand in it, on the target's:
    `where` says the same of them as of two of the target's own sets."""
    target = recipe.data.target[name]
    labelled = [source for source in (target.validation, target.test) if source is not None]
    own = [*labelled, target.train]
    domain = {
        (key, str(value))
        for i, source in enumerate(own)
        for key, value in source.where.items()
        if any(key in other.where and other.where[key] == value for other in own[i + 1 :])
    }
    return any(
        _place(train) == _place(source) and all(str(train.where.get(key, value)) == value for key, value in domain)
        for train in training_sources(recipe)
        for source in labelled
    )


def _place(source: Source) -> tuple[str | None, ...]:
    return source.path, source.name, source.split


def _adapts(recipe: Recipe) -> bool:
    return recipe.reweight is not None or any(loss.kind in OF_DOMAINS for loss in recipe.losses)


def _targets(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json")["data"]["target"], sort_keys=True)


def _unseen(oracle: Recipe, name: str) -> list[str]:
    """The splits that have other rows than the oracle's training data."""

    def apart(source: Source) -> bool:
        """Of another file or split, or of rows that have another value in one column."""
        return all(
            _place(source) != _place(train)
            or any(source.where[key] != train.where[key] for key in source.where.keys() & train.where.keys())
            for train in training_sources(oracle)
        )

    splits = {"test": oracle.data.target[name].test, "validation": oracle.data.target[name].validation}
    return [split for split, source in splits.items() if source is not None and apart(source)]
