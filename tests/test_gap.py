"""How much of the gap to the oracle a method closes: which runs are which, and what is compared."""

from __future__ import annotations

from typing import Any

import pytest

from fleetune.gap import gaps_closed, missing_ends
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
    ("rows", "said"),
    [
        ([SOURCE_ONLY, row(0.8, 0.8, "mmd")], None),
        ([ORACLE, row(0.8, 0.8, "mmd")], "here are 1 and 0"),
        ([ORACLE, SOURCE_ONLY, SOURCE_ONLY], "here are 1 and 2"),
        ([ORACLE, row(0.90, 0.5)], None),
        ([], None),
    ],
    ids=["no oracle", "no source alone", "two of them", "no gap", "nothing"],
)
def test_without_two_ends_there_is_no_gap(rows: list[Any], said: str | None) -> None:
    assert gaps_closed(rows) == [{}] * len(rows)
    lines = missing_ends([recipe for recipe, _ in rows])
    assert [line.rpartition("; ")[2] for line in lines] == ([said] if said else [])


def test_what_began_without_pretrained_weights_is_at_no_end_of_it() -> None:
    model = {"model_name_or_path": "none", "from_scratch": True}
    baselines = [row(0.5, 0.5, model=model), row(0.6, 0.01, train="dvd", model=model)]
    found = gaps_closed([ORACLE, SOURCE_ONLY, row(0.85, 0.5, "mmd"), *baselines])
    assert [values["dvd accuracy"] for values in found] == pytest.approx([1.0, 0.0, 0.75, -1.0, -0.5])
    found = gaps_closed([*baselines, row(0.55, 0.5, "mmd", model=model)])  # nor are there others
    assert [values["dvd accuracy"] for values in found] == pytest.approx([0.0, 1.0, 0.5])


def test_the_domains_may_stand_in_one_file() -> None:
    def rows_of(domain: str, split: str) -> dict[str, Any]:
        return {"path": "/reviews.jsonl", "where": {"domain": domain, "split": split}}

    target = {"dvd": {"train": rows_of("dvd", "unlabelled"), "test": rows_of("dvd", "test")}}
    trained_on = [{"train": rows_of(domain, "train"), "target": target} for domain in ("books", "dvd", "books")]
    plain, oracle, adapted = (
        row(0.5, test, *losses, data=data)
        for test, losses, data in zip((0.7, 0.9, 0.8), ([], [], ["mmd"]), trained_on, strict=True)
    )
    found = gaps_closed([plain, oracle, adapted])
    assert [values["dvd accuracy"] for values in found] == pytest.approx([0.0, 1.0, 0.5])


def test_another_target_is_another_gap() -> None:
    other, figures = row(0.8, 0.8, "mmd")
    data = other.data.model_copy(update={"target": {"dvd": other.data.target["dvd"].model_copy(update={"test": None})}})
    assert gaps_closed([ORACLE, SOURCE_ONLY, (other.model_copy(update={"data": data}), figures)])[2] == {}


def test_an_oracle_may_have_other_sources_beside() -> None:
    sources = {name: {"train": {"path": f"/{name}.jsonl", "where": {"split": "train"}}} for name in ("dvd", "music")}
    data = {"train": None, "source": sources, "target": TARGET}
    found = gaps_closed([row(0.90, 0.01, data=data), SOURCE_ONLY, row(0.80, 0.5, "mmd")])
    assert [values["dvd accuracy"] for values in found] == pytest.approx([1.0, 0.0, 0.5])
