"""The terms of a student and its teachers; of layers see test_alignment.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fleetune.schema import Recipe
from fleetune.train.alignment import Outputs, StoredTokens
from fleetune.train.batches import IGNORED, MicroBatch
from fleetune.train.head import Head
from fleetune.train.objectives import build_terms
from fleetune.train.terms import Term
from fleetune.train.window import Replay, weighted

CPU = torch.device("cpu")
ROWS, TOKENS, CLASSES = 2, 7, 11
LABELS = {"kind": "cross_entropy", "weight": 0.3, "label_smoothing": 0.1}
TARGETS = {"kind": "distillation", "weight": 1.7, "temperature": 2.0}


def recipe(*losses: dict[str, Any], **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "task": "causal_lm",
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}},
        "teacher": {"model_name_or_path": "none"},
    }
    return Recipe.model_validate({**values, **sections, "losses": list(losses)})


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(width: int, seed: int) -> Outputs:
    head = Head(drawn(ROWS, TOKENS, width, seed=seed), drawn(CLASSES, width, seed=seed + 1), None, 1.0, None)
    return Outputs(None, head=head)


def stored() -> Outputs:
    """Three classes of every token that is learnt."""
    logits = drawn(int((micro().labels != IGNORED).sum()), CLASSES, seed=5)
    log_probs, ids = (logits / 2.0).log_softmax(-1).topk(3)
    return Outputs(None, stored=StoredTokens(ids, log_probs, None, "zero", CLASSES))


def micro() -> MicroBatch:
    labels = torch.randint(CLASSES, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    labels[:, ::3] = IGNORED
    weights = torch.tensor([0.5, 2.0]).double()[:, None].expand(ROWS, TOKENS).contiguous()
    supervised = torch.nonzero(labels.flatten() != IGNORED).flatten()
    return MicroBatch({}, labels, weights, torch.arange(ROWS).numpy(), ROWS * TOKENS, ROWS, supervised)


def values_and_gradients(terms: list[Term], teachers: list[Outputs]) -> list[torch.Tensor]:
    student = head(4, seed=1)
    assert student.head is not None
    leaves = [student.head.hidden_states.requires_grad_(), student.head.weight.requires_grad_()]
    counts = [term.divisor(micro()) for term in terms]
    values = weighted(terms, 0.0, teachers, micro(), Replay(), counts, student)
    return [values.detach(), *torch.autograd.grad(values[-1], leaves)]


@pytest.mark.parametrize("order", [(LABELS, TARGETS), (TARGETS, LABELS)], ids=["labels first", "targets first"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("kind", ["one", "several", "stored"])
def test_labels_and_soft_targets_are_formed_in_one_pass_with_the_values_and_gradients_of_two(
    kind: str, divergence: str, order: tuple[dict[str, Any], ...]
) -> None:
    if kind == "stored" and divergence != "forward_kl":
        pytest.skip("a stored teacher's is forward_kl")
    losses = [loss | ({"divergence": divergence} if loss is TARGETS else {}) for loss in order]
    teachers = {"one": [head(6, seed=7)], "several": [head(6, seed=7), head(3, seed=9)], "stored": [stored()]}[kind]
    terms = build_terms(recipe(*losses), CPU, shares=[1 / len(teachers)] * len(teachers))
    assert [term.pair is not None for term in terms] == [loss["kind"] == "distillation" for loss in losses]
    apart = [dataclasses.replace(term, pair=None) for term in terms]
    for mine, theirs in zip(values_and_gradients(terms, teachers), values_and_gradients(apart, teachers), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "made",
    [
        recipe(TARGETS),
        recipe(LABELS, LABELS, TARGETS),
        recipe(LABELS, TARGETS, kernels="reference"),
        recipe(LABELS, TARGETS, task="classification"),
        recipe(
            LABELS,
            TARGETS | {"combine": "losses"},
            teacher=None,
            teachers=[{"model_name_or_path": "none"}, {"model_name_or_path": "other"}],
        ),
    ],
    ids=["no labels", "labels twice", "the model's own logits", "a classifier", "a loss for each teacher"],
)
def test_else_each_is_formed_by_itself(made: Recipe) -> None:
    assert not any(term.pair for term in build_terms(made, CPU, shares=[1.0]))


def test_labels_over_more_classes_than_the_teacher_has_are_formed_by_themselves() -> None:
    assert not any(term.pair for term in build_terms(recipe(LABELS, TARGETS), CPU, shares=[1.0], vocab_size=CLASSES))
