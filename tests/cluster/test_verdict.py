"""How an attempt ended, from what its ranks wrote down, and whether another one is made."""

from __future__ import annotations

import datetime
import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_values

from fleetune import runs
from fleetune.cluster import verdict
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    made = runs.Run(tmp_path / "run")
    made.path.mkdir()
    values = recipe_values(tmp_path, "run", retries={"crash": 2, "without_progress": 3})
    made.recipe_file.write_text(dump_recipe(Recipe.model_validate(values)), encoding="utf-8")
    return made


def end_of(run: runs.Run, srun_code: int, *ranks: dict[str, Any]) -> verdict.End:
    notes = run.path / "slurm" / "7-0"
    notes.mkdir(parents=True, exist_ok=True)
    for number, rank in enumerate(ranks):
        value = {"reason": "", "signals": [], "time": float(number), **rank}
        (notes / f"ended-{number}.json").write_text(json.dumps(value), encoding="utf-8")
    return verdict._end_of(run, notes, srun_code)


SAVED = {"code": runs.SAVED}


@pytest.mark.parametrize(
    ("srun_code", "ranks", "kind", "code"),
    [
        (0, [{"code": 0}, {"code": 0}], "done", runs.DONE),
        (0, [SAVED | {"signals": [signal.SIGUSR2]}, SAVED], "preemption", runs.SAVED),
        (1, [SAVED, {"code": 1, "reason": "rank 1: out of memory"}], "crash", runs.FAILED),
        (1, [{"code": 1}, {"code": 3, "reason": "nan"}], "wrong", runs.FAILED_FOR_GOOD),
        (1, [{"code": 2, "reason": "no such file"}], "wrong", runs.WRONG),
        (137, [], "crash", runs.FAILED),
        (137, [{"code": 0}], "crash", runs.FAILED),
    ],
)
def test_what_ended_an_attempt(run: runs.Run, srun_code: int, ranks: list[Any], kind: str, code: int) -> None:
    found = end_of(run, srun_code, *ranks)
    assert (found.kind, found.code) == (kind, code)


@pytest.mark.parametrize(("left", "kind"), [(100.0, "time_limit"), (3600.0, "preemption"), (None, "preemption")])
def test_a_signal_near_the_time_limit_is_the_time_limits(
    run: runs.Run, left: float | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.write_json(run.path / "job.json", {"stop_seconds": 60})
    monkeypatch.setattr(verdict.slurm, "seconds_left", lambda job: left)
    assert end_of(run, 0, SAVED | {"signals": [signal.SIGUSR2]}).kind == kind


def test_a_cancelled_run_is_not_one_whose_time_is_over(run: runs.Run) -> None:
    (run.path / "cancel.json").write_text("{}", encoding="utf-8")
    assert end_of(run, 0, SAVED | {"signals": [signal.SIGUSR2]}).kind == "cancel"


@pytest.mark.parametrize("ranks", [[{"code": 1, "reason": "rank 0: connection closed"}], []])
def test_a_cancelled_run_whose_save_failed_is_not_made_to_come_again(run: runs.Run, ranks: list[Any]) -> None:
    (run.path / "cancel.json").write_text("{}", encoding="utf-8")
    found = end_of(run, 1, *ranks)
    assert (found.kind, found.code) == ("cancel", runs.FAILED)
    assert found.reason.startswith("cancelled")
    if ranks:
        hang = {"rank": 0, "phase": "step", "seconds": 61.0, "limit": 60.0}
        runs.write_json(run.path / "slurm" / "7-0" / "hang.json", hang)
        assert end_of(run, 1, *ranks).kind == "cancel"


def test_the_first_rank_that_failed_is_the_one_that_is_named(run: runs.Run) -> None:
    ranks = [
        {"code": 1, "reason": "rank 0: connection closed", "time": 5.0},
        {"code": 1, "reason": "rank 1", "time": 4.0},
    ]
    assert end_of(run, 1, *ranks).reason == "rank 1"


def attempts(run: runs.Run, *ends: tuple[str, int]) -> str | None:
    for number, (kind, last_step) in enumerate(ends, start=1):
        runs.append_jsonl(run.attempts, {"attempt": number, "event": "start", "nodes": []})
        end = {"attempt": number, "event": "end", "kind": kind, "last_step": last_step, "reason": f"by {kind}"}
        end["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        runs.append_jsonl(run.attempts, end)
    return verdict.given_up(run)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([], None),
        ([("preemption", 5)] * 1 + [("crash", 9), ("preemption", 12)], None),
        ([("crash", 4), ("crash", 8)], None),
        (
            [("crash", 4), ("crash", 8), ("crash", 12)],
            r"given up after 3 attempts that ended by crash \(retries.crash = 2",
        ),
        ([("time_limit", n) for n in range(1, 40)], None),
        ([("preemption", 5), ("preemption", 5), ("preemption", 5)], None),
        ([("preemption", 5)] * 4, "given up after 3 attempts without a step of progress: by preemption"),
        ([("node_failure", 0)] * 3, "without a step of progress"),
        ([("preemption", 5)] * 3 + [("preemption", 6)], None),
    ],
)
def test_each_kind_has_a_budget_and_none_may_stand_still(run: runs.Run, ends: list[Any], said: str | None) -> None:
    found = attempts(run, *ends)
    assert (found is None) == (said is None)
    if said is not None:
        assert re.search(said, str(found))


def test_sending_a_run_anew_is_a_new_beginning(run: runs.Run) -> None:
    assert attempts(run, *[("crash", n) for n in (4, 8, 12)]) is not None
    runs.write_json(run.path / "job.json", {"sent": time.time() + 60})
    assert verdict.given_up(run) is None


def test_attempts_that_come_to_no_training_are_counted_and_given_up(run: runs.Run) -> None:
    for restart in range(2):
        notes = verdict.notes_of(run, "7", restart)
        notes.mkdir(parents=True)
        end = verdict.End("crash", runs.FAILED, "a task ended without a word")
        assert verdict._record(run, notes, end) is None
    assert "retries.crash = 2" in str(verdict._record(run, verdict.notes_of(run, "7", 2), end))


def test_what_says_most_goes_before_what_another_nodes_clock_puts_first(run: runs.Run) -> None:
    lost, killed = "rank 0: connection closed", "rank 1 was killed by SIGKILL"
    ranks = [{"code": 1, "reason": lost, "time": 4.0}, {"code": 1, "reason": killed, "time": 5.0}]
    assert end_of(run, 1, *ranks).reason == killed
    wrong = {"code": 2, "reason": "no such file", "time": 6.0}
    assert end_of(run, 1, *ranks, wrong).reason == "no such file"


def test_ranks_that_hang_at_one_place_are_named_together_and_the_odd_one_first(run: runs.Run) -> None:
    places = [*("is at c10d.py:1 in wait",) * 12, "is stopped (by SIGSTOP, a terminal or a debugger)"]
    notes = run.path / "slurm" / "7-0"
    notes.mkdir(parents=True)
    runs.write_json(notes / "hang.json", {"rank": 12, "phase": "step", "seconds": 61.0, "limit": 60.0})
    failed = [
        {"code": 1, "reason": f"rank {rank} hangs\n  rank {rank} {place}\n  log: x"}
        for rank, place in enumerate(places)
    ]
    found = end_of(run, 1, *failed)
    assert found.kind == "crash"
    assert found.reason.splitlines() == [
        "the ranks hang in their step: no sign of rank 12 for 61 s, and 60 s is the most it may take",
        "  rank 12 is stopped (by SIGSTOP, a terminal or a debugger)",
        "  each of ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more is at c10d.py:1 in wait",
    ]
