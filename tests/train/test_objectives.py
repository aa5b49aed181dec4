"""The loss terms: their values, what divides them, and that no cut into micro-batches changes their sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fleetune.schema import Recipe
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.objectives import build_penalties, build_terms
from fleetune.train.terms import Term

CPU = torch.device("cpu")
NAMES = ["bert.embeddings.word.weight", "bert.layer.0.dense.weight", "bert.layer.0.dense.bias", "classifier.weight"]


def recipe(*losses: dict[str, Any], task: str = "classification") -> Recipe:
    values = {
        "name": "tiny",
        "task": task,
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}},
        "losses": list(losses),
    }
    return Recipe.model_validate(values)


def term(*losses: dict[str, Any], task: str = "classification") -> Term:
    (found,) = build_terms(recipe(*losses, task=task), CPU)
    return found


def micro(labels: torch.Tensor, weights: torch.Tensor | None = None) -> MicroBatch:
    weights = torch.ones(len(labels)) if weights is None else weights
    return MicroBatch({}, labels, weights, np.arange(len(labels)), tokens=len(labels), examples=len(labels))


def value(term: Term, logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """As the loop forms it: the divisors are summed in fp64."""
    return term.forward(Outputs(logits), [], batch, term.divisor(batch).double())


def example(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp64 logits that want gradients, labels, and weights; of one class, labels are values."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, (rows,), generator=generator)
    if classes == 1:
        labels = 5 * torch.rand(rows, generator=generator)
    # Eighths, so that sums of weights are exact.
    return logits, labels, torch.randint(17, (rows,), generator=generator) / 8


# ---------------------------------------------------------------- which terms


def test_each_task_has_a_term_of_its_own() -> None:
    assert [(t.name, t.weight) for t in build_terms(recipe(), CPU)] == [("cross_entropy", 1.0)]
    assert [(t.name, t.weight) for t in build_terms(recipe(task="regression"), CPU)] == [("mse", 1.0)]


def test_penalties_are_no_terms_and_a_terms_weight_is_the_recipes() -> None:
    losses = [{"kind": "l2_penalty", "weight": 1.0}, {"kind": "cross_entropy", "weight": 0.25}]
    assert [(t.name, t.weight) for t in build_terms(recipe(*losses), CPU)] == [("cross_entropy", 0.25)]


def test_losses_between_domains_are_numbered_and_their_weights_follow_a_schedule() -> None:
    losses = [{"kind": "cross_entropy"}, {"kind": "mmd", "weight": 2.0, "schedule": "linear"}]
    losses += [{"kind": "mmd", "layer": 0, "schedule": "sigmoid"}, {"kind": "dann", "weight": 0.5}]
    _, linear, sigmoid, dann = build_terms(recipe(*losses), CPU)
    assert [linear.name, sigmoid.name, dann.name] == ["mmd", "mmd_2", "dann"]
    assert [linear.weight_at(done) for done in (0.0, 0.5, 1.0)] == [0.0, 1.0, 2.0]
    assert sigmoid.weight_at(0.0) == 0.0
    assert sigmoid.weight_at(0.1) == pytest.approx(2 / (1 + np.exp(-1.0)) - 1)
    assert sigmoid.weight_at(1.0) == pytest.approx(1.0, abs=1e-4)
    assert [dann.weight_at(done) for done in (0.0, 1.0)] == [0.5, 0.5]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, [0.3, 1.0, 2.5]])
def test_cross_entropy_is_pytorchs(label_smoothing: float, class_weights: list[float] | None) -> None:
    logits, labels, _ = example(20, 3)
    loss = {"kind": "cross_entropy", "label_smoothing": label_smoothing, "class_weights": class_weights}
    weight = None if class_weights is None else torch.tensor(class_weights).double()
    expected = functional.cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing)
    torch.testing.assert_close(value(term(loss), logits, micro(labels)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("class_weights", [None, [0.3, 1.0, 2.5]])
def test_examples_weights_are_counted_in_both_sums(class_weights: list[float] | None) -> None:
    logits, labels, weights = example(20, 3)
    class_weight = torch.tensor(class_weights or [1.0] * 3).double()
    each = functional.cross_entropy(logits, labels, weight=class_weight, reduction="none")
    expected = (weights * each).sum() / (weights * class_weight[labels]).sum()
    loss = {"kind": "cross_entropy", "class_weights": class_weights}
    torch.testing.assert_close(value(term(loss), logits, micro(labels, weights)), expected, rtol=1e-12, atol=0)


def test_mean_squared_error_is_pytorchs() -> None:
    logits, labels, weights = example(20, 1)
    mse = term(task="regression")
    expected = functional.mse_loss(logits.squeeze(-1), labels.double())
    torch.testing.assert_close(value(mse, logits, micro(labels)), expected, rtol=1e-12, atol=0)
    expected = (weights * (logits.squeeze(-1) - labels) ** 2).sum() / weights.sum()
    torch.testing.assert_close(value(mse, logits, micro(labels, weights)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("task", "classes"), [("classification", 3), ("regression", 1)])
def test_bf16_logits_are_computed_in_fp32(task: str, classes: int) -> None:
    logits, labels, weights = example(20, classes)
    rounded = logits.detach().bfloat16()
    losses = [value(term(task=task), given, micro(labels, weights)) for given in (rounded, rounded.float())]
    assert losses[0].item() == losses[1].item()


# ---------------------------------------------------------------- any cut gives the same sum

CUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("classification", 2, {}),
    ("classification", 3, {"kind": "cross_entropy", "label_smoothing": 0.1, "class_weights": [0.3, 1.0, 0.7]}),
    ("regression", 1, {}),
]


@pytest.mark.parametrize(("task", "classes", "loss"), CUTS)
@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 100))
def test_micro_batches_sum_to_the_whole(
    task: str, classes: int, loss: dict[str, Any], sizes: list[int], seed: int
) -> None:
    logits, labels, weights = example(sum(sizes), classes, seed)
    weights[0] = 1.0  # all zero is another test
    found = term(*([loss] if loss else []), task=task)
    whole = value(found, logits, micro(labels, weights))
    pieces = list(zip(logits.split(sizes), labels.split(sizes), weights.split(sizes), strict=True))
    num_items = torch.stack([found.divisor(micro(y, u)).double() for _, y, u in pieces]).sum()
    total = torch.stack([found.forward(Outputs(x), [], micro(y, u), num_items) for x, y, u in pieces]).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)
    (expected,), (gradient,) = torch.autograd.grad(whole, logits, retain_graph=True), torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("task", "classes", "loss"), CUTS)
def test_filler_rows_add_nothing(task: str, classes: int, loss: dict[str, Any]) -> None:
    logits, labels, weights = example(6, classes)
    found = term(*([loss] if loss else []), task=task)
    filler = micro(labels[:1], torch.zeros(1))
    assert found.divisor(filler) == 0
    part = found.forward(Outputs(logits[:1]), [], filler, found.divisor(micro(labels, weights)).double())
    assert part.item() == 0
    assert torch.autograd.grad(part, logits)[0].abs().max() == 0


@pytest.mark.parametrize(("task", "classes", "loss"), CUTS)
def test_a_window_of_weight_0_has_loss_and_gradient_0(task: str, classes: int, loss: dict[str, Any]) -> None:
    logits, labels, _ = example(6, classes)
    nothing = value(term(*([loss] if loss else []), task=task), logits, micro(labels, torch.zeros(6)))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, logits)[0].abs().max() == 0


# ---------------------------------------------------------------- penalties


@pytest.mark.parametrize(
    ("kind", "formula"), [("l1_penalty", lambda p: p.abs().sum()), ("l2_penalty", lambda p: p.square().sum())]
)
def test_a_penaltys_gradient_is_autograds(kind: str, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
    (penalty,) = build_penalties(recipe({"kind": "cross_entropy"}, {"kind": kind, "weight": 0.3}), NAMES)
    shard = torch.randn(50, dtype=torch.float64)
    shard[:5] = 0
    shard.requires_grad_()
    expected = 0.3 * formula(shard)
    torch.testing.assert_close(penalty.value(shard), expected)
    torch.testing.assert_close(penalty.gradient(shard.detach()), torch.autograd.grad(expected, shard)[0])


def test_a_penalty_of_shards_sums_to_the_penalty_of_the_whole() -> None:
    losses = [{"kind": "cross_entropy"}, {"kind": "l1_penalty", "weight": 2.0}, {"kind": "l2_penalty", "weight": 3.0}]
    parameter = torch.randn(7, 3, dtype=torch.float64)
    padded = torch.cat([parameter.flatten(), torch.zeros(3, dtype=torch.float64)])
    for penalty in build_penalties(recipe(*losses), NAMES):
        shards = padded.split(8)
        torch.testing.assert_close(sum(map(penalty.value, shards)), penalty.value(parameter))
        torch.testing.assert_close(
            torch.cat([penalty.gradient(shard) for shard in shards])[:21], penalty.gradient(parameter).flatten()
        )


def test_a_penalty_is_over_the_parameters_that_its_patterns_match() -> None:
    losses = [
        {"kind": "cross_entropy"},
        {"kind": "l2_penalty", "weight": 1.0},
        {"kind": "l2_penalty", "weight": 1.0, "parameters": ["*.layer.*", "classifier.weight"]},
    ]
    first, second = build_penalties(recipe(*losses), NAMES)
    assert [name for name in NAMES if first.matches(name)] == [NAMES[0], NAMES[1], NAMES[3]]
    assert [name for name in NAMES if second.matches(name)] == NAMES[1:]


def test_penalties_of_one_kind_are_numbered() -> None:
    losses = [{"kind": kind, "weight": 1.0} for kind in ("l1_penalty", "l2_penalty", "l2_penalty", "l2_penalty")]
    penalties = build_penalties(recipe({"kind": "cross_entropy"}, *losses), NAMES)
    assert [penalty.name for penalty in penalties] == ["l1_penalty", "l2_penalty", "l2_penalty_2", "l2_penalty_3"]
    assert [penalty.power for penalty in penalties] == [1, 2, 2, 2]


def test_a_pattern_that_no_parameter_matches_is_refused() -> None:
    losses = [
        {"kind": "cross_entropy"},
        {"kind": "l2_penalty", "weight": 1.0, "parameters": ["*.weight", "*.Layer.*"]},
    ]
    with pytest.raises(ValueError, match=r"losses\.1\.parameters: `\*\.Layer\.\*` matches no trainable parameter") as e:
        build_penalties(recipe(*losses), NAMES)
    assert NAMES[0] in str(e.value)
