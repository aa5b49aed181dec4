"""What Slurm says of jobs, and when a requeued one's start is moved up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fleetune.cluster import slurm


@pytest.mark.parametrize(
    ("state", "reason", "left", "has_run", "held"),
    [
        ("PENDING", "BeginTime", 100.0, True, True),
        ("PENDING", "BeginTime", 118.0, True, False),  # its last start may still be ending
        ("PENDING", "BeginTime", 100.0, False, False),  # a person chose when it begins
        ("PENDING", "BeginTime", None, True, False),
        ("PENDING", "Priority", 100.0, True, False),
        ("RUNNING", "None", 100.0, True, False),
    ],
)
def test_only_a_requeued_job_whose_last_start_is_gone_is_moved_up(
    state: str, reason: str, left: float | None, has_run: bool, held: bool, tmp_path: Path
) -> None:
    if has_run:
        (tmp_path / "slurm" / "7-0").mkdir(parents=True)
    job = slurm.Job("7", state, reason, "", "x", None if left is None else time.time() + left)
    assert slurm._is_held_back(tmp_path, job) is held
