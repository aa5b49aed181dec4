"""What a teacher says, stored: the same logits, resumed where it was broken off, refused where it does not belong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import make_run, train_together
from taught import teach_on_two_ranks
from tiny import recipe_values, write_model, write_rows

from fleetune.batch import Batch
from fleetune.schema import Recipe, RecipeError, teachers_of
from fleetune.train import teach as teach_module
from fleetune.train.batches import collate
from fleetune.train.data import prepare
from fleetune.train.distributed import World
from fleetune.train.model import load_tokenizer
from fleetune.train.prepare import prepare_recipe
from fleetune.train.teach import begin, write
from fleetune.train.teacher import load_teachers
from fleetune.train.teacher_cache import CachedTeacher, open_cache
from fleetune.verify import exact_metrics

ROWS, PART = 37, 16
ALONE = World(0, 1, 0, torch.device("cpu"))


def teach(recipe: Recipe, folder: Path) -> None:
    begin(recipe, folder, 1)
    write(recipe, folder, ALONE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForSequenceClassification

    path = tmp_path_factory.mktemp("cache")
    write_model(path / "model")
    for name, seed in (("teacher", 1), ("another", 2)):
        torch.manual_seed(seed)
        encoder = write_model(path / name, seed=seed)
        AutoModelForSequenceClassification.from_pretrained(encoder).save_pretrained(encoder)
    write_rows(path / "train.jsonl", ROWS)
    write_rows(path / "validation.jsonl", 8, seed=1)
    return path


def recipe(folder: Path, name: str = "tiny", teacher: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    given = teacher or {"model_name_or_path": str(folder / "teacher")}
    losses = [{"kind": "cross_entropy"}, {"kind": "distillation"}]
    return Recipe.model_validate(recipe_values(folder, name, losses=losses, teacher=given, **sections))


@pytest.fixture(scope="module")
def cache(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach_module, "PART", PART)
        teach(recipe(folder), folder / "taught")
    return folder / "taught"


def test_it_holds_the_teachers_logits_of_every_row(folder: Path, cache: Path) -> None:
    found = recipe(folder)
    tokenizer = load_tokenizer(found)
    data = prepare(found, tokenizer)
    split = data.splits["train"]
    assert sorted(path.name for path in cache.iterdir()) == [
        "part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "teacher.json",
    ]  # fmt: skip
    stored = open_cache(teachers_of(recipe(folder, teacher={"cache": str(cache)}))[0][1], 1.0)
    (live,) = load_teachers(found, data.label_names, tokenizer, Batch(4, 1, 1, 4), ALONE)
    for rows in ([3, 36, 0], [16, 15]):
        batch = collate(split, np.array(rows), tokenizer.pad_token_id)
        torch.testing.assert_close(stored(batch).logits, live(batch).logits, rtol=1e-5, atol=1e-6)


def test_training_with_it_is_training_with_the_teacher(folder: Path, cache: Path) -> None:
    live = make_run(recipe(folder, "live").model_dump(mode="json"), 1)
    stored = make_run(recipe(folder, "stored", {"cache": str(cache)}).model_dump(mode="json"), 1)
    train_together([live, stored], 1)
    first, second = (exact_metrics(run.path) for run in (live, stored))
    assert [values["train/distillation"] for values in second.values() if "train/distillation" in values] == (
        pytest.approx([v["train/distillation"] for v in first.values() if "train/distillation" in v], rel=1e-4)
    )


def test_what_was_broken_off_goes_on(folder: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(teach_module, "PART", PART)
    half = tmp_path / "half"
    shutil.copytree(cache, half)
    stored = json.loads((half / "teacher.json").read_text(encoding="utf-8"))
    stored.pop("rows")
    stored["parts"].pop("part-00001.parquet")
    (half / "teacher.json").write_text(json.dumps(stored), encoding="utf-8")
    (half / "part-00001.parquet").unlink()
    kept = {path: path.stat().st_mtime_ns for path in half.glob("*.parquet")}
    with pytest.raises(RecipeError, match="is half written; the same `fleetune teach` goes on with it"):
        prepare_recipe(recipe(folder, teacher={"cache": str(half)}))
    teach(recipe(folder), half)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in cache.glob("*.parquet"):
        assert (half / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_write_what_one_does(folder: Path, cache: Path, tmp_path: Path, stage: int) -> None:
    """Each has parts of its own, and of three the second rank has one; cut over both, the teacher takes both."""
    teacher = {"model_name_or_path": str(folder / "teacher"), "deepspeed": {"zero_stage": stage}}
    said = teach_on_two_ranks(recipe(folder, teacher=teacher), tmp_path, PART)
    assert said == ["taught 2 of 3 parts", "taught 3 of 3 parts"]
    alone, together = (
        open_cache(teachers_of(recipe(folder, teacher={"cache": str(path)}))[0][1], 1.0)
        for path in (cache, tmp_path / "taught")
    )
    assert isinstance(alone, CachedTeacher)
    assert isinstance(together, CachedTeacher)
    assert np.array_equal(alone.rows, together.rows)
    torch.testing.assert_close(alone.logits, together.logits, rtol=1e-5, atol=1e-6)
    prepare_recipe(recipe(folder, teacher={"cache": str(tmp_path / "taught")}))  # belongs, and is whole


def test_several_ranks_have_several_parts_each(folder: Path, tmp_path: Path) -> None:
    begin(recipe(folder), tmp_path / "taught", 2)
    assert json.loads((tmp_path / "taught" / "teacher.json").read_text(encoding="utf-8"))["rows_of_a_part"] == 5
    begin(recipe(folder), tmp_path / "taught", 1)  # goes on with these
    assert json.loads((tmp_path / "taught" / "teacher.json").read_text(encoding="utf-8"))["rows_of_a_part"] == 5


def test_rows_are_found_by_their_numbers_where_some_were_taken_away(folder: Path, tmp_path: Path) -> None:
    """Of what validation_fraction leaves, and for a micro-batch without rows too."""
    data = {"validation": None, "validation_fraction": 0.3}
    apart = recipe(folder, data=data)
    teach(apart, tmp_path / "apart")
    tokenizer = load_tokenizer(apart)
    prepared = prepare(apart, tokenizer)
    split = prepared.splits["train"]
    assert len(split) == 26 and split.index.tolist() != list(range(26))  # noqa: PT018
    stored = open_cache(teachers_of(recipe(folder, teacher={"cache": str(tmp_path / "apart")}))[0][1], 1.0)
    (live,) = load_teachers(apart, prepared.label_names, tokenizer, Batch(4, 1, 1, 4), ALONE)
    for rows in (np.array([25, 0, 7]), np.array([], dtype=np.int64)):
        batch = collate(split, rows, tokenizer.pad_token_id)
        torch.testing.assert_close(stored(batch).logits, live(batch).logits, rtol=1e-5, atol=1e-6)


def test_a_damaged_part_is_written_anew(folder: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(teach_module, "PART", PART)
    shutil.copytree(cache, tmp_path / "mine")
    _damaged(tmp_path / "mine")
    teach(recipe(folder), tmp_path / "mine")
    for path in cache.iterdir():
        assert (tmp_path / "mine" / path.name).read_bytes() == path.read_bytes()


def _another_data(folder: Path) -> dict[str, Any]:
    write_rows(folder / "other.jsonl", ROWS, seed=9)
    return {"data": {"train": {"path": str(folder / "other.jsonl")}}}


def _damaged(cache: Path) -> None:
    part = cache / "part-00002.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize(
    ("sections", "harm", "said"),
    [
        (_another_data, None, r"teacher\.cache = .*: is of other data; teach with this recipe"),
        (lambda _: {"data": {"max_length": 8}}, None, "is of other data"),
        (lambda _: {"model": {"label_names": ["no", "yes"]}}, None, "is of other labels: 0, 1"),
        (lambda _: {}, _damaged, r"part-00002\.parquet is damaged or gone"),
        (lambda _: {}, lambda cache: (cache / "teacher.json").unlink(), "there is no teacher.json"),
        (
            lambda _: {},
            lambda cache: (cache / "teacher.json").write_text('{"format": 1}'),
            "no teacher.json of this form",
        ),
        (lambda _: {}, lambda cache: (cache / "teacher.json").write_text("[]"), "no teacher.json of this form"),
    ],
    ids=["other-data", "cut-elsewhere", "other-labels", "damaged", "no-cache", "no-form", "no-map"],
)
def test_a_cache_that_does_not_belong_is_refused(
    folder: Path,
    cache: Path,
    tmp_path: Path,
    sections: Callable[[Path], dict[str, Any]],
    harm: Callable[[Path], None] | None,
    said: str,
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(cache, mine)
    if harm is not None:
        harm(mine)
    with pytest.raises(RecipeError, match=said):
        prepare_recipe(recipe(folder, teacher={"cache": str(mine)}, **sections(folder)))


def test_another_teacher_takes_another_folder(folder: Path, cache: Path) -> None:
    other = recipe(folder, teacher={"model_name_or_path": str(folder / "another")})
    with pytest.raises(RecipeError, match=r"taught: is a cache of another teacher; choose another folder with --out"):
        teach(other, cache)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(folder).model_dump(mode="json", exclude={"output_dir"})), encoding="utf-8")
    command = [sys.executable, "-m", "fleetune.cli", "teach", str(file), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"out: 2 logits of {ROWS} rows, " in done.stdout
    assert "teacher.cache=" in done.stdout
    assert "parts" in json.loads((tmp_path / "out" / "teacher.json").read_text(encoding="utf-8"))
