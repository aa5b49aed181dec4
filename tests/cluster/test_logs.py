"""What `logs` shows, and what is said of a start that came to no training: by Slurm's own logs, on a real Slurm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster, eventually
from typer.testing import CliRunner, Result

from fleetune import runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.cli import app
from fleetune.cluster import logs, slurm


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    runs.write_json(tmp_path / "run.json", {"id": "1"})
    return runs.Run(tmp_path)


def write(run: runs.Run, attempt: int, text: str) -> None:
    with (run.logs(attempt) / "rank-0.log").open("a", encoding="utf-8") as file:
        file.write(text)


def of_task(run: runs.Run, name: str, text: str) -> Path:
    folder = run.path / "submitit" / "abc"
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(run.path / "job.json", {"token": "abc"})
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_log_is_followed_through_all_attempts_until_the_run_has_ended(
    run: runs.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "ASKING_SECONDS", 0.2)

    def train() -> None:
        with runs.lease(run):
            for attempt, (code, reason) in enumerate([(runs.FAILED, "a node failed"), (runs.DONE, "done")], start=1):
                start_attempt(run, ["node1"])
                for step in (1, 2):
                    time.sleep(0.4)
                    write(run, attempt, f"step {step}\n")
                end_attempt(run, attempt, code, reason)
            time.sleep(0.4)

    at_work = threading.Thread(target=train)
    at_work.start()
    assert eventually(lambda: runs.is_at_work(run), 5)
    text = "".join(logs.followed(run, 0, None))
    at_work.join()
    assert text.splitlines() == [
        *("step 1", "step 2", "---- attempt 2", "step 1", "step 2", "---- attempt 2 ended: done"),
    ]
    assert "".join(logs.followed(run, 0, 1)).splitlines()[-1] == "---- attempt 1 ended: a node failed"
    assert "".join(logs.said(run, 0, None)) == "step 1\nstep 2\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "slurmstepd-node1: error: execve(): apptainer: No such file or directory\n"
            "srun: error: node1: tasks 0-1: Exited with exit code 2\n"
            "srun: launch/slurm: _step_signal: Terminating StepId=6.0\n",
            ["slurmstepd-node1: error: execve(): apptainer: No such file or directory"],
        ),
        (
            "srun: unrecognized option '--container-image=x'\nTry \"srun --help\" for more information\n",
            ["srun: unrecognized option '--container-image=x'"],
        ),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s)\n"
            "slurmstepd-node1: error: *** JOB 6 ON node1 CANCELLED AT 2026 DUE TO JOB REQUEUE ***\n"
            "srun: error: node1: task 0: Killed\n",
            ["srun: error: node1: task 0: Killed"],  # what the start before it said is not its
        ),
        ("first\nlast\n", ["last", "first"]),
        ("", []),
    ],
)
def test_the_last_words_are_those_that_say_why(run: runs.Run, text: str, words: list[str]) -> None:
    path = of_task(run, "6_0_log.err", text)
    assert logs.last_words(run) == ([*words, f"log: {path}"] if words else [])


def test_where_no_rank_has_a_log_slurms_own_is_shown(run: runs.Run) -> None:
    with pytest.raises(logs.RecipeError, match="no attempt has begun"):
        list(logs.said(run, 0, None))
    path = of_task(run, "6_1_log.err", "no such program\n")
    start_attempt(run, ["node1"])
    shown = "".join(logs.said(run, 1, None))
    assert shown == f"---- no rank has written a log; this is Slurm's own, {path}\nno such program\n"
    write(run, 1, "trained\n")
    with pytest.raises(logs.RecipeError, match="--rank 1: the attempt has ranks 0"):
        list(logs.said(run, 1, None))


def test_a_job_that_waits_says_so_when_its_log_is_followed(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([("PENDING", "Priority"), ("PENDING", "Priority"), ("RUNNING", "None"), ("CANCELLED", "None")])

    def look(paths: list[Path]) -> dict[Path, slurm.Job]:
        state, reason = next(states)
        return {run.path: slurm.Job("7", state, reason, "", "x")}

    monkeypatch.setattr(logs, "ASKING_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "jobs_of", look)
    followed = logs.followed(run, 0, None)
    assert [next(followed), next(followed)] == ["---- job 7 is pending (Priority)\n", "---- job 7 is running\n"]
    with pytest.raises(logs.RecipeError, match="no attempt has begun"):
        next(followed)


# ---------------------------------------------------------------- a real one


def fleetune(*words: str) -> str:
    return CliRunner().invoke(app, list(words)).output


def last_end(run: runs.Run) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        last = (runs.read_jsonl(run.attempts) or [{}])[-1]
        return last if last.get("event") == "end" else {}

    return eventually(look, 60)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["modul load cuda", "touch begun"], "failed with exit code 127: "),
        (["exit 3"], "failed with exit code 3"),
        (["exit 0"], "left the script with exit code 0"),
        (["load() { false; return 4; }", "load cuda"], "failed with exit code 4"),
    ],
)
def test_a_setup_that_fails_is_the_jobs_end_and_its_reason(
    lines: list[str], said: str, cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    run = runs.Run(tmp_path / "runs" / "one")
    assert send("one", setup=lines).exit_code == 0
    end = last_end(run)
    assert eventually(lambda: not cluster.slurm("squeue", "--noheader"), 60)
    assert (end["kind"], end["exit_code"]) == ("wrong", runs.WRONG)
    assert end["reason"].startswith(f"the profile's setup {said}")
    assert not (run.path / "begun").exists()
    told = " ".join(fleetune("why", str(run.path)).split())
    assert f"the profile's setup {said}".strip() in told
    assert "Mend the `setup` lines of the cluster's profile" in told
    if "modul" in lines[0]:  # and no rank has a log
        assert "modul: command not found" in told
        assert "modul: command not found" in fleetune("logs", str(run.path), "--follow")


def test_a_setup_whose_functions_fail_inside_and_not_as_a_whole_goes_on(
    send: Callable[..., Result], tmp_path: Path
) -> None:
    run = runs.Run(tmp_path / "runs" / "one")
    send("one", setup=["load() { false; true; }", "load cuda", "false || true", "touch begun", "exit 5"])
    assert last_end(run)["reason"].startswith("the profile's setup failed with exit code 5")
    assert (run.path / "begun").exists()


def test_what_starts_the_ranks_and_is_not_there_is_named(send: Callable[..., Result], tmp_path: Path) -> None:
    run = runs.Run(tmp_path / "runs" / "one")
    sent = send("one", container={"kind": "apptainer", "image": "/nowhere/torch.sif"})
    assert "container.image = '/nowhere/torch.sif': is not there on this machine" in sent.stderr
    end = last_end(run)
    assert end["kind"] == "crash"
    assert "execve(): apptainer: No such file or directory" in end["reason"]
    assert "execve(): apptainer: No such file or directory" in fleetune("logs", str(run.path))
    told = " ".join(fleetune("why", str(run.path)).split())
    assert "If it ends so again: What starts the ranks is not there on the node: see `container`" in told
