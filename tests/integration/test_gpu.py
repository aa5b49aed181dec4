"""The whole of a run on one GPU against the same on the CPU: every kind of loss, precision, stage and offload."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import recipe_values, write_language_model, write_model, write_prompts, write_rows

from fleetune import runs
from fleetune.recipe import parse_recipe
from fleetune.train.metrics_log import read_metrics

CROSS_ENTROPY = {"kind": "cross_entropy", "weight": 0.5}
DISTILLATION = {"kind": "distillation", "weight": 0.7, "temperature": 2.0}
OF_TEXT: dict[str, dict[str, Any]] = {
    "cross_entropy": {"losses": [CROSS_ENTROPY | {"label_smoothing": 0.1}, {"kind": "l2_penalty", "weight": 1e-3}]},
    "distillation": {"losses": [CROSS_ENTROPY, DISTILLATION, {"kind": "hidden_states", "layer_map": [[1, 2]]}]},
    **{
        kind: {"losses": [CROSS_ENTROPY, {"kind": kind, "weight": 0.5, "accumulate": True}]}
        for kind in ("mmd", "lmmd", "coral")
    },
    "jmmd": {"losses": [CROSS_ENTROPY, {"kind": "jmmd", "layers": ["pooled", "probabilities"], "accumulate": True}]},
    "dann": {"losses": [CROSS_ENTROPY, {"kind": "dann", "weight": 0.1}]},
    "entropy": {"losses": [CROSS_ENTROPY, {"kind": "entropy"}]},
    "reweight": {"reweight": {"method": "domain_classifier"}},
}
OF_TOKENS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"losses": [CROSS_ENTROPY | {"label_smoothing": 0.1}], "data": {"packing": True}},
    **{
        divergence: {"losses": [CROSS_ENTROPY, DISTILLATION | {"divergence": divergence}], "data": {"packing": True}}
        for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd")
    },
    "logits": {"losses": [CROSS_ENTROPY, DISTILLATION], "kernels": "reference"},
}
EVERYTHING_ELSEWHERE = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}
PLACES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((precision, {"zero_stage": stage}, {}) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)),
    *(("fp16", {"zero_stage": stage}, {}) for stage in (1, 2, 3)),
    *((precision, EVERYTHING_ELSEWHERE, {}) for precision in ("fp32", "bf16")),
    ("bf16", {"zero_stage": 2, "offload_optimizer": "cpu"}, {}),
    ("bf16", {"zero_stage": 2}, {"gradient_checkpointing": True}),
    ("bf16", {"zero_stage": 2}, {"lora": {"r": 4}}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_model(folder / "model", initializer_range=0.2)
    write_language_model(folder / "decoder", tie_word_embeddings=True)
    write_language_model(folder / "teacher", seed=1, hidden_size=48, num_hidden_layers=3, initializer_range=0.3)
    for task, write in (("text", write_rows), ("tokens", write_prompts)):
        write(folder / f"{task}-train.jsonl", 96)
        write(folder / f"{task}-validation.jsonl", 24, seed=1)
    write_rows(folder / "target.jsonl", 64, seed=2)
    return folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Path:
    """A teacher whose classes are the data's."""
    from transformers import AutoModelForSequenceClassification

    write_model(folder / "classifier", seed=1, num_hidden_layers=3)
    AutoModelForSequenceClassification.from_pretrained(folder / "classifier").save_pretrained(folder / "classifier")
    return folder / "classifier"


