"""Cleaning: what each step does to text, which rows it drops, and that it counts them and drops from train alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fleetune.train.cleaning import Rows, clean
from fleetune.train.sources import DataError


def rows(*texts: str | tuple[str, ...], labels: list[Any] | None = None) -> Rows:
    cells = [(text,) if isinstance(text, str) else text for text in texts]
    return Rows(cells, labels or [0] * len(cells), [float(i) for i in range(len(cells))], np.arange(len(cells)))


@pytest.mark.parametrize(
    ("step", "text", "cleaned"),
    [
        ("unicode_nfc", "cafe\u0301 ﬁ", "café ﬁ"),
        ("unicode_nfkc", "cafe\u0301 ﬁ ①", "café fi 1"),
        ("strip_html", "a<br />b &amp; <b class='x'>c</b><!-- d\n -->", "a b &  c  "),
        ("strip_html", "1 < 2 and 3 > 2, <3", "1 < 2 and 3 > 2, <3"),
        ("collapse_whitespace", " a \t\n\u00a0 b ", "a b"),
    ],
)
def test_steps_on_text_change_every_split_and_count_rows(step: str, text: str, cleaned: str) -> None:
    splits = {"train": rows(text, "same", text), "validation": rows("same", text), "test": rows("same")}
    changed = text != cleaned
    assert clean(splits, [step]) == {step: {"train": 2 * changed, "validation": 1 * changed, "test": 0}}
    assert [texts for (texts,) in splits["train"].texts] == [cleaned, "same", cleaned]
    assert [texts for (texts,) in splits["validation"].texts] == ["same", cleaned]


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        ("drop_empty", [0, 2, 5, 6, 7]),
        ("drop_duplicates", [0, 1, 2, 3, 6]),
        ("drop_leaked", [0, 1, 3, 4, 5, 7]),
    ],
)
def test_steps_that_drop_rows_touch_train_alone(step: str, kept: list[int]) -> None:
    texts = ["a", "", "b", " \n", "", "a", "c", "a"]
    held_out = ["b", "b", "", "c"]
    splits = {"train": rows(*texts), "validation": rows(*held_out[:2]), "test": rows(*held_out[3:])}
    assert clean(splits, [step]) == {step: {"train": len(texts) - len(kept)}}
    train = splits["train"]
    assert train.texts == [(texts[i],) for i in kept]
    assert train.index.tolist() == kept
    assert train.weights == [float(i) for i in kept]
    assert splits["validation"].texts == [("b",), ("b",)]


def test_drop_empty_drops_rows_without_a_label() -> None:
    splits = {"train": rows("a", "b", "c", labels=[0, None, ""])}
    assert clean(splits, ["drop_empty"]) == {"drop_empty": {"train": 1}}
    assert splits["train"].labels == [0, ""]


def test_of_a_pair_both_count() -> None:
    pairs = [("a", "b"), ("a", ""), ("b", "a"), ("a", "b")]
    splits = {"train": rows(*pairs), "test": rows(("b", "a"))}
    assert clean(splits, ["drop_empty", "drop_duplicates", "drop_leaked"]) == {
        "drop_empty": {"train": 1},
        "drop_duplicates": {"train": 1},
        "drop_leaked": {"train": 1},
    }
    assert splits["train"].texts == [("a", "b")]


def test_a_row_of_language_data_is_also_whose_its_texts_are_and_what_is_no_text() -> None:
    def said(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text, "id": next(numbers)} for role, text in turns]}

    numbers = itertools.count()
    a, b, again = (said((one, "a"), (other, "b")) for one, other in (("user", "bot"), ("bot", "user"), ("user", "bot")))
    scored = [{"question": "a", "answer": 4}, {"question": "a", "answer": 5}, {"question": "a", "answer": 4}]
    given = {"train": rows(*[("a", "b")] * 3, *[("a",)] * 3, labels=[a, b, again, *scored])}
    splits = {**given, "validation": rows(("a", "b"), labels=[{"prompt": "a", "completion": "b"}])}
    assert clean(splits, ["drop_duplicates"]) == {"drop_duplicates": {"train": 2}}
    assert splits["train"].labels == [a, b, *scored[:2]]
    assert clean(splits, ["drop_leaked"]) == {"drop_leaked": {"train": 2}}  # whatever the format they stand in
    assert splits["train"].labels == scored[:2]


def test_steps_run_in_their_order() -> None:
    steps = ["collapse_whitespace", "drop_duplicates"]
    for order, kept in ((steps, ["a b"]), (steps[::-1], ["a b", "a b"])):
        splits = {"train": rows("a b", "a  b")}
        clean(splits, order)
        assert [texts for (texts,) in splits["train"].texts] == kept


def test_cleaning_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.cleaning = \['drop_empty'\]: leaves no training rows"):
        clean({"train": rows("", " ")}, ["drop_empty"])


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_duplicate_may_stand_in_another_source_and_the_first_by_name_stays(order: tuple[str, str]) -> None:
    texts = {"a": ("x", "y", "x"), "b": ("y", "z")}
    splits = {f"source.{name}.train": rows(*texts[name]) for name in order}
    splits["source.a.test"], splits["target.far.train"] = rows("z"), rows("x", "w", "w")
    touched = {"source.a.train": 1, "source.b.train": 1, "target.far.train": 1}
    assert clean(splits, ["drop_duplicates"]) == {"drop_duplicates": touched}
    assert splits["source.a.train"].texts == [("x",), ("y",)]
    assert splits["source.b.train"].texts == [("z",)]
    assert splits["target.far.train"].texts == [("x",), ("w",)]
