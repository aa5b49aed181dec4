"""When `save_steps: auto` saves: Young's interval within its bounds, the same on all ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from ranks import group_environment, rank_variables

from fleetune.schema import Checkpoint, hours_between_failures
from fleetune.train.cadence import (
    FIRST_STEPS,
    LONGEST_SECONDS,
    averaged,
    sentence,
    steps_between_saves,
    young_seconds,
)


def overhead(interval: float, save: float, mtbf: float) -> float:
    """The share of time that saves and failures cost, to first order."""
    return save / interval + interval / (2 * mtbf)


@pytest.mark.parametrize(
    ("save", "mtbf_hours", "seconds"), [(60.0, 4.0, 1314.5), (20.0, 4.0, 758.9), (2.0, 4.0, 240.0), (2.0, 1.0, 120.0)]
)
def test_the_interval_is_youngs(save: float, mtbf_hours: float, seconds: float) -> None:
    found = young_seconds(save, mtbf_hours * 3600)
    assert found == pytest.approx(seconds, abs=0.1)
    assert found == pytest.approx(math.sqrt(2 * save * mtbf_hours * 3600))


@pytest.mark.parametrize("save", [0.05, 2.0, 60.0])
@pytest.mark.parametrize("mtbf_hours", [1.0, 30.0, 3700.0])
def test_no_other_interval_costs_less_and_half_or_double_costs_a_quarter_more(save: float, mtbf_hours: float) -> None:
    mtbf = mtbf_hours * 3600
    best = young_seconds(save, mtbf)
    least = overhead(best, save, mtbf)
    assert all(overhead(best * factor, save, mtbf) > least for factor in (0.5, 0.9, 1.1, 2.0))
    assert overhead(best / 2, save, mtbf) == pytest.approx(1.25 * least)
    assert overhead(best * 2, save, mtbf) == pytest.approx(1.25 * least)


def test_it_is_turned_into_steps_by_the_time_of_one() -> None:
    assert [steps_between_saves(2.0, step, 4.0) for step in (0.5, 1.0, 3.0, 7.0)] == [480, 240, 80, 34]


def test_it_has_bounds() -> None:
    """A step at least, an hour at most, never over the mean time between failures; ten steps before one was timed."""
    assert steps_between_saves(2.0, 300.0, 4.0) == 1
    assert steps_between_saves(1e-9, 1.0, 1e-9) == 1
    assert steps_between_saves(600.0, 1.0, 10000.0) == LONGEST_SECONDS
    assert steps_between_saves(0.0, 1.0, 4.0) == 1
    assert steps_between_saves(2.0, 0.0, 4.0) > 0
    assert young_seconds(3600.0, 600.0) == 600.0
    assert steps_between_saves(None, None, 4.0) == steps_between_saves(None, 1.0, 4.0) == FIRST_STEPS


def test_one_slow_save_is_soon_forgotten_and_a_lasting_change_soon_followed() -> None:
    known = averaged(None, 2.0)
    assert known == 2.0
    after = [known := averaged(known, seconds) for seconds in (60.0, 2.0, 2.0, 2.0, 2.0, 2.0)]
    assert (after[0], after[-1]) == (31.0, pytest.approx(2.0, abs=1.0))
    for _ in range(6):
        known = averaged(known, 20.0)
    assert known == pytest.approx(20.0, rel=0.02)


def test_the_default_is_the_public_figure_for_the_runs_nodes() -> None:
    """6.5 failures in 1,000 days of a node: one in 154 days of one node, one in 1.8 hours of 2,048."""
    assert hours_between_failures(1) / 24 == pytest.approx(1000 / 6.5)
    assert hours_between_failures(2048) == pytest.approx(1.8, abs=0.01)
    assert hours_between_failures(4, failures_per_node_day=0.25) == 24.0


def test_the_log_says_what_was_chosen_and_from_what() -> None:
    assert sentence(2.1, 4.8, 30.0, True) == (
        "saving every 140 steps (11 min): a save stops training for 2.1 s, mean time between failures 30 h"
    )
    assert sentence(2.1, 9000.0, hours_between_failures(1), False) == (
        "saving every step (2.5 h): a save stops training for 2.1 s, mean time between failures 154 days "
        "(no mtbf_hours given)"
    )


def test_a_recipe_may_say_steps_or_auto_or_nothing() -> None:
    assert [Checkpoint.model_validate({"save_steps": value}).save_steps for value in (140, "auto", None)] == [
        140, "auto", None,
    ]  # fmt: skip


def test_the_policy_needs_no_torch() -> None:
    program = "import sys, fleetune.train.cadence; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=group_environment(), check=False).returncode == 0


# ---------------------------------------------------------------- all ranks alike


RANK = """
import json, sys
from fleetune.train import distributed
from fleetune.train.cadence import steps_between_saves

world = distributed.start()
mine = [[2.0, 5.0], [8.0, 1.0]][world.rank]
agreed = distributed.max_over_ranks(mine, world)
json.dump([agreed, steps_between_saves(*agreed, 4.0), steps_between_saves(*mine, 4.0)], sys.stdout)
distributed.stop()
"""


def test_ranks_that_measure_differently_save_at_the_same_step() -> None:
    """Two ranks whose clocks and disks differ, through the loop's own reduction."""
    port = int(rank_variables()["MASTER_PORT"])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=group_environment() | rank_variables(rank, 2, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(rank.communicate(timeout=200)[0]) for rank in ranks]
    assert [agreed for agreed, _, _ in found] == [[8.0, 5.0]] * 2
    assert found[0][1] == found[1][1] == 96
    assert {alone for _, _, alone in found} == {48, 480}  # what would have been a deadlock
