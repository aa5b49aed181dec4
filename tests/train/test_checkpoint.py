"""Which checkpoints count, which are kept, and what a damaged one is called."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fleetune.train.checkpoint import MANIFEST, DamagedCheckpoint, complete_checkpoints, prune, step_of, verify


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text(f'{{"step": {step}}}', encoding="utf-8")
    content = (path / "state.json").read_bytes()
    files = {"state.json": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (path / MANIFEST).write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")
    return path


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(folder)]


def test_a_whole_one_verifies_and_damage_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 100)
    verify(path)
    (path / "state.json").write_text('{"step": 101}', encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match=r"step-00000100: state\.json is damaged"):
        verify(path)
    (path / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step-00000100: state\.json is missing"):
        verify(path)


def test_one_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 100).rename(tmp_path / "step-00000200")
    with pytest.raises(DamagedCheckpoint, match="its manifest is of step 100"):
        verify(tmp_path / "step-00000200")


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
