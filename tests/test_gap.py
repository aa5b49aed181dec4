"""How much of the gap to the oracle a method closes: which runs are which, and what is compared."""

from __future__ import annotations

from typing import Any

import pytest

from fleetune.gap import gaps_closed
from fleetune.schema import Recipe

TARGET = {
    "dvd": {
        "train": {"path": "/dvd_unlabeled.jsonl"},
        "validation": {"path": "/dvd.jsonl", "where": {"split": "validation"}},
        "test": {"path": "/dvd.jsonl", "where": {"split": "train"}},
    }
}


def row(validation: float, test: float, *losses: str, train: str = "books", **more: Any) -> tuple[Recipe, Any]:
    values = {
        "name": "tiny",
        "task": "classification",
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": f"/{train}.jsonl", "where": {"split": "train"}}, "target": TARGET},
        "losses": [{"kind": kind} for kind in ("cross_entropy", *losses)],
        **more,
    }
    means = {"validation/dvd/accuracy": validation, "test/dvd/accuracy": test}
    return Recipe.model_validate(values), {key: {"mean": mean} for key, mean in means.items()}


SOURCE_ONLY, ORACLE = row(0.70, 0.99), row(0.90, 0.01, train="dvd")


def test_it_is_of_rows_that_the_oracle_has_not_seen() -> None:
    reweighted = row(0.65, 0.5, reweight={"method": "domain_classifier"})
    found = gaps_closed([ORACLE, row(0.85, 0.5, "mmd"), SOURCE_ONLY, reweighted])
    assert [values["dvd accuracy"] for values in found] == pytest.approx([1.0, 0.75, 0.0, -0.25])


@pytest.mark.parametrize(
    "rows",
    [
        [SOURCE_ONLY, row(0.8, 0.8, "mmd")],
        [ORACLE, row(0.8, 0.8, "mmd")],
        [ORACLE, SOURCE_ONLY, SOURCE_ONLY],
        [ORACLE, row(0.90, 0.5)],
        [],
    ],
    ids=["no oracle", "no source alone", "two of them", "no gap", "nothing"],
)
def test_without_two_ends_there_is_no_gap(rows: list[Any]) -> None:
    assert gaps_closed(rows) == [{}] * len(rows)


def test_another_target_is_another_gap() -> None:
    other, figures = row(0.8, 0.8, "mmd")
    data = other.data.model_copy(update={"target": {"dvd": other.data.target["dvd"].model_copy(update={"test": None})}})
    assert gaps_closed([ORACLE, SOURCE_ONLY, (other.model_copy(update={"data": data}), figures)])[2] == {}


def test_an_oracle_may_have_other_sources_beside() -> None:
    sources = {name: {"train": {"path": f"/{name}.jsonl", "where": {"split": "train"}}} for name in ("dvd", "music")}
    data = {"train": None, "source": sources, "target": TARGET}
    found = gaps_closed([row(0.90, 0.01, data=data), SOURCE_ONLY, row(0.80, 0.5, "mmd")])
    assert [values["dvd accuracy"] for values in found] == pytest.approx([1.0, 0.0, 0.5])
