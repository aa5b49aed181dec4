"""A language model distilled: the same losses and gradients without the logits and with them, under ZeRO, over ranks,
packed or not; the teacher's head is wider, and filled up to another number of rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Job, make_run, work_together
from safetensors.torch import load_file
from tiny import recipe_values, write_language_model, write_prompts
from torch.nn import functional

from fleetune.train.metrics_log import read_metrics
from fleetune.verify import difference

TEMPERATURE = 2.0
LOSSES = [
    {"kind": "cross_entropy", "weight": 0.5},
    {"kind": "distillation", "weight": 0.7, "temperature": TEMPERATURE},
    {"kind": "hidden_states", "weight": 0.3, "layer_map": "last"},
    {"kind": "embedding", "weight": 0.1},
]
FORMS = (  # kernels, packed, stage, ranks, micro-batches
    ("reference", False, 0, 1, 1),
    ("torch", False, 0, 1, 1),
    ("torch", True, 0, 1, 4),
    ("torch", False, 2, 2, 2),
    ("torch", True, 3, 2, 1),
    ("reference", True, 3, 2, 2),
)
TRUTH = FORMS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language-distillation")
    write_language_model(folder / "student", tie_word_embeddings=True)
    write_language_model(
        folder / "teacher", seed=1, hidden_size=48, num_hidden_layers=3, vocab_size=64, initializer_range=0.3
    )
    write_prompts(folder / "train.jsonl", 37)
    write_prompts(folder / "validation.jsonl", 4, seed=1)
    return folder


def values(folder: Path, form: tuple[str, bool, int, int, int], losses: list[dict[str, Any]]) -> dict[str, Any]:
    kernels, packed, stage, ranks, micro = form
    size = 64 // ranks // micro
    made = recipe_values(
        folder,
        "-".join(map(str, (*form, len(losses)))),
        model={"model_name_or_path": str(folder / "student")},
        teacher={"model_name_or_path": str(folder / "teacher"), "deepspeed": {"zero_stage": 3 * (stage == 3)}},
        deepspeed={"zero_stage": stage},
        data={"weight_column": "weight", "packing": packed},
        training={
            "global_batch_size": 64,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": micro,
            "max_steps": 2,
        },
    )
    return {**made, "task": "causal_lm", "kernels": kernels, "losses": losses}


@pytest.fixture(scope="module")
def done(folder: Path) -> tuple[dict[Any, Any], dict[Any, dict[str, torch.Tensor]]]:
    """Of each form the logged steps, and the gradient of all rows at once; in fp64 too where there is no ZeRO."""
    jobs: dict[Any, list[Job]] = {}
    for form in FORMS:
        run = str(make_run(values(folder, form, LOSSES), form[3]).path)
        jobs[form] = [Job(run, f"{run}/32.safetensors")]
        jobs[form] += [Job(run, f"{run}/64.safetensors", 0, True)] if form[2] == 0 else []
        jobs[form] += [Job(run)]
    work_together([(n, [job for form in FORMS if form[3] == n for job in jobs[form]]) for n in (1, 2)])
    metrics = {form: read_metrics(Path(jobs[form][0].folder) / "metrics.jsonl") for form in FORMS}
    gradients = {
        (form, job.float64): load_file(job.gradient) for form in FORMS for job in jobs[form] if job.gradient is not None
    }
    return metrics, gradients


def test_losses_are_those_of_the_plain_logits(done: tuple[dict[Any, Any], Any]) -> None:
    metrics, _ = done
    for form, steps in metrics.items():
        for expected, step in zip(metrics[TRUTH], steps, strict=True):
            names = [name for name in expected if name in ("train/loss", "train/grad_norm", "train/distillation")]
            for name in names:
                assert step[name] == pytest.approx(expected[name], rel=2e-5), (form, expected["step"], name)
    assert metrics[TRUTH][0]["train/distillation"] > 0.05


def test_the_gradient_is_that_of_the_plain_logits(done: tuple[Any, dict[Any, dict[str, torch.Tensor]]]) -> None:
    _, gradients = done
    for (form, float64), found in gradients.items():
        assert difference(gradients[TRUTH, True], found).whole < (1e-10 if float64 else 2e-6), form


def test_the_losses_are_the_formulas(folder: Path, done: tuple[dict[Any, Any], Any]) -> None:
    """tau² KL(teacher || student) over the tokens that both have, and cross-entropy, over the weights of the answers'
    tokens."""
    from transformers import AutoModelForCausalLM

    from fleetune.train.batches import IGNORED, collate
    from fleetune.train.data import prepare
    from fleetune.train.model import load_tokenizer

    recipe = make_run(values(folder, TRUTH, LOSSES[:2]), 1).recipe()
    split = prepare(recipe, load_tokenizer(recipe)).splits["train"]
    import numpy as np

    batch = collate(split, np.arange(len(split)), 0)
    with torch.no_grad():
        mine, theirs = (
            AutoModelForCausalLM.from_pretrained(folder / name)(**batch.inputs).logits
            for name in ("student", "teacher")
        )
    known = min(mine.shape[-1], theirs.shape[-1])
    weights = batch.weights * (batch.labels != IGNORED)
    log_student = (mine[..., :known] / TEMPERATURE).log_softmax(-1)
    log_teacher = (theirs[..., :known] / TEMPERATURE).log_softmax(-1)
    divergence = TEMPERATURE**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    entropy = functional.cross_entropy(mine.transpose(1, 2), batch.labels, reduction="none")
    first = done[0][TRUTH][0]
    for name, share, each in (("distillation", 0.7, divergence), ("cross_entropy", 0.5, entropy)):
        expected = share * float((each * weights).sum() / weights.sum())
        assert first[f"train/{name}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kernels", "shares"), list(itertools.product(["auto", "torch"], [(1.0, 2.0)])))
def test_unequal_teachers_mean_soft_targets_are_refused(
    folder: Path, kernels: str, shares: tuple[float, float]
) -> None:
    from fleetune.schema import RecipeError

    made = values(folder, TRUTH, LOSSES[:2])
    teacher = made.pop("teacher")
    made |= {"kernels": kernels, "teachers": [{**teacher, "weight": share} for share in shares]}
    with pytest.raises(RecipeError, match=r"losses\.1\.combine"):
        make_run(made, 1)
