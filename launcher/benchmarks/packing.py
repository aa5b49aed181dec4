"""Packed against unpacked, on real instructions: the same loss and gradient; and how much padding packing leaves.

    FLEETUNE_DATA=... python launcher/benchmarks/packing.py      # about 10 minutes on 2 cores

The gradient of one global batch of 500 of Alpaca's examples through a pretrained Llama of 260,000 parameters, packed to
512 tokens and one by one, in fp64 and in fp32, one rank without ZeRO. The padding is of whole data sets, in packs of
512 tokens, which many of their rows fill alone in that model's 512 word pieces, and of 2,048.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FLEETUNE_DATA") or ROOT.parent / "shared" / "data")
ROWS, MAX_LENGTH, MICRO_BATCH = 500, 512, 4
SETS = {
    "alpaca": "instruct/alpaca_en_demo.json",
    "dolly": "instruct/dolly_hhrlhf_train_small.jsonl",
    "gsm8k": "gsm8k/train.jsonl",
}


def recipe(
    folder: Path, name: str, data: str, *, packing: bool, limit: int | None = None, max_length: int = MAX_LENGTH
) -> Any:
    from fleetune.schema import Recipe

    values = {
        "name": name,
        "task": "causal_lm",
        "output_dir": str(folder),
        "model": {
            "model_name_or_path": str(DATA / "models" / "stories260k"),
            "config": {"max_position_embeddings": max_length},
        },
        "data": {
            "train": {"path": str(DATA / data), "limit": limit},
            "max_length": max_length,
            "packing": packing,
        },
        "training": {
            "global_batch_size": ROWS,
            "per_device_train_batch_size": MICRO_BATCH,
        },
        "deepspeed": {"zero_stage": 0},
    }
    return Recipe.model_validate(values)


def gradient(folder: Path, *, packing: bool, float64: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """Its tensors and its losses."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    from fleetune import opening

    name = f"{'packed' if packing else 'unpacked'}-{64 if float64 else 32}"
    run = opening.open_run(
        recipe(folder, name, SETS["alpaca"], packing=packing, limit=ROWS),
        {"nodes": 1, "nproc_per_node": 1, "threads": os.cpu_count() or 1},
    )
    out = folder / f"{name}.safetensors"
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "fleetune.train.gradient", str(run.path), str(out)]
    subprocess.run(command + ["--float64"] * float64, env=environment, check=True, stdout=subprocess.DEVNULL)
    with safe_open(out, "np") as file:
        losses = json.loads(file.metadata()["losses"])
    return load_file(out), losses


def padding(folder: Path, name: str, max_length: int) -> dict[str, float]:
    """The share of all places that no token fills: packed, and in batches of like length without packing."""
    from fleetune.train.batches import compose_epoch
    from fleetune.train.data import prepare
    from fleetune.train.model import load_tokenizer

    loaded = recipe(folder, name, SETS[name], packing=True, max_length=max_length)
    data = prepare(loaded, load_tokenizer(loaded))
    lengths = data.splits["train"].lengths
    places = data.report["sequences"] * max_length
    batches = {grouped: compose_epoch(lengths, 8, 0, 0, grouped) for grouped in (True, False)}
    padded = {grouped: sum(len(b) * lengths[b].max() for b in found) for grouped, found in batches.items()}
    return {
        "rows": len(lengths),
        "packed": 1 - float(lengths.sum()) / places,
        "batches of 8, like length": 1 - float(lengths.sum() / padded[True]),
        "batches of 8, shuffled": 1 - float(lengths.sum() / padded[False]),
    }


def main() -> None:
    from fleetune.verify import difference

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    errors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = (MAX_LENGTH, 2048)
        paddings = {f"{data}, {length}": padding(folder, data, length) for data in SETS for length in lengths}
        for data, found in paddings.items():
            print(data, json.dumps(found), flush=True)
        for float64 in (True, False):
            (plain, losses), (packed, others) = (gradient(folder, packing=p, float64=float64) for p in (False, True))
            error = difference(plain, packed)
            apart = abs(losses["cross_entropy"] - others["cross_entropy"]) / losses["cross_entropy"]
            errors["fp64" if float64 else "fp32"] = {"gradient": error.whole, "worst": error.worst, "loss": apart}
            print(json.dumps(errors), flush=True)
    record.write(
        "packing", "python launcher/benchmarks/packing.py", {"rows": ROWS, "padding": paddings, "errors": errors}
    )


if __name__ == "__main__":
    main()
