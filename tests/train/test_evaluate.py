"""Predictions in the split's order whatever the ranks and batches, and metrics as sklearn and scipy have them."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch.nn import functional

from fleetune.schema import Recipe
from fleetune.train.alignment import Asked, Outputs, run
from fleetune.train.data import Split
from fleetune.train.distributed import World
from fleetune.train.evaluate import compute_metrics, evaluate, predict

ROOT = Path(__file__).parents[2]
WORLD = World(0, 1, 0, torch.device("cpu"))


def recipe(task: str = "classification", batch_size: int = 4, **evaluation: Any) -> Recipe:
    values = {
        "name": "tiny",
        "task": task,
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}, "validation": {"path": "none"}},
        "evaluation": {"per_device_eval_batch_size": batch_size, **evaluation},
    }
    return Recipe.model_validate(values)


def logits_of(labels: list[int], classes: int) -> npt.NDArray[np.float64]:
    """Logits whose largest is each label's."""
    noise = np.random.default_rng(0).random((len(labels), classes))
    noise[np.arange(len(labels)), labels] += 1.0
    return noise


# ---------------------------------------------------------------- classification


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (3, "macro")])
def test_classification_metrics_are_sklearns(classes: int, average: str) -> None:
    random = np.random.default_rng(1)
    labels, chosen = random.integers(classes, size=50), random.integers(classes, size=50)
    logits = logits_of(chosen.tolist(), classes)
    found = compute_metrics(recipe(), logits, labels)
    assert found == pytest.approx(
        {
            "loss": functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item(),
            "accuracy": sklearn_metrics.accuracy_score(labels, chosen),
            "f1": sklearn_metrics.f1_score(labels, chosen, average=average),
            "matthews": sklearn_metrics.matthews_corrcoef(labels, chosen),
        }
    )
    assert list(found) == ["loss", "accuracy", "f1", "matthews"]


def test_f1_of_two_classes_is_that_of_class_1() -> None:
    labels, chosen = np.array([1, 1, 0, 0, 0]), [1, 0, 1, 0, 0]
    assert compute_metrics(recipe(), logits_of(chosen, 2), labels)["f1"] == pytest.approx(1 / 2)


def test_f1_of_more_classes_is_the_plain_mean_over_classes() -> None:
    labels, chosen = np.array([0, 0, 0, 0, 1, 2]), [0, 0, 0, 0, 2, 2]
    assert compute_metrics(recipe(), logits_of(chosen, 3), labels)["f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)


@pytest.mark.parametrize("label", [0, 1])
def test_metrics_of_one_class_alone(label: int) -> None:
    labels = np.full(4, label)
    right = compute_metrics(recipe(), logits_of([label] * 4, 2), labels)
    wrong = compute_metrics(recipe(), logits_of([1 - label] * 4, 2), labels)
    assert (right["accuracy"], right["f1"], right["matthews"]) == (1.0, float(label), 0.0)
    assert (wrong["accuracy"], wrong["f1"], wrong["matthews"]) == (0.0, 0.0, 0.0)


def test_the_loss_of_sure_predictions_is_finite_where_they_are_right() -> None:
    logits = np.array([[1e4, 0.0], [0.0, 1e4]])
    assert compute_metrics(recipe(), logits, np.array([0, 1]))["loss"] == 0.0
    assert compute_metrics(recipe(), logits, np.array([1, 1]))["loss"] == 5e3


# ---------------------------------------------------------------- regression


def test_regression_metrics_are_scipys() -> None:
    random = np.random.default_rng(2)
    labels = np.round(random.random(50) * 5, 0).astype(np.float32)  # with ties
    values = labels + random.random(50)
    found = compute_metrics(recipe("regression"), values[:, None], labels)
    assert found == pytest.approx(
        {
            "loss": float(np.mean((values - labels) ** 2)),
            "pearson": stats.pearsonr(values, labels)[0],
            "spearman": stats.spearmanr(values, labels)[0],
            "mse": float(np.mean((values - labels) ** 2)),
        }
    )


@pytest.mark.parametrize(
    ("values", "labels"), [([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), ([1.0], [2.0])]
)
def test_correlations_that_are_not_defined_are_nan(values: list[float], labels: list[float]) -> None:
    found = compute_metrics(recipe("regression"), np.array(values)[:, None], np.array(labels, dtype=np.float32))
    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])
    assert found["mse"] == found["loss"] == pytest.approx(np.mean((np.array(values) - labels) ** 2))


