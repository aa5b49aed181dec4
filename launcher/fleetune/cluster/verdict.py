"""How an attempt on a cluster ended, and whether another is made.

After srun, `python -m fleetune.cluster.verdict RUN CODE` in the batch script reads how the ranks ended, ends the
attempt in RUN/attempts.jsonl, and requeues the job under its own id, or gives the run up: each kind of interruption
has a budget of its own. With `setup` behind CODE it was the profile's setup that ended the script. Where Slurm itself
requeues (a dead node, scontrol requeue) it never comes to that; the next attempt then ends the one before.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetune import runs
from fleetune.attempts import began_of, end_attempt, epoch_of, progress_of, start_attempt, unended
from fleetune.cluster import slurm
from fleetune.cluster.logs import last_words
from fleetune.schema import RecipeError


def notes_of(run: runs.Run, job: str, restart: int) -> Path:
    """The folder in which the tasks of one start of a job leave notes for each other."""
    return run.path / "slurm" / f"{job}-{restart}"


@dataclass(frozen=True)
class End:
    kind: str  # done | cancel | time_limit | preemption | requeue | node_failure | crash | wrong
    code: int
    reason: str


def conclude(run: runs.Run, job: str, restart: int, code: int, of_setup: bool = False) -> int:
    """The batch script's last word: ends the attempt and requeues, or not. Returns the job's exit code.

    Args:
        code: srun's exit code, or the script's own where the profile's `setup` ended it.
    """
    if of_setup and code == 128 + signal.SIGTERM:  # it is Slurm that ends the job
        return code
    notes = notes_of(run, job, restart)
    end = _end_of_setup(run, code) if of_setup else _end_of(run, notes, code)
    verdict = _record(run, notes, end)
    if verdict is None and end.kind not in ("done", "cancel", "wrong"):
        try:
            slurm.requeue(job)
            time.sleep(30.0)  # Slurm ends this script
        except slurm.SlurmFailed as error:
            verdict = f"cannot be requeued ({error}); `fleetune submit` goes on with it"
    if verdict is not None:
        print(f"fleetune: error: {run.path}: {verdict}", file=sys.stderr)
    return 0 if end.kind == "done" else 1  # 0 is what a run that is sent with --after waits for


def _end_of(run: runs.Run, notes: Path, srun_code: int) -> End:
    ended = [runs.read_json(path) for path in sorted(notes.glob("ended-*.json"))]
    failed = [one for one in ended if one["code"] not in (runs.DONE, runs.SAVED)]
    cancelled = (run.path / "cancel.json").exists()
    if failed:
        # Nodes' clocks differ: what says most goes first, and only then what was said first.
        first = min(failed, key=_says_most)
        if cancelled and first["code"] == runs.FAILED:
            return End("cancel", runs.FAILED, f"cancelled, and not saved: {first['reason']}")
        if (hang := notes / "hang.json").exists():
            return End("crash", runs.FAILED, _how_they_hang(runs.read_json(hang), failed))
        kept = first["code"] if first["code"] in (runs.WRONG, runs.FAILED_FOR_GOOD) else runs.FAILED
        return End("crash" if kept == runs.FAILED else "wrong", kept, first["reason"])
    if ended and all(one["code"] == runs.DONE for one in ended) and srun_code == 0:
        return End("done", runs.DONE, "done")
    if any(one["code"] == runs.SAVED for one in ended) and srun_code == 0:
        if cancelled:
            return End("cancel", runs.SAVED, "cancelled: stopped and saved")
        if _time_is_over(run, notes.name.partition("-")[0]):
            return End("time_limit", runs.SAVED, "the time limit is near: stopped and saved")
        return End("preemption", runs.SAVED, "preempted: stopped and saved")
    if cancelled:
        return End("cancel", runs.FAILED, f"cancelled; a task ended without a word (srun: {srun_code})")
    return End("crash", runs.FAILED, _with_last_words(run, f"a task ended without a word (srun: {srun_code})"))


def _end_of_setup(run: runs.Run, code: int) -> End:
    if (run.path / "cancel.json").exists():
        return End("cancel", runs.FAILED, "cancelled before training began")
    said = f"the profile's setup {'failed with' if code else 'left the script with'} exit code {code}"
    return End("wrong", runs.WRONG, _with_last_words(run, said))


def _with_last_words(run: runs.Run, what: str) -> str:
    return "\n  ".join([": ".join([what, *words[:1]]), *words[1:]]) if (words := last_words(run)) else what


def _says_most(one: dict[str, Any]) -> tuple[bool, bool, float]:
    return one["code"] == runs.FAILED, "was killed by" not in one["reason"], one["time"]


def _how_they_hang(silence: dict[str, Any], failed: list[dict[str, Any]]) -> str:
    doing = "as they start" if silence["phase"] == "start" else f"in their {silence['phase']}"
    line = (
        f"the ranks hang {doing}: no sign of rank {silence['rank']} for {silence['seconds']:.0f} s, "
        f"and {silence['limit']:.0f} s is the most it may take"
    )
    places: dict[str, list[int]] = {}
    for one in failed:
        if match := re.search(r"^ *rank (\d+) (.*)$", one["reason"].partition("\n")[2], re.MULTILINE):
            places.setdefault(match[2], []).append(int(match[1]))
    unusual = sorted(places.items(), key=lambda place: (len(place[1]), place[1]))
    return "\n  ".join([line, *(f"{_named(ranks)} {place}" for place, ranks in unusual)])


def _named(ranks: list[int]) -> str:
    few = ", ".join(map(str, sorted(ranks)[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"{'each of ranks' if len(ranks) > 1 else 'rank'} {few}{more}"


def _time_is_over(run: runs.Run, job: str) -> bool:
    """Whether Slurm's signal was that of the time limit: it comes up to a minute early."""
    with contextlib.suppress(slurm.SlurmFailed, OSError, KeyError):
        left = slurm.seconds_left(job)
        return left is not None and left < runs.read_json(run.path / "job.json")["stop_seconds"] + 65
    return False


