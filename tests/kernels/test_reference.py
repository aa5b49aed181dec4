"""The reference losses against PyTorch's own, and what they add: divisors, weights of single labels, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from fleetune_kernels import cross_entropy, supervised_weight

CLASSES = 5


def example(*shape: int, dtype: torch.dtype = torch.float64, ignored: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (*shape, CLASSES) that want gradients, and labels (*shape), a share of them -100."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*shape, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return logits.to(dtype).requires_grad_(), labels


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss.sum(), logits)
    return found


WEIGHT = torch.tensor([0.1, 1.0, 2.0, 0.0, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_values_and_gradients_are_pytorchs(
    reduction: str, weight: torch.Tensor | None, label_smoothing: float, ignored: float
) -> None:
    logits, labels = example(40, ignored=ignored)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    found, expected = cross_entropy(logits, labels, **options), functional.cross_entropy(logits, labels, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(found, logits), gradient(expected, logits), rtol=1e-12, atol=1e-12)


def test_another_label_may_be_ignored() -> None:
    logits, labels = example(40)
    expected = functional.cross_entropy(logits, labels, ignore_index=2)
    torch.testing.assert_close(cross_entropy(logits, labels, ignore_index=2), expected)
    assert supervised_weight(labels, ignore_index=2) == (labels != 2).sum()
    assert supervised_weight(torch.tensor([3, 156, 7], dtype=torch.uint8)) == 3  # -100 does not wrap round to 156


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (0,)])
def test_any_leading_shape_goes(shape: tuple[int, ...]) -> None:
    logits, labels = example(*shape)
    losses = cross_entropy(logits, labels, reduction="none")
    assert losses.shape == shape
    flat = functional.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), reduction="none")
    torch.testing.assert_close(losses.reshape(-1), flat)
    torch.testing.assert_close(cross_entropy(logits, labels, reduction="sum"), flat.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = example(400, dtype=dtype)
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, functional.cross_entropy(logits.detach().float(), labels))
    assert gradient(loss, logits).dtype == dtype


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 1e4]], requires_grad=True)
    losses = cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    assert losses.tolist() == [0.0, 2e4]
    assert gradient(losses, logits).tolist() == [[0.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, labels = example(20)
    torch.testing.assert_close(cross_entropy(logits, labels.to(dtype)), functional.cross_entropy(logits, labels))


# ---------------------------------------------------------------- weights and divisors


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_each_label_may_have_a_weight(weight: torch.Tensor | None, label_smoothing: float) -> None:
    logits, labels = example(4, 10, ignored=0.3)
    token_weights = torch.rand(4, 10, dtype=torch.float64)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": label_smoothing}
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", **options)
    each = each.reshape(4, 10) * token_weights
    class_weights = torch.ones(CLASSES, dtype=torch.float64) if weight is None else weight
    divisor = (token_weights * class_weights[labels.clamp(min=0)] * (labels >= 0)).sum()
    options["token_weights"] = token_weights
    torch.testing.assert_close(cross_entropy(logits, labels, reduction="none", **options), each)
    torch.testing.assert_close(cross_entropy(logits, labels, reduction="sum", **options), each.sum())
    torch.testing.assert_close(cross_entropy(logits, labels, **options), each.sum() / divisor)
    torch.testing.assert_close(supervised_weight(labels, weight=weight, token_weights=token_weights), divisor)


def test_num_items_is_what_the_sum_is_divided_by() -> None:
    logits, labels = example(10)
    total = cross_entropy(logits, labels, reduction="sum")
    for num_items in (torch.tensor(4), torch.tensor(4.0), torch.tensor(4.0, dtype=torch.float64)):
        torch.testing.assert_close(cross_entropy(logits, labels, num_items=num_items), total / 4)


def test_the_divisor_of_a_whole_is_the_sum_of_its_parts() -> None:
    _, labels = example(3000, ignored=0.2)
    token_weights, weight = torch.rand(3000), WEIGHT.float()
    whole = supervised_weight(labels, weight=weight, token_weights=token_weights)
    parts = [
        supervised_weight(labels[i : i + 7], weight=weight, token_weights=token_weights[i : i + 7])
        for i in range(0, 3000, 7)
    ]
    assert whole.shape == ()
    assert float(whole) == pytest.approx(math.fsum(map(float, parts)), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items": torch.tensor(0.0)},
        {"num_items": torch.tensor(0.0, dtype=torch.float64)},
        {"weight": WEIGHT},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
    ],
)
def test_nothing_supervised_is_0_with_gradient_0(dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits, _ = example(3, dtype=dtype)
    loss = cross_entropy(logits, torch.full((3,), -100), **options)
    assert loss.item() == 0
    assert gradient(loss, logits).abs().max() == 0


def test_labels_of_weight_0_are_as_if_not_there() -> None:
    logits, labels = example(6)
    token_weights = torch.tensor([1.0, 0, 1, 0, 0, 1])
    kept = token_weights.bool()
    loss = cross_entropy(logits, labels, token_weights=token_weights)
    torch.testing.assert_close(loss, functional.cross_entropy(logits[kept], labels[kept]))
    assert gradient(loss, logits)[~kept].abs().max() == 0
    nothing = cross_entropy(logits, labels, token_weights=torch.zeros(6))
    assert nothing.item() == 0
    assert gradient(nothing, logits).abs().max() == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": WEIGHT, "label_smoothing": 0.2},
        {"token_weights": torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64), "reduction": "sum"},
        {"num_items": torch.tensor(3.0), "weight": WEIGHT},
        {"reduction": "none"},
    ],
)
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    logits, labels = example(4)
    labels[1] = -100
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, labels, **options), logits)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(4, dtype=torch.int64)},
            r"labels: shape \(4,\); should be \(3,\), one for each row of logits",
        ),
        ({"labels": torch.zeros(3, 5, dtype=torch.int64)}, r"labels: shape \(3, 5\); should be \(3,\), one"),
        ({"weight": torch.ones(4)}, r"weight: shape \(4,\); should be \(5,\), one for each class"),
        ({"weight": torch.tensor(1.0)}, r"weight: shape \(\); should be \(5,\), one for each class"),
        ({"token_weights": torch.ones(5)}, r"token_weights: shape \(5,\); should be \(3,\), one for each row of"),
        ({"token_weights": torch.ones(3, 1)}, r"token_weights: shape \(3, 1\); should be \(3,\), one for each row"),
        ({"reduction": "average"}, r"reduction: 'average'; should be one of none, mean, sum"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    logits, labels = example(3)
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"logits": logits, "labels": labels, **change})
