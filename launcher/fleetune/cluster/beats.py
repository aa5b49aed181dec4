"""Whether ranks get on: their beats, what they should take, and where one hangs. No torch here."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TIMES = 20.0  # a beat may be this many times later than the latest so far
LEAST_SECONDS = {"step": 60.0, "evaluation": 60.0, "save": 600.0}  # and so late in any case: disks have moods
UNKNOWN_SECONDS = 1800.0  # for what has not been seen yet, and for what has no usual length, as loading
EXIT_SECONDS = 60.0
FROZEN_SECONDS = 10.0  # between two looks, which else are a tenth of a second apart


@dataclass(frozen=True)
class Silence:
    rank: int
    phase: str
    seconds: float
    limit: float


@dataclass
class Beats:
    """The last beat of each rank, which it leaves in `folder`, and how long ranks take between two of a phase."""

    folder: Path
    ranks: list[int]
    hang_timeout: float | None  # for a step, in place of what is learnt
    last: dict[int, tuple[str, float]] = field(default_factory=dict)  # the beat as it stands in the file, and when
    longest: dict[str, float] = field(default_factory=dict)  # seconds between two beats, by phase
    looked: float = 0.0

    def look(self, now: float | None = None) -> Silence | None:
        """Reads every rank's beat; of the ranks that have been silent for too long, if any, the one that is behind."""
        now = time.monotonic() if now is None else now
        if now - self.looked > FROZEN_SECONDS and self.last:
            # This process was frozen, and perhaps they were: nothing can be said of that time.
            self.last = {rank: (text, since + now - self.looked) for rank, (text, since) in self.last.items()}
        self.looked = now
        silent = []
        for rank in self.ranks:
            before, since = self.last.setdefault(rank, ("0 start", now))
            text = self._read(rank) or before
            phase = before.partition(" ")[2]
            if text == before:
                if now - since > self.limit(phase):
                    silent.append(Silence(rank, phase, now - since, self.limit(phase)))
                continue
            if text.partition(" ")[2] == phase:
                self.longest[phase] = max(self.longest.get(phase, 0.0), now - since)
            self.last[rank] = (text, now)
        return min(silent, key=lambda one: int(self.last[one.rank][0].split()[0]), default=None)

    def limit(self, phase: str) -> float:
        """Seconds that may pass without a beat."""
        if phase == "step" and self.hang_timeout is not None:
            return self.hang_timeout
        if phase in LEAST_SECONDS and phase in self.longest:
            return max(LEAST_SECONDS[phase], TIMES * self.longest[phase])
        return EXIT_SECONDS if phase == "exit" else UNKNOWN_SECONDS

    def _read(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / f"rank-{rank}").read_text(encoding="ascii").strip()
        return ""


def where_each_is(pids: Mapping[int, int], logs: Mapping[int, Path], wait: float = 2.0) -> list[str]:
    """Asks every rank for its stacks, which go to its log. Returns a line for each; one that is stopped is named."""
    stopped, before = set(), {}
    for rank, pid in pids.items():
        before[rank] = logs[rank].stat().st_size if logs[rank].exists() else 0
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                stopped.add(rank)
            else:
                os.kill(pid, signal.SIGUSR1)  # faulthandler answers
    time.sleep(wait)
    lines = []
    for rank, log in logs.items():
        if rank in stopped:
            lines.append(f"rank {rank} is stopped (by SIGSTOP, a terminal or a debugger)")
            continue
        with contextlib.suppress(OSError), log.open("rb") as file:
            file.seek(before[rank])
            lines.append(f"rank {rank} {_place(file.read().decode('utf-8', errors='replace'))}")
    return lines


_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)', re.MULTILINE)


def _place(stacks: str) -> str:
    """Where the main thread stands: its innermost frame, and Fleetune's innermost where that is another."""
    main = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)[-1]  # faulthandler shows it last
    frames = [f"{Path(m['file']).name}:{m['line']} in {m['name']}" for m in _FRAME.finditer(main)]
    ours = [f"{Path(m['file']).name}:{m['line']} in {m['name']}" for m in _FRAME.finditer(main) if _is_ours(m["file"])]
    if not frames:
        return "does not answer"
    return f"is at {frames[0]}" + (f", from {ours[0]}" if ours and ours[0] != frames[0] else "")


def _is_ours(file: str) -> bool:
    return "/fleetune/train/" in file
