"""What Slurm says of jobs, and when a requeued one's start is moved up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from devcluster import DevCluster, eventually
from typer.testing import CliRunner, Result

from fleetune import runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.cli import app
from fleetune.cluster import site, slurm


@pytest.mark.parametrize(
    ("state", "reason", "left", "held"),
    [
        ("PENDING", "BeginTime", 100.0, True),
        ("PENDING", "BeginTime", 118.0, False),  # its last start may still be ending
        ("PENDING", "BeginTime", None, False),
        ("PENDING", "Priority", 100.0, False),
        ("RUNNING", "None", 100.0, False),
    ],
)
def test_only_a_job_that_waits_as_a_requeued_one_does_and_whose_last_start_is_gone_may_be_moved_up(
    state: str, reason: str, left: float | None, held: bool
) -> None:
    job = slurm.Job("7", state, reason, "", "x", None if left is None else time.time() + left)
    assert slurm._may_be_held_back(job) is held


def test_a_job_whose_node_was_lost_before_any_task_came_up_says_so_and_is_moved_up(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs" / "one"
    send("one", setup=["sleep 60"], nodes=2)
    id_ = slurm.job_of(path)
    assert eventually(lambda: cluster.job(id_)["JobState"] == "RUNNING", 60)
    cluster.slurm("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=lost")
    try:
        assert eventually(lambda: cluster.job(id_)["Reason"] == "BeginTime", 60)
        told = " ".join(CliRunner().invoke(app, ["why", str(path)]).stdout.split())
        assert "Slurm holds it back for two minutes, as every requeued job (BeginTime). Its last start was lost" in told
        monkeypatch.setattr(slurm, "ENDING_SECONDS", -60.0)  # it was the batch script's node that was lost
        said, command = [], slurm.command
        monkeypatch.setattr(slurm, "command", lambda *words: said.append(words[:2]) or command(*words))
        found = slurm.jobs_of([path])[path]
    finally:
        cluster("heal", "node1")
    assert (found.reason, found.lost) == ("its start was moved up", "a node failed")
    assert [name for name, *_ in said] == ["squeue", "sacct", "scontrol"]  # two questions, and what it was told to do


@pytest.mark.parametrize(
    ("open_", "state", "lost"),
    [
        (True, "NODE_FAIL", "a node failed"),
        (True, "PREEMPTED", "it was preempted"),
        (False, "PREEMPTED", ""),  # it said so itself
        (True, None, "it was ended from outside"),  # there is no accounting
        (False, "NODE_FAIL", "a node failed"),
        (False, "REQUEUED", ""),  # by its own batch script, which has ended the attempt
        (False, None, ""),
    ],
)
def test_how_a_start_was_lost_is_told_where_the_attempts_do_not_say_it_yet(
    open_: bool, state: str | None, lost: str, tmp_path: Path
) -> None:
    run = runs.Run(tmp_path)
    start_attempt(run, ["node1"])
    if not open_:
        end_attempt(run, 1, runs.SAVED, "preempted: stopped and saved", "preemption")
    earlier = [] if state is None else [slurm.Job("7", state, "", "node1", "x", ended=1.0)]
    waits = slurm.Job("7", "PENDING", "Resources", "", "x")
    assert slurm._how_it_was_lost(tmp_path, waits, earlier) == lost
    assert slurm._how_it_was_lost(tmp_path, slurm.Job("7", "RUNNING", "None", "node1", "x"), earlier) == ""


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("", []),
        ("node7", ["node7"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[08-10,7],gpu-a[1-2]b", ["node08", "node09", "node10", "node7", "gpu-a1b", "gpu-a2b"]),
        ("login,rack[1-2]n[01-02]", ["login", "rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
    ],
)
def test_the_short_form_of_hosts_is_read_where_there_is_no_scontrol(
    short: str, hosts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As inside a container."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.hosts(short) == hosts


@pytest.mark.parametrize("short", ["node[1-3]", "node[08-10,7],gpu-a1b", "login,rack[1-2]n[01-02]", "n[098-102]"])
def test_the_short_form_of_hosts_is_read_as_scontrol_reads_it(short: str, cluster: DevCluster) -> None:
    assert slurm.hosts(short) == cluster.slurm("scontrol", "show", "hostnames", short).split()


def test_the_queue_is_this_users_whatever_the_environment_says(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send("one", extra={"hold": True})
    id_ = slurm.job_of(tmp_path / "runs" / "one")
    wishes = {"SQUEUE_PARTITION": "hi", "SQUEUE_NAMES": "x", "SCANCEL_PARTITION": "hi", "SINFO_PARTITION": "hi"}
    for name, value in ({"LOGNAME": "nobody", "USER": "nobody", "SACCT_FEDERATION": "1"} | wishes).items():
        monkeypatch.setenv(name, value)
    assert slurm.queue()[id_].state == "PENDING"
    assert list(site.ask(associations=False).partitions) == ["main", "hi"]
    assert {nodes.partition for nodes in site.ask(associations=False).nodes} == {"main", "hi"}
    assert slurm.end(id_, at_once=True) == "PENDING"
    assert cluster.job(id_)["JobState"] == "CANCELLED"


def test_every_command_asks_the_cluster_that_is_exported(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "devcluster")
    assert send("one", extra={"hold": True}).exit_code == 0
    id_ = slurm.job_of(tmp_path / "runs" / "one")
    assert slurm.queue()[id_].state == "PENDING"
    assert eventually(lambda: id_ in (slurm.accounted(ids=[id_]) or {}), 20)
    assert slurm.end(id_, at_once=True) == "PENDING"
    monkeypatch.setenv("SLURM_CLUSTERS", "elsewhere")
    for ask in (slurm.queue, lambda: slurm.requeue(id_), lambda: slurm.command("scancel", id_)):
        with pytest.raises(slurm.SlurmFailed):
            ask()
    assert not slurm.accounted(ids=[id_])


ROWS = {
    "waits": "7|PENDING||Unknown|Unknown|x",
    "lost": "7|NODE_FAIL|node1|2026-01-02T00:00:00|2026-01-02T01:00:00|x",
    "requeued": "7|REQUEUED|node2|2026-01-03T00:00:00|2026-01-03T01:00:00|x",
    "whose end is unknown": "7|RUNNING|node1|2026-01-01T00:00:00|Unknown|x",
    "done": "7|COMPLETED|node3|2026-01-04T00:00:00|2026-01-04T01:00:00|x",
    "cancelled": "7|CANCELLED by 1000|None assigned|None|2026-01-05T00:00:00|x",
}


@pytest.mark.parametrize(
    ("rows", "last"),
    [
        (("waits", "lost"), "PENDING"),
        (("requeued", "lost"), "REQUEUED"),
        (("done", "whose end is unknown", "lost"), "COMPLETED"),
        (("cancelled", "lost"), "CANCELLED"),
    ],
)
def test_the_latest_start_of_a_job_stands_for_it(
    rows: tuple[str, ...], last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "command", lambda *words: "\n".join(ROWS[row] for row in rows) + "\n")
    found = slurm.accounted(ids=["7"])
    assert found is not None
    assert found["7"][-1].state == last


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED", "REQUEUED"])
def test_a_job_that_lost_a_start_before_any_task_came_up_may_be_moved_up(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.write_json(tmp_path / "job.json", {"id": "7"})
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "queue", lambda: {"7": slurm.Job("7", "PENDING", "BeginTime", "", "x")})
    ended = slurm.Job("7", state, "", "node1", "x", 1.0, 2.0)
    monkeypatch.setattr(slurm, "accounted", lambda ids: {"7": [ended, slurm.Job("7", "PENDING", "", "", "x")]})
    (job,) = slurm.look([tmp_path]).values()
    assert slurm._has_run(tmp_path, job)
    monkeypatch.setattr(slurm, "accounted", lambda ids: {"7": [slurm.Job("7", "PENDING", "", "", "x")]})
    (job,) = slurm.look([tmp_path]).values()
    assert not slurm._has_run(tmp_path, job)  # a person chose when it begins


def test_a_person_who_chose_when_a_job_begins_is_left_alone(
    cluster: DevCluster, send: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "runs" / "one"
    send("one", extra={"begin": "now+100"})
    assert slurm.jobs_of([path])[path].reason == "BeginTime"
