"""Where a run's time went, over all its attempts: a ledger that adds up to the wall time.

The main rank writes down how far it is in RUN/logs/attempt-N/progress.json, once a second at most; attempts.jsonl has
when each attempt was sent, began and ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

from fleetune.attempts import began_of, epoch_of, progress_of
from fleetune.runs import Run, is_at_work, read_jsonl


@dataclass
class Ledger:
    """Seconds, but for the steps."""

    queued: float = 0.0
    """From sending the run, or from an attempt's end, until nodes work for it."""
    starting: float = 0.0
    """Until the ranks have data, model and each other."""
    restoring: float = 0.0
    """Reading the checkpoint."""
    productive: float = 0.0
    """Steps and evaluations that count."""
    saving: float = 0.0
    """Training stood still for a checkpoint."""
    recomputed: float = 0.0
    """Steps that a later attempt had to do again."""
    lost: float = 0.0
    """From the last that an attempt told of itself until its end: ending, dying, hanging."""
    recomputed_steps: int = 0

    @property
    def wall(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def goodput(self) -> float:
        """The productive share of the wall time; 0 where nothing has begun."""
        return self.productive / self.wall if self.wall else 0.0


PARTS = tuple(field.name for field in fields(Ledger) if field.type == "float")


def ledger_of(run: Run, now: float | None = None) -> Ledger:
    """`now`, in seconds since the epoch, is where an attempt that is at work is cut off.

    What nobody waited or worked for, as the night after a run on this machine was killed, is no part of it.
    """
    now = time.time() if now is None else now
    entries = read_jsonl(run.attempts)
    starts = [entry for entry in entries if entry["event"] == "start"]
    ends = {entry["attempt"]: epoch_of(entry["time"]) for entry in entries if entry["event"] == "end"}
    told = [progress_of(run, start["attempt"]) for start in starts]
    resumed: list[int | None] = [None]  # the step from which a later attempt went on, from the last attempt on
    for progress in reversed(told[1:]):
        resumed.append(progress["first_step"] if progress else resumed[-1])
    if not starts:
        return Ledger()
    ledger, last_end = Ledger(), 0.0
    for start, progress, later in zip(starts, told, reversed(resumed), strict=True):
        began, end = began_of(start), ends.get(start["attempt"])
        is_live = end is None and start is starts[-1] and is_at_work(run)
        if end is None:  # at work, or cut off without a word: what it told last is all that is known
            end = now if is_live else progress.get("time", began)
        if "sent" in start:
            ledger.queued += max(0.0, began - max(epoch_of(start["sent"]), last_end))
        _add_attempt(ledger, progress, began, end, is_live, later)
        last_end = end
    return ledger


def _add_attempt(
    ledger: Ledger, progress: dict[str, Any], began: float, end: float, is_live: bool, resumed: int | None
) -> None:
    """`resumed` is the step from which a later attempt went on."""
    if not progress:
        if is_live:
            ledger.starting += end - began
        else:
            ledger.lost += end - began
        return
    told = end if is_live else progress["time"]
    training = told - progress["began"] - progress["saving"]
    done = progress["step"] - progress["first_step"] + 1
    kept = progress["step"] if is_live else progress["saved_step"]
    if resumed is not None:
        kept = min(progress["step"], resumed - 1)
    again = min(done, max(0, progress["step"] - kept))
    wasted = training * again / done if done else 0.0
    ledger.starting += progress["began"] - progress["restoring"] - began
    ledger.restoring += progress["restoring"]
    ledger.saving += progress["saving"]
    ledger.productive += training - wasted
    ledger.lost += end - told
    if resumed is None:
        ledger.lost += wasted  # nobody has done them again yet
    else:
        ledger.recomputed += wasted
        ledger.recomputed_steps += again