def test_values_that_are_nan_have_metrics_that_are_nan() -> None:
    found = compute_metrics(recipe("regression"), np.array([[1.0], [math.nan]]), np.array([1.0, 2.0]))
    assert all(math.isnan(value) for value in found.values())


# ---------------------------------------------------------------- which metrics


def test_the_recipe_chooses_the_metrics_and_the_loss_is_always_there() -> None:
    logits, labels = logits_of([0, 1], 2), np.array([0, 1])
    assert list(compute_metrics(recipe(metrics=["f1"]), logits, labels)) == ["loss", "f1"]
    assert list(compute_metrics(recipe(metrics=["f1", "loss"]), logits, labels)) == ["loss", "f1"]


# ---------------------------------------------------------------- predictions


def make_split(lengths: list[int]) -> Split:
    """Row i's tokens are all i + 1, and its label is i % 2."""
    count = len(lengths)
    tokens = np.repeat(np.arange(1, count + 1), lengths).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Split(tokens, offsets, None, np.arange(count) % 2, None, np.arange(count), None)


LENGTHS = [3, 9, 1, 4, 4, 2, 7]


def first_token_and_length(inputs: dict[str, torch.Tensor], compute: Callable[[Outputs], torch.Tensor]) -> torch.Tensor:
    assert not torch.is_grad_enabled()
    return compute(Outputs(torch.stack([inputs["input_ids"][:, 0], inputs["attention_mask"].sum(1)], dim=1).bfloat16()))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_predictions_stand_in_the_splits_order(batch_size: int) -> None:
    logits = predict(first_token_and_length, make_split(LENGTHS), batch_size, 0, WORLD)
    assert logits.tolist() == [[i + 1, length] for i, length in enumerate(LENGTHS)]
    assert logits.dtype == np.float64


RANK = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_evaluate import LENGTHS, first_token_and_length, make_split
from fleetune.train.distributed import World
from fleetune.train.evaluate import predict
rank, store = int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
logits = predict(first_token_and_length, make_split(LENGTHS), 3, 0, World(rank, 2, rank, torch.device("cpu")))
print(json.dumps(logits.tolist()), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_every_rank_has_all_predictions_once(tmp_path: Path) -> None:
    """Seven rows in batches of three: the second rank has one batch less, and runs a filler."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("launcher", "kernels"))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(Path(__file__).parent), str(rank), str(tmp_path / "store")],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output = rank.communicate(timeout=120)[0]
        assert rank.returncode == 0
        assert json.loads(output) == [[i + 1, length] for i, length in enumerate(LENGTHS)]


def test_a_real_model_predicts_in_batches_what_it_predicts_row_by_row() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).double().eval()
    split = make_split(LENGTHS)
    forward: Any = functools.partial(run, model, model, asked=Asked())
    found = predict(lambda inputs, compute: forward(inputs=inputs, compute=compute), split, 3, 0, WORLD)
    with torch.no_grad():
        for i, length in enumerate(LENGTHS):
            alone = model(torch.full((1, length), i + 1)).logits[0]
            np.testing.assert_allclose(found[i], alone.numpy(), atol=1e-6)
    metrics = evaluate(
        lambda inputs, compute: forward(inputs=inputs, compute=compute), split, recipe(batch_size=2), 0, WORLD
    )
    assert metrics == pytest.approx(compute_metrics(recipe(), found, split.labels), abs=1e-6)


def test_each_domain_has_the_metrics_of_its_own_rows() -> None:
    split, domains = make_split(LENGTHS), {"books": slice(0, 3), "dvd": slice(3, len(LENGTHS))}
    found = evaluate(first_token_and_length, split, recipe(), 0, WORLD, domains)
    logits, labels = predict(first_token_and_length, split, 4, 0, WORLD), np.asarray(split.labels)
    expected = compute_metrics(recipe(), logits, labels)
    for name, rows in domains.items():
        of_domain = compute_metrics(recipe(), logits[rows], labels[rows])
        expected |= {f"{name}/{metric}": value for metric, value in of_domain.items()}
    assert found == expected
    assert {"accuracy", "books/accuracy", "dvd/accuracy"} <= set(found)
