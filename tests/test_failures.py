"""The small form of `launcher/benchmarks/failures.py`: jobs whose nodes fail, saving as `save_steps: auto` does."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "launcher" / "benchmarks"))
from failures import OTHERS, Job, Stand, attempt, case, endurance, job_of

TRACES, FAILURES = 2, 150


@pytest.fixture(scope="module")
def figures() -> list[dict[str, Any]]:
    return [case(job_of(gpus), hours, OTHERS, TRACES, FAILURES) for hours in (1.0, 4.0, 8.0) for gpus in (8, 16384)]


def test_the_share_of_time_that_counts_is_that_of_the_published_formula(figures: list[dict[str, Any]]) -> None:
    """300 failures are within 2 points of it, and 2,000 within a quarter of a point."""
    for one in figures:
        assert one["auto"] == pytest.approx(one["published"], abs=0.02)
        assert one["auto"] == pytest.approx(one["exact"], abs=0.02)


def test_half_and_double_the_interval_train_less(figures: list[dict[str, Any]]) -> None:
    for one in figures:
        assert one["auto"] > max(one["half"], one["double"])
        assert one["auto"] > max(one["10 min"], one["1 h"]) - 0.01


def test_what_a_failure_takes() -> None:
    """The steps since the last whole save; one in a save, or in the restart, all that the attempt did."""
    job = Job(8, 1.0, 10.0, 100.0)

    def end(seconds: float) -> tuple[int, int]:
        saved, reached = attempt(job, Stand(40), seconds, 100.0, lambda now: 60, random.Random(0))
        return saved.step, reached

    assert end(50.0) == (40, 40)
    assert end(130.0)[0] == 40
    assert 65 <= end(130.0)[1] <= 75
    assert end(170.0) == (40, 100)  # in its first save
    assert end(190.0)[0] == 100


def test_a_job_that_fails_faster_than_it_saves_is_given_up_and_one_that_does_not_is_not() -> None:
    hopeless = endurance(Job(8, 1.0, 60.0, 3600.0), 0.5, 40)
    assert hopeless["given_up"] > 5
    assert endurance(job_of(8), 8.0, 40)["given_up"] == 0
