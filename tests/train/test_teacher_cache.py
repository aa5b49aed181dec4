"""What a teacher says, stored: the same logits, resumed where it was broken off, refused where it does not belong."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
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
from typer.testing import CliRunner

from fleetune import teach_command
from fleetune.batch import Batch
from fleetune.cli import app
from fleetune.schema import Recipe, RecipeError, teacher_to_store, teachers_of
from fleetune.train import teach as teach_module
from fleetune.train.alignment import Outputs
from fleetune.train.batches import collate
from fleetune.train.data import prepare
from fleetune.train.distributed import World
from fleetune.train.model import ModelError, load_tokenizer
from fleetune.train.prepare import prepare_recipe
from fleetune.train.teach import begin, end, write
from fleetune.train.teacher import load_teachers
from fleetune.train.teacher_cache import CachedTeacher, open_cache
from fleetune.verify import exact_metrics

ROWS, PART = 37, 16
ALONE = World(0, 1, 0, torch.device("cpu"))


def teach(recipe: Recipe, folder: Path) -> None:
    begin(recipe, folder)
    assert write(recipe, folder, ALONE)
    end(folder)


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
    card = (stored.model / "README.md").read_text(encoding="utf-8")
    assert f"Distilled from `{folder / 'teacher'}`, as stored in `{cache}`." in card
    first, second = (exact_metrics(run.path) for run in (live, stored))
    assert [values["train/distillation"] for values in second.values() if "train/distillation" in values] == (
        pytest.approx([v["train/distillation"] for v in first.values() if "train/distillation" in v], rel=1e-4)
    )


def test_what_was_broken_off_goes_on(folder: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(teach_module, "PART", PART)
    half = tmp_path / "half"
    shutil.copytree(cache, half)
    _half(half)
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
    assert said[-1] in ("taught 2 of 3 parts", "taught 3 of 3 parts")  # as the main rank sees it when it is done
    assert_alike(folder, cache, tmp_path / "taught")
    prepare_recipe(recipe(folder, teacher={"cache": str(tmp_path / "taught")}))  # belongs, and is whole


def test_two_ranks_go_on_with_what_one_began(folder: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "taught")
    kept = tmp_path / "taught" / "part-00000.parquet"
    written = kept.stat().st_mtime_ns
    _half(tmp_path / "taught")
    teach_on_two_ranks(recipe(folder), tmp_path, rows_of_a_part=5)  # it goes on with parts of 16
    assert kept.stat().st_mtime_ns == written
    assert_alike(folder, cache, tmp_path / "taught")


def assert_alike(folder: Path, *caches: Path) -> None:
    first, second = (open_cache(teachers_of(recipe(folder, teacher={"cache": str(p)}))[0][1], 1.0) for p in caches)
    assert isinstance(first, CachedTeacher)
    assert isinstance(second, CachedTeacher)
    assert np.array_equal(first.rows, second.rows)
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_cut_is_run_no_more_often_than_it_has_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a short part every rank makes as many passes as the longest beside it takes, not as a full one would."""
    passes = 0

    def run_uncut(*_: Any) -> Any:
        def teacher(batch: Any) -> Outputs:
            nonlocal passes
            passes += 1
            return Outputs(torch.zeros(len(batch.labels), 2))

        return teacher

    monkeypatch.setattr("fleetune.train.teacher.load_teacher", run_uncut)
    monkeypatch.setattr(teach_module, "PART", PART)
    cut = recipe(folder, teacher={"model_name_or_path": str(folder / "teacher"), "deepspeed": {"zero_stage": 3}})
    begin(cut, tmp_path / "taught")
    assert write(cut, tmp_path / "taught", ALONE)
    size = cut.evaluation.per_device_eval_batch_size
    assert passes == sum(-(-rows // size) for rows in (16, 16, 5))


def test_asked_to_stop_it_keeps_the_parts_that_are_whole(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_module, "PART", PART)
    begin(recipe(folder), tmp_path / "taught")
    first = tmp_path / "taught" / "part-00000.parquet"
    monkeypatch.setattr(teach_module.signals, "stop_requested", first.exists)
    assert not write(recipe(folder), tmp_path / "taught", ALONE)
    assert first.read_bytes() == (cache / first.name).read_bytes()
    assert begin(recipe(folder), tmp_path / "taught") == {"left": 2}


def test_a_teacher_of_another_precision_does_not_go_on(folder: Path, cache: Path) -> None:
    half = recipe(folder, teacher={"model_name_or_path": str(folder / "teacher"), "dtype": "bfloat16"})
    with pytest.raises(RecipeError, match="another teacher: its dtype is float32, and this one's bfloat16; choose"):
        begin(half, cache)


def test_what_a_full_disk_left_of_its_start_is_no_hindrance(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taught").mkdir()
    (tmp_path / "taught" / ".teacher.json.host.7").touch()
    assert begin(recipe(folder), tmp_path / "taught")["left"] == 1


def test_a_part_that_was_damaged_before_all_were_there_is_written_anew(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_module, "PART", PART)
    shutil.copytree(cache, tmp_path / "mine")
    _half(tmp_path / "mine")
    (tmp_path / "mine" / "part-00000.parquet").write_bytes(b"PAR1")
    assert begin(recipe(folder), tmp_path / "mine")["left"] == 2
    teach(recipe(folder), tmp_path / "mine")
    for path in cache.iterdir():
        assert (tmp_path / "mine" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_without_a_part_is_begun_anew(folder: Path, tmp_path: Path) -> None:
    begin(recipe(folder), tmp_path / "taught")
    (tmp_path / "taught" / "logs").mkdir()
    (tmp_path / "taught" / "lease.json").write_text("{}")  # of one that was killed
    (tmp_path / "taught" / "part-00000.part").touch()
    other = recipe(folder, teacher={"model_name_or_path": str(folder / "another")})
    assert begin(other, tmp_path / "taught")["left"] == 1
    stored = json.loads((tmp_path / "taught" / "teacher.json").read_text(encoding="utf-8"))
    assert stored["teacher"]["model_name_or_path"] == str(folder / "another")


def test_logits_that_are_no_numbers_are_not_stored(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["classifier.bias"][1] = float("nan")
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    broken = recipe(folder, teacher={"model_name_or_path": str(tmp_path / "teacher")})
    with pytest.raises(
        ModelError, match=r"its logits of training row \d+ are not finite: it is damaged, or teacher.dtype"
    ):
        teach(broken, tmp_path / "taught")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teacher": None}, r"teacher: is not there; `fleetune teach` stores that of teacher: \{model_name_or_path"),
        ({"teacher": {"cache": "x"}}, r"teacher.cache = '.*x': is stored already; .* teacher.cache=null teacher.model"),
        ({"teacher": None, "teachers": [{"model_name_or_path": "hub/a"}, {"model_name_or_path": "hub/b"}]},
         r"teachers = \['hub/a', 'hub/b'\]: `fleetune teach` stores one"),
    ],
)  # fmt: skip
def test_it_takes_one_teacher(folder: Path, values: dict[str, Any], said: str) -> None:
    given = recipe_values(folder, "tiny", losses=[{"kind": "cross_entropy"}], **values)
    if values["teacher"] or "teachers" in values:
        given["losses"].append({"kind": "distillation"})
    with pytest.raises(RecipeError, match=said):
        teacher_to_store(Recipe.model_validate(given))


def test_what_is_whole_is_not_touched(folder: Path, cache: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert begin(recipe(folder), cache)["left"] == 0
    assert end(cache)["rows"] == ROWS
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written


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


def _half(cache: Path) -> None:
    """As it is when it is broken off."""
    stored = json.loads((cache / "teacher.json").read_text(encoding="utf-8"))
    for name, digest in stored["parts"].items():
        (cache / f"{name}.sha256").write_text(digest, encoding="ascii")
    stored.pop("rows")
    (cache / "teacher.json").write_text(json.dumps({**stored, "parts": {}}), encoding="utf-8")
    (cache / "part-00001.parquet").unlink()


def _damaged(cache: Path) -> None:
    part = cache / "part-00002.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")


@pytest.mark.parametrize(
    ("sections", "harm", "said"),
    [
        (_another_data, None, r"teacher\.cache = .*: is of other data; teach anew for this recipe, to another folder"),
        (lambda _: {"data": {"max_length": 8}}, None, r"other data \(data.max_length: 32 there, 8 here\)"),
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
    with pytest.raises(
        RecipeError, match=r"taught: is a cache of another teacher: its model_name_or_path is .*; choose another"
    ):
        teach(other, cache)


def started(folder: Path, tmp_path: Path, *words: str, **sections: Any) -> subprocess.Popen[str]:
    file = tmp_path / "recipe.yaml"
    values = recipe(folder, **sections).model_dump(mode="json", exclude={"output_dir"})
    file.write_text(json.dumps(values), encoding="utf-8")
    words = (sys.executable, "-m", "fleetune.cli", "teach", str(file), "--out", str(tmp_path / "out"), *words)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def command(folder: Path, tmp_path: Path, *words: str, **sections: Any) -> subprocess.CompletedProcess[str]:
    with started(folder, tmp_path, *words, **sections) as process:
        output, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """On a number of ranks that could not train with this batch."""
    done = command(folder, tmp_path, "--nproc-per-node", "2", training={"global_batch_size": 3})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("taught 1 of 1 parts\n")
    assert f"out: 2 logits of {ROWS} rows, " in done.stdout
    assert "teacher.cache=" in done.stdout
    assert "rows" in json.loads((tmp_path / "out" / "teacher.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / "logs").rename(tmp_path / "logs")
    again = command(folder, tmp_path)
    before = f"{tmp_path / 'out'}: was stored before\n"
    assert again.stdout == done.stdout.replace("taught 1 of 1 parts\n", before)
    assert not (tmp_path / "out" / "logs").exists()  # no rank was started


def test_the_command_fails_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    failed = command(folder, tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    assert "out: cannot be written: " in failed.stderr
    (tmp_path / "out").unlink()
    copied = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", copied)
    (copied / "model.safetensors").unlink()
    failed = command(folder, tmp_path, teacher={"model_name_or_path": str(copied)})
    assert failed.returncode == 3
    assert "goes on" not in failed.stderr  # not before it is mended


def test_the_command_stops_when_asked_and_goes_on(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "many.jsonl", 4000)
    one_by_one = {"per_device_eval_batch_size": 1}  # seconds on any machine, so that it is still at work when asked
    many = {"data": {"train": {"path": str(tmp_path / "many.jsonl")}}, "evaluation": one_by_one}
    with started(folder, tmp_path, **many) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taught 1 of 16 parts\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
        assert process.stdout.read().endswith("out: stopped and saved by SIGTERM; the same command goes on\n")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert 0 < len(kept) < 16
    assert command(folder, tmp_path, data=many["data"]).returncode == 0  # in larger batches, which are faster
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("folder", "written"),
    [("runs/x-taught", "runs/x-taught"), ("2024", '"2024"'), ("null", '"null"'), ("a: #", '"a: #"')],
)
def test_a_folder_stays_text_in_an_override(folder: str, written: str) -> None:
    assert teach_command._as_yaml(folder) == written


def test_what_no_training_could_use_is_refused_first(folder: Path, tmp_path: Path) -> None:
    failed = command(folder, tmp_path, data={"augmentation": [{"kind": "word_dropout"}]})
    assert failed.returncode == 2
    assert "data.augmentation = ['word_dropout']: changes the rows that teacher.cache is of" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_train_with_it(folder: Path, tmp_path: Path) -> None:
    """Word for word, where some losses need the teacher itself too."""
    file = tmp_path / "recipe.yaml"
    losses = [{"kind": "cross_entropy", "weight": 0.5}, {"kind": "distillation"}, {"kind": "hidden_states"}]
    values = recipe_values(folder, "tiny", losses=losses, teacher={"model_name_or_path": str(folder / "teacher")})
    file.write_text(json.dumps(values), encoding="utf-8")
    taught = CliRunner().invoke(app, ["teach", str(file), "--out", str(tmp_path / "out")])
    words = shlex.split(taught.stdout.rpartition("train with it: fleetune run ")[2])[1:]
    assert words[2] == 'losses=[{"kind": "cross_entropy", "weight": 0.5}, {"kind": "distillation"}]'
    checked = CliRunner().invoke(app, ["check", str(file), *words])
    assert checked.exit_code == 0, checked.output
