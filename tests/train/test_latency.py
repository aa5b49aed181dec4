"""How fast models answer: measured in turn, on rows of their own data, and reported with what they were given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import recipe_values, write_model, write_rows
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fleetune import runs
from fleetune.cli import app
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.train.data import prepare
from fleetune.train.latency import RANDOM_LENGTH, Subject, load, measure, time_in_turn, typical_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, `trained`, with its data, and `orphan`, whose data are gone."""
    folder = tmp_path_factory.mktemp("latency")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 40)
    write_rows(folder / "validation.jsonl", 50, seed=1)
    for name, data in (("trained", {}), ("orphan", {"validation": {"path": "/gone.jsonl"}})):
        AutoModelForSequenceClassification.from_pretrained(folder / "model").save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / name)
        recipe = Recipe.model_validate(recipe_values(folder, name, data=data))
        (folder / name / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder


def test_the_command_measures_shows_and_writes(folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "table.json"
    models = [str(folder / name) for name in ("trained", "orphan")]
    done = CliRunner().invoke(app, ["compare", *models, "--latency", "--threads", "1", "--json", str(written)])
    assert done.exit_code == 0, done.stderr
    for line in ("tokens a row", "CPU ms, batch 1 ", "CPU rows/s, batch 32", "1 thread(s): fp32", "(random)"):
        assert line in done.stdout
    report = runs.read_json(written)
    assert report["machine"]["threads"] == 1
    assert report["machine"]["cpu"]
    assert report["machine"]["load"] >= 0
    for row, source in zip(report["rows"], ("validation", "random"), strict=True):
        assert row["latency"]["tokens"]["source"] == source
        for size in ("1", "32"):
            found = row["latency"]["cpu"][size]
            assert found["milliseconds"] > 0
            assert found["passes"] >= 9
            assert found["quartiles"][0] <= found["milliseconds"] <= found["quartiles"][1]
            assert found["samples_per_second"] == pytest.approx(int(size) * 1e3 / found["milliseconds"])


def test_the_rows_are_those_of_typical_length(folder: Path) -> None:
    recipe = runs.Run(folder / "trained").recipe()
    split = prepare(recipe, AutoTokenizer.from_pretrained(folder / "trained")).splits["validation"]
    median = float(np.median(split.lengths))
    assert abs(typical_batch(split, 1, 0)["input_ids"].shape[1] - median) < 1
    lengths = typical_batch(split, 32, 0)["attention_mask"].sum(1)
    assert len(lengths) == 32
    chosen, all_ = (np.sort(np.abs(np.asarray(each) - median)) for each in (lengths, split.lengths))
    assert np.array_equal(chosen, all_[:32])
    assert typical_batch(split, 64, 0)["input_ids"].shape[0] == 64  # more than there are


def test_without_its_data_a_model_gets_random_tokens_of_one_length(folder: Path) -> None:
    subject = load(folder / "orphan")
    assert subject.source == "random"
    assert subject.batches[32]["input_ids"].shape == (32, min(RANDOM_LENGTH, 32))
    assert subject.model.dtype == torch.float32


def test_models_have_their_turns_round_by_round_forth_and_back() -> None:
    seen: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            if not seen or seen[-1] != self.name:
                seen.append(self.name)
            return input_ids

    subjects = [Subject(Path(name), Named(name), {1: {"input_ids": torch.zeros(1, 4)}}, "test") for name in "abc"]
    seconds = time_in_turn(subjects, 1, torch.device("cpu"), rounds=3)
    assert "".join(seen) == "abc" + "abc" + "ba" + "bc"  # a warm-up, then c and a have two turns running
    assert [len(each) for each in seconds] == [9, 9, 9]


def test_what_cannot_be_measured_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no config.json: no model is there"):
        measure([tmp_path])
    (tmp_path / "recipe.yaml").write_text((folder / "trained" / "recipe.yaml").read_text(), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        measure([tmp_path])
