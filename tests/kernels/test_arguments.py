"""Arguments of another type: every public function names the one that is wrong and says what it should be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fleetune_kernels
from fleetune_kernels.backends import readable

HIDDEN, WEIGHT, LOGITS = torch.randn(4, 8), torch.randn(10, 8), torch.randn(4, 10)
LABELS, IDS = torch.arange(4), torch.arange(3).repeat(4, 1)
RIGHT: dict[str, dict[str, Any]] = {
    "check_labels": {"labels": LABELS, "vocab_size": 10},
    "coral": {"source": HIDDEN, "target": HIDDEN + 1},
    "cross_entropy": {"logits": LOGITS, "labels": LABELS},
    "distillation_loss": {"student_logits": LOGITS, "teacher_logits": LOGITS},
    "jmmd": {"source_layers": [HIDDEN], "target_layers": [HIDDEN + 1]},
    "linear_cross_entropy": {"hidden_states": HIDDEN, "lm_head_weight": WEIGHT, "labels": LABELS},
    "linear_distillation_loss": {
        "student_hidden": HIDDEN,
        "student_weight": WEIGHT,
        "teacher_hidden": HIDDEN,
        "teacher_weight": WEIGHT,
    },
    "lmmd": {
        "source": HIDDEN,
        "target": HIDDEN + 1,
        "source_labels": LABELS % 2,
        "target_probs": torch.full((4, 2), 0.5),
    },
    "mmd": {"source": HIDDEN, "target": HIDDEN + 1},
    "supervised_weight": {"labels": LABELS},
    "topk_distillation_loss": {
        "hidden_states": HIDDEN,
        "lm_head_weight": WEIGHT,
        "teacher_ids": IDS,
        "teacher_log_probs": torch.full((4, 3), -1.0),
    },
}
ARGUMENTS = [
    (function, name) for function in RIGHT for name in inspect.signature(getattr(fleetune_kernels, function)).parameters
]


def test_every_public_function_is_among_them() -> None:
    public = {name for name in fleetune_kernels.__all__ if inspect.isfunction(getattr(fleetune_kernels, name))}
    assert public == RIGHT.keys()


@pytest.mark.parametrize("function", RIGHT)
def test_help_has_a_line_for_every_argument(function: str) -> None:
    public: Callable[..., object] = getattr(fleetune_kernels, function)
    arguments = (inspect.getdoc(public) or "").partition("Args:\n")[2].partition("\n\n")[0]
    lines = dict(line.strip().split(": ", 1) for line in arguments.splitlines())
    parameters = inspect.signature(public).parameters
    assert list(lines) == list(parameters)
    for name, parameter in parameters.items():
        if parameter.annotation in ("torch.Tensor", "torch.Tensor | None"):
            assert re.match(r"\(.*\)", lines[name]) or "likewise" in lines[name], (name, lines[name])


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_an_object_of_another_type_is_named(function: str, name: str) -> None:
    call: Callable[..., object] = getattr(fleetune_kernels, function)
    for wrong in (object(), {1: 2}):
        with pytest.raises(ValueError, match=rf"^{name}: {type(wrong).__name__}; should be "):
            call(**{**RIGHT[function], name: wrong})


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        ("cross_entropy", {"labels": [0, 1, 2, 3]}, "labels: list; should be a tensor"),
        ("cross_entropy", {"logits": LOGITS.long()}, "logits: torch.int64; should be floating-point"),
        ("cross_entropy", {"labels": LABELS.float()}, "labels: torch.float32; should be integers"),
        ("cross_entropy", {"reduction": 1}, "reduction: int; should be text"),
        ("cross_entropy", {"num_items": "4"}, "num_items: str; should be a tensor, a number or None"),
        ("cross_entropy", {"num_items": -4}, "num_items: -4; should be 0 or more"),
        ("linear_cross_entropy", {"num_items": float("nan")}, "num_items: nan; should be 0 or more"),
        ("cross_entropy", {"return_stats": 1}, "return_stats: int; should be True or False"),
        ("cross_entropy", {"ignore_index": -100.0}, "ignore_index: float; should be a whole number"),
        ("cross_entropy", {"label_smoothing": True}, "label_smoothing: bool; should be a number"),
        ("linear_cross_entropy", {"hidden_states": HIDDEN.int()}, "hidden_states: torch.int32; should be floating-"),
        ("linear_cross_entropy", {"bias": 0.0}, "bias: float; should be a tensor or None"),
        ("distillation_loss", {"teacher_logits": [LOGITS, None]}, r"teacher_logits\[1\]: NoneType; should be a tensor"),
        ("distillation_loss", {"teacher_logits": "x"}, "teacher_logits: str; should be a tensor or a list"),
        ("distillation_loss", {"temperature": HIDDEN}, "temperature: Tensor; should be a number"),
        ("linear_distillation_loss", {"teacher_bias": [3]}, r"teacher_bias\[0\]: int; should be a tensor or None"),
        ("topk_distillation_loss", {"teacher_ids": IDS.float()}, "teacher_ids: torch.float32; should be integers"),
        ("jmmd", {"source_layers": HIDDEN}, "source_layers: Tensor; should be a list"),
        ("jmmd", {"bandwidth": ["1"]}, r"bandwidth\[0\]: str; should be a tensor, a number or None"),
        ("mmd", {"source": HIDDEN.long()}, "source: torch.int64; should be floating-point"),
        ("mmd", {"bandwidth": "1"}, "bandwidth: str; should be a tensor, a number or None"),
        ("mmd", {"group": "world"}, "group: str; should be a process group or None"),
        ("check_labels", {"labels": LABELS.float()}, "labels: torch.float32; should be integers"),
    ],
)
def test_what_people_get_wrong(function: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(fleetune_kernels, function)(**{**RIGHT[function], **given})


def test_arguments_by_place_are_looked_at_too() -> None:
    with pytest.raises(ValueError, match=r"^labels: int; should be a tensor"):
        fleetune_kernels.cross_entropy(LOGITS, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", RIGHT)
def test_what_is_right_stays_right(function: str) -> None:
    call: Callable[..., object] = getattr(fleetune_kernels, function)
    call(**RIGHT[function])
    call(*RIGHT[function].values())


def test_values_are_looked_at_on_a_cpu_alone() -> None:
    assert readable(LOGITS)
    assert not readable(LOGITS.to("meta"))
    with FakeTensorMode():
        assert not readable(torch.empty(3))
    assert torch.compile(lambda x: x + readable(x), fullgraph=True, backend="eager")(torch.zeros(1)) == 0


def test_numpys_numbers_and_parameters_are_right() -> None:
    expected = fleetune_kernels.cross_entropy(LOGITS, LABELS, label_smoothing=0.25, vocab_size=8)
    numbers: dict[str, Any] = {"label_smoothing": np.float32(0.25), "vocab_size": np.int64(8)}
    assert fleetune_kernels.cross_entropy(torch.nn.Parameter(LOGITS), LABELS, **numbers) == expected
