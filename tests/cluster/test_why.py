"""Why a run is where it is: what a person is told, from what the run's folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_values

from fleetune import runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.cluster import why as why_
from fleetune.cluster.slurm import Job
from fleetune.recipe import dump_recipe
from fleetune.schema import Recipe, RecipeError


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    made = runs.Run(tmp_path / "run")
    made.path.mkdir()
    runs.write_json(made.path / "run.json", {"id": "1", "total_steps": 400})
    values = recipe_values(tmp_path, "run", retries={"crash": 1})
    made.recipe_file.write_text(dump_recipe(Recipe.model_validate(values)), encoding="utf-8")
    return made


def ended(run: runs.Run, code: int, reason: str, kind: str | None = None, saved: int = 0) -> None:
    number = start_attempt(run, ["node1"])
    progress: dict[str, Any] = {"first_step": 1, "step": saved, "saved_step": saved, "restoring": 0.0, "saving": 0.0}
    (run.logs(number) / "progress.json").write_text(json.dumps(progress | {"began": 1.0, "time": 2.0}))
    end_attempt(run, number, code, reason, kind)


def told(run: runs.Run) -> str:
    return "\n".join(why_.why(run))


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("rank 3: CUDA out of memory. Tried to allocate 2 GiB", "per_device_train_batch_size"),
        ("rank 1 was killed by SIGKILL\n  log: x", "for want of memory"),
        ("rank 1 was killed by SIGSEGV\n  log: x", "compiled code"),
        ("the ranks hang in their step: no sign of rank 1 for 61 s\n  rank 1 is stopped", "stacks"),
        ("rank 0: step 7: cross_entropy is nan; rows 3, 4", "learning_rate"),
        ("rank 0: the checkpoint cannot be written: Disk quota exceeded", "Free some space"),
        ("rank 2: [gloo] Connection closed by peer", "died first"),
        ("rank 0: something that nobody has seen yet", "mend what the message names"),
    ],
)
def test_a_failure_is_told_with_what_to_do(run: runs.Run, reason: str, remedy: str) -> None:
    ended(run, runs.FAILED, reason)
    assert reason.partition("\n")[0] in told(run)
    assert remedy in told(run)


def test_a_run_given_up_says_so_and_how_its_attempts_ended(run: runs.Run) -> None:
    ended(run, runs.SAVED, "preempted: stopped and saved", "preemption", 5)
    for step in (7, 9):
        ended(run, runs.FAILED, f"rank 1 broke at {step}", "crash", step)
    said = told(run)
    assert "does not go on by itself: rank 1 broke at 9" in said
    assert "It was given up after 2 attempts that ended by crash (retries.crash = 1)" in said
    assert "2 earlier attempts ended: 1 by preemption, 1 by crash." in said


def test_a_run_that_is_done_stopped_or_never_begun(run: runs.Run) -> None:
    assert "It has not begun." in told(run)
    ended(run, runs.SAVED, "stopped and saved by SIGTERM", saved=5)
    runs.append_jsonl(run.metrics, {"step": 5})
    assert "It is not at work, at step 5 of 400: stopped and saved by SIGTERM." in told(run)
    assert "the same command again goes on from there" in told(run)
    ended(run, runs.DONE, "done", saved=400)
    assert "It is done" in told(run)
    assert "1 earlier attempt ended: 1 by stop." in told(run)


def test_an_attempt_without_an_end_is_at_work_or_was_cut_off(run: runs.Run) -> None:
    start_attempt(run, ["node1", "node2"])
    assert "Attempt 1 on node1, node2 was ended from outside, without a word" in told(run)
    with runs.lease(run):
        assert "Attempt 1 is at work on node1, node2" in told(run)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("Priority", "jobs of higher priority go first"),
        ("QOSMaxJobsPerUserLimit", "a limit of your account or qos is reached"),
        ("PartitionTimeLimit", "`time` is beyond what the partition allows"),
        ("DependencyNeverSatisfied", "the run it waits for has ended before it was done"),
        ("Dependency", "it waits for another run"),
        ("ReqNodeNotAvail, UnavailableNodes:node3", "nodes it needs are down, or reserved"),
        ("SomethingNew", "not begun: SomethingNew."),
    ],
)
def test_a_job_that_waits_says_for_what(run: runs.Run, reason: str, said: str) -> None:
    assert said in why_._now(run, Job("7", "PENDING", reason, "", "x"), [])[0]


def test_a_job_that_was_cancelled_before_it_began_is_no_riddle(run: runs.Run) -> None:
    runs.write_json(run.path / "job.json", {"id": "7"})
    said = why_._now(run, Job("7", "CANCELLED by 1000", "", "", "x"), [])
    assert said == ("Job 7 was cancelled before it began.", "submit it again, if it is still wanted.")


def test_a_run_that_was_cancelled_between_two_attempts_says_so(run: runs.Run) -> None:
    ended(run, runs.FAILED, "a node failed", "node_failure", 5)
    runs.write_json(run.path / "cancel.json", {"job": "7"})
    assert "It was cancelled while it waited for its next attempt, at step 5 of 400." in told(run)


def test_a_run_whose_node_was_lost_says_so_and_not_how_the_attempt_before_ended(
    run: runs.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(run, runs.SAVED, "preempted: stopped and saved", "preemption", 5)
    start_attempt(run, ["node1", "node2"])
    waits = Job("7", "PENDING", "BeginTime", "", "x", lost="a node failed")
    monkeypatch.setattr(why_, "_job", lambda run: waits)
    assert "(BeginTime). Attempt 2 on node1, node2 was lost: a node failed. 1 earlier attempt ended" in told(run)
    assert "stopped and saved" not in told(run)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run folder"):
        why_.why(runs.Run(tmp_path))
