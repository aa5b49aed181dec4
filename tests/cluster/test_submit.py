"""What sending a run fills in from the profile, and what becomes of what was sent: on a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from devcluster import DevCluster, eventually
from tiny import recipe_values
from typer.testing import CliRunner, Result

from fleetune import runs
from fleetune.cli import app
from fleetune.cluster import slurm
from fleetune.cluster.local import Layout
from fleetune.cluster.profile import Profile, load_profile
from fleetune.cluster.submit import _alone, _is_refusal, _send, attached, awaited, with_failures
from fleetune.recipe import load_recipe
from fleetune.schema import Recipe

PROFILE = Profile(time="4h", nodes=16, failures_per_node_day=0.0065)


def recipe(**checkpoint: Any) -> Recipe:
    return Recipe.model_validate(recipe_values(Path("/nowhere"), "sent", checkpoint=checkpoint))


def test_auto_gets_the_mean_time_between_failures_of_the_profiles_nodes() -> None:
    sent = with_failures(recipe(save_steps="auto"), PROFILE)
    assert sent.checkpoint.mtbf_hours == pytest.approx(24 / (16 * 0.0065))
    assert sent.checkpoint.save_steps == "auto"


def test_what_the_recipe_says_itself_stays() -> None:
    for asked in (recipe(save_steps="auto", mtbf_hours=30.0), recipe(save_steps=100), recipe()):
        assert with_failures(asked, PROFILE) == asked
    asked = recipe(save_steps="auto")
    assert with_failures(asked, Profile(time="4h")) == asked


# ---------------------------------------------------------------- what was sent


def fleetune(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


HELD = {"extra": {"hold": True}}


def job_of(run: Path) -> str:
    return str(runs.read_json(run / "job.json")["id"])


def test_a_job_that_has_not_begun_is_cancelled_plainly(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    run, begun = tmp_path / "runs" / "held", time.monotonic()
    assert send("held", **HELD).exit_code == 0
    done = fleetune("cancel", str(run))
    assert (done.exit_code, done.output) == (0, f"{run}: job {job_of(run)} had not begun, and is cancelled\n")
    assert cluster.job(job_of(run))["JobState"] == "CANCELLED"
    assert time.monotonic() - begun < 20
    again = fleetune("cancel", str(run))
    assert again.exit_code == 2
    assert f"its job {job_of(run)} has ended; there is nothing to cancel" in again.stderr


def test_a_cancelling_that_slurm_refuses_leaves_nothing(
    send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, refusing = tmp_path / "runs" / "held", tmp_path / "scancel"
    send("held", **HELD)
    refusing.write_text("#!/bin/sh\necho no permission >&2\nexit 1\n", encoding="utf-8")
    refusing.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        done = fleetune("cancel", str(run))
    assert (done.exit_code, done.stderr) == (1, "error: scancel: no permission\n")
    assert not (run / "cancel.json").exists()


def test_a_run_that_is_cancelled_before_its_tasks_are_up_is_cancelled(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    """There is none yet that could hear the signal."""
    run = tmp_path / "runs" / "early"
    send("early", setup=["sleep 3"])
    assert eventually(lambda: cluster.job(job_of(run))["JobState"] == "RUNNING", 60)
    assert "is asked to save and end" in fleetune("cancel", str(run)).output
    again = send("early")
    assert again.exit_code == 2
    assert "is being cancelled" in again.stderr
    assert eventually(lambda: not cluster.slurm("squeue", "--noheader"), 60)
    assert [entry.get("kind") for entry in runs.read_jsonl(run / "attempts.jsonl")] == [None, "cancel"]


def test_a_run_is_waited_for_until_it_is_done_and_not_merely_until_its_job_has_ended(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    assert send("first", setup=["sleep 3"]).exit_code == 0
    assert send("second", "--after", str(first)).exit_code == 0
    assert eventually(lambda: cluster.job(job_of(first))["JobState"] == "RUNNING", 60)
    fleetune("cancel", str(first))
    assert eventually(lambda: not cluster.slurm("squeue", "--noheader"), 60)
    assert runs.read_jsonl(first / "attempts.jsonl")[-1]["kind"] == "cancel"
    assert cluster.job(job_of(second))["JobState"] == "CANCELLED"
    assert not (second / "attempts.jsonl").exists()
    told = " ".join(fleetune("why", str(second)).stdout.split())
    assert f"waited for {first}, and was cancelled: that run's job ended before the run was done" in told
    third = send("third", "--after", str(first))
    assert third.exit_code == 2
    assert "is not done, and no job of it is in the queue (cancelled: " in third.stderr
    assert not (tmp_path / "runs" / "third").exists()


def test_a_run_that_is_done_is_not_waited_for(send: Callable[..., Result], tmp_path: Path) -> None:
    done = runs.Run(tmp_path / "done")
    done.path.mkdir()
    runs.write_json(done.path / "run.json", {"id": "1"})
    runs.append_jsonl(done.attempts, {"attempt": 1, "event": "end", "exit_code": runs.DONE, "reason": "done"})
    assert awaited(done.path) is None
    shown = send("next", "--dry-run", "--after", str(done.path))
    assert shown.exit_code == 0, shown.stderr
    assert "--dependency" not in shown.stdout
    send("next", "--after", str(done.path), **HELD)
    assert send("next", "--after", str(done.path), **HELD).stderr == ""
    assert "changed since: --after" in send("next", "--after", str(tmp_path), **HELD).stderr
    nothing = send("other", "--after", str(tmp_path / "nothing"))
    assert nothing.exit_code == 2
    assert "nothing: is no run folder" in nothing.stderr


def test_a_requeued_job_is_still_waited_for(cluster: DevCluster, send: Callable[..., Result], tmp_path: Path) -> None:
    send("first", setup=["sleep 60"])
    send("second", "--after", str(tmp_path / "runs" / "first"))
    first, second = (job_of(tmp_path / "runs" / name) for name in ("first", "second"))
    assert eventually(lambda: cluster.job(first)["JobState"] == "RUNNING", 60)
    cluster.slurm("scontrol", "requeue", first)
    assert eventually(lambda: cluster.job(first)["Reason"] == "BeginTime", 60)
    assert cluster.job(second)["Reason"] == "Dependency"
    assert not (tmp_path / "runs" / "first" / "attempts.jsonl").exists()  # its setup did not fail: Slurm ended it


# ---------------------------------------------------------------- sent once, and as it is meant


def stand_in(folder: Path, name: str, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that goes before one of Slurm's commands."""
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_what_sbatch_refuses_is_said_where_there_is_no_accounting(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "sacct", "echo accounting storage is disabled >&2; exit 1", monkeypatch)
    refused = send("one", extra={"nodelist": "node9"})
    assert refused.exit_code == 2
    assert "the run was not sent; " in refused.stderr
    assert "Invalid node name" in refused.stderr
    assert not (tmp_path / "runs" / "one").exists()
    assert send("one", **HELD).exit_code == 0


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("sbatch: error: Batch job submission failed: Invalid qos specification", True),
        ("sbatch: error: contact support@site\nsbatch: error: Batch job submission failed: Unspecified error", True),
        ("sbatch: unrecognized option '--nodez=3'\nTry \"sbatch --help\" for more information", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", False),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", False),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", False),
        ("sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying", False),
        ("Could not make sense of sbatch output", False),
        ("", False),  # it was killed
    ],
)
def test_only_where_sbatch_itself_says_why_the_job_is_not_looked_for_in_the_accounting(
    said: str, refused: bool
) -> None:
    assert _is_refusal(RuntimeError(said)) is refused


