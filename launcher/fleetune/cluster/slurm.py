"""What Slurm says and is told: jobs by id or by token, requeues, signals. By its own commands; no cached states."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fleetune import runs
from fleetune.attempts import unended
from fleetune.schema import RecipeError

# States in which a job is, or comes back, in the queue.
LIVE = frozenset(
    ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
     "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT")
)  # fmt: skip
SECONDS = 60.0  # for a controller that is being restarted
LOOKS = 30  # a second apart, at a job that is between two states
HELD_SECONDS = 120.0  # that Slurm holds a requeued job back
ENDING_SECONDS = 10.0  # of which its last start may need as many to be gone


class SlurmFailed(RuntimeError):
    """A Slurm command failed: carries the command's name and what it said."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str  # Slurm's word: PENDING, RUNNING, COMPLETED, NODE_FAIL, ...
    reason: str  # why it waits
    nodes: str
    name: str
    begins: float | None = None  # seconds since the epoch; of one that waits, where Slurm says so
    lost: str = ""  # how Slurm ended the last start of one that waits, where the run's own files do not say it yet

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    def __str__(self) -> str:
        return f"pending ({self.reason})" if self.state == "PENDING" else self.state.lower().replace("_", " ")


def job_of(path: Path) -> str:
    """The id of the job of a run's folder. Raises RecipeError where it was never sent."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(runs.read_json(path / "job.json")["id"])
    raise RecipeError(f"{path}: was not sent to a cluster (it has no job.json with an id)")


def jobs_of(paths: Iterable[Path]) -> dict[Path, Job]:
    """Each run's job that Slurm still knows, by at most three queries; runs without a job are left out.

    A requeued job is held for two minutes, from the moment that its last attempt has left the nodes, so that the
    attempt itself cannot change it: who looks moves its start up, where this user may.
    """
    ids = {}
    for path in paths:
        with contextlib.suppress(RecipeError):
            ids[path] = job_of(path)
    if not ids or shutil.which("squeue") is None:
        return {}
    known = queue()
    if missing := {id_ for id_ in ids.values() if id_ not in known}:
        known |= accounted(ids=missing) or {}
    found = {path: known[id_] for path, id_ in ids.items() if id_ in known}
    for path, how in how_they_were_lost(found).items():
        found[path] = replace(found[path], lost=how)
    for path, job in found.items():
        if _may_be_held_back(job) and _has_run(path, job.id) and start_now(job.id):
            found[path] = replace(job, reason="its start was moved up")
    return found


def _may_be_held_back(job: Job) -> bool:
    """Whether it waits as a job that was requeued does, and has done so for a while.

    The batch script of its last start may still be ending, and Slurm would take that for the end of a new start, which
    is then lost.
    """
    if job.state != "PENDING" or job.reason != "BeginTime" or job.begins is None:
        return False
    return job.begins - time.time() < HELD_SECONDS - ENDING_SECONDS


def _has_run(path: Path, id_: str) -> bool:
    """Else it was a person who chose when it begins. Slurm is asked where no task of it came up."""
    if any((path / "slurm").glob(f"{id_}-*")):
        return True
    with contextlib.suppress(SlurmFailed):
        return re.search(r"\bRestarts=[1-9]", command("scontrol", "--oneliner", "show", "job", id_)) is not None
    return False


def how_they_were_lost(jobs: dict[Path, Job]) -> dict[Path, str]:
    """How Slurm ended the last start of those that wait for another, where the run's own files do not say it yet.

    By one query at most.
    """
    waiting = {path: job for path, job in jobs.items() if job.state == "PENDING"}
    is_open = {path: bool(unended(runs.Run(path))) for path in waiting}
    ids = [job.id for path, job in waiting.items() if job.reason == "BeginTime" or runs.Run(path).attempts.exists()]
    starts = past(ids) if ids else {}
    told = {"NODE_FAIL": "a node failed", "PREEMPTED": "it was preempted", "REQUEUED": "it was requeued"}
    found = {}
    for path, job in waiting.items():
        state = starts[job.id][-1].state if job.id in starts else ""
        if is_open[path]:
            found[path] = told.get(state, "it was ended from outside")
        elif state == "NODE_FAIL":  # of the others the attempt's own end is told
            found[path] = told[state]
    return found


def require() -> None:
    """Raises RecipeError where this is no machine from which jobs can be sent."""
    missing = [name for name in ("sbatch", "squeue", "scontrol", "srun") if shutil.which(name) is None]
    if missing:
        raise RecipeError(
            f"{missing[0]}: not found on the PATH: this is no login node of a Slurm cluster; `fleetune run` trains on "
            "this machine, and slurm/devcluster starts a small cluster on it"
        )


def command(*words: str, typed: str | None = None, seconds: float = SECONDS) -> str:
    """What a command says; `typed` goes to its standard input. Raises SlurmFailed."""
    try:
        done = subprocess.run(
            words, input=typed, capture_output=True, text=True, timeout=seconds, check=False,
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SlurmFailed(f"{words[0]}: no answer in {seconds:.0f} s") from None
    except OSError as error:
        raise SlurmFailed(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise SlurmFailed(f"{words[0]}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done.stdout


def queue(user: str | None = None) -> dict[str, Job]:
    """The user's jobs in the queue and those that have just left it, by id; one query."""
    fields = "%i|%T|%r|%N|%S|%j"
    lines = command("squeue", "--noheader", "--states=all", f"--user={user or getpass.getuser()}", f"--format={fields}")
    jobs = {}
    for line in lines.splitlines():
        id_, state, reason, nodes, begins, name = (field.strip() for field in line.split("|", 5))
        jobs[id_] = Job(id_, state, reason, nodes, name, _epoch(begins))
    return jobs


