"""`fleetune eval`: a model on data of the recipe or others, and faults told in the words that were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_values, write_model, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.train.data import DataError
from fleetune.train.evaluate_folder import evaluate_folder

ROW = "data.label_column = 'label': row 1 of --data (counted from 0) "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as training leaves one, beside the data that it was trained on."""
    folder = tmp_path_factory.mktemp("evaluated")
    encoder = write_model(folder / "model")
    write_rows(folder / "train.jsonl", 40)
    write_rows(folder / "validation.jsonl", 10, seed=1)
    write_trained(folder, encoder, folder / "trained", {})
    return folder


def write_trained(folder: Path, encoder: Path, model: Path, data: dict[str, Any]) -> Path:
    values = recipe_values(folder, "tiny", data=data)
    values["data"] = {key: value for key, value in values["data"].items() if value is not None}
    names = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    AutoModelForSequenceClassification.from_pretrained(encoder, **names).save_pretrained(model)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(model)
    (model / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(values)), encoding="utf-8")
    return model


def refusal(model: Path, data: Path | str | None = None, split: str | None = None) -> str:
    with pytest.raises((RecipeError, DataError)) as caught:
        evaluate_folder(model, None if data is None else str(data), split)
    return str(caught.value)


def test_a_split_of_the_recipe_and_the_same_rows_as_a_file(folder: Path) -> None:
    found = evaluate_folder(folder / "trained", None, None)
    assert (found["data"], found["rows"]) == ("validation", 10)
    file = str(folder / "validation.jsonl")
    assert evaluate_folder(folder / "trained", file, None) == found | {"data": file}


def test_a_long_evaluation_says_how_far_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_folder(folder / "trained", None, None)
    assert "evaluated" not in capsys.readouterr().err
    monkeypatch.setattr("fleetune.train.evaluate_folder.TELL_SECONDS", 0.0)
    evaluate_folder(folder / "trained", None, None)
    assert "evaluated 10 of 10 rows\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.jsonl", None, "--data {file}: there is no such file"),
        ("rows.xlsx", "text", "--data {file}: should be a file that ends in .tsv, .csv, .json, .jsonl, .parquet"),
        ("broken.jsonl", "{", "--data '{file}': cannot be read: line 1: "),
        ("empty.jsonl", "", "--data '{file}': has no rows"),
        ("unlabelled.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": null}\n', ROW + "has no label"),
        ("other.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 7}\n', ROW + "has 7, which is none of the"),
    ],
    ids=lambda value: value if value and value.endswith(("l", ".xlsx")) else "",
)
def test_a_fault_of_other_data_names_the_option(
    folder: Path, tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text, encoding="utf-8")
    found = refusal(folder / "trained", file)
    assert found.startswith(said.format(file=file))
    assert "train" not in found.replace(str(file), "")
    assert "drop_empty" not in found


def test_a_split_is_for_hub_data(folder: Path) -> None:
    file = folder / "validation.jsonl"
    assert refusal(folder / "trained", file, "test") == (
        f"--split test: is for a hub data set, and --data {file} is a file: leave it out"
    )


def test_a_split_that_the_recipe_does_not_have(folder: Path, tmp_path: Path) -> None:
    assert refusal(folder / "trained", None, "test") == "--split test: the recipe has train, validation"
    alone = write_trained(folder, folder / "model", tmp_path / "alone", {"validation": None})
    assert refusal(alone) == f"{alone}: its recipe has neither test nor validation data; give --data FILE"
