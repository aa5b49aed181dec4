"""The recipes on their real data, in a small form: enough steps to be far from chance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleetune import runs

ROOT = Path(__file__).parents[2]
FORMS = {
    "sst2": (["data.train.limit=1600", "training.learning_rate=1e-4"], "accuracy", 0.70),
    "stsb": (["data.train.limit=1600", "training.learning_rate=1e-4", "training.num_train_epochs=2"], "spearman", 0.60),
}


@pytest.mark.parametrize("task", FORMS)
def test_learns(task: str, shared_data: Path, tmp_path: Path) -> None:
    overrides, metric, least = FORMS[task]
    command = [sys.executable, "-m", "fleetune.cli", "run", f"recipes/{task}/minilm.yaml", *overrides]
    command += ["data.test=null", "tracking.wandb=null", f"output_dir={tmp_path}"]
    environment = {**os.environ, "FLEETUNE_DATA": str(shared_data)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    assert runs.read_json(run / "eval.json")["validation"][metric] > least
