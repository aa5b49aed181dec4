"""How much of the gap between the source alone and the target's own labels a method closes. Nothing here imports torch.

Of runs with the same `data.target`: the oracle is trained on rows of a target's labelled file; the source alone has no
loss between domains and no `reweight`. On a split that the oracle is not trained on, by the metric that chooses
checkpoints, closed = (method - source alone) / (oracle - source alone).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fleetune.data_section import Source
from fleetune.losses import OF_DOMAINS
from fleetune.schema import Recipe, best_metric_of, training_sources

Figures = dict[str, dict[str, Any]]  # by name, as `comparison.summary` has them


def gaps_closed(rows: Sequence[tuple[Recipe, Figures]]) -> list[dict[str, float]]:
    """For each row its figures, as `DOMAIN METRIC`; none where there is not one oracle and one source alone."""
    found: list[dict[str, float]] = [{} for _ in rows]
    for name, targets in sorted({(name, _targets(recipe)) for recipe, _ in rows for name in recipe.data.target}):
        group = [i for i, (recipe, _) in enumerate(rows) if _targets(recipe) == targets]
        oracles = [i for i in group if is_oracle(rows[i][0], name)]
        plain = [i for i in group if i not in oracles and not _adapts(rows[i][0])]
        plain = [i for i in plain if not rows[i][0].model.from_scratch]
        if len(oracles) != 1 or len(plain) != 1:
            continue
        recipe = rows[oracles[0]][0]
        for split in _unseen(recipe, name):
            key = f"{split}/{name}/{best_metric_of(recipe)}"
            means = {i: rows[i][1].get(key, {}).get("mean") for i in group}
            low, high = means[plain[0]], means[oracles[0]]
            if low is not None and high is not None and low != high:
                line = f"{name} {best_metric_of(recipe)}"
                for i, mean in means.items():
                    if mean is not None:
                        found[i][line] = (mean - low) / (high - low)
                break
    return found


def is_oracle(recipe: Recipe, name: str) -> bool:
    target = recipe.data.target[name]
    labelled = [source for source in (target.validation, target.test) if source is not None]
    return any(_place(train) == _place(source) for train in training_sources(recipe) for source in labelled)


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
