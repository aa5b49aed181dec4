"""Signals that ask to stop only set a flag; SIGUSR1 prints stacks; beats go where the watcher reads them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launcher"
PROGRAM = """
import signal, sys, time
{before}
sys.path.insert(0, {launcher!r})
from fleetune.train import signals
signals.listen()
signals.beat("step")
signals.beat("save")
print("ready", flush=True)
while not signals.stop_requested():
    time.sleep(0.01)
print("asked to stop", flush=True)
time.sleep({after})
"""


def start(tmp_path: Path, before: str = "", after: float = 0.0) -> subprocess.Popen[str]:
    program = PROGRAM.format(launcher=str(LAUNCHER), before=before, after=after)
    environment = {**os.environ, "FLEETUNE_BEATS": str(tmp_path), "RANK": "3"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]),
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_asks_to_stop_and_ends_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    assert line(process) == "ready"
    process.send_signal(number)
    assert line(process) == "asked to stop"
    assert process.wait(10) == 0


def test_one_that_came_while_python_started_is_heard(tmp_path: Path) -> None:
    """A launcher starts ranks with these signals blocked: by default they would kill a rank that imports torch."""
    process = start(tmp_path, before="time.sleep(1)")
    process.send_signal(signal.SIGUSR2)
    assert [line(process), line(process)] == ["ready", "asked to stop"]
    assert process.wait(10) == 0


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, after=60.0)
    assert line(process) == "ready"
    process.send_signal(signal.SIGINT)
    assert line(process) == "asked to stop"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_second_sigterm_does_not(tmp_path: Path) -> None:
    """Clusters send several."""
    process = start(tmp_path, after=0.5)
    assert line(process) == "ready"
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(10) == 0


def test_stacks_are_printed_on_request(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert line(process) == "ready"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert "most recent call first" in errors
    assert 'File "<string>", line' in errors


def test_the_last_beat_stands_in_the_ranks_file(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert line(process) == "ready"
    assert (tmp_path / "rank-3").read_text().split() == ["2", "save"]
    process.kill()
    process.wait()