def _record(run: runs.Run, notes: Path, end: End) -> str | None:
    """Ends the attempt. Returns why the run is given up, or None."""
    if (notes / "start.json").exists():
        attempt = runs.read_json(notes / "start.json")["attempt"]
    else:  # it came to no training, which counts too: else it would come again for ever
        attempt = start_attempt(run, slurm.hosts(os.environ.get("SLURM_JOB_NODELIST", "")), sent=sent_at(run))
    end_attempt(run, attempt, end.code, end.reason, end.kind)
    if end.kind in ("done", "cancel"):
        return None
    if end.kind == "wrong":
        return end.reason
    return given_up(run)


def given_up(run: runs.Run) -> str | None:
    """Why no further attempt is made, by the budgets of the recipe; None where one may be. Sending it anew is a new
    beginning: what was before is not counted."""
    sent = sent_at(run) or 0.0
    ends = [
        entry for entry in runs.read_jsonl(run.attempts) if entry["event"] == "end" and epoch_of(entry["time"]) >= sent
    ]
    retries = run.recipe().retries
    last = ends[-1] if ends else {}
    kind = last.get("kind", "crash")
    count = sum(entry.get("kind") == kind for entry in ends)
    budget = getattr(retries, kind, None)
    if budget is not None and count > budget:
        return f"given up after {count} attempts that ended by {kind} (retries.{kind} = {budget}): {last['reason']}"
    reached = [entry.get("last_step") or 0 for entry in ends]
    idle = 0
    for index in range(len(reached) - 1, -1, -1):
        if reached[index] > max(reached[:index], default=0):
            break
        idle += 1
    if idle >= retries.without_progress:
        return f"given up after {idle} attempts without a step of progress: {last.get('reason', '')}"
    return None


def close_last(run: runs.Run, job: str, restart: int) -> None:
    """Ends an attempt that Slurm ended before it could be: a dead node, or `scontrol requeue`. One that is at work, of
    another job or on a machine without Slurm, is left alone.

    Raises RecipeError where no further one is to be made.
    """
    for entry in () if runs.is_at_work(run) else unended(run):
        began = began_of(entry)
        starts = (slurm.accounted(ids=[job]) or {}).get(job, [])
        state, ended = next(((one.state, one.ended) for one in starts if (one.ended or 0.0) > began), ("", None))
        told = progress_of(run, entry["attempt"]).get("time", began)
        kind, code, reason = None, runs.FAILED, "ended from outside, without a word"
        if restart:
            kind, code, reason = _why_requeued(run, entry["attempt"], state)
        end_attempt(run, entry["attempt"], code, reason, kind, at=max(told, ended or told))
    if restart and (verdict := given_up(run)) is not None:
        raise RecipeError(verdict)


def _why_requeued(run: runs.Run, attempt: int, state: str) -> tuple[str, int, str]:
    """(kind, code, reason) of an attempt that Slurm ended, whose accounting calls it `state`, or "" without any."""
    saved = [
        runs.read_json(path)["code"] == runs.SAVED
        for folder in (run.path / "slurm").glob("*")
        if (folder / "start.json").exists() and runs.read_json(folder / "start.json")["attempt"] == attempt
        for path in folder.glob("ended-*.json")
    ]
    if state == "NODE_FAIL":
        return "node_failure", runs.FAILED, "a node failed"
    kind = "requeue" if state == "REQUEUED" else "preemption"
    by = {"requeue": "requeued by scontrol", "preemption": "preempted"}[kind] if state else "requeued by Slurm"
    if saved and all(saved):
        return kind, runs.SAVED, f"{by}: stopped and saved"
    return kind, runs.FAILED, f"{by} before it was saved"


def sent_at(run: runs.Run) -> float | None:
    """When the run was sent to the cluster, in seconds since the epoch."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return float(runs.read_json(run.path / "job.json")["sent"])
    return None


def main() -> int:
    run, code, of_setup = runs.Run(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3:] == ["setup"]
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return conclude(run, os.environ["SLURM_JOB_ID"], restart, code, of_setup)


if __name__ == "__main__":
    sys.exit(main())
