"""QLoRA from the first step to a merged model: the same losses on any ranks, a resume bit for bit, evaluation between
steps that changes nothing, an adapter that is evaluated as it was trained and merged into whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, work_together
from safetensors.torch import load_file
from tiny import recipe_values, write_language_model, write_model, write_prompts, write_rows

from fleetune import runs
from fleetune.train.evaluate_folder import evaluate_folder
from fleetune.train.export import export
from fleetune.train.metrics_log import read_metrics
from fleetune.train.reshard import Stored

pytest.importorskip("bitsandbytes")
QWEN = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each run is of four steps; `-stopped` ends after the second, and then goes on."""
    folder = tmp_path_factory.mktemp("qlora")
    write_language_model(folder / "qwen", family="qwen2", tie_word_embeddings=False, **QWEN)
    write_model(folder / "bert")
    for split, count, seed in (("train", 43, 0), ("validation", 21, 1)):
        write_prompts(folder / f"{split}.jsonl", count, seed)
        write_rows(folder / f"{split}-rows.jsonl", count, seed)

    def job(name: str, stage: int, steps: int = 4, model: str = "qwen", eval_steps: int = 1, **more: Any) -> Job:
        offload, kernels = more.pop("offload", "none"), more.pop("kernels", "auto")
        training = {"max_steps": steps, "lr_scheduler_type": "constant", "bf16": more.pop("bf16", False)}
        settings = {"r": 4, "lora_alpha": 16.0, "quantization": "nf4", **more}
        values = recipe_values(
            folder,
            name,
            model={"model_name_or_path": str(folder / model), "lora": settings},
            training={**training, "global_batch_size": 12, "per_device_train_batch_size": 6, "learning_rate": 2e-3},
            deepspeed={"zero_stage": stage, "offload_optimizer": offload},
            checkpoint={"save_steps": 2},
            evaluation={"eval_steps": eval_steps},
            data={"max_length": 64},
        )
        if model == "bert":
            for split in ("train", "validation"):
                values["data"][split] = {"path": str(folder / f"{split}-rows.jsonl")}
        else:
            generate = {"prompts": ["the film was"], "max_new_tokens": 4}
            values |= {"task": "causal_lm", "kernels": kernels}
            values["evaluation"] |= {"generate": generate}
        return Job(str(folder / "runs" / name), values=values)

    two = [job(f"{stage}x2", stage) for stage in (0, 1, 2)]
    two += [job("offload", 2, offload="cpu"), job("bf16", 2, bf16=True), job("bert", 2, model="bert")]
    two += [job("dropout", 2, lora_dropout=0.1), job("moved", 2, 2)]
    one = [job("0x1", 0), job("2x1", 2), job("reference", 0, kernels="reference"), job("rarely", 0, eval_steps=4)]
    one += [job("whole", 0, quantization=None), job("fp4", 0, quantization="fp4"), job("autocast", 0, bf16=True)]
    one += [job("bert-0x1", 0, model="bert"), job("mlp", 1, modules_to_save=["mlp"]), job("moved", 1)]
    work_together(
        [
            (2, [*two, job("dropout-stopped", 2, 2, lora_dropout=0.1)]),
            (2, [job("dropout-stopped", 2, 4, lora_dropout=0.1)]),
            (1, one),
        ]
    )
    return folder / "runs"


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        *((name, "0x1") for name in ("0x2", "1x2", "2x2", "2x1", "offload", "moved", "reference")),
        ("bert", "bert-0x1"),
        ("rarely", "0x1"),  # bitsandbytes would leave weights that it has evaluated without their gradient
    ],
)
def test_the_losses_are_the_same_on_any_ranks_and_stage(folder: Path, name: str, truth: str) -> None:
    found, expected = (
        [line for line in read_metrics(folder / run / "metrics.jsonl") if "train/loss" in line] for run in (name, truth)
    )
    assert len(found) == 4
    assert found[-1]["train/loss"] != found[0]["train/loss"]
    for one, other in zip(found, expected, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)


def test_four_bits_are_near_to_whole_weights_and_not_the_same(folder: Path) -> None:
    whole, nf4, fp4 = (losses(folder / name)[0] for name in ("whole", "0x1", "fp4"))
    assert len({whole, nf4, fp4}) == 3
    assert nf4 == pytest.approx(whole, rel=0.05)
    assert losses(folder / "bf16") == pytest.approx(losses(folder / "2x2"), rel=0.02)
    assert losses(folder / "autocast") == pytest.approx(losses(folder / "2x2"), rel=0.02)


def test_a_run_that_was_stopped_is_the_same_run_bit_for_bit(folder: Path) -> None:
    keys = ("train/loss", "train/grad_norm", "data/order")
    runs_ = [folder / name for name in ("dropout", "dropout-stopped")]
    lines = [
        [[line[key] for key in keys] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
        for run in runs_
    ]
    assert lines[0] == lines[1]
    whole, stopped = (load_file(run / "model" / "adapter_model.safetensors") for run in runs_)
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_checkpoint_holds_nothing_that_is_frozen_and_the_report_counts_weights(folder: Path) -> None:
    quantized, whole = (runs.read_json(folder / name / "eval.json") for name in ("0x1", "whole"))
    for key in ("parameters", "trainable_parameters"):
        assert quantized[key] == whole[key]
    stored = Stored(folder / "2x2" / "checkpoints" / "step-00000004" / "engine", [])
    assert all(".lora_" in name for name in stored.pieces)
    assert sum(stored.numel(name) for name in stored.pieces) == quantized["trainable_parameters"]


@pytest.mark.parametrize("name", ["0x1", "2x2", "bf16", "mlp", "bert"])
def test_an_adapter_is_evaluated_as_it_was_trained_and_merged_into_whole_weights(
    folder: Path, tmp_path: Path, name: str
) -> None:
    report = runs.read_json(folder / name / "eval.json")["validation"]
    close = 1e-2 if name == "bf16" else 1e-5
    assert evaluate_folder(folder / name, None, "validation")["metrics"]["loss"] == pytest.approx(report["loss"], close)
    export(folder / name, tmp_path / "adapter", merged=False, dtype=None)
    again = evaluate_folder(tmp_path / "adapter", None, "validation")["metrics"]
    assert again["loss"] == pytest.approx(report["loss"], close)
    found = export(folder / name, tmp_path / "merged", merged=True, dtype=None)
    assert found["difference"] < (0.02 if name == "bf16" else 1e-5)
    assert 0 < found["from_quantized"] < 0.5
    assert "quantiz" not in (tmp_path / "merged" / "config.json").read_text(encoding="utf-8")
    said = [(tmp_path / place / "README.md").read_text(encoding="utf-8") for place in ("adapter", "merged")]
    assert "QLoRA adapter, fine-tuned" in said[0]
    assert "with a QLoRA adapter merged, fine-tuned" in said[1]
    merged = evaluate_folder(tmp_path / "merged", None, "validation")["metrics"]
    assert merged["loss"] == pytest.approx(report["loss"], rel=0.1)


def test_peft_reads_the_adapter_over_whole_weights_as_the_merged_model_says(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export(folder / "2x2", tmp_path / "merged", merged=True, dtype=None)
    base: Any = AutoModelForCausalLM.from_pretrained(folder.parent / "qwen", dtype=torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 20, 11, 7]])
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(base, str(folder / "2x2" / "model")).float()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, by_peft, rtol=0, atol=1e-5)
