"""A language model, a distillation and a domain adaptation, each sent to a real Slurm cluster and there to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import DevCluster, eventually

from fleetune import runs
from fleetune.recipe import dump_recipe, load_recipe
from fleetune.short_form import short_form
from fleetune.train.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 3
RECIPES = {  # and a figure that only such a run has
    "lm/stories260k_alpaca": ("perplexity", "train/cross_entropy"),
    "lm/stories260k_student": ("perplexity", "train/distillation"),
    "amazon/mmd": ("accuracy", "train/mmd"),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def sent(devcluster: DevCluster, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Run]:
    """On 2 nodes x 2 ranks each, when all are done."""
    folder = tmp_path_factory.mktemp("recipes")
    profile = {"partition": "main", "nodes": 2, "ranks_per_node": 2, "time": "10m"}
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "FLEETUNE_DATA": str(shared_data), "OMP_NUM_THREADS": "1"}

    def fleetune(*words: str) -> None:
        command = [sys.executable, "-m", "fleetune.cli", *words]
        subprocess.run(command, capture_output=True, check=True, env=devcluster.environment | path)

    started = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_DATA", str(shared_data))
        for name in RECIPES:
            recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", ["data.train.limit=400"])
            short = short_form(recipe, name.replace("/", "-"), folder, STEPS, 100)
            file = folder / f"{short.name}.yaml"
            file.write_text(dump_recipe(short), encoding="utf-8")
            fleetune("submit", str(file), "--cluster", str(folder / "profile.yaml"))
            started[name] = runs.Run(folder / short.name)

    def all_ended() -> bool:
        return all(ends_of(run) for run in started.values())

    assert eventually(all_ended, 600), {name: runs.read_jsonl(run.attempts) for name, run in started.items()}
    return started


def ends_of(run: runs.Run) -> list[dict[str, Any]]:
    return [entry for entry in runs.read_jsonl(run.attempts) if entry["event"] == "end"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_to_its_end_on_two_nodes(sent: dict[str, runs.Run], name: str) -> None:
    run, (metric, loss) = sent[name], RECIPES[name]
    assert [entry["kind"] for entry in ends_of(run)] == ["done"]
    assert len(ends_of(run)[0]["nodes"]) == 2
    trained = [line for line in read_metrics(run.metrics) if loss in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert runs.read_json(run.eval)["validation"][metric] > 0
