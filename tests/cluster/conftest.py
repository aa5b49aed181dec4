"""A recipe and a profile that are sent to the development cluster by the command itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import DevCluster
from tiny import recipe_values, write_rows
from typer.testing import CliRunner, Result

from fleetune.cli import app


@pytest.fixture
def send(cluster: DevCluster, tmp_path: Path) -> Iterator[Callable[..., Result]]:
    """Sends the recipe NAME with a profile of these keys; what is left in the queue is cancelled."""
    (tmp_path / "model").mkdir()
    write_rows(tmp_path / "train.jsonl", 8)
    write_rows(tmp_path / "validation.jsonl", 8, seed=1)

    def sent(name: str, *words: str, recipe: tuple[str, ...] = (), **keys: Any) -> Result:
        recipe_file, profile = tmp_path / f"{name}.yaml", tmp_path / "profile.yaml"
        recipe_file.write_text(yaml.safe_dump(recipe_values(tmp_path, name)), encoding="utf-8")
        profile.write_text(yaml.safe_dump({"time": "10m", "stop_seconds": 30, **keys}), encoding="utf-8")
        return CliRunner().invoke(app, ["submit", str(recipe_file), *recipe, "--cluster", str(profile), *words])

    yield sent
    cluster.slurm("scancel", "--user=root")
