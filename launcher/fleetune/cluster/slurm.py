"""What Slurm says and is told: jobs by id or by token, requeues, signals. By its own commands; no cached states."""

from __future__ import annotations

import contextlib
import datetime
import math
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
# A person's own wishes as to what these commands show and touch: SQUEUE_PARTITION hides jobs of other partitions.
WISHES = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_")


class SlurmFailed(RuntimeError):
    """A Slurm command failed: carries the command's name and what it said."""


@dataclass(frozen=True)
class Job:
    id: str
    state: str  # Slurm's word: PENDING, RUNNING, COMPLETED, NODE_FAIL, ...
    reason: str  # why it waits
    nodes: str
    name: str
    begins: float | None = None  # or began, in seconds since the epoch; where Slurm says so
    ended: float | None = None  # likewise; of one that waits for another start, when its last one did
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
    """Each run's job that Slurm still knows, by at most two queries; runs without a job are left out.

    A requeued job is held for two minutes, from the moment that its last attempt has left the nodes, so that the
    attempt itself cannot change it: who looks moves its start up, where this user may.
    """
    found = look(paths)
    for path, job in found.items():
        if _may_be_held_back(job) and _has_run(path, job) and start_now(job.id):
            found[path] = replace(job, reason="its start was moved up")
    return found


def look(paths: Iterable[Path]) -> dict[Path, Job]:
    """As `jobs_of`, and nothing is changed. Raises SlurmFailed where Slurm does not answer."""
    ids = {}
    for path in paths:
        with contextlib.suppress(RecipeError):
            ids[path] = job_of(path)
    if not ids or shutil.which("squeue") is None:
        return {}
    queued = queue()
    asked = [id_ for path, id_ in ids.items() if id_ not in queued or _may_have_run(path, queued[id_])]
    starts = (accounted(ids=asked) or {}) if asked else {}
    found = {}
    for path, id_ in ids.items():
        known = starts.get(id_, [])
        if id_ in queued:
            earlier = [start for start in known if start.ended is not None]
            lost = _how_it_was_lost(path, queued[id_], earlier)
            found[path] = replace(queued[id_], ended=earlier[-1].ended if earlier else None, lost=lost)
        elif known:
            found[path] = known[-1]
    return found


def _may_have_run(path: Path, job: Job) -> bool:
    return job.state == "PENDING" and (job.reason == "BeginTime" or runs.Run(path).attempts.exists())


def _how_it_was_lost(path: Path, job: Job, earlier: list[Job]) -> str:
    """How Slurm ended the last start of a job that waits for another, where the run's own files do not say it yet."""
    if not _may_have_run(path, job):
        return ""
    state = earlier[-1].state if earlier else ""
    told = {"NODE_FAIL": "a node failed", "PREEMPTED": "it was preempted", "REQUEUED": "it was requeued"}
    if unended(runs.Run(path)):
        return told.get(state, "it was ended from outside")
    return told[state] if state == "NODE_FAIL" else ""  # of the others the attempt's own end is told


def _may_be_held_back(job: Job) -> bool:
    """Whether it waits as a job that was requeued does, and has done so for a while.

    The batch script of its last start may still be ending, and Slurm would take that for the end of a new start, which
    is then lost.
    """
    if job.state != "PENDING" or job.reason != "BeginTime" or job.begins is None:
        return False
    return job.begins - time.time() < HELD_SECONDS - ENDING_SECONDS


def _has_run(path: Path, job: Job) -> bool:
    """Else it was a person who chose when it begins. A start may be lost before any task of it came up."""
    return job.ended is not None or any((path / "slurm").glob(f"{job.id}-*"))


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
    environment = {name: value for name, value in os.environ.items() if not name.startswith(WISHES)}
    try:
        done = subprocess.run(
            words, input=typed, capture_output=True, text=True, timeout=seconds, check=False,
            env=environment | {"SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SlurmFailed(f"{words[0]}: no answer in {seconds:.0f} s") from None
    except OSError as error:
        raise SlurmFailed(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        raise SlurmFailed(f"{words[0]}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done.stdout


def queue() -> dict[str, Job]:
    """This user's jobs in the queue and those that have just left it, by id; one query.

    By the number: a name that is taken from LOGNAME may be another's.
    """
    lines = command("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%N|%S|%j")
    jobs = {}
    for line in lines.splitlines():
        id_, state, reason, nodes, begins, name = (field.strip() for field in line.split("|", 5))
        jobs[id_] = Job(id_, state, reason, nodes, name, _epoch(begins))
    return jobs


def accounted(ids: Iterable[str] = (), names: Iterable[str] = ()) -> dict[str, list[Job]] | None:
    """Every start of jobs as the accounting has it, the latest last; one query. None where there is no accounting.

    One that waits for its start is the latest, and one whose end was never written down is not for that.
    """
    by = [f"--jobs={','.join(ids)}"] if (ids := list(ids)) else []
    by += [f"--name={','.join(names)}"] if (names := list(names)) else []
    by += [f"--clusters={clusters}"] if (clusters := os.environ.get("SLURM_CLUSTERS")) else []  # others read it
    words = ("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--starttime=now-30days", *by)
    try:
        lines = command(*words, "--format=JobIDRaw,State,NodeList,Start,End,JobName")
    except SlurmFailed:
        return None
    jobs: dict[str, list[Job]] = {}
    for line in lines.splitlines():
        id_, state, nodes, start, end, name = line.split("|", 5)
        state = state.split()[0]  # CANCELLED by 1000
        jobs.setdefault(id_, []).append(Job(id_, state, "", nodes, name, _epoch(start), _epoch(end)))
    return {id_: sorted(starts, key=lambda one: one.begins or math.inf) for id_, starts in jobs.items()}


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
    """Of Slurm's short form: node[1-3] is node1, node2, node3. By hand: inside a container there is no scontrol."""
    return [host for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes) for host in _hosts_of(part)]


def _hosts_of(part: str) -> list[str]:
    """Of a part without a comma outside its brackets: rack[1-2]node[08-10]."""
    before, bracket, rest = part.partition("[")
    if not bracket:
        return [part]
    ranges, _, after = rest.partition("]")
    ends, found = _hosts_of(after), []
    for first, _, last in (one.partition("-") for one in ranges.split(",")):
        numbers = range(int(first), int(last or first) + 1)
        found += [f"{before}{number:0{len(first)}}{end}" for number in numbers for end in ends]
    return found


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