def of_text(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    files = {split: {"path": str(folder / f"text-{split}.jsonl")} for split in ("train", "validation")}
    target = {"target": {"train": {"path": str(folder / "target.jsonl")}}}
    kinds = {loss["kind"] for loss in sections.get("losses", [])}
    adapts = "reweight" in sections or kinds & {"mmd", "jmmd", "lmmd", "coral", "dann", "entropy"}
    return recipe_values(folder, name, **{**sections, "data": files | ({"target": target} if adapts else {})})


def of_tokens(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    files = {split: {"path": str(folder / f"tokens-{split}.jsonl")} for split in ("train", "validation")}
    model = {"model_name_or_path": str(folder / "decoder"), **sections.pop("model", {})}
    data = {**files, "format": "prompt_completion", **sections.pop("data", {})}
    return {**recipe_values(folder, name, model=model, data=data, **sections), "task": "causal_lm"}


def fleetune(*arguments: object, cache: Path | None = None) -> str:
    """What the command says; with a `cache` of its own it sees no GPU."""
    hidden = {} if cache is None else {"CUDA_VISIBLE_DEVICES": "", "FLEETUNE_CACHE": str(cache)}
    command = [sys.executable, "-m", "fleetune.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | hidden, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(values: dict[str, Any], *overrides: object, cache: Path | None = None) -> list[dict[str, Any]]:
    """What was logged of its steps."""
    run = Path(values["output_dir"]) / values["name"]
    file = run.parent.parent / f"{values['name']}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    said = fleetune("run", file, *overrides, "--nproc-per-node", 1, cache=cache)
    assert f", {'cuda' if cache is None else 'cpu'}\n" in said
    return [step for step in read_metrics(run / "metrics.jsonl") if "train/loss" in step]


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float) -> None:
    """Every loss by itself, the gradient's norm, and the losses of evaluations."""
    other_figures = ("learning_rate", "epoch", "samples_per_second", "tokens_per_second", "memory_mb", "mfu")

    def compared(step: dict[str, Any]) -> set[str]:
        trained = {name for name in step if name.startswith("train/") and name[6:] not in other_figures}
        return trained | {name for name in step if name.startswith("eval/") and name.endswith("loss")}

    assert len(one) == len(other) > 0
    assert any(name.startswith("eval/") for name in compared(one[-1]))
    for mine, theirs in zip(one, other, strict=True):
        assert compared(mine) == compared(theirs) >= {"train/loss", "train/grad_norm"}
        for name in compared(mine):
            assert mine[name] == pytest.approx(theirs[name], rel=rel, abs=1e-5), (mine["step"], name)


def taught(sections: dict[str, Any], teacher: Path) -> dict[str, Any]:
    """With the teacher where a loss asks for one."""
    asks = any(loss["kind"] == "distillation" for loss in sections.get("losses", []))
    return sections | ({"teacher": {"model_name_or_path": str(teacher)}} if asks else {})


def recipes(folder: Path) -> Iterator[dict[str, Any]]:
    """All of this file but those that need what another has made."""
    for name, sections in OF_TEXT.items():
        yield of_text(folder, f"text-{name}", **taught(sections, folder / "classifier"))
    for name, sections in OF_TOKENS.items():
        yield of_tokens(folder, f"tokens-{name}", **taught(sections, folder / "teacher"))
    for precision, deepspeed, model in PLACES:
        training = {} if precision == "fp32" else {precision: True}
        yield of_tokens(folder, "place", model=model, deepspeed=deepspeed, training=training)


def test_their_recipes_are_right_where_there_is_no_gpu_to_try_them(folder: Path) -> None:
    for values in recipes(folder):
        parse_recipe(yaml.safe_dump(values), "here")


# ---------------------------------------------------------------- the same as on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", OF_TEXT)
def test_a_classifier_learns_on_a_gpu_what_it_learns_on_a_cpu(
    name: str, folder: Path, classifier: Path, tmp_path: Path
) -> None:
    sections = taught(OF_TEXT[name], classifier)
    found = train(of_text(folder, f"text-{name}-gpu", **sections))
    expected = train(of_text(folder, f"text-{name}-cpu", **sections), cache=tmp_path)
    assert_alike(found, expected, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_language_model_learns_on_a_gpu_what_it_learns_on_a_cpu(name: str, folder: Path, tmp_path: Path) -> None:
    sections = taught(OF_TOKENS[name], folder / "teacher")
    found = train(of_tokens(folder, f"tokens-{name}-gpu", **sections))
    expected = train(of_tokens(folder, f"tokens-{name}-cpu", **sections), cache=tmp_path)
    assert_alike(found, expected, rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "deepspeed", "model"), PLACES, ids=str)
def test_every_precision_and_stage_learns(
    precision: str, deepspeed: dict[str, Any], model: dict[str, Any], folder: Path
) -> None:
    name = f"place-{PLACES.index((precision, deepspeed, model))}"
    training = {"max_steps": 20, "learning_rate": 5e-3, **({} if precision == "fp32" else {precision: True})}
    steps = train(of_tokens(folder, name, model=model, deepspeed=deepspeed, training=training))
    assert all(math.isfinite(step["train/loss"]) for step in steps)
    # An adapter of random weights that stay as they are has little to learn.
    assert steps[-1]["train/loss"] < (1.0 if "lora" in model else 0.8) * steps[0]["train/loss"]
    assert steps[-1]["train/memory_mb"] > 0
    report = runs.read_json(folder / "runs" / name / "eval.json")
    assert report["validation"]["loss"] < steps[0]["train/loss"]


# ---------------------------------------------------------------- and all that comes after


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_that_goes_on_has_the_losses_of_one_never_stopped(stage: int, folder: Path) -> None:
    training = {"lr_scheduler_type": "constant"}
    sections = {"deepspeed": {"zero_stage": stage}, "training": training}
    whole = train(of_tokens(folder, f"whole-{stage}", **sections), "training.max_steps=8")
    train(of_tokens(folder, f"cut-{stage}", **sections), "training.max_steps=4")
    cut = train(of_tokens(folder, f"cut-{stage}", **sections), "training.max_steps=8")
    assert_alike(cut, whole, rel=1e-4)  # sums by atomic additions come in any order


@pytest.mark.gpu
def test_a_stored_teacher_teaches_what_the_living_one_does(folder: Path) -> None:
    teacher = {"model_name_or_path": str(folder / "teacher")}
    losses = [CROSS_ENTROPY, DISTILLATION]
    living = of_tokens(folder, "living", losses=losses, teacher=teacher)
    expected = train(living)
    classes = runs.read_json(folder / "teacher" / "config.json")["vocab_size"]
    fleetune("teach", folder / "living.yaml", "--top-k", classes, "--out", folder / "taught")
    stored = of_tokens(folder, "stored", losses=losses, teacher={"cache": str(folder / "taught")})
    assert_alike(train(stored), expected, rel=5e-3)


@pytest.mark.gpu
def test_what_was_trained_is_evaluated_measured_and_merged(folder: Path) -> None:
    train(of_tokens(folder, "adapter", model={"lora": {"r": 4}}, training={"bf16": True}))
    run = folder / "runs" / "adapter"
    assert "loss" in fleetune("eval", run, "--data", folder / "tokens-validation.jsonl")
    fleetune("export", run, folder / "merged", "--merge")
    assert (folder / "merged" / "model.safetensors").exists()
    fleetune("compare", run, "--latency", "--json", folder / "compared.json")
    (row,) = runs.read_json(folder / "compared.json")["rows"]
    assert row["latency"]["gpu"]
