"""Ranks' beats: what they should take is learnt from them, and one that hangs is found, asked and named."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleetune.cluster.beats import EXIT_SECONDS, LEAST_SECONDS, TIMES, UNKNOWN_SECONDS, Beats, Silence, where_each_is


def beat(folder: Path, rank: int, count: int, phase: str) -> None:
    (folder / f"rank-{rank}").write_text(f"{count} {phase}".ljust(40))


def stepping(folder: Path, seconds: float, hang_timeout: float | None = None) -> Beats:
    """Two ranks that have done steps of so many seconds, up to time 100."""
    beats = Beats(folder, [0, 1], hang_timeout)
    beats.look(now=0.0)
    count, now = 1, 100.0 - 5 * seconds
    while now <= 100.0:
        for rank in (0, 1):
            beat(folder, rank, count, "step")
        assert beats.look(now) is None
        count, now = count + 1, now + seconds
    return beats


def look_until(beats: Beats, now: float, since: float = 100.0) -> Silence | None:
    """Looks every five seconds, as a launcher that is not frozen does, and oftener."""
    while since + 5.0 < now:
        since += 5.0
        assert beats.look(since) is None
    return beats.look(now)


def test_a_step_may_take_many_times_the_longest_so_far(tmp_path: Path) -> None:
    beats = stepping(tmp_path, seconds=10.0)
    assert beats.limit("step") == TIMES * 10.0
    assert look_until(beats, 100.0 + TIMES * 10.0) is None
    silence = beats.look(101.0 + TIMES * 10.0)
    assert silence is not None
    assert (silence.rank, silence.phase, round(silence.seconds)) == (0, "step", 201)


def test_short_steps_do_not_make_the_limit_short(tmp_path: Path) -> None:
    assert stepping(tmp_path, seconds=0.1).limit("step") == LEAST_SECONDS["step"]


def test_the_recipes_own_limit_goes_before_what_is_learnt(tmp_path: Path) -> None:
    beats = stepping(tmp_path, seconds=1.0, hang_timeout=7.0)
    assert beats.look(106.5) is None
    assert beats.look(107.5) is not None


def test_one_rank_that_is_silent_is_enough(tmp_path: Path) -> None:
    beats = stepping(tmp_path, seconds=1.0, hang_timeout=7.0)
    for second in range(1, 8):
        beat(tmp_path, 0, 100 + second, "step")
        assert beats.look(100.0 + second) is None
    silence = beats.look(108.0)
    assert silence is not None
    assert silence.rank == 1


@pytest.mark.parametrize(
    ("phase", "limit"), [("start", UNKNOWN_SECONDS), ("save", UNKNOWN_SECONDS), ("exit", EXIT_SECONDS)]
)
def test_what_has_no_usual_length_may_take_long(tmp_path: Path, phase: str, limit: float) -> None:
    """A save of minutes between steps of seconds is no hang."""
    beats = stepping(tmp_path, seconds=1.0)
    for rank in (0, 1):
        beat(tmp_path, rank, 100, phase)
    assert beats.look(101.0) is None
    assert look_until(beats, 100.0 + limit, since=101.0) is None
    assert beats.look(102.0 + limit) is not None


def test_a_long_save_is_not_taken_for_a_long_step(tmp_path: Path) -> None:
    beats = stepping(tmp_path, seconds=1.0)
    beat(tmp_path, 0, 100, "save")
    beats.look(101.0)
    beat(tmp_path, 0, 101, "step")
    beats.look(1001.0)
    assert beats.limit("step") == LEAST_SECONDS["step"]


def test_of_all_that_are_silent_the_one_that_is_behind_is_named(tmp_path: Path) -> None:
    beats = stepping(tmp_path, seconds=1.0, hang_timeout=7.0)
    beat(tmp_path, 0, 100, "step")
    assert beats.look(100.5) is None
    silence = look_until(beats, 108.0)
    assert silence is not None
    assert silence.rank == 1


def test_time_in_which_the_launcher_was_frozen_does_not_count(tmp_path: Path) -> None:
    """With its ranks, as by a suspended job or a closed laptop; nor is a long step learnt from it."""
    beats = stepping(tmp_path, seconds=1.0)
    assert beats.look(5000.0) is None
    for rank in (0, 1):
        beat(tmp_path, rank, 100, "step")
    assert beats.look(5001.0) is None
    assert beats.limit("step") == LEAST_SECONDS["step"]


def test_a_rank_that_has_ended_is_not_watched(tmp_path: Path) -> None:
    beats = stepping(tmp_path, seconds=1.0, hang_timeout=7.0)
    beats.ranks = []
    assert beats.look(1000.0) is None


RANK = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
def waits_for_ever():
    print("ready", flush=True)
    time.sleep(60)
waits_for_ever()
"""


def test_each_rank_says_where_it_is_and_a_stopped_one_is_named(tmp_path: Path) -> None:
    logs = {rank: tmp_path / f"rank-{rank}.log" for rank in (0, 1)}
    ranks = []
    for log in logs.values():
        log.write_text('Current thread of an older hang\n  File "old.py", line 1 in old\n')
        with log.open("a") as file:
            ranks.append(subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, stderr=file))
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == b"ready\n"
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        lines = where_each_is({0: ranks[0].pid, 1: ranks[1].pid}, logs, wait=1.0)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert lines[0] == "rank 0 is at <string>:6 in waits_for_ever"
    assert lines[1].startswith("rank 1 is stopped")
