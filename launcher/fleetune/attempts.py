"""A run's attempts: each has a line in RUN/attempts.jsonl when it starts and one when it ends, and logs of its own."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

from fleetune.runs import Run, append_jsonl, last_json, read_json, read_jsonl
from fleetune.schema import RecipeError


def start_attempt(
    run: Run,
    nodes: list[str],
    began: float | None = None,
    sent: float | None = None,
    layout: dict[str, int] | None = None,
) -> int:
    """Records the attempt; returns its number, counted from 1.

    Args:
        began: when its nodes began to work for it, in seconds since the epoch; now, when absent.
        sent: when the run was sent to a cluster, in the same.
        layout: its ranks and ZeRO stage, which the next attempt may have others of.
    """
    logged = (int(path.name.removeprefix("attempt-")) for path in run.logs(0).parent.glob("attempt-[0-9]*"))
    number = 1 + max([*(entry["attempt"] for entry in read_jsonl(run.attempts)), *logged], default=0)
    run.logs(number).mkdir(parents=True, exist_ok=True)
    began = time.time() if began is None else began
    append_jsonl(
        run.attempts,
        {
            "attempt": number,
            "event": "start",
            "time": _iso(time.time()),
            "began": _iso(began),
            **({} if sent is None else {"sent": _iso(sent)}),
            "nodes": nodes,
            **({} if layout is None else {"layout": layout}),
        },
    )
    return number


def unended(run: Run) -> list[dict[str, Any]]:
    """The starts of attempts that have no end: one that is at work, or that was ended from outside."""
    entries = read_jsonl(run.attempts)
    ended = {entry["attempt"] for entry in entries if entry["event"] == "end"}
    return [entry for entry in entries if entry["event"] == "start" and entry["attempt"] not in ended]


def end_attempt(
    run: Run, number: int, exit_code: int, reason: str, kind: str | None = None, at: float | None = None
) -> None:
    """Records how an attempt ended.

    Args:
        kind: what ended it, on a cluster: each has its own budget in the recipe's `retries`.
        at: when, in seconds since the epoch; now, when absent.
    """
    start = next((e for e in read_jsonl(run.attempts) if e["attempt"] == number and e["event"] == "start"), {})
    at = time.time() if at is None else at
    steps = progress_of(run, number)
    append_jsonl(
        run.attempts,
        {
            "attempt": number,
            "event": "end",
            "time": _iso(at),
            "exit_code": exit_code,
            "reason": reason,
            **({} if kind is None else {"kind": kind}),
            "nodes": start.get("nodes", []),
            "seconds": round(at - began_of(start), 3) if start else None,
            "first_step": steps.get("first_step"),
            "last_step": steps.get("saved_step"),
        },
    )


def progress_of(run: Run, number: int) -> dict[str, Any]:
    """How far the attempt came, as its main rank wrote it down last; {} where it came to no training."""
    path = run.logs(number) / "progress.json"
    return read_json(path) if path.exists() else {}


def last_step(run: Run) -> int:
    """The step that the run has come to, as far as its files know: not every one is logged, and some are noted."""
    starts = [entry["attempt"] for entry in read_jsonl(run.attempts) if entry["event"] == "start"]
    noted = progress_of(run, starts[-1]).get("step", 0) if starts else 0
    return max(int(noted), int(last_json(run.metrics, "step").get("step", 0)))


def began_of(start: dict[str, Any]) -> float:
    """When an attempt's nodes began to work for it, in seconds since the epoch; `start` is its line."""
    return epoch_of(start.get("began", start["time"]))


def epoch_of(time: str) -> float:
    """Seconds since the epoch, of a time in attempts.jsonl."""
    return datetime.datetime.fromisoformat(time).timestamp()


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def log_of(run: Run, rank: int, attempt: int | None) -> Path:
    """Raises RecipeError with the attempts or ranks that there are."""
    folders = sorted(run.logs(0).parent.glob("attempt-[0-9]*"), key=lambda folder: int(folder.name[8:]))
    if not folders:
        raise RecipeError(f"{run.path}: has no logs: no attempt has begun")
    folder = folders[-1] if attempt is None else run.logs(attempt)
    if folder not in folders:
        raise RecipeError(f"--attempt {attempt}: the run has attempts 1 to {folders[-1].name[8:]}")
    path = folder / f"rank-{rank}.log"
    if not path.exists():
        ranks = sorted(int(log.stem[5:]) for log in folder.glob("rank-*.log"))
        raise RecipeError(f"--rank {rank}: the attempt has ranks {', '.join(map(str, ranks)) or 'none yet'}")
    return path
