"""Distillation on GLUE SST-2: a teacher of six layers, and students of three: alone, distilled, from scratch.

    python launcher/benchmarks/distil_sst2.py run                   # all that is not there yet; hours on 2 cores
    python launcher/benchmarks/distil_sst2.py run --seeds 0 --only teacher student
    python launcher/benchmarks/distil_sst2.py table                 # what is recorded; --latency measures the models

Every run is one recorded result and stands in RUNS (`--runs`, by default runs/distil_sst2); what is recorded is not
run again, and what was broken off goes on. The teacher is that of seed 0 for all students.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import record

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FLEETUNE_DATA", ROOT.parent / "shared" / "data"))
SEEDS = (0, 1, 2)
ARMS = {  # the recipe, and what is changed in it
    "teacher": ("minilm", []),
    "student": ("student", []),
    "distil-logits": ("distil_logits", []),
    "distil-layers": ("distil_layers", []),
    "scratch": ("student", ["model.from_scratch=true"]),
}


def run(arm: str, seed: int, runs: Path) -> None:
    """One training run, by the command that a person would type. Raises CalledProcessError where it fails."""
    recipe, overrides = ARMS[arm]
    name = f"sst2-{arm}-seed{seed}"
    shown = ["run", f"recipes/sst2/{recipe}.yaml", f"name={name}", f"training.seed={seed}", *overrides]
    command = [sys.executable, "-m", "fleetune.cli", *shown, "tracking.wandb=null", f"output_dir={runs}"]
    environment = {**os.environ, "FLEETUNE_DATA": str(DATA), "FLEETUNE_TEACHER": str(runs / "sst2-teacher-seed0")}
    subprocess.run([*command, "--nproc-per-node", "2"], cwd=ROOT, check=True, env=environment)
    report = json.loads((runs / name / "eval.json").read_text(encoding="utf-8"))
    figures = {key: report[key] for key in ("validation", "test", "parameters", "train_seconds", "step")}
    record.write(f"distil_sst2/{arm}-{seed}", "fleetune " + " ".join([*shown, "--nproc-per-node", "2"]), figures)


def table(runs: Path, latency: bool) -> None:
    """Mean and spread of each arm, and what the distilled students win over the student alone."""
    mean: dict[str, float] = {}
    spread: dict[str, float] = {}
    print(
        "| model | n | validation accuracy | test accuracy | parameters | seconds, least |\n|---|---|---|---|---|---|"
    )
    for arm in ARMS:
        results = [found for seed in SEEDS if (found := record.read(f"distil_sst2/{arm}-{seed}"))]
        if not results:
            continue
        cells = []
        for split in ("validation", "test"):
            values = [result[split]["accuracy"] for result in results]
            sd = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.4f} ± {sd:.4f}")
            if split == "validation":
                mean[arm], spread[arm] = statistics.mean(values), sd
        seconds = min(result["train_seconds"] for result in results)  # other work is in some of them
        millions = results[0]["parameters"] / 1e6
        print(f"| {arm} | {len(results)} | {cells[0]} | {cells[1]} | {millions:.1f}M | {seconds:.0f} |")
    for arm in ("distil-logits", "distil-layers"):
        if arm in mean and {"teacher", "student"} <= mean.keys():
            print(
                f"{arm}: {100 * (mean[arm] - mean['student']):+.2f} points over the student alone (whose spread is "
                f"{100 * spread['student']:.2f}), {mean[arm] / mean['teacher']:.3f} of the teacher"
            )
    if latency:
        folders = [str(runs / f"sst2-{arm}-seed{seed}") for arm in ARMS for seed in SEEDS]
        there = [folder for folder in folders if (Path(folder) / "model").exists()]
        subprocess.run([sys.executable, "-m", "fleetune.cli", "compare", "--latency", *there], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "distil_sst2")
    parser.add_argument("--latency", action="store_true", help="also measure the models on this machine")
    arguments = parser.parse_args()
    if arguments.what == "run":
        for seed in arguments.seeds:
            for arm in arguments.only:
                if record.read(f"distil_sst2/{arm}-{seed}") is None:
                    run(arm, seed, arguments.runs.absolute())
    table(arguments.runs.absolute(), arguments.latency)


if __name__ == "__main__":
    main()
