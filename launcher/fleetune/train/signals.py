"""What this process hears and says while it trains: signals that ask it to stop, and beats that show it lives.

A signal only sets a flag, which the loop reads at a step's boundary, where all ranks can agree and save together:
saving is a collective, and would deadlock inside a handler. SIGUSR1 prints every thread's stack to the log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_heard: list[int] = []
_beats: list[int] = []  # how many, and the file they go to; empty where nobody watches


class Stopped(Exception):
    """All ranks have agreed to stop; what is done so far is to be saved."""


def listen() -> None:
    """Takes the stopping signals, which whoever started this process may have blocked until now."""
    for number in STOPPING:
        signal.signal(number, _hear)
    # In C, so that it works where Python hangs in a collective.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    if folder := os.environ.get("FLEETUNE_BEATS"):
        path = Path(folder) / f"rank-{os.environ['RANK']}"
        _beats[:] = [0, os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)]


def _hear(number: int, frame: FrameType | None) -> Any:
    if number == signal.SIGINT and number in _heard:
        os._exit(128 + number)
    _heard.append(number)


def stop_requested() -> bool:
    return bool(_heard)


def beat(phase: str) -> None:
    """Says that this rank gets on, and with what.

    That is `verify`, `load`, `step`, `evaluation`, `teaching`, `save`, `finish` or `exit`.
    """
    if _beats:
        _beats[0] += 1
        with contextlib.suppress(OSError):  # a full disk
            os.pwrite(_beats[1], f"{_beats[0]} {phase}".ljust(40).encode(), 0)
