"""The ledger: every second of a run's wall time stands under one word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetune import runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.ledger import Ledger, ledger_of
from fleetune.runs import Run


def attempt(
    run: Run, began: float, end: float | None, progress: dict[str, Any] | None = None, sent: float | None = None
) -> None:
    number = start_attempt(run, ["node1"], began, sent)
    if progress is not None:
        runs.write_json(run.logs(number) / "progress.json", progress)
    if end is not None:
        end_attempt(run, number, runs.FAILED, "broke", at=end)


def progress(first: int, step: int, saved: int, began: float, time: float, **seconds: float) -> dict[str, Any]:
    return {
        "first_step": first,
        "step": step,
        "saved_step": saved,
        "began": began,
        "time": time,
        "restoring": 0.0,
        "saving": 0.0,
        **seconds,
    }


def parts(ledger: Ledger) -> dict[str, float]:
    return {name: round(value, 3) for name, value in ledger.parts().items() if value}


def test_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    attempt(run, 110.0, 205.0, progress(1, 80, 80, 120.0, 204.0, saving=4.0), sent=100.0)
    ledger = ledger_of(run)
    assert parts(ledger) == {"queued": 10.0, "starting": 10.0, "productive": 80.0, "saving": 4.0, "lost": 1.0}
    assert ledger.wall == pytest.approx(105.0)
    assert ledger.goodput == pytest.approx(80 / 105)


def test_steps_that_were_done_twice_count_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    attempt(run, 100.0, 170.0, progress(1, 50, 30, 110.0, 160.0), sent=100.0)  # 20 steps of 1 s are gone
    attempt(run, 290.0, 400.0, progress(31, 120, 120, 305.0, 395.0, restoring=5.0), sent=100.0)
    ledger = ledger_of(run)
    assert parts(ledger) == {
        "queued": 120.0,
        "starting": 20.0,
        "restoring": 5.0,
        "productive": 30.0 + 90.0,
        "recomputed": 20.0,
        "lost": 15.0,
    }
    assert ledger.recomputed_steps == 20
    assert ledger.wall == pytest.approx(300.0)


def test_an_attempt_that_never_trained_is_lost_and_the_one_after_it_is_looked_at(tmp_path: Path) -> None:
    run = Run(tmp_path)
    attempt(run, 0.0, 60.0, progress(1, 20, 10, 10.0, 50.0))
    attempt(run, 100.0, 130.0)
    attempt(run, 200.0, 250.0, progress(11, 40, 40, 210.0, 250.0))
    ledger = ledger_of(run)
    assert parts(ledger) == {"starting": 20.0, "productive": 20.0 + 40.0, "recomputed": 20.0, "lost": 40.0}
    assert ledger.wall == pytest.approx(60.0 + 30.0 + 50.0)  # nobody waited in between: no cluster was asked


def test_steps_that_are_not_saved_are_lost_once_an_attempt_has_ended(tmp_path: Path) -> None:
    run = Run(tmp_path)
    attempt(run, 0.0, 60.0, progress(1, 40, 30, 10.0, 50.0))
    assert parts(ledger_of(run)) == {"starting": 10.0, "productive": 30.0, "lost": 20.0}


def test_an_attempt_at_work_is_counted_to_now(tmp_path: Path) -> None:
    run = Run(tmp_path)
    attempt(run, 0.0, None)
    with runs.lease(run):
        assert parts(ledger_of(run, now=7.0)) == {"starting": 7.0}
        runs.write_json(run.logs(1) / "progress.json", progress(1, 5, 0, 8.0, 13.0))
        assert parts(ledger_of(run, now=14.0)) == {"starting": 8.0, "productive": 6.0}


def test_of_an_attempt_that_was_cut_off_only_what_it_told_counts(tmp_path: Path) -> None:
    """Nobody worked in the night that followed, and what was not saved is gone."""
    run = Run(tmp_path)
    attempt(run, 0.0, None, progress(1, 600, 500, 8.0, 608.0))
    assert parts(ledger_of(run, now=86400.0)) == {"starting": 8.0, "productive": 500.0, "lost": 100.0}
    attempt(run, 86400.0, 86510.0, progress(501, 600, 600, 86410.0, 86510.0))
    assert parts(ledger_of(run)) == {"starting": 18.0, "productive": 600.0, "recomputed": 100.0}


def test_a_run_of_an_older_fleetune_has_a_ledger_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for event, second in (("start", "00"), ("end", "30")):
        runs.append_jsonl(run.attempts, {"attempt": 1, "event": event, "time": f"2026-01-01T00:00:{second}+00:00"})
    assert parts(ledger_of(run)) == {"lost": 30.0}


def test_a_run_that_has_not_begun_has_an_empty_ledger(tmp_path: Path) -> None:
    ledger = ledger_of(Run(tmp_path))
    assert (ledger.wall, ledger.goodput) == (0.0, 0.0)
