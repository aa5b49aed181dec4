"""Several named sources as one: their rows one source after the other, in the order of the names.

What is joined has numbers for its rows that go on from source to source, so that each number is still of one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.schema import Recipe
from fleetune.train.cleaning import Rows
from fleetune.train.sources import DataError


@dataclass(frozen=True)
class Part:
    """Of a joined split, what is of one source."""

    name: str
    rows: int
    first: int  # the number that stands for the source's own row 0


def of_role(recipe: Recipe, splits: dict[str, Any], role: str) -> list[str]:
    """The splits that are to be one split of this name."""
    return [split for name in sorted(recipe.data.source) if (split := f"source.{name}.{role}") in splits]


def training_rows(recipe: Recipe, splits: dict[str, Rows]) -> Rows:
    """All that is learnt from, with labels as the data has them.

    Raises DataError where labels of the same number have different names.
    """
    if not recipe.data.source:
        return splits["train"]
    named = of_role(recipe, splits, "train")
    first = splits[named[0]].class_names
    for name in named[1:]:
        if splits[name].class_names != first and recipe.model.label_names is None:
            raise DataError(
                f"data.source: {named[0]} has the classes {_told(first)} and {name} {_told(splits[name].class_names)}; "
                "say which there are, and in what order, by model.label_names"
            )
    return _join([splits[name] for name in named], [0] * len(named))


def _told(names: list[str] | None) -> str:
    return "as its labels say" if names is None else ", ".join(names[:10])


def joined(
    recipe: Recipe, splits: dict[str, Rows], labels: dict[str, npt.NDArray[Any]]
) -> tuple[dict[str, Rows], dict[str, npt.NDArray[Any]], dict[str, list[Part]]]:
    """The splits and their labels with one `train`, `validation` and `test` in the sources' place; and their parts."""
    rows: dict[str, Rows] = {}
    numbers: dict[str, npt.NDArray[Any]] = {}
    parts: dict[str, list[Part]] = {}
    for role in ("train", "validation", "test"):
        if named := of_role(recipe, splits, role):
            sizes = [int(splits[name].index.max()) + 1 for name in named]
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            rows[role] = _join([splits[name] for name in named], starts)
            numbers[role] = np.concatenate([labels[name] for name in named])
            parts[role] = [
                Part(name.split(".")[1], len(splits[name].texts), start)
                for name, start in zip(named, starts, strict=True)
            ]
    others = [name for name in splits if not name.startswith("source.")]
    rows |= {name: splits[name] for name in others}
    numbers |= {name: labels[name] for name in others if name in labels}
    return rows, numbers, parts


def _join(several: list[Rows], starts: list[int]) -> Rows:
    return Rows(
        [text for rows in several for text in rows.texts],
        [label for rows in several for label in rows.labels],
        None if several[0].weights is None else [weight for rows in several for weight in rows.weights or []],
        np.concatenate([rows.index + start for rows, start in zip(several, starts, strict=True)]),
        several[0].class_names,
    )


def spans(parts: list[Part]) -> dict[str, slice]:
    """Each source's rows among the joined ones."""
    ends = np.cumsum([part.rows for part in parts]).tolist()
    return {part.name: slice(end - part.rows, end) for part, end in zip(parts, ends, strict=True)}


def place(parts: list[Part], number: int) -> tuple[str | None, int]:
    """The source that a row is of, and its number there; of a single source None, and the number itself."""
    for part in reversed(parts):
        if number >= part.first:
            return part.name, number - part.first
    return None, number
