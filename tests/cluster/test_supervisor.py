"""What begins an attempt on a cluster."""

from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import recipe_values

from fleetune import opening, runs
from fleetune.attempts import start_attempt, unended
from fleetune.cluster import local, slurm, supervisor, verdict
from fleetune.schema import Recipe, RecipeError


def held_elsewhere(run: runs.Run, beaten: float) -> None:
    lease = {"host": "another-node", "pid": 1, "started": 0.0, "token": "x", "time": beaten}
    runs.write_json(run.path / "lease.json", lease)


def test_the_lease_of_an_attempt_that_died_with_its_node_is_waited_for(tmp_path: Path) -> None:
    run = runs.Run(tmp_path)
    held_elsewhere(run, time.time() - runs.LEASE_SECONDS + 2.0)
    begun = time.monotonic()
    supervisor._await_free(run)
    assert 1.0 < time.monotonic() - begun < 10.0
    assert not runs.is_at_work(run)


def test_an_attempt_that_lives_is_a_failure_that_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LEASE_WAIT", 0.5)
    held_elsewhere(runs.Run(tmp_path), time.time())
    with pytest.raises(local.PreparationFailed, match="another attempt is still at work"):
        supervisor._await_free(runs.Run(tmp_path))


def test_an_attempt_that_is_at_work_is_not_ended_by_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.Run(tmp_path)
    monkeypatch.setattr(slurm, "accounted", lambda ids: None)
    start_attempt(run, ["another-node"])
    held_elsewhere(run, time.time())
    verdict.close_last(run, "8", 0)
    assert unended(run)
    held_elsewhere(run, time.time() - runs.LEASE_SECONDS)
    verdict.close_last(run, "8", 0)
    assert not unended(run)


# ---------------------------------------------------------------- before training begins


def opened(folder: Path) -> runs.Run:
    recipe = Recipe.model_validate(recipe_values(folder, "run") | {"output_dir": str(folder)})
    return opening.open_run(recipe, local.Layout(1, 1, 1).stored())


def test_the_data_may_take_rank_0_as_long_as_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look is an hour later; at the tenth they are ready."""
    run, looks = runs.Run(tmp_path), iter(range(100))

    def sleep(seconds: float) -> None:
        if next(looks) == 10:
            runs.write_json(tmp_path / "start.json", {"attempt": 1})

    hours = SimpleNamespace(monotonic=lambda: 3600.0 * next(looks), time=time.time, sleep=sleep)
    monkeypatch.setattr(supervisor, "time", hours)
    assert supervisor._await_start(run, tmp_path, []) == {"attempt": 1}


def test_those_that_wait_for_rank_0_hear_that_it_has_ended(tmp_path: Path) -> None:
    runs.write_json(tmp_path / "ended-0.json", {"code": runs.WRONG, "reason": "there is no such file"})
    with pytest.raises(local.PreparationFailed, match="rank 0 did not start: there is no such file"):
        supervisor._await_start(runs.Run(tmp_path), tmp_path, [])
    runs.write_json(tmp_path / "ended-0.json", {"code": runs.SAVED, "reason": "asked to stop"})
    with pytest.raises(local.StoppedEarly):
        supervisor._await_start(runs.Run(tmp_path), tmp_path, [])


@pytest.mark.parametrize("how", ["signal", "file"])
def test_a_stop_is_heard_while_rank_0_prepares(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGCONT alone, which Slurm sends before others, is none."""
    run, heard = opened(tmp_path), list[int]()

    def prepare(recipe: Recipe, stop: local.Stop | None = None) -> dict[str, Any]:
        heard.append(signal.SIGCONT)
        assert stop is not None
        assert not stop
        if how == "signal":
            heard.append(signal.SIGUSR2)
        else:
            runs.write_json(run.path / "cancel.json", {"job": "7"})
        assert stop
        raise local.StoppedEarly

    monkeypatch.setattr(local, "prepare", prepare)
    task = supervisor.Task("7", 0, 0, 1, 0, 0, 1, "node1")
    with pytest.raises(local.StoppedEarly), supervisor._lead(run, task, tmp_path, heard):
        pass


# ---------------------------------------------------------------- the folder for compiled code


def test_the_folder_for_compiled_code_is_made_and_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEETUNE_COMPILED", raising=False)
    supervisor._make_caches_private()  # a profile without a cache_dir
    folder = tmp_path / "local" / "fleetune-0"
    monkeypatch.setenv("FLEETUNE_COMPILED", str(folder))
    for mode in (None, 0o777):
        if mode is not None:
            folder.chmod(mode)
        supervisor._make_caches_private()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user needs root")
@pytest.mark.parametrize("is_link", [False, True])
def test_compiled_code_is_not_taken_from_another_users_folder(
    is_link: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fleetune-0"
    if is_link:
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
    os.lchown(folder, 65534, 65534)
    monkeypatch.setenv("FLEETUNE_COMPILED", str(folder))
    with pytest.raises(RecipeError, match=r"cache_dir: \S+ on \S+ belongs to another user"):
        supervisor._make_caches_private()


def test_a_cache_dir_in_which_nothing_can_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEETUNE_COMPILED", str(tmp_path / "file" / "fleetune-0"))
    with pytest.raises(local.PreparationFailed, match=r"cache_dir: \S+ on \S+ cannot be made: Not a directory; "):
        supervisor._make_caches_private()
