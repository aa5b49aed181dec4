"""What `fleetune check` says of a rank's memory, against what training takes at its height.

    python launcher/benchmarks/memory_estimate.py [--only NAME]      # about 10 minutes on 2 cores

Two optimizer steps of each setting, so that the optimizer's state is there, every rank a process. Measured is what
PyTorch has allocated on the CPU at its height, by its profiler's own record, as a GPU's allocator would count it:
Python, the libraries and what the C library keeps back are not in it. Resumable: what is recorded is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "integration")]
import ranks  # type: ignore[import-not-found]  # noqa: E402
import tiny  # noqa: E402

DECODER: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 16000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # 43.6M parameters
ENCODER: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
SETTINGS: dict[str, dict[str, Any]] = {  # ranks, and what differs from 4 rows of 256 tokens, fp32, stage 0
    "one rank": {},
    "plain loss": {"kernels": "reference"},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "accumulation": {"training": {"global_batch_size": 8}},
    "512 tokens": {"data": {"max_length": 512}},
    "two ranks": {"ranks": 2},
    "ZeRO-1": {"ranks": 2, "deepspeed": {"zero_stage": 1}},
    "ZeRO-2": {"ranks": 2, "deepspeed": {"zero_stage": 2}},
    "ZeRO-3": {"ranks": 2, "deepspeed": {"zero_stage": 3}},
    "LoRA, ZeRO-3": {"ranks": 2, "deepspeed": {"zero_stage": 3}, "model": {"lora": {"r": 8}}},
    "QLoRA, ZeRO-2": {"ranks": 2, "deepspeed": {"zero_stage": 2}, "model": {"lora": {"r": 8, "quantization": "nf4"}}},
    "distillation": {"teacher": True},
    "encoder, ZeRO-2": {"ranks": 2, "deepspeed": {"zero_stage": 2}, "encoder": True},
}


def values(folder: Path, name: str) -> tuple[dict[str, Any], int]:
    setting = dict(SETTINGS[name])
    count, encoder = setting.pop("ranks", 1), setting.pop("encoder", False)
    rows = {"max_steps": 2, "global_batch_size": 4 * count, "per_device_train_batch_size": 4}
    if encoder:
        rows |= {"global_batch_size": 32 * count, "per_device_train_batch_size": 32}
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": str(folder / ("encoder" if encoder else "decoder"))},
        "training": rows,
        "deepspeed": {"zero_stage": 0},
        "data": {"max_length": 64 if encoder else 256, "packing": not encoder},
    }
    if setting.pop("teacher", False):
        sections["teacher"] = {"model_name_or_path": str(folder / "decoder")}
        sections["losses"] = [{"kind": "distillation"}]
    for key, value in setting.items():
        sections[key] = {**sections[key], **value} if key in sections else value
    made = tiny.recipe_values(folder, name.replace(", ", "-").replace(" ", "-"), **sections)
    del made["data"]["validation"]
    if encoder:
        made["data"]["train"] = {"path": str(folder / "rows.jsonl")}
    return {**made, "task": "classification" if encoder else "causal_lm"}, count


def write_models(folder: Path) -> None:
    tiny.write_language_model(folder / "decoder", **DECODER)
    tiny.write_model(folder / "encoder", **ENCODER)
    tiny.write_prompts(folder / "train.jsonl", 400)
    tiny.write_rows(folder / "rows.jsonl", 400)


# ---------------------------------------------------------------- one setting, in a process of its own


def work(rank: int, world_size: int, port: int, folder: str, out: str) -> None:
    """What each rank does: it trains, and the main one writes its height in bytes."""
    import os

    from torch.profiler import ProfilerActivity, profile

    from fleetune import runs
    from fleetune.train import distributed, loop

    os.environ |= ranks.rank_variables(rank, world_size, port)
    world = distributed.start()
    run = runs.Run(Path(folder))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loop.train(run, world, run.path)
    height = now = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            height = max(height, now)
    if world.is_main:
        Path(out).write_text(json.dumps(height), encoding="utf-8")
    distributed.barrier()
    distributed.stop()


def measure(folder: Path, made: dict[str, Any], count: int) -> tuple[int, dict[str, Any]]:
    """The main rank's height in bytes, and what was estimated."""
    run = ranks.make_run(made, count)
    environment = ranks.group_environment()
    command = [sys.executable, "-m", "fleetune.train.memory", str(run.path / "recipe.yaml"), "--ranks", str(count)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    out = run.path / "height.json"
    one = [sys.executable, __file__, "--one", str(run.path), str(count), str(out)]
    subprocess.run(one, env=environment, capture_output=True, text=True, check=True)
    return int(out.read_text(encoding="utf-8")), json.loads(answer.stdout)


def one(folder: str, count: str, out: str) -> None:
    from torch.multiprocessing.spawn import start_processes

    ranks._import_everything()
    start_processes(  # type: ignore[no-untyped-call]
        work, (int(count), ranks._free_port(), folder, out), nprocs=int(count), start_method="fork"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--again", action="store_true", help="what is recorded too")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(*given.one)
        return
    known = record.read("memory_estimate") or {"settings": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(folder)
        for name in SETTINGS:
            if given.only in name and (given.again or name not in known["settings"]):
                height, estimated = measure(folder, *values(folder, name))
                known["settings"][name] = {"measured": height, "estimated": estimated["height"]}
                command = "python launcher/benchmarks/memory_estimate.py"
                record.write("memory_estimate", command, {"settings": known["settings"]})
            if name in known["settings"]:
                found = known["settings"][name]
                ratio = found["estimated"] / found["measured"]
                print(
                    f"{name:18} measured {found['measured'] / 1e6:6.0f} MB  estimated "
                    f"{found['estimated'] / 1e6:6.0f} MB  {ratio - 1:+.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
