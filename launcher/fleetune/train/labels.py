"""Labels as the task has them: which classes there are, by what names, and each row's number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.schema import Recipe, is_source
from fleetune.train.cleaning import Rows
from fleetune.train.sources import DataError, row_of

DROP_UNLABELLED = "; drop such rows with the cleaning step drop_empty"


def label_names(recipe: Recipe, train: Rows) -> list[str]:
    """The classes' names in the order of their numbers: from the recipe, the data's own features, or the labels."""
    if recipe.model.label_names is not None:
        return recipe.model.label_names
    column = f"data.label_column = {recipe.data.label_column!r}"
    found = Counter(label for label in train.labels if label is not None)
    if train.class_names is not None:
        names = train.class_names
    elif not found:
        raise DataError(f"{column}: no row of train has a label")
    elif all(isinstance(label, str) for label in found):
        names = sorted(found, key=int if _are_numbers(found) else None)
    elif all(not isinstance(label, str) and float(label).is_integer() for label in found):
        highest = max(int(label) for label in found)
        if highest > 10_000 or min(int(label) for label in found) < 0:
            raise DataError(
                f"{column}: the labels go from {min(found)} to {highest}; "
                "classes are numbered from 0 up. For numbers as such use `task: regression`"
            )
        names = [str(i) for i in range(max(highest + 1, recipe.model.num_labels or 2))]
    else:
        others = [label for label in found if isinstance(label, str)] or [label for label in found if label % 1]
        raise DataError(
            f"{column}: {others[0]!r} stands among the labels, which are then neither all classes' numbers (whole, "
            "from 0) nor all names. For numbers as such use `task: regression`"
        )
    if len(names) < 2:
        raise DataError(f"{column}: all rows of train have the label {names[0]!r}; there is nothing to tell apart")
    wanted = recipe.model.num_labels
    if wanted is not None and len(names) != wanted:
        raise DataError(
            f"model.num_labels = {wanted}: the training data has {len(names)} labels: {', '.join(names[:10])}"
        )
    return names


def _are_numbers(names: Iterable[str]) -> bool:
    return all(re.fullmatch(r"0|[1-9]\d*", name) for name in names)


def _labelled(recipe: Recipe, key: str, number: Any) -> str:
    """Where a label stands: the row's number in its source, also where that was cut in two."""
    if is_source(key) and key.endswith("validation") and recipe.data.validation_fraction is not None:
        train = f"{key.removesuffix('validation')}train"
        row = f"{row_of(number, train)}, which data.validation_fraction puts into validation,"
    else:
        row = row_of(number, key)
    return f"data.label_column = {recipe.data.label_column!r}: {row}"


def to_numbers(rows: Rows, key: str, recipe: Recipe, names: list[str]) -> npt.NDArray[Any]:
    """Labels as the task has them: float32, or classes' numbers.

    A name stands for its place in `names`, and so does a number that the data itself has a known name for. A number is
    a name where the names are numbers (five stars, written "1" to "5"), and otherwise the class's number.
    """
    if None in rows.labels:
        hint = DROP_UNLABELLED if key.endswith("train") else ""
        raise DataError(f"{_labelled(recipe, key, rows.index[rows.labels.index(None)])} has no label{hint}")
    if recipe.task == "regression":
        for i, label in enumerate(rows.labels):
            if isinstance(label, bool) or not isinstance(label, int | float) or not np.isfinite(label):
                raise DataError(f"{_labelled(recipe, key, rows.index[i])} has {label!r}, which is no number")
        return np.asarray(rows.labels, dtype=np.float32)
    number: dict[Any, int] = {name: i for i, name in enumerate(names)}
    if rows.class_names is not None and set(rows.class_names) <= set(names):
        number |= {i: number[name] for i, name in enumerate(rows.class_names)}
    elif rows.class_names is None and _are_numbers(names):
        number |= {int(name): i for i, name in enumerate(names)}
    else:
        number |= {i: i for i in range(len(names))}
    values = np.empty(len(rows.labels), dtype=np.int64)
    for i, label in enumerate(rows.labels):
        value = number.get(label)  # 1, 1.0 and True are one key
        if value is None:
            raise DataError(
                f"{_labelled(recipe, key, rows.index[i])} has {label!r}, which is none of the {len(names)} classes "
                f"({', '.join(names[:10])})"
            )
        values[i] = value
    return values
