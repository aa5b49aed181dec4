"""Language models against TRL's SFTTrainer: one rank each, in turn, a Llama with a head of 32,000 rows on instructions.

    FLEETUNE_DATA=... python launcher/benchmarks/lm_vs_trl.py [--rows 160] [--rounds 2]     # 12 minutes on 2 cores

Every arm trains one epoch of the same rows of Dolly from the same weights, in fp32 on a CPU, in a fresh process on all
cores, `rounds` times in turn: Fleetune, packed; TRL with dynamic padding, rows of like length together; TRL packed
(bfd). The loss is on the answers. Supervised tokens a second are of the steps alone, start-up and saving left out;
memory is the most that the training process had resident. TRL's packing parts rows where FlashAttention does; on a CPU
its rows see each other, which is faster and another training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("FLEETUNE_DATA") or ROOT.parent / "shared" / "data")
ROWS = "instruct/dolly_hhrlhf_train_small.jsonl"
ARMS = ("fleetune", "trl", "trl, packed")
MAX_LENGTH, BATCH = 512, 8
PACKAGES = (*record.PACKAGES, "trl")


def write_model(folder: Path) -> None:
    """Random weights, and a tokenizer of byte pairs made of the data."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    lines = (DATA / ROWS).read_text(encoding="utf-8").splitlines()
    made = ByteLevelBPETokenizer()
    texts = (text for line in lines for text in json.loads(line).values() if isinstance(text, str))
    made.train_from_iterator(texts, vocab_size=16000, special_tokens=["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=688,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- the arms


def run_fleetune(model: Path, rows: Path) -> dict[str, Any]:
    recipe = {
        "name": "lm-vs-trl",
        "task": "causal_lm",
        "output_dir": str(model.parent / "runs"),
        "model": {"model_name_or_path": str(model)},
        "data": {
            "train": {"path": str(rows)},
            "max_length": MAX_LENGTH,
            "packing": True,
            "format": "prompt_completion",
        },
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH // 2,  # packs: about as many tokens as a batch of rows
            "learning_rate": 1e-3,
            "logging_steps": 1,
        },
        "deepspeed": {"zero_stage": 0},
        "checkpoint": {"save_steps": 10_000},
    }
    file = model.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "fleetune.cli", "run", str(file), "--fresh"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = max((model.parent / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    report = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    return {
        "seconds": report["train_seconds"],
        "steps": len(steps),
        "final_loss": steps[-1]["train/loss"],
        "peak_rss_mb": report["peak_memory_mb"],
    }


def run_trl(model: Path, rows: Path, packed: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--trl", str(model), str(rows), *(["--packed"] if packed else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def train_by_trl(model: str, rows: str, packed: bool) -> None:
    """The peer, in a process of its own; prints its figures."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    read = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["response"]} for row in read])
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH // 2 if packed else BATCH,
        learning_rate=1e-3,
        max_length=MAX_LENGTH,
        packing=packed,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        train_sampling_strategy="random" if packed else "group_by_length",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "final_loss": losses[-1],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures))


def supervised_tokens(model: Path, rows: Path) -> int:
    """Of the answers, with the token that ends each, as far as a row is not cut."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    total = 0
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        before, after = (len(tokenizer(row[key])["input_ids"]) for key in ("prompt", "response"))
        total += max(0, min(before + after + 1, MAX_LENGTH) - before)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trl:
        train_by_trl(given.trl[0], given.trl[1], given.packed)
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as place:
        model, rows = Path(place) / "model", Path(place) / "rows.jsonl"
        write_model(model)
        lines = (DATA / ROWS).read_text(encoding="utf-8").splitlines()[: given.rows]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokens = supervised_tokens(model, rows)
        for number in range(given.rounds):
            found = {
                "fleetune": run_fleetune(model, rows),
                "trl": run_trl(model, rows, False),
                "trl, packed": run_trl(model, rows, True),
            }
            rounds.append(found)
            for arm, figures in found.items():
                figures["tokens_per_second"] = tokens / figures["seconds"]
                print(
                    f"round {number + 1}  {arm:12} {figures['tokens_per_second']:7.1f} supervised tokens/s  "
                    f"{figures['peak_rss_mb']:6.0f} MB  {figures['steps']} steps  loss {figures['final_loss']:.3f}",
                    flush=True,
                )
    ratios = {
        key: {arm: [r["fleetune"][key] / r[arm][key] for r in rounds] for arm in ARMS[1:]}
        for key in ("tokens_per_second", "peak_rss_mb")
    }
    for arm in ARMS[1:]:
        speed, memory = (statistics.median(ratios[key][arm]) for key in ratios)
        print(f"fleetune / {arm}: speed {speed:.2f}, memory {memory:.2f}")
    record.write(
        "lm_vs_trl",
        "python launcher/benchmarks/lm_vs_trl.py " + " ".join(sys.argv[1:]),
        {"supervised_tokens": tokens, "rounds": rounds, "ratios": ratios},
        packages=PACKAGES,
    )


if __name__ == "__main__":
    main()
