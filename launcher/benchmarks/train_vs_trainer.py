"""Training speed against Hugging Face Trainer: one rank each, in turn, on SST-2 with MiniLM-L6, batch 32, bf16
(on a CPU without bf16 arithmetic fp32 for all).

    python launcher/benchmarks/train_vs_trainer.py [--rows 6400] [--rounds 3]

Every arm trains one epoch of the same rows from the same weights, in a fresh process on all cores, `rounds` times in
turn: Fleetune, Trainer as people run it (dynamic padding, shuffled batches), Trainer with length grouping. Samples a
second are of the training alone, start-up, saving and evaluation left out; the ratio is taken round by round. Memory is
the most that the training process had resident. The final loss is the mean over the last 20 steps.
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
from accuracy import DATA, ROOT

ARMS = ("fleetune", "trainer", "trainer, grouped")


def run_fleetune(rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            "-m",
            "fleetune.cli",
            "run",
            "recipes/sst2/minilm.yaml",
            f"output_dir={output}",
            f"data.train.limit={rows}",
            "data.test=null",
            "deepspeed.zero_stage=0",
            "training.logging_steps=1",
            "tracking.wandb=null",
        ]
        environment = {**os.environ, "FLEETUNE_DATA": str(DATA)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        run = next(Path(output).iterdir())
        report = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["train/loss"] for line in metrics if "train/loss" in line]
    return {
        "samples_per_second": report["samples_per_second"],
        "final_loss": statistics.mean(losses[-20:]),
        "peak_rss_mb": report["peak_memory_mb"],
        "eval": report["validation"],
    }


def run_trainer(rows: int, grouped: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            "launcher/benchmarks/trainer_peer.py",
            "--train",
            f"{DATA}/sst2/train.tsv",
            "--validation",
            f"{DATA}/sst2/validation.tsv",
            "--text",
            "sentence",
            "--label",
            "label",
            "--limit",
            str(rows),
            "--logging-steps",
            "20",
            "--output",
            output,
        ]
        done = subprocess.run(
            [*command, *(["--group-by-length"] if grouped else [])],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        found = {
            "fleetune": run_fleetune(args.rows),
            "trainer": run_trainer(args.rows, False),
            "trainer, grouped": run_trainer(args.rows, True),
        }
        rounds.append(found)
        for arm in ARMS:
            figures = found[arm]
            print(
                f"round {number + 1}  {arm:17} {figures['samples_per_second']:7.1f} samples/s  "
                f"{figures['peak_rss_mb']:6.0f} MB  loss {figures['final_loss']:.4f}  "
                f"accuracy {figures['eval']['accuracy']:.4f}",
                flush=True,
            )
    ratios = {
        arm: [r["fleetune"]["samples_per_second"] / r[arm]["samples_per_second"] for r in rounds] for arm in ARMS[1:]
    }
    memory = {arm: [r["fleetune"]["peak_rss_mb"] / r[arm]["peak_rss_mb"] for r in rounds] for arm in ARMS[1:]}
    for arm in ARMS[1:]:
        print(
            f"fleetune / {arm}: speed {statistics.median(ratios[arm]):.2f} "
            f"(each {', '.join(f'{ratio:.2f}' for ratio in ratios[arm])}), "
            f"memory {statistics.median(memory[arm]):.2f}"
        )
    record.write(
        "train_vs_trainer",
        "python launcher/benchmarks/train_vs_trainer.py " + " ".join(sys.argv[1:]),
        {"rounds": rounds, "speed_ratios": ratios, "memory_ratios": memory},
    )


if __name__ == "__main__":
    main()
