"""`reweight`: weights by row from the pretrained encoder's features, kept, told, and used in every loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import recipe_values, write_model, write_rows

from fleetune import runs
from fleetune.recipe import load_recipe
from fleetune.schema import Recipe, RecipeError
from fleetune.train import source_weights
from fleetune.train.data import prepare
from fleetune.train.distributed import World
from fleetune.train.model import load_tokenizer
from fleetune.train.prepare import prepare_recipe

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of two kinds of text, one of which is the target's."""
    folder = tmp_path_factory.mktemp("weights")
    write_model(folder / "model")
    write_rows(folder / "validation.jsonl", 4, seed=1)
    write_rows(folder / "plain.jsonl", 60)
    rows = [json.loads(line) for line in (folder / "plain.jsonl").read_text(encoding="utf-8").splitlines()]
    near = [{**row, "text": f"film plot {row['text']} plot film"} for row in rows[:20]]
    lines = {"train": near + rows[20:], "target": [{"text": f"film plot {row['text']} plot film"} for row in rows[30:]]}
    for name, some in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


def recipe(folder: Path, method: str = "domain_classifier", **more: Any) -> Recipe:
    values = recipe_values(
        folder,
        f"weights-{method}",
        data={"target": {"far": {"train": {"path": str(folder / "target.jsonl")}}}},
        reweight={"method": method, **more},
    )
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    monkeypatch.setenv("FLEETUNE_CACHE", str(workspace / "cache"))


@pytest.mark.parametrize("method", ["domain_classifier", "kernel_mean_matching"])
def test_rows_that_look_like_the_target_weigh_more_and_the_mean_is_1(workspace: Path, method: str) -> None:
    found = recipe(workspace, method, clip=3.0)
    weights = source_weights.fitted(found, prepare(found, load_tokenizer(found)))
    assert len(weights) == 60
    assert weights.mean() == pytest.approx(1.0)
    assert weights.max() <= 3.0 * (1 + 1e-9)
    assert weights[:20].mean() > 1.5 * weights[20:].mean()


def test_preparing_tells_how_many_rows_are_left_and_warns_where_they_are_few(workspace: Path) -> None:
    report = prepare_recipe(recipe(workspace))
    told = report["reweight"]
    assert told["method"] == "domain_classifier"
    assert 1 <= told["effective_sample_size"] <= told["rows"] == 60
    few = {"method": "domain_classifier", "rows": 100, "effective_sample_size": 24.0, "at_the_highest": 0}
    assert "as much as 24 of equal weight" in str(source_weights.warning(few))
    assert source_weights.warning({**few, "effective_sample_size": 25.0}) is None
    assert ("warning" in report) == (told["effective_sample_size"] < 15)


def test_what_is_stored_is_not_fitted_again(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe(workspace)
    data = prepare(found, load_tokenizer(found))
    first = source_weights.fitted(found, data)

    def refuse(*_: Any) -> Any:
        raise AssertionError("fitted again")

    monkeypatch.setattr(source_weights, "_fit", refuse)
    assert np.array_equal(source_weights.fitted(found, data), first)
    with pytest.raises(AssertionError, match="fitted again"):
        source_weights.fitted(recipe(workspace, clip=2.0), data)


def test_a_run_keeps_its_weights_by_row_with_a_plot(workspace: Path, tmp_path: Path) -> None:
    found = recipe(workspace)
    data, run = prepare(found, load_tokenizer(found)), runs.Run(tmp_path)
    weighted = source_weights.weighted(found, data, run, ALONE)
    source_weights.write(found, weighted, run)
    lines = [json.loads(line) for line in (tmp_path / "source_weights.jsonl").read_text(encoding="utf-8").splitlines()]
    train = weighted.splits["train"]
    assert train.weights is not None
    assert [line["row"] for line in lines] == train.index.tolist()
    assert np.array_equal(np.array([line["weight"] for line in lines], dtype=np.float32), train.weights)
    assert (tmp_path / "source_weights.png").read_bytes().startswith(b"\x89PNG")


def test_from_its_first_checkpoint_on_the_weights_are_the_runs_own(workspace: Path, tmp_path: Path) -> None:
    first, mended = recipe(workspace, clip=3.0), recipe(workspace, clip=1.5)
    data, run = prepare(first, load_tokenizer(first)), runs.Run(tmp_path)
    source_weights.write(first, source_weights.weighted(first, data, run, ALONE), run)
    anew = source_weights.weighted(mended, data, run, ALONE)  # it failed before it had saved, and the recipe was mended
    source_weights.write(mended, anew, run)
    weights = anew.splits["train"].weights
    assert weights is not None
    assert weights.max() == pytest.approx(1.5)
    stored = tmp_path / "source_weights.jsonl"
    lines = [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()]
    assert [line["weight"] for line in lines] == weights.tolist()
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    stored.write_text("".join(json.dumps(line | {"weight": 2.0}) + "\n" for line in lines), encoding="utf-8")
    again = source_weights.weighted(mended, data, run, ALONE).splits["train"].weights
    assert again is not None
    assert set(again.tolist()) == {2.0}


def test_matching_that_needs_more_memory_than_there_is_is_an_error(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recipe(workspace, "kernel_mean_matching", clip=2.5)
    monkeypatch.setattr(source_weights, "available_memory", lambda: 8 * 60**2 - 1)
    with pytest.raises(RecipeError, match=r"60 rows of train need 0\.0 GB of memory, .* domain_classifier takes any"):
        prepare_recipe(found)


def test_too_few_rows_are_an_error_that_names_the_method(workspace: Path) -> None:
    found = recipe(workspace)
    target = found.data.target["far"]
    few = target.model_copy(update={"train": target.train.model_copy(update={"limit": 1})})
    data = found.data.model_copy(update={"target": {"far": few}})
    found = found.model_copy(update={"data": data})
    with pytest.raises(RecipeError, match=r"^reweight\.method = 'domain_classifier': target: "):
        prepare_recipe(found)
