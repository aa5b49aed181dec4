"""A language model's stored teacher against the living one: room, gradient, time, and what the student comes to.

    FLEETUNE_DATA=... python launcher/benchmarks/cached_teacher.py [--steps 60] [--seeds 3]      # 15 minutes on 2 cores

Three of five layers of a Llama of 260,000 parameters are distilled from the whole on plays (recipes/lm/
stories260k_student.yaml: temperature 2, 512 classes in all). Bytes are of the parts, by token that is learnt. Gradient
and loss are those of one global batch at the first step, against the living teacher's; time is of training alone, one
rank on all cores. Resumable: each figure is recorded as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FLEETUNE_DATA") or ROOT.parent / "shared" / "data")
RECIPE = "recipes/lm/stories260k_student.yaml"
STORED = {  # how it is taught, and the tail
    "top 8": (["--top-k", "8"], "zero"),
    "top 64": (["--top-k", "64"], "zero"),
    "top 64, uniform": (["--top-k", "64"], "uniform"),
    "top 128": (["--top-k", "128"], "zero"),
    "all 512": (["--top-k", "512"], "zero"),
    "64 draws": (["--samples", "64"], "zero"),
}
TRAINED = ("living", "top 64", "top 64, uniform", "64 draws", "no teacher")
ENVIRONMENT = {**os.environ, "FLEETUNE_DATA": str(DATA), "HF_HUB_OFFLINE": "1"}


def fleetune(*arguments: str) -> str:
    command = [sys.executable, "-m", "fleetune.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def teach(folder: Path, name: str, seed: int) -> Path:
    """The seed chooses the rows that are held out, so that each has a teacher of its own."""
    out = folder / f"{name.partition(',')[0].replace(' ', '-')}-{seed}"
    if not out.exists():
        fleetune("teach", RECIPE, *STORED[name][0], "--out", str(out), f"training.seed={seed}")
    return out


def overrides(folder: Path, name: str, seed: int = 0) -> list[str]:
    if name == "living":
        return []
    if name == "no teacher":
        return ["teacher=null", "losses=[{kind: cross_entropy}]"]
    cache = teach(folder, name, seed)
    return ["teacher.model_name_or_path=null", f"teacher.cache={cache}", f"teacher.tail={STORED[name][1]}"]


def gradient(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Of the first global batch, and its losses."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    from fleetune import opening
    from fleetune.recipe import load_recipe

    os.environ["FLEETUNE_DATA"] = str(DATA)
    place = f"gradient-{name.replace(' ', '-').replace(',', '')}"
    more = [f"name={place}", f"output_dir={folder}", "deepspeed.zero_stage=0", *overrides(folder, name)]
    run = opening.open_run(
        load_recipe(ROOT / RECIPE, more), {"nodes": 1, "nproc_per_node": 1, "threads": os.cpu_count() or 1}
    )
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    environment = {**ENVIRONMENT, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "DS_ACCELERATOR": "cpu"}
    out = folder / f"{place}.safetensors"
    command = [sys.executable, "-m", "fleetune.train.gradient", str(run.path), str(out)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with safe_open(out, "np") as file:
        losses = json.loads(file.metadata()["losses"])
    return load_file(out), losses


def bytes_a_token(folder: Path) -> float:
    import pyarrow
    from pyarrow import ipc

    parts = list(folder.glob("*.arrow"))
    tables = [ipc.open_file(pyarrow.memory_map(str(path))).read_all() for path in parts]
    tokens = sum(int(table["tokens"].to_numpy().sum()) for table in tables)
    return sum(path.stat().st_size for path in parts) / tokens


def train(folder: Path, name: str, seed: int, steps: int) -> dict[str, float]:
    place = f"run-{name.replace(' ', '-').replace(',', '')}-{seed}"
    settings = [f"training.max_steps={steps}", f"training.seed={seed}", f"name={place}", f"output_dir={folder}"]
    fleetune(
        "run", RECIPE, *settings, "deepspeed.zero_stage=0", "--nproc-per-node", "1", *overrides(folder, name, seed)
    )
    report = json.loads((folder / place / "eval.json").read_text(encoding="utf-8"))
    return {"perplexity": report["validation"]["perplexity"], "seconds": report["train_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    from fleetune.verify import difference

    command = "python launcher/benchmarks/cached_teacher.py " + " ".join(sys.argv[1:])
    known: dict[str, Any] = record.read("cached_teacher") or {}
    figures: dict[str, Any] = {key: known.get(key, {}) for key in ("stored", "trained")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth: Any = None
        for kind in STORED:
            if kind not in figures["stored"]:
                truth = truth or gradient(folder, "living")
                found, losses = gradient(folder, kind)
                figures["stored"][kind] = {
                    "bytes_a_token": bytes_a_token(teach(folder, kind, 0)),
                    "gradient": difference(truth[0], found).whole,
                    "loss": losses["distillation"] / truth[1]["distillation"] - 1,
                }
                record.write("cached_teacher", command, figures)
            print(f"{kind:16}", json.dumps(figures["stored"][kind]), flush=True)
        for seed in range(given.seeds):
            for kind in TRAINED if seed % 2 == 0 else reversed(TRAINED):
                if f"{kind} {seed}" not in figures["trained"]:
                    figures["trained"][f"{kind} {seed}"] = train(folder, kind, seed, given.steps)
                    record.write("cached_teacher", command, figures)
        for kind in TRAINED:
            runs_ = [figures["trained"][f"{kind} {seed}"] for seed in range(given.seeds)]
            perplexities = [one["perplexity"] for one in runs_]
            ratios = [
                one["seconds"] / figures["trained"][f"living {seed}"]["seconds"] for seed, one in enumerate(runs_)
            ]
            spread = statistics.stdev(perplexities) if len(runs_) > 1 else 0.0
            print(
                f"{kind:16} perplexity {statistics.mean(perplexities):.3f} ± {spread:.3f}, "
                f"time to the living teacher's {statistics.median(ratios):.2f}"
            )


if __name__ == "__main__":
    main()
