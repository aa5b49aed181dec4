"""Accuracy against Hugging Face Trainer on GLUE: the same model, data, batch and learning rate, three seeds each.

    python launcher/benchmarks/accuracy.py sst2 --side trainer      # about 11 minutes a seed on 2 cores
    python launcher/benchmarks/accuracy.py sst2 --side fleetune
    python launcher/benchmarks/accuracy.py sst2 --table

Each seed is one recorded result; what is there already is not run again, so the command resumes.
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
DATA = Path(os.environ.get("FLEETUNE_DATA", ROOT.parent / "shared" / "data"))
SEEDS = (0, 1, 2)
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "recipe": "recipes/sst2/minilm.yaml",
        "metric": "accuracy",
        "trainer": ["--text", "sentence", "--label", "label", "--group-by-length"],
    },
    "stsb": {
        "recipe": "recipes/stsb/minilm.yaml",
        "metric": "spearman",
        "trainer": [
            "--text",
            "sentence1,sentence2",
            "--label",
            "score",
            "--num-labels",
            "1",
            "--epochs",
            "4",
            "--group-by-length",
        ],
    },
}


def run_trainer(task: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as output:
        command = [
            "launcher/benchmarks/trainer_peer.py",
            "--train",
            f"{DATA / task}/train.tsv",
            "--validation",
            f"{DATA / task}/validation.tsv",
            *TASKS[task]["trainer"],
            "--seed",
            str(seed),
            "--output",
            output,
        ]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    # No times: these runs may share the machine with others.
    evaluation = json.loads(done.stdout.strip().splitlines()[-1])["eval"]
    shown = " ".join(["python", *command]).replace(str(DATA), "$FLEETUNE_DATA").replace(output, "OUTPUT")
    record.write(
        f"accuracy/{task}-trainer-{seed}",
        shown,
        {"eval": {name: value for name, value in evaluation.items() if "second" not in name and name != "runtime"}},
    )


def run_fleetune(task: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as output:
        command = ["run", TASKS[task]["recipe"], f"training.seed={seed}", "--nproc-per-node", "2"]
        subprocess.run(
            [sys.executable, "-m", "fleetune.cli", *command, f"output_dir={output}"],
            cwd=ROOT,
            check=True,
            env={**os.environ, "FLEETUNE_DATA": str(DATA)},
        )
        run = next(Path(output).iterdir())
        report = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        # A CPU without bf16 trains in fp32, whatever the recipe asks.
        precision = "bf16" if "bf16: true" in (run / "recipe.yaml").read_text(encoding="utf-8") else "fp32"
    record.write(
        f"accuracy/{task}-fleetune-{seed}",
        "fleetune " + " ".join(command),
        {"precision": precision, "eval": report["validation"], "test": report["test"]},
    )


def table(task: str) -> None:
    metric = TASKS[task]["metric"]
    for side in ("trainer", "fleetune"):
        results = [r for seed in SEEDS if (r := record.read(f"accuracy/{task}-{side}-{seed}"))]
        values = [r["eval"][metric] for r in results]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            each = ", ".join(f"{v:.4f}" for v in values)
            print(f"{task} {side:9} {metric} mean {statistics.mean(values):.4f} sd {spread:.4f} ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--side", choices=("trainer", "fleetune"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds if args.side else ():
        if record.read(f"accuracy/{args.task}-{args.side}-{seed}") is None:
            (run_trainer if args.side == "trainer" else run_fleetune)(args.task, seed)
    table(args.task)


if __name__ == "__main__":
    main()
