"""Gradient caching: the gradient of a loss over a whole window, with dropout, is that of one graph over all of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fleetune.schema import Recipe
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.objectives import build_terms
from fleetune.train.terms import Features, Term, join
from fleetune.train.window import look_ahead, replayed


def term(kind: str) -> Term:
    values = {
        "name": "tiny",
        "task": "classification",
        "model": {"model_name_or_path": "none"},
        "data": {"train": {"path": "none"}, "target": {"far": {"train": {"path": "none"}}}},
        "losses": [{"kind": "cross_entropy"}, {"kind": kind, "layer": "logits", "accumulate": True}],
    }
    return build_terms(Recipe.model_validate(values), torch.device("cpu"))[1]


def window(*sizes: int) -> list[MicroBatch]:
    torch.manual_seed(0)
    micros = []
    for size in sizes:
        inputs = {"input_ids": torch.randn(max(1, 2 * size), 6), "attention_mask": torch.ones(max(1, 2 * size), 1)}
        labels, weights = torch.arange(max(1, 2 * size)) % 3, torch.ones(max(1, 2 * size))
        micros.append(MicroBatch(inputs, labels, weights, np.arange(size), size, size, None, size, (size,)))
    return micros


@pytest.mark.parametrize("kind", ["mmd", "lmmd", "coral"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3, 4), (4, 0)], ids=str)
def test_the_gradient_is_that_of_one_graph(kind: str, sizes: tuple[int, ...]) -> None:
    found, micros = term(kind), window(*sizes)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 3))
    passes: list[torch.Tensor] = []

    def forward(micro: MicroBatch, compute: Callable[[Outputs], list[Features]]) -> list[Features]:
        logits = model(micro.inputs["input_ids"])
        passes.append(logits.detach())
        return compute(Outputs(logits))

    assert found.statistic is not None
    torch.manual_seed(2)
    whole = join([forward(micro, lambda o, m=micro: [found.statistic.collect(o, m)])[0] for micro in micros])  # type: ignore[misc, union-attr]
    loss = found.statistic.value(whole)
    loss.backward()
    truth = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    passes.clear()

    torch.manual_seed(2)
    replays = look_ahead(forward, [found], micros)
    after = torch.get_rng_state()
    num_items = torch.tensor(float(len(micros)))
    values = []
    for micro, replay in zip(micros, replays, strict=True):
        replay.restore()
        logits = model(micro.inputs["input_ids"])
        passes.append(logits.detach())
        assert replay.cached is not None
        value = replayed(found, replay.cached[found.name], Outputs(logits), micro, num_items)
        value.backward()
        values.append(value.item())
    assert torch.equal(torch.get_rng_state(), after)
    assert sum(values) == pytest.approx(loss.item(), rel=1e-5)
    for one, parameter in zip(truth, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, one, rtol=1e-4, atol=1e-6)
    first, second = passes[: len(micros)], passes[len(micros) :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_window_with_too_few_rows_is_0_and_has_no_gradient() -> None:
    found, micros = term("coral"), window(1, 0)
    weight = torch.ones(6, 3, requires_grad=True)
    replays = look_ahead(lambda m, compute: compute(Outputs(m.inputs["input_ids"] @ weight)), [found], micros)
    for replay in replays:
        assert replay.cached is not None
        assert replay.cached["coral"].loss == 0
        assert not any(gradient.any() for gradient in replay.cached["coral"].gradients)


def test_one_micro_batch_has_no_first_pass() -> None:
    def refuse(*_: object) -> list[Features]:
        raise AssertionError("a pass more")

    assert look_ahead(refuse, [term("mmd")], window(4))[0].cached is None
