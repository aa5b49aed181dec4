"""The gradient of a global batch does not depend on how it is cut: accumulation x ranks, under ZeRO 0 to 3."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, group_environment, make_run, rank_variables, work_together
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import recipe_values, write_model, write_rows
from torch.nn import functional

from fleetune import runs
from fleetune.batch import cut_batch
from fleetune.train import engine
from fleetune.train.data import prepare
from fleetune.train.model import build_model, load_tokenizer
from fleetune.verify import Difference, difference

ROWS, GLOBAL_BATCH = 37, 16  # the last window has 5 rows: of 8 ranks, three have none
CUTS = ((1, 1), (1, 8), (2, 4), (8, 1))  # ranks x micro-batches
STAGES = (0, 1, 2, 3)
WINDOWS = {"whole": 0, "short": -1}
CASES = (("cross_entropy", "whole"), ("cross_entropy", "short"), ("mse", "short"), ("penalties", "whole"))
CLASS_WEIGHTS, SMOOTHING, L1, L2 = [1.0, 3.0], 0.1, 1e-3, 1e-2
L1_ON, L2_ON = "*.dense.weight", "*.weight"
TASKS: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "losses": [{"kind": "cross_entropy", "label_smoothing": SMOOTHING, "class_weights": CLASS_WEIGHTS}],
    },
    "mse": {
        "task": "regression",
        "losses": [{"kind": "mse"}],
        "data": {"label_column": "score", "augmentation": [{"kind": "random_swap", "probability": 0.3}]},
        "model": {"freeze": ["*.word_embeddings.*"]},
    },
    # Of a decoder whose cross-attention no loss reaches: a penalty is all its gradient.
    "penalties": {
        "model": {"model_name_or_path": "unreached"},
        "losses": [
            {"kind": "cross_entropy", "weight": 0.1},
            {"kind": "l1_penalty", "weight": L1, "parameters": [L1_ON]},
            {"kind": "l2_penalty", "weight": L2, "parameters": [L2_ON]},
        ],
    },
}
FP32 = [(stage, False) for stage in STAGES]
FP64 = [(0, True)]  # the other stages add gradients up in fp32, whatever the model is


@dataclass(frozen=True)
class Found:
    difference: Difference  # from the reference: one rank, one micro-batch, no ZeRO, of the same type
    losses: dict[str, float]
    rows: list[int]


@dataclass(frozen=True)
class Gradients:
    found: dict[tuple[str, str, tuple[int, int], int, bool], Found]
    references: dict[tuple[str, str], dict[str, torch.Tensor]]  # by task and window, in fp64
    folder: Path


def _recipe(folder: Path, task: str, cut: tuple[int, int], stage: int) -> dict[str, Any]:
    ranks, micro_batches = cut
    sections = {
        "deepspeed": {"zero_stage": stage},
        "training": {
            "global_batch_size": GLOBAL_BATCH,
            "per_device_train_batch_size": GLOBAL_BATCH // ranks // micro_batches,
            "gradient_accumulation_steps": micro_batches,
        },
        **TASKS[task],
        "data": {"weight_column": "weight", **TASKS[task].get("data", {})},
    }
    model = str(folder / TASKS[task].get("model", {}).get("model_name_or_path", "model"))
    sections["model"] = {**TASKS[task].get("model", {}), "model_name_or_path": model}
    return recipe_values(folder, f"{task}-{ranks}x{micro_batches}-zero{stage}", **sections)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    folder = tmp_path_factory.mktemp("gradient")
    write_model(folder / "model", num_hidden_layers=1)
    write_model(folder / "unreached", num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "validation.jsonl", 2, seed=1)
    jobs: dict[tuple[str, str, tuple[int, int], int, bool], Job] = {}
    for cut in CUTS:
        made = {key: make_run(_recipe(folder, key[0], cut, key[1]), cut[0]) for key in itertools.product(TASKS, STAGES)}
        for (task, window), (stage, float64) in itertools.product(CASES, FP32 + FP64):
            run = made[task, stage].path
            out = run / f"{window}-{64 if float64 else 32}.safetensors"
            jobs[task, window, cut, stage, float64] = Job(str(run), str(out), WINDOWS[window], float64)
    sizes = sorted({ranks for ranks, _ in CUTS})
    work_together([(size, [job for key, job in jobs.items() if key[2][0] == size]) for size in sizes])

    found, references = {}, {}
    for key, job in jobs.items():
        task, window, _, _, float64 = key
        path = Path(str(job.gradient))
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(text) for name, text in file.metadata().items()}
        path.unlink()
        reference = references.setdefault((task, window, float64), tensors)  # the first cut is 1 x 1, without ZeRO
        found[key] = Found(difference(reference, tensors), metadata["losses"], metadata["rows"])
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float64 if float64 else torch.float32}
    return Gradients(found, {key[:2]: tensors for key, tensors in references.items() if key[2]}, folder)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut[0]}x{cut[1]}")
@pytest.mark.parametrize(("stage", "float64"), FP32 + FP64, ids=[f"zero{stage}" for stage in STAGES] + ["zero0-fp64"])
@pytest.mark.parametrize(("task", "window"), CASES)
def test_no_cut_changes_the_gradient(
    gradients: Gradients, task: str, window: str, stage: int, float64: bool, cut: tuple[int, int]
) -> None:
    truth = gradients.found[task, window, (1, 1), 0, float64]
    found = gradients.found[task, window, cut, stage, float64]
    assert found.rows == truth.rows
    assert len(set(found.rows)) == len(found.rows) == (GLOBAL_BATCH if window == "whole" else ROWS % GLOBAL_BATCH)
    bound = 1e-12 if float64 else 1e-6
    assert found.difference.whole <= bound, found.difference
    assert found.difference.worst <= bound, found.difference
    assert found.losses == pytest.approx(truth.losses, rel=bound)


@pytest.mark.parametrize(("task", "window"), [case for case in CASES if case[0] != "mse"])
def test_the_reference_is_torchs_own_gradient(gradients: Gradients, task: str, window: str) -> None:
    """What every cut is held to, written down in plain PyTorch over the whole batch."""
    recipe = runs.Run(gradients.folder / "runs" / f"{task}-1x1-zero0").recipe()
    tokenizer = load_tokenizer(recipe)
    reference = gradients.found[task, window, (1, 1), 0, True]
    config = engine.deepspeed_config(recipe, cut_batch(recipe.training, 1))
    model = build_model(recipe, prepare(recipe, tokenizer).label_names, torch.float32, config).double()
    lines = (gradients.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[row]) for row in reference.rows]
    labels = torch.tensor([row["label"] for row in rows])
    weights = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    logits = model(**inputs).logits
    if task == "cross_entropy":
        classes = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
        each = functional.cross_entropy(logits, labels, classes, label_smoothing=SMOOTHING, reduction="none")
        loss = (weights * each).sum() / (weights * classes[labels]).sum()
    else:
        parameters = dict(model.named_parameters())
        each = functional.cross_entropy(logits, labels, reduction="none")
        loss = 0.1 * (weights * each).sum() / weights.sum()
        loss = loss + L1 * sum(p.abs().sum() for name, p in parameters.items() if name.endswith(".dense.weight"))
        loss = loss + L2 * sum(p.square().sum() for name, p in parameters.items() if name.endswith(".weight"))
    loss.backward()
    truth = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    found = difference(truth, gradients.references[task, window])
    assert found.whole <= 1e-12, found


def test_the_program_writes_what_the_groups_did(gradients: Gradients) -> None:
    """One rank that starts with ZeRO-3, as a command; it reads the run and leaves it as it was."""
    run, out = gradients.folder / "runs" / "mse-1x1-zero3", gradients.folder / "alone.safetensors"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = subprocess.run(
        [sys.executable, "-m", "fleetune.train.gradient", str(run), str(out), "--batch", "-1"],
        env=group_environment() | rank_variables(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "deepspeed_shm_comm" not in done.stdout + done.stderr  # an extension that takes a minute to build
    found = gradients.found["mse", "short", (1, 1), 3, False]
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["losses"]) == found.losses
        assert json.loads(file.metadata()["rows"]) == found.rows
    reference = gradients.references["mse", "short"]  # in fp64
    assert difference(reference, load_file(out)).whole <= 1e-6