def accounted(ids: Iterable[str] = (), names: Iterable[str] = ()) -> dict[str, Job] | None:
    """Jobs as the accounting has them, the latest state of each; one query. None where there is no accounting."""
    by = [f"--jobs={','.join(ids)}"] if (ids := list(ids)) else []
    by += [f"--name={','.join(names)}"] if (names := list(names)) else []
    words = ("sacct", "--noheader", "--parsable2", "--allocations", "--starttime=now-30days", *by)
    try:
        lines = command(*words, "--format=JobIDRaw,State,NodeList,JobName")
    except SlurmFailed:
        return None
    jobs = {}
    for line in lines.splitlines():
        id_, state, nodes, name = line.split("|", 3)
        jobs[id_] = Job(id_, state.split()[0], "", nodes, name)  # CANCELLED by 1000
    return jobs


@dataclass(frozen=True)
class Past:
    """One of a job's earlier starts, as the accounting has it."""

    state: str  # NODE_FAIL, PREEMPTED, REQUEUED, ...
    end: float  # seconds since the epoch


def past(ids: Iterable[str]) -> dict[str, list[Past]]:
    """The starts of jobs that have ended, oldest first; by one query. None where there is no accounting."""
    words = ("sacct", "--noheader", "--parsable2", "--duplicates", "--allocations", f"--jobs={','.join(ids)}")
    found: dict[str, list[Past]] = {}
    with contextlib.suppress(SlurmFailed):
        for line in command(*words, "--format=JobIDRaw,State,End").splitlines():
            id_, state, end = line.split("|")
            if (ended := _epoch(end)) is not None:  # else it is still at work
                found.setdefault(id_, []).append(Past(state.split()[0], ended))
    return {id_: sorted(starts, key=lambda one: one.end) for id_, starts in found.items()}


def _epoch(time: str) -> float | None:
    """Of Slurm's local time; None for N/A and Unknown."""
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(time).timestamp()
    return None


def seconds_left(id_: str) -> float | None:
    """Until the job's time limit; None where it has none."""
    return seconds_of(command("squeue", "--noheader", f"--jobs={id_}", "--format=%L").strip())


def seconds_of(text: str) -> float | None:
    """Of Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS; None of UNLIMITED and the like."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"[\d:]+", clock):  # UNLIMITED, NOT_SET
        return None
    seconds = 0
    for field in clock.split(":"):
        seconds = 60 * seconds + int(field)
    return seconds + 86400 * int(days or 0)


def hosts(nodes: str) -> list[str]:
    """Of Slurm's short form: node[1-3] is node1, node2, node3."""
    return command("scontrol", "show", "hostnames", nodes).split() if nodes else []


def requeue(id_: str) -> None:
    command("scontrol", "requeue", id_)


def start_now(id_: str) -> bool:
    """Ends the time that Slurm holds a requeued job back for (two minutes), where this user may. Whether it did."""
    try:
        command("scontrol", "update", f"JobId={id_}", "StartTime=now")
    except SlurmFailed:
        return False
    return True


def end(id_: str, at_once: bool) -> str | None:
    """Has a job's ranks save and end, or cancels it: `at_once`, or where it has not begun and there is nothing to save.

    Returns the state that it was in, RUNNING or PENDING for the most part; None where it had ended already.

    Raises:
        SlurmFailed: the job stays between two states, in which it takes no signal, or Slurm does not do it.
    """
    for _ in range(LOOKS):
        job = queue().get(id_)
        if job is None or not job.is_live:
            return None
        if at_once:
            command("scancel", id_)
            return job.state
        if job.state == "RUNNING":
            command("scancel", "--signal=USR2", id_)
            return job.state
        if job.state == "PENDING":  # a signal would wait for it to begin; this leaves one alone that has begun by now
            command("scancel", "--state=PENDING", id_)
            if (now := queue().get(id_)) is None or not now.is_live:
                return job.state
        time.sleep(1.0)
    raise SlurmFailed(f"scancel: job {id_} is {job}, and takes no signal to save; --now ends it without")
