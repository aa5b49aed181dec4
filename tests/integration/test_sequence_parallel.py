"""Sequences shared among ranks, and MLPs in tiles: the losses and gradients of one rank that has all of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, make_run, work_together
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import recipe_values, write_language_model, write_prompts

from fleetune.train.metrics_log import read_metrics
from fleetune.verify import difference

GLOBAL_BATCH = 16
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},  # of 4 heads over 2 of keys
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 4},
    "sliding": {"family": "mistral", "sliding_window": 5, "num_key_value_heads": 4},
}


def values(folder: Path, name: str, family: str, ranks: int, size: int, **sections: Any) -> dict[str, Any]:
    readers = ranks // size
    training = {
        "global_batch_size": GLOBAL_BATCH,
        "per_device_train_batch_size": GLOBAL_BATCH // readers // 2,  # in two micro-batches
        "max_grad_norm": 0.5,
        "max_steps": 3,
        "sequence_parallel_size": size,
        **sections.pop("training", {}),
    }
    model_section = {"model_name_or_path": str(folder / family), **sections.pop("model", {})}
    made = recipe_values(folder, name, model=model_section, training=training, **sections)
    return {**made, "task": "causal_lm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence-parallel")
    for name, config in MODELS.items():
        write_language_model(folder / name, initializer_range=0.2, **config)
    write_prompts(folder / "train.jsonl", 43)
    write_prompts(folder / "validation.jsonl", 21, seed=1)
    return folder


Cut = tuple[int, int]  # ranks, of which so many share a sequence
Key = tuple[str, bool, str, int, Cut, str]  # model, packed, kernels, ZeRO stage, cut, what else
ALONE: Cut = (1, 1)
CUTS: tuple[Cut, ...] = ((2, 2), (4, 2))
PLAIN = list(itertools.product(("tied", "untied"), (False, True)))
MORE: dict[str, dict[str, Any]] = {
    "": {},
    "tiled": {"model": {"mlp_tiles": 3}},
    "checkpointed": {"model": {"gradient_checkpointing": True, "mlp_tiles": 3}},
    "lora": {"model": {"lora": {"r": 2, "lora_alpha": 4}}},
}


def keys() -> list[Key]:
    found: list[Key] = [(m, p, "torch", 0, ALONE, "") for m, p in PLAIN]
    found += [(m, p, "torch", stage, cut, "") for m, p in PLAIN for stage in (0, 3) for cut in CUTS]
    found += [("tied", p, "reference", stage, (2, 2), "") for p in (False, True) for stage in (0, 3)]
    found += [("untied", True, "torch", stage, (2, 2), "") for stage in (1, 2)]
    found += [("untied", True, "torch", 3, (4, 4), "")]
    found += [
        ("sliding", p, "torch", stage, cut, "") for p in (False, True) for stage, cut in ((0, ALONE), (0, (2, 2)))
    ]
    found += [("tied", True, "torch", 0, ALONE, "tiled"), ("tied", False, "torch", 3, (2, 1), "tiled")]
    found += [("tied", True, "torch", 2, (2, 2), "tiled"), ("tied", True, "torch", 3, (2, 2), "checkpointed")]
    found += [("tied", True, "torch", 0, ALONE, "lora"), ("tied", True, "torch", 3, (2, 2), "lora")]
    return found


Found = dict[Key, tuple[dict[str, torch.Tensor], dict[str, float], list[int]]]


@pytest.fixture(scope="module")
def gradients(folder: Path) -> Found:
    jobs: dict[Key, Job] = {}
    for key in keys():
        model, packed, kernels, stage, (ranks, size), more = key
        name = "-".join(map(str, (model, packed, kernels, stage, ranks, size, more or "plain")))
        recipe = values(
            folder,
            name,
            model,
            ranks,
            size,
            kernels=kernels,
            deepspeed={"zero_stage": stage},
            data={"weight_column": "weight", "packing": packed},
            **{section: dict(added) for section, added in MORE[more].items()},
        )
        run = make_run(recipe, ranks).path
        jobs[key] = Job(str(run), str(run / "gradient.safetensors"))
    work_together([(n, [job for key, job in jobs.items() if key[4][0] == n]) for n in (1, 2, 4)])
    found: Found = {}
    for key, job in jobs.items():
        with safe_open(str(job.gradient), "pt") as file:
            said = {name: json.loads(text) for name, text in file.metadata().items()}
        found[key] = load_file(str(job.gradient)), said["losses"], said["rows"]
    return found


@pytest.mark.parametrize(
    "key", [key for key in keys() if key[4:] != (ALONE, "")], ids=lambda key: "-".join(map(str, key))
)
def test_loss_and_gradient_are_those_of_one_rank_with_whole_sequences(gradients: Found, key: Key) -> None:
    model, packed, _, _, _, more = key
    truth, losses, rows = gradients[model, packed, "torch", 0, ALONE, "lora" if more == "lora" else ""]
    found, other_losses, other_rows = gradients[key]
    apart = difference(truth, found)
    assert apart.whole < 1e-6, apart
    assert apart.worst < 1e-6, apart
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert other_rows == rows
    assert len(set(rows)) == len(rows)


def test_a_run_goes_on_with_other_ranks_to_a_sequence(folder: Path) -> None:
    """Trained, evaluated and saved on four ranks that share by twos; taken up where none share."""
    sections: dict[str, Any] = {"data": {"packing": True}, "deepspeed": {"zero_stage": 2}}

    def recipe(name: str, ranks: int, size: int, steps: int) -> dict[str, Any]:
        training = {"max_steps": steps, "lr_scheduler_type": "constant"}
        return values(folder, name, "tied", ranks, size, training=training, **sections)

    later = recipe("shared", 2, 1, 3)
    work_together(
        [
            (1, [Job(str(make_run(recipe("alone", 1, 1, 3), 1).path))]),
            (4, [Job(str(make_run(recipe("shared", 4, 2, 2), 4).path))]),
            (2, [Job(str(folder / "runs" / "shared"), values=later)]),
        ]
    )
    truth, found = (read_metrics(folder / "runs" / name / "metrics.jsonl") for name in ("alone", "shared"))
    assert [step["step"] for step in found] == [step["step"] for step in truth] == [1, 2, 3]
    for expected, step in zip(truth, found, strict=True):
        assert step["data/order"] == expected["data/order"]
        for name in ("train/loss", "train/grad_norm"):
            assert step[name] == pytest.approx(expected[name], rel=1e-5), (step["step"], name)
    assert found[-1]["eval/loss"] == pytest.approx(truth[-1]["eval/loss"], rel=1e-5)
