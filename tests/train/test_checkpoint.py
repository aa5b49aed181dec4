"""Which checkpoints count, which are kept, and what becomes of damaged ones: with those of a real run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_run, train_together
from tiny import recipe_values, write_model, write_rows

from fleetune import runs
from fleetune.train.distributed import World
from fleetune.train.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    complete_checkpoints,
    newest_good,
    prune,
    read_manifest,
    step_of,
    verify,
)

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, runs.Run]:
    """Two runs of two ranks, saved after steps 2, 4 and 6: with the files written at once, and in the background."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_model(folder / "model", hidden_size=16, num_attention_heads=2)
    write_rows(folder / "train.jsonl", 64)
    write_rows(folder / "validation.jsonl", 8, seed=1)
    found = {}
    for in_background in (False, True):
        checkpoint = {"async": in_background, "save_steps": 2, "save_total_limit": 3}
        found[in_background] = make_run(recipe_values(folder, f"run-{in_background}", checkpoint=checkpoint), 2)
    train_together(list(found.values()), 2)
    return found


@pytest.fixture
def run(made: dict[bool, runs.Run], tmp_path: Path) -> runs.Run:
    """A copy to damage."""
    shutil.copytree(made[False].path, tmp_path / "run")
    return runs.Run(tmp_path / "run")


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(folder)]


def problems(run: runs.Run) -> tuple[int | None, list[str]]:
    found, lines = newest_good(run, ALONE)
    return (None if found is None else step_of(found)), lines


# ---------------------------------------------------------------- what a checkpoint holds


@pytest.mark.parametrize("in_background", [False, True])
def test_each_is_whole_and_says_where_training_stands(made: dict[bool, runs.Run], in_background: bool) -> None:
    run = made[in_background]
    assert steps(run.checkpoints) == [6, 4, 2]
    assert problems(run) == (6, [])
    for path in complete_checkpoints(run.checkpoints):
        manifest = read_manifest(path)
        assert (manifest["step"], manifest["world_size"], manifest["threads"]) == (step_of(path), 2, 1)
        assert manifest["run"] == run.info()["id"]
        assert {"state.json", "rank-0.pt", "rank-1.pt"} <= manifest["files"].keys()
        state = runs.read_json(path / "state.json")
        assert (state["step"], state["logged_step"]) == (step_of(path), step_of(path))
        assert state["order"]
    assert not list(run.checkpoints.glob(".*"))


def test_in_the_background_the_same_is_written(made: dict[bool, runs.Run]) -> None:
    """Tensor by tensor; the files differ in how storages are shared."""

    def tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
        if isinstance(state, torch.Tensor):
            return {name: state}
        items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
        return {key: value for part, inner in items for key, value in tensors(inner, f"{name}/{part}").items()}

    for step in (2, 6):
        files = sorted((made[False].checkpoints / f"step-{step:08d}" / "engine").iterdir())
        assert len(files) == 3
        for file in files:
            other = made[True].checkpoints / f"step-{step:08d}" / "engine" / file.name
            first, second = (tensors(torch.load(path, weights_only=False)) for path in (file, other))
            assert first.keys() == second.keys()
            assert first
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_time_that_training_stood_still_is_logged(made: dict[bool, runs.Run]) -> None:
    for run in made.values():
        saves = [line for line in runs.read_jsonl(run.metrics) if "checkpoint/seconds" in line]
        assert len(saves) == 3
        assert all(0 < line["checkpoint/blocked_seconds"] <= line["checkpoint/seconds"] + 0.1 for line in saves)


# ---------------------------------------------------------------- damage


