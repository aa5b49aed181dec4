"""What a run says while it is on a cluster: the logs of its ranks, and Slurm's own where no rank came to write one."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fleetune import runs
from fleetune.attempts import log_of
from fleetune.cluster import slurm
from fleetune.report import goes_on
from fleetune.schema import RecipeError

MOST_BYTES = 65536  # of a log's end
ASKING_SECONDS = 5.0  # between two questions to Slurm
_REQUEUED = re.compile(r"\*\*\* JOB .* DUE TO .*")  # Slurm's last word on one of a job's starts
# What follows from an end and does not say why.
_NO_REASON = re.compile(r"^srun: (error: \S+: task|launch/slurm|Job step|Force Terminated)|\*\*\* (JOB|STEP) |^Try \"")


def slurm_logs(run: runs.Run) -> list[Path]:
    """Slurm's own logs of the run's last job that are not empty, rank 0's first, in which the batch script's is too."""
    try:
        folder = run.path / "submitit" / runs.read_json(run.path / "job.json")["token"]
    except (OSError, ValueError, KeyError):
        return []
    logs = [path for path in folder.glob("*_*_log.*") if path.stat().st_size]
    return sorted(logs, key=lambda path: (path.suffix != ".err", _rank_of(path)))


def _rank_of(path: Path) -> int:
    return int(path.name.split("_")[1])


def last_words(run: runs.Run, most: int = 3) -> list[str]:
    """What the last start of the run's job said last, by Slurm's own logs, the last line first; then where it stands.

    Empty where it said nothing.
    """
    found: list[str] = []
    for path in slurm_logs(run):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - MOST_BYTES))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line.strip() for line in _REQUEUED.split(text)[-1].splitlines() if line.strip()]
        telling = [line for line in lines if not _NO_REASON.search(line)]
        if telling:
            return [*reversed(telling[-most:]), f"log: {path}"]
        if lines and not found:
            found = [*reversed(lines[-most:]), f"log: {path}"]
    return found


def said(run: runs.Run, rank: int, attempt: int | None) -> Iterator[str]:
    """The log of a rank; Slurm's own of its task where no rank of the attempt has written one.

    Raises RecipeError with the attempts or ranks that there are.
    """
    try:
        path = log_of(run, rank, attempt)
    except RecipeError:
        folders = run.logs(0).parent.glob("attempt-[0-9]*" if attempt is None else f"attempt-{attempt}")
        last = max(folders, key=lambda folder: int(folder.name[8:]), default=None)
        of_task = [path for path in slurm_logs(run) if _rank_of(path) == rank]
        if not of_task or (attempt is not None and last is None) or (last and any(last.glob("rank-*.log"))):
            raise
        path = of_task[0]
        yield f"---- no rank has written a log; this is Slurm's own, {path}\n"
    yield path.read_text(encoding="utf-8", errors="replace")


def followed(run: runs.Run, rank: int, attempt: int | None) -> Iterator[str]:
    """A rank's log as it grows, and those of the attempts that come after it, until the run has ended; then why.

    Where there is none yet, what the run's job is doing first.

    With an `attempt`, that one's alone. Raises RecipeError where there is nothing to be seen, nor will be.
    """
    opened: dict[int, IO[str]] = {}
    first, asked, on, told = max(1, _last_attempt(run)), -math.inf, True, ""
    try:
        while on:
            if time.monotonic() - asked >= ASKING_SECONDS:
                asked, (on, state) = time.monotonic(), _goes_on(run)
                if on and state and not opened and state != told:
                    told = state
                    yield f"---- {state}\n"
            on = on and (attempt is None or _end_of(run, attempt) is None)  # where not, reads once more
            for number in [attempt] if attempt else range(first, _last_attempt(run) + 1):
                path = run.logs(number) / f"rank-{rank}.log"
                if number not in opened and path.exists():
                    opened[number] = path.open(encoding="utf-8", errors="replace")
                    if len(opened) > 1:
                        yield f"---- attempt {number}\n"
                if number in opened and (text := opened[number].read()):
                    yield text
            if on:
                time.sleep(0.5)
    finally:
        for file in opened.values():
            file.close()
    if not opened:
        yield from said(run, rank, attempt)
    end = _end_of(run, attempt)
    yield f"---- attempt {end['attempt']} ended: {end['reason']}\n" if end else "---- it is not at work\n"


def _goes_on(run: runs.Run) -> tuple[bool, str]:
    """Whether it does, and what its job is doing; the latter is "" where it has logs, or Slurm does not know it."""
    try:
        job = slurm.jobs_of([run.path]).get(run.path)
    except slurm.SlurmFailed:  # it may be starting anew
        return True, ""
    has_logs = any(run.logs(0).parent.glob("attempt-*/rank-*.log"))
    return goes_on(run.path, job), "" if job is None or has_logs else f"job {job.id} is {job}"


def _last_attempt(run: runs.Run) -> int:
    return max((int(path.name[8:]) for path in run.logs(0).parent.glob("attempt-[0-9]*")), default=0)


def _end_of(run: runs.Run, attempt: int | None) -> dict[str, Any] | None:
    """The last attempt's end, or that of a given one; None while it has none."""
    entries = [entry for entry in runs.read_jsonl(run.attempts) if attempt in (None, entry["attempt"])]
    return entries[-1] if entries and entries[-1]["event"] == "end" else None
