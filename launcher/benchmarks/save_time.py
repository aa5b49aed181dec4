"""How long training stands still for a checkpoint, with the files written at once and in the background.

    python launcher/benchmarks/save_time.py      # about 4 minutes on 2 cores

MiniLM-L6 (22.7M parameters) and a BERT of base's size (110M, fresh weights), AdamW in fp32 under ZeRO-2 on two ranks of
one thread. Each trains a few steps and saves after every second one; the first save of a run is left out. In turn, so
that a slow moment of the machine is not one side's alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
BASE = "{hidden_size: 768, num_hidden_layers: 12, num_attention_heads: 12, intermediate_size: 3072}"
MODELS: dict[str, list[str]] = {"22M": [], "110M": ["model.from_scratch=true", f"model.config={BASE}"]}
ROUNDS = 1


def run(model: str, in_background: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "fleetune.cli", "run", "recipes/quickstart.yaml", "--nproc-per-node", "2"]
        command += [*MODELS[model], f"output_dir={output}", f"checkpoint.async={json.dumps(in_background)}"]
        command += [
            "checkpoint.save_steps=2",
            "training.max_steps=8",
            "training.logging_steps=1",
            "training.bf16=false",
        ]
        command += ["training.global_batch_size=16", "training.per_device_train_batch_size=8", "tracking.wandb=null"]
        command += ["data.test=null", "data.validation.limit=64"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        path = Path(output) / "quickstart"
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        saves = [line for line in lines if "checkpoint/seconds" in line][1:]
        (newest,) = sorted(path.glob("checkpoints/step-*"))[-1:]
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    if in_background:
        saves = saves[:-1]  # the last one of a run is waited for
    return {
        "blocked_seconds": [line["checkpoint/blocked_seconds"] for line in saves],
        "seconds": [line["checkpoint/seconds"] for line in saves],
        "megabytes": round(size / 1e6),
        "seconds_a_step": statistics.median(line["time/whole_step"] for line in lines if "time/whole_step" in line),
    }


def main() -> None:
    figures: dict[str, Any] = {}
    for model in MODELS:
        rounds = [{side: run(model, side == "async") for side in ("at once", "async")} for _ in range(ROUNDS)]
        figures[model] = rounds
        for side in ("at once", "async"):
            blocked = [value for one in rounds for value in one[side]["blocked_seconds"]]
            whole = [value for one in rounds for value in one[side]["seconds"]]
            print(
                f"{model:5} {side:8} blocked {statistics.median(blocked):.2f} s (each "
                f"{', '.join(f'{value:.2f}' for value in blocked)}), written after {statistics.median(whole):.2f} s, "
                f"{rounds[0][side]['megabytes']} MB; a step takes {rounds[0][side]['seconds_a_step']:.2f} s",
                flush=True,
            )
    record.write("save_time", "python launcher/benchmarks/save_time.py", {"rounds": figures})


if __name__ == "__main__":
    main()
