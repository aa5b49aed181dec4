"""LoRA under ZeRO, from the first step to a merged model: the same losses on any ranks, a resume bit for bit, an
adapter that peft itself reads, and a merged model that says the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, work_together
from safetensors.torch import load_file
from tiny import recipe_values, write_language_model, write_model, write_prompts, write_rows

from fleetune import runs
from fleetune.schema import RecipeError
from fleetune.train.evaluate_folder import evaluate_folder
from fleetune.train.export import export
from fleetune.train.metrics_log import read_metrics

QWEN = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 768, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Each run is of four steps; `-stopped` ones end after the second, and then go on."""
    folder = tmp_path_factory.mktemp("lora")
    write_language_model(folder / "qwen", family="qwen2", **QWEN)  # 3.3M parameters, untied
    (folder / "stories").symlink_to(shared_data / "models" / "stories260k")
    write_model(folder / "bert")
    for split, count, seed in (("train", 43, 0), ("validation", 21, 1)):
        write_prompts(folder / f"{split}.jsonl", count, seed)
        write_rows(folder / f"{split}-rows.jsonl", count, seed)

    def job(model: str, name: str, stage: int, steps: int = 4, bf16: bool = False, **lora: Any) -> Job:
        training = {"max_steps": steps, "lr_scheduler_type": "constant", "bf16": bf16, "global_batch_size": 12}
        settings = {"r": 4, "lora_alpha": 16.0, **lora}
        values = recipe_values(
            folder,
            f"{model}-{name}",
            model={"model_name_or_path": str(folder / model), "lora": settings},
            training={**training, "per_device_train_batch_size": 6, "learning_rate": 2e-3},
            deepspeed={"zero_stage": stage},
            checkpoint={"save_steps": 2},
            evaluation={"eval_steps": 4},
            data={"max_length": 64},
        )
        if model == "bert":
            for split in ("train", "validation"):
                values["data"][split] = {"path": str(folder / f"{split}-rows.jsonl")}
        else:
            values |= {"task": "causal_lm"}
        return Job(str(folder / "runs" / values["name"]), values=values)

    both, stopped = ("qwen", "stories"), "dropout-stopped"
    two = [job(model, "3x2", 3) for model in ("qwen", "bert", "stories")]
    two += [job("qwen", "2x2", 2), job("qwen", "bf16", 2, bf16=True), job("qwen", "moved", 3, 2)]
    two += [job("qwen", "head-3x2", 3, modules_to_save=["lm_head"])]
    two += [job(model, "dropout", 3, lora_dropout=0.1) for model in both]
    one = [job("qwen", "moved", 1, 4), *(job(model, "0x1", 0) for model in ("qwen", "bert"))]
    one += [job("qwen", "named", 0, target_modules=["q_proj"], use_rslora=True)]
    one += [job("qwen", "head", 0, modules_to_save=["lm_head"])]
    work_together(
        [
            (2, [*two, *(job(model, stopped, 3, 2, lora_dropout=0.1) for model in both)]),
            (2, [job(model, stopped, 3, 4, lora_dropout=0.1) for model in both]),
            (1, one),
        ]
    )
    return folder / "runs"


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("qwen-3x2", "qwen-0x1"),
        ("qwen-2x2", "qwen-0x1"),
        ("qwen-moved", "qwen-0x1"),
        ("bert-3x2", "bert-0x1"),
        ("qwen-head-3x2", "qwen-head"),
    ],
)
def test_the_losses_are_the_same_on_any_ranks_and_stage(folder: Path, name: str, truth: str) -> None:
    found, expected = (read_metrics(folder / run / "metrics.jsonl") for run in (name, truth))
    assert len(found) == 4
    assert found[-1]["train/loss"] != found[0]["train/loss"]
    for one, other in zip(found, expected, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)
        assert one["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("model", ["qwen", "stories"])
def test_a_run_that_was_stopped_is_the_same_run_bit_for_bit(folder: Path, model: str) -> None:
    keys = ("train/loss", "train/grad_norm", "data/order")
    runs_ = [folder / f"{model}-{name}" for name in ("dropout", "dropout-stopped")]
    lines = [[[line[key] for key in keys] for line in read_metrics(run / "metrics.jsonl")] for run in runs_]
    assert lines[0] == lines[1]
    whole, stopped = (load_file(run / "model" / "adapter_model.safetensors") for run in runs_)
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("name", ["qwen-3x2", "stories-3x2", "bert-3x2"])
def test_the_adapter_is_whole_and_a_checkpoint_holds_nothing_that_is_frozen(folder: Path, name: str) -> None:
    adapter = load_file(folder / name / "model" / "adapter_model.safetensors")
    assert all(tensor.numel() > 0 and tensor.abs().sum() > 0 for tensor in adapter.values())
    assert sum("lora_B" in key for key in adapter) == sum("lora_A" in key for key in adapter) > 10
    trained = runs.read_json(folder / name / "eval.json")["trainable_parameters"]
    assert sum(tensor.numel() for tensor in adapter.values()) == trained
    engine = folder / name / "checkpoints" / "step-00000004" / "engine"
    files = sum(path.stat().st_size for path in engine.iterdir())
    assert (
        files < 16 * trained + 400_000
    )  # fp32 weights, their two means and those computed with, and the files' frames


@pytest.mark.parametrize("name", ["qwen-3x2", "qwen-bf16", "qwen-named", "qwen-head-3x2", "stories-3x2"])
def test_peft_reads_the_adapter_and_the_merged_model_says_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = export(folder / name, tmp_path / "merged", merged=True, dtype=None)
    base: Any = AutoModelForCausalLM.from_pretrained(folder.parent / name.partition("-")[0], dtype=torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 20, 11, 7]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        by_peft = PeftModel.from_pretrained(base, str(folder / name / "model")).float()(input_ids=ids).logits
        logits = merged(input_ids=ids).logits
    assert float((by_peft - plain).abs().max()) > 1e-2
    torch.testing.assert_close(
        logits, by_peft, rtol=0, atol=(0.05 if "bf16" in name else 1e-5) * float(plain.abs().max())
    )
    assert found["difference"] < (0.02 if "bf16" in name else 1e-5)
    report = runs.read_json(folder / name / "eval.json")["validation"]
    again = evaluate_folder(tmp_path / "merged", None, "validation")["metrics"]
    assert again["loss"] == pytest.approx(report["loss"], rel=1e-2 if "bf16" in name else 1e-5)


def test_a_classifiers_head_is_trained_whole_and_comes_with_it(folder: Path, tmp_path: Path) -> None:
    report = runs.read_json(folder / "bert-3x2" / "eval.json")["validation"]
    export(folder / "bert-3x2", tmp_path / "merged", merged=True, dtype=None)
    for model in (folder / "bert-3x2", tmp_path / "merged"):
        found = evaluate_folder(model, None, "validation")["metrics"]
        assert found["loss"] == pytest.approx(report["loss"], rel=1e-5)


def umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def test_what_cannot_be_exported_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    for arguments, message in (
        ((folder / "qwen-3x2", tmp_path / "full", True, None), "is there already; give the name of a new folder"),
        ((folder / "qwen-3x2", tmp_path / "a" / "b", True, None), "there is no folder"),
        ((folder / "qwen-3x2", tmp_path / "new", False, "bfloat16"), "an adapter is kept as it is; give --merge too"),
        ((tmp_path / "full", tmp_path / "new", False, None), "no model is there"),
    ):
        with pytest.raises(RecipeError, match=message):
            export(*arguments)
    adapter = tmp_path / "adapter"
    export(folder / "qwen-3x2", adapter, merged=False, dtype=None)
    modes = {path.stat().st_mode & 0o777 for path in adapter.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask()}  # the runs' own files are private
    export(adapter, tmp_path / "half", merged=True, dtype="bfloat16")
    with pytest.raises(RecipeError, match="is a whole model already; leave it out"):
        export(tmp_path / "half", tmp_path / "new", merged=True, dtype=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "full", "half"]
    assert load_file(tmp_path / "half" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
