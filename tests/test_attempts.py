"""Attempts, as attempts.jsonl has them: counted from 1, each with its logs, none lost by a torn line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune import runs
from fleetune.attempts import end_attempt, log_of, start_attempt, unended
from fleetune.runs import Run
from fleetune.schema import RecipeError


def test_attempts_are_counted_from_1_and_have_their_logs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for number in (1, 2, 3):
        assert start_attempt(run, ["here"]) == number
        assert run.logs(number).is_dir()
        if number == 2:  # of the others no rank came to a step
            (run.logs(number) / "progress.json").write_text('{"first_step": 4, "step": 11, "saved_step": 9}')
        end_attempt(run, number, runs.FAILED, "rank 0: broke")
    entries = runs.read_jsonl(run.attempts)
    assert [(entry["attempt"], entry["event"]) for entry in entries] == [
        (number, event) for number in (1, 2, 3) for event in ("start", "end")
    ]
    assert [entries[at]["first_step"] for at in (1, 3, 5)] == [None, 4, None]
    assert entries[3]["last_step"] == 9
    assert {"exit_code": 1, "reason": "rank 0: broke", "nodes": ["here"]}.items() <= entries[1].items()


def test_an_attempt_lasts_from_its_nodes_first_work_to_its_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    start_attempt(run, ["here"], began=1000.0, sent=900.0)
    end_attempt(run, 1, runs.SAVED, "preempted", kind="preemption", at=1012.5)
    end = runs.read_jsonl(run.attempts)[-1]
    assert (end["seconds"], end["kind"]) == (12.5, "preemption")


def test_what_has_no_end_is_at_work_or_was_ended_from_outside(tmp_path: Path) -> None:
    run = Run(tmp_path)
    start_attempt(run, ["a"])
    end_attempt(run, 1, runs.DONE, "done")
    start_attempt(run, ["b"])
    assert [(entry["attempt"], entry["nodes"]) for entry in unended(run)] == [(2, ["b"])]


@pytest.mark.parametrize(
    "torn", ['{"attempt": 2, "event": "st', '{"attempt": 2, "reason": "ü'.encode()[:-1].decode("latin-1"), "{"]
)
def test_a_line_torn_by_a_kill_costs_neither_the_next_line_nor_its_number(tmp_path: Path, torn: str) -> None:
    run = Run(tmp_path)
    start_attempt(run, ["here"])
    run.logs(2).mkdir()  # made before the line was written
    with run.attempts.open("ab") as file:
        file.write(torn.encode("latin-1"))
    assert [entry["attempt"] for entry in runs.read_jsonl(run.attempts)] == [1]
    assert start_attempt(run, ["here"]) == 3
    end_attempt(run, 3, runs.DONE, "done")
    assert [(entry["attempt"], entry["event"]) for entry in runs.read_jsonl(run.attempts)] == [
        (1, "start"),
        (3, "start"),
        (3, "end"),
    ]


def test_a_log_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RecipeError, match="no attempt has begun"):
        log_of(run, 0, None)
    start_attempt(run, ["here"])
    for rank in (0, 1):
        (run.logs(1) / f"rank-{rank}.log").touch()
    assert log_of(run, 1, None) == run.logs(1) / "rank-1.log"
    with pytest.raises(RecipeError, match=r"--rank 2: the attempt has ranks 0, 1"):
        log_of(run, 2, None)
    with pytest.raises(RecipeError, match=r"--attempt 7: the run has attempts 1 to 1"):
        log_of(run, 0, 7)
