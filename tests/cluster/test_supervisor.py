"""What begins an attempt on a cluster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fleetune import runs
from fleetune.cluster import local, supervisor


def held_elsewhere(run: runs.Run, beaten: float) -> None:
    lease = {"host": "another-node", "pid": 1, "started": 0.0, "token": "x", "time": beaten}
    runs.write_json(run.path / "lease.json", lease)


def test_the_lease_of_an_attempt_that_died_with_its_node_is_waited_for(tmp_path: Path) -> None:
    run = runs.Run(tmp_path)
    held_elsewhere(run, time.time() - runs.LEASE_SECONDS + 2.0)
    begun = time.monotonic()
    supervisor._await_free(run)
    assert 1.0 < time.monotonic() - begun < 10.0
    assert not runs.is_at_work(run)


def test_an_attempt_that_lives_is_a_failure_that_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LEASE_WAIT", 0.5)
    held_elsewhere(runs.Run(tmp_path), time.time())
    with pytest.raises(local.PreparationFailed, match="another attempt is still at work"):
        supervisor._await_free(runs.Run(tmp_path))
