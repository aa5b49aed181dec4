"""A real Slurm cluster, for the tests that submit to one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from devcluster import DevCluster
from devcluster import devcluster as run


@pytest.fixture(scope="session")
def devcluster() -> Iterator[DevCluster]:
    """Three nodes, all idle. Who crashes a node or cuts it off heals it; who submits a job cancels it."""
    folder = Path(tempfile.mkdtemp(prefix="fleetune-devcluster-"))  # short: sockets stand in it
    try:
        started = run(folder, "up", "--nodes", "3")
        if started.returncode == 2:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        yield DevCluster(folder)
    finally:
        run(folder, "down")
        shutil.rmtree(folder, ignore_errors=True)