def _flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    content[at] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _cut(file: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def _remove(file: Path, chance: random.Random) -> None:
    file.unlink()


def _swap(file: Path, chance: random.Random) -> None:
    """With the same file of the step before."""
    newest = next(folder for folder in file.parents if folder.name == "step-00000006")
    older = newest.with_name("step-00000004") / file.relative_to(newest)
    if older.read_bytes() == file.read_bytes():
        _flip(file, chance)  # random states without dropout are alike at every step
    else:
        shutil.copyfile(older, file)


DAMAGES: list[Callable[[Path, random.Random], None]] = [_flip, _cut, _remove, _swap]


@pytest.mark.parametrize("seed", range(50))
def test_damage_is_found_and_named_and_the_one_before_is_used(run: runs.Run, seed: int) -> None:
    chance = random.Random(seed)
    newest = run.checkpoints / "step-00000006"
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    file = chance.choice(files)
    damage = DAMAGES[seed % len(DAMAGES)]
    damage(file, chance)
    found, lines = problems(run)
    assert found == 4, (file.name, damage.__name__)
    if damage is _remove and file.name == MANIFEST:
        assert lines == []  # without its manifest it is none, as if it had not been written to its end
    else:
        (line,) = lines
        assert line.startswith("step-00000006: ")
        assert file.name in line or "manifest" in line.lower()


def test_where_all_are_damaged_each_is_named_and_none_is_overwritten(run: runs.Run) -> None:
    for path in complete_checkpoints(run.checkpoints):
        (path / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="no checkpoint is whole") as refused:
        problems(run)
    for step in (6, 4, 2):
        assert f"step-0000000{step}: state.json is missing" in str(refused.value)


def test_one_under_another_steps_name_is_refused(run: runs.Run) -> None:
    shutil.rmtree(run.checkpoints / "step-00000006")
    shutil.copytree(run.checkpoints / "step-00000004", run.checkpoints / "step-00000006")
    assert problems(run) == (4, ["step-00000006: its manifest is of step 4"])


def test_one_of_another_run_is_refused(made: dict[bool, runs.Run], run: runs.Run) -> None:
    shutil.rmtree(run.checkpoints / "step-00000006")
    shutil.copytree(made[True].checkpoints / "step-00000006", run.checkpoints / "step-00000006")
    found, (line,) = problems(run)
    assert found == 4
    assert "is of another run" in line


def test_a_file_too_many_and_a_link_are_refused(run: runs.Run) -> None:
    """DeepSpeed's loader takes what it finds by its name, and unpickles it."""
    planted = run.checkpoints / "step-00000006" / "engine" / "mp_rank_01_model_states.pt"
    planted.write_bytes(b"")
    assert problems(run) == (4, ["step-00000006: engine/mp_rank_01_model_states.pt is not in its manifest"])
    state = run.checkpoints / "step-00000004" / "state.json"
    state.rename(run.path / "elsewhere")
    state.symlink_to(run.path / "elsewhere")
    assert problems(run)[0] == 2


@pytest.mark.skipif(os.getuid() != 0, reason="giving a file to another user needs root")
@pytest.mark.parametrize("name", [".", "state.json", MANIFEST])
def test_one_that_another_user_owns_is_refused(run: runs.Run, name: str) -> None:
    os.chown(run.checkpoints / "step-00000006" / name, 12345, -1)
    found, (line,) = problems(run)
    assert found == 4
    assert "belongs to another user" in line


def test_one_that_was_being_written_is_named(run: runs.Run) -> None:
    (run.checkpoints / ".step-00000008.part" / "engine").mkdir(parents=True)
    assert problems(run) == (6, ["step-00000008: was being written when the run ended"])


def test_the_ranks_share_the_hashing(run: runs.Run) -> None:
    """Each file is looked at by one of them, and no file by none."""
    path = run.checkpoints / "step-00000006"
    files = list(read_manifest(path)["files"])
    for number, name in enumerate(files):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1])
        for part in range(3):
            if part == number % 3:
                with pytest.raises(DamagedCheckpoint, match="is damaged"):
                    verify(path, run.info()["id"], part, 3)
            else:
                verify(path, run.info()["id"], part, 3)
        (path / name).write_bytes(content)


# ---------------------------------------------------------------- which are kept


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / MANIFEST).write_text("{}", encoding="utf-8")
    return path


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=2, step=40, best_step=10)
    assert steps(tmp_path) == [40, 30, 10]


def test_a_damaged_one_beyond_the_step_does_not_push_the_new_one_out(tmp_path: Path) -> None:
    for step in (150, 160, 200):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=1, step=160, best_step=None)
    assert steps(tmp_path) == [160]


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (make_checkpoint(tmp_path, 5) / MANIFEST).unlink()
    (tmp_path / ".step-00000007.part").mkdir()
    prune(tmp_path, keep_last=2, step=10, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
