"""The texts of a split before they are tokenised, and the recipe's cleaning steps over them."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.schema import is_source
from fleetune.train.sources import DataError, Ints

NAMES = ("role", "from")  # keys of language data that say whose a text is: no text themselves
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", re.DOTALL)


def _strip_html(text: str) -> str:
    return html.unescape(_TAG.sub(" ", text))


NORMALISE: dict[str, Callable[[str], str]] = {
    "unicode_nfc": lambda text: unicodedata.normalize("NFC", text),
    "unicode_nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "strip_html": _strip_html,
    "collapse_whitespace": lambda text: " ".join(text.split()),
}


@dataclass
class Rows:
    """Texts of one split, before tokenising; `index` is each row's number in its source."""

    texts: list[tuple[str, ...]]
    labels: list[Any]
    weights: list[float] | None
    index: Ints
    class_names: list[str] | None = None  # what the labels' numbers mean, where the data itself says it

    def only(self, kept: list[int]) -> Rows:
        weights = [self.weights[i] for i in kept] if self.weights is not None else None
        texts, labels = [self.texts[i] for i in kept], [self.labels[i] for i in kept]
        return Rows(texts, labels, weights, self.index[np.asarray(kept, dtype=np.int64)], self.class_names)


def clean(splits: dict[str, Rows], steps: list[str]) -> dict[str, dict[str, int]]:
    """Runs the steps in order, in place; returns how many rows each touched, by split.

    Steps that change text run on every split; those that drop rows run on the training splits alone, so that
    validation and test stay the sets that others report on. Those are `train` or the sources' `source.NAME.train`, and
    the targets' `target.NAME.train`, whose rows have no label to be empty. The sources are learnt from as one set, so a
    row is also a duplicate of one in another source; the first in the order of their names stays.
    """
    report: dict[str, dict[str, int]] = {}
    for step in steps:
        touched: dict[str, int] = {}
        if step in NORMALISE:
            for name, rows in splits.items():
                touched[name] = 0
                for i, texts in enumerate(rows.texts):
                    changed = tuple(NORMALISE[step](text) for text in texts)
                    if changed != texts:
                        rows.texts[i] = changed
                        touched[name] += 1
        else:
            trained = sorted(
                (name for name in splits if name.endswith("train")), key=lambda name: (not is_source(name), name)
            )
            held_out = {texts for name, rows in splits.items() if name not in trained for texts in rows.texts}
            of_sources: set[tuple[Any, ...]] = set()
            for name in trained:
                seen = of_sources if is_source(name) else set()
                kept = _kept(splits[name], step, held_out, seen, is_labelled=is_source(name))
                touched[name] = len(splits[name].texts) - len(kept)
                splits[name] = splits[name].only(kept)
        report[step] = touched
    for name, rows in splits.items():
        if not rows.texts:
            what = "training rows" if name == "train" else f"rows of {name}"
            raise DataError(f"data.cleaning = {steps}: leaves no {what}")
    return report


def _said_by(label: Any) -> tuple[Any, ...]:
    """Whose a row's texts are, in language data, and the cells that are numbers; nothing of others, whose label may
    differ."""
    numbers = [cell for cell in label.values() if isinstance(cell, int | float)] if isinstance(label, dict) else []
    return (*_roles(label), *numbers)


def _roles(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (value[name] for name in NAMES if isinstance(value.get(name), str))
        yield from (role for inner in value.values() for role in _roles(inner))
    elif isinstance(value, list):
        yield from (role for inner in value for role in _roles(inner))


def _kept(
    rows: Rows, step: str, held_out: set[tuple[str, ...]], seen: set[tuple[Any, ...]], *, is_labelled: bool
) -> list[int]:
    """The places of those that a step leaves; drop_duplicates adds them to those `seen`."""
    kept = []
    for i, texts in enumerate(rows.texts):
        if step == "drop_empty":
            drop = (is_labelled and rows.labels[i] is None) or not all(text.strip() for text in texts)
        elif step == "drop_leaked":
            drop = texts in held_out
        else:
            content = (texts, _said_by(rows.labels[i]))
            drop = content in seen
            seen.add(content)
        if not drop:
            kept.append(i)
    return kept
