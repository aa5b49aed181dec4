"""A run on a real Slurm cluster whose nodes do not reach Weights & Biases, sent from here while it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from devcluster import DevCluster, eventually
from tiny import recipe_values, write_model, write_rows
from wandb_server import serving, wandb_environment, without_wandb

from fleetune import runs
from fleetune.train.metrics_log import read_metrics

STEPS = 400  # some seconds of training on a fast machine: the interruption falls into it

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def sent(tmp_path: Path) -> tuple[str, ...]:
    """What `fleetune submit` takes: a recipe, and a profile of 2 nodes that have no internet."""
    write_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 90)
    values = recipe_values(
        tmp_path, "offline", checkpoint={"save_steps": 20}, tracking={"wandb": {"project": "p", "mode": "auto"}}
    )
    values["data"].pop("validation")
    values["training"] |= {"max_steps": STEPS}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path)}), encoding="utf-8")
    profile = {"partition": "main", "nodes": 2, "time": "10m", "stop_seconds": 30, "internet": False}
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    return "submit", str(tmp_path / "recipe.yaml"), "--cluster", str(tmp_path / "profile.yaml")


def test_an_interrupted_run_on_nodes_without_internet_is_sent_while_it_goes_on(
    devcluster: DevCluster, tmp_path: Path, sent: tuple[str, ...]
) -> None:
    run = runs.Run(tmp_path / "offline")
    environment = without_wandb(devcluster.environment)
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def command(*words: str) -> list[str]:
        return [sys.executable, "-m", "fleetune.cli", *words]

    def fleetune(*words: str) -> str:
        return subprocess.run(command(*words), check=True, capture_output=True, text=True, env=environment).stdout

    def is_done() -> bool:
        fleetune("status", str(run.path))  # a requeued job goes on where somebody looks
        return any(entry.get("exit_code") == runs.DONE for entry in runs.read_jsonl(run.attempts))

    try:
        with serving() as server:
            watch = f"fleetune sync --watch {run.path}"
            assert watch in fleetune(*sent)
            here = environment | wandb_environment(server.url, tmp_path / "home")
            watching = subprocess.Popen(
                command(*watch.split()[1:]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=here
            )
            assert eventually(lambda: len(server.steps()) >= 3, 180)
            devcluster.submit("sleep 1", "--partition=hi", "--nodes=3", "--exclusive")
            assert eventually(is_done, 240), runs.read_jsonl(run.attempts)
            said = watching.communicate(timeout=60)[0]
            assert watching.returncode == 0, said
            url = f"{server.url}/e/p/runs/{run.info()['id']}"
    finally:
        devcluster.slurm("scancel", "--user=root")
    kinds = [entry.get("kind") for entry in runs.read_jsonl(run.attempts) if entry["event"] == "end"]
    assert kinds == ["preemption", "done"]
    assert server.steps() == [line["step"] for line in read_metrics(run.metrics)]
    assert {f"nodes/{node}/cpu_percent" for node in (0, 1)} <= server.history[-1].keys()
    assert server.exit_codes == {run.info()["id"]: 0}
    assert said.splitlines()[0].endswith(url)
    assert url in fleetune("status", str(run.path))
    assert url in fleetune(*sent)