def test_a_job_that_a_slow_controller_has_taken_is_found_though_sbatch_gave_up(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gives_up = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    stand_in(tmp_path, "sbatch", f'/usr/bin/env PATH="${{PATH#*:}}" sbatch "$@"; {gives_up}', monkeypatch)
    sent = send("one", **HELD)
    assert sent.exit_code == 0, sent.stderr
    assert cluster.job(job_of(tmp_path / "runs" / "one"))["JobState"] == "PENDING"


def test_what_is_sent_from_within_a_job_has_nothing_of_that_job(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_a_job = {"SLURM_MEM_PER_CPU": "4096", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "x"}
    of_a_job |= {"SRUN_DEBUG": "3", "SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    for name, value in of_a_job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CLUSTERS", "devcluster")
    seen = tmp_path / "seen"
    stand_in(tmp_path, "sbatch", f'env >> {seen}; exec /usr/bin/env PATH="${{PATH#*:}}" sbatch "$@"', monkeypatch)
    for words in (("--dry-run",), ()):
        assert send("one", *words, **HELD).exit_code == 0
        names = {line.partition("=")[0] for line in seen.read_text(encoding="utf-8").splitlines()}
        assert not names & of_a_job.keys()
        assert {"SLURM_CONF", "SLURM_CLUSTERS", "PATH"} <= names
        seen.unlink()
    assert of_a_job.items() <= os.environ.items()


def test_of_two_that_send_a_run_at_the_same_moment_one_finds_the_others_job(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    send("one", "--dry-run", **HELD)  # writes the recipe and the profile
    run, recipe_file, profile_file = tmp_path / "runs" / "one", tmp_path / "one.yaml", tmp_path / "profile.yaml"

    def waits() -> bool:
        return any(Path(file.path).name == ".one.sending" for file in psutil.Process(other.pid).open_files())

    with _alone(runs.Run(run)):
        other = subprocess.Popen(
            [sys.executable, "-m", "fleetune.cli", "submit", str(recipe_file), "--cluster", str(profile_file)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert eventually(waits, 60)
        sent = _send(load_recipe(recipe_file), load_profile(profile_file), Layout(1, 1, 1), None, None)
    output, _ = other.communicate(timeout=60)
    assert other.returncode == 0
    assert f"job {sent.job}, pending already" in output
    assert len(cluster.slurm("squeue", "--noheader").splitlines()) == 1
    assert sorted(path.name for path in run.parent.iterdir()) == ["one"]


def completing(states: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run's job is in these states, look by look, and then gone; what was slept meanwhile."""
    runs.write_json(path / "job.json", {"id": "7", "token": "x"})
    left = iter(states)

    def queue() -> dict[str, slurm.Job]:
        return {} if (state := next(left, None)) is None else {"7": slurm.Job("7", state, "", "", "x")}

    slept = list[str]()
    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(str(seconds)))
    return slept


def test_a_job_that_is_only_ending_is_waited_for_until_it_is_gone_or_back_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    completing(["COMPLETING", "COMPLETING"], tmp_path, monkeypatch)
    assert attached(runs.Run(tmp_path)) is None
    completing(["COMPLETING", "PENDING"], tmp_path, monkeypatch)
    assert getattr(attached(runs.Run(tmp_path)), "state", "") == "PENDING"
    slept = completing(["COMPLETING"] * 100, tmp_path, monkeypatch)  # a node that does not answer
    assert getattr(attached(runs.Run(tmp_path)), "state", "") == "COMPLETING"
    assert len(slept) == slurm.LOOKS


ANOTHER = ("training.learning_rate=0.5",)


def finish(run: runs.Run) -> None:
    """As a run stands that has come to its end, its job long forgotten."""
    runs.append_jsonl(run.attempts, {"attempt": 1, "event": "end", "exit_code": runs.DONE, "reason": "done"})
    runs.write_json(run.eval, {"total_steps": 6})
    runs.write_json(run.path / "run.json", run.info() | {"total_steps": 6})


@pytest.mark.parametrize("state", ["queued", "finished", "failed after a step"])
@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["sent", "dry run"])
def test_another_recipe_under_the_name_of_a_run_is_refused(
    state: str, words: tuple[str, ...], cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    run = runs.Run(tmp_path / "runs" / "one")
    send("one", **HELD)
    before = (run.path / "job.json").read_bytes()
    if state != "queued":
        cluster.slurm("scancel", job_of(run.path))
    if state == "finished":
        finish(run)
    if state == "failed after a step":
        run.metrics.write_text('{"step": 1, "train/loss": 0.5}\n')
    done = send("one", *words, recipe=ANOTHER, **HELD)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"error: {run.path} is a run of another recipe (--fresh takes the next free name):",
        "  training.learning_rate: 0.001 in the run, 0.5 now",
    ]
    assert (run.path / "job.json").read_bytes() == before


def test_a_mended_recipe_takes_the_name_of_a_run_whose_job_ended_before_its_first_step(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    run = runs.Run(tmp_path / "runs" / "one")
    send("one", **HELD)
    first = job_of(run.path)
    cluster.slurm("scancel", first)
    done = send("one", recipe=ANOTHER, **HELD)
    assert done.exit_code == 0, done.stderr
    assert run.recipe().training.learning_rate == 0.5
    assert job_of(run.path) != first


def test_what_has_changed_since_a_job_was_sent_is_said_when_it_is_attached_to(
    send: Callable[..., Result], tmp_path: Path
) -> None:
    run, longer = tmp_path / "runs" / "one", ("training.max_steps=60",)
    send("one", **HELD)
    same = send("one", **HELD)
    assert same.stderr == ""
    assert f"{run}: job {job_of(run)}, pending already" in same.stdout
    for words in ((), ("--dry-run",)):
        done = send("one", *words, recipe=longer, nodes=2, **HELD)
        assert done.exit_code == 0
        assert done.stderr.startswith("warning   changed since: training.max_steps, nodes of the profile; job ")
        assert done.stderr.count("\n") == 1
        assert ("submit would send nothing" in done.stdout) is (words != ())
        assert "#SBATCH" not in done.stdout


def test_the_nodes_own_choice_of_fp32_is_no_change(send: Callable[..., Result], tmp_path: Path) -> None:
    run, bf16 = runs.Run(tmp_path / "runs" / "one"), ("training.bf16=true",)
    send("one", recipe=bf16, **HELD)
    text = run.recipe_file.read_text(encoding="utf-8")  # as the first rank does on a CPU without bf16
    runs.write_text(run.recipe_file, text.replace("bf16: true", "bf16: false"))
    runs.write_json(run.path / "run.json", run.info() | {"fp32_for_bf16": True})
    assert send("one", recipe=bf16, **HELD).stderr == ""


def test_a_run_that_is_finished_goes_on_where_it_is_longer_now(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    run = runs.Run(tmp_path / "runs" / "one")
    send("one", **HELD)
    cluster.slurm("scancel", job_of(run.path))
    finish(run)
    (run.path / "job.json").rename(run.path / "other.json")  # it was trained by `fleetune run`
    assert "one is finished; --fresh trains it again, a longer training.max_steps goes on" in send("one", **HELD).stdout
    assert "#SBATCH" in send("one", "--dry-run", recipe=("training.max_steps=60",), **HELD).stdout
    assert f"--job-name={'one-2-TOKEN'}" in send("one", "--dry-run", "--fresh", **HELD).stdout
    assert ", sent" in send("one", recipe=("training.max_steps=60",), **HELD).stdout
