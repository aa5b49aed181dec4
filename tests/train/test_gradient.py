"""Gradients in files: what is refused, what a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import make_run
from safetensors import safe_open
from tiny import recipe_values

from fleetune.schema import RecipeError
from fleetune.train.batches import compose_epoch
from fleetune.train.distributed import World
from fleetune.train.gradient import Gradient, batch_gradient, batch_of, save_gradient
from fleetune.train.setup import Epoch

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"deepspeed": {"zero_stage": 1}}, "zero_stage = 1"),
        ({"deepspeed": {"zero_stage": 3}}, "zero_stage = 3"),
        ({"deepspeed": {"zero_stage": 0}, "training": {"bf16": True}}, "training.bf16"),
        ({"deepspeed": {"zero_stage": 2}, "training": {"fp16": True}}, "training.fp16"),
    ],
)
def test_a_precision_that_would_not_hold_is_refused(tmp_path: Path, sections: dict[str, Any], named: str) -> None:
    run = make_run(recipe_values(tmp_path, "run", **sections), 1)
    with pytest.raises(RecipeError, match=named):
        batch_gradient(run, WORLD, float64=True)


EPOCH = Epoch(compose_epoch(np.arange(10), 4, seed=0, epoch=0), None, None)


@pytest.mark.parametrize(("batch", "rows"), [(0, 4), (2, 2), (-1, 2), (-3, 4)])
def test_a_batch_is_counted_from_the_first_or_the_last(batch: int, rows: int) -> None:
    assert len(batch_of(EPOCH, batch)) == rows


@pytest.mark.parametrize("batch", [3, -4])
def test_a_batch_that_is_not_there_is_an_error(batch: int) -> None:
    with pytest.raises(RecipeError, match=f"--batch {batch}: the epoch has 3 batches"):
        batch_of(EPOCH, batch)


def test_a_file_holds_tensors_losses_and_rows(tmp_path: Path) -> None:
    gradient = Gradient({"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.float64)}, {"mse": 0.1}, [3, 1])
    save_gradient(gradient, tmp_path / "g.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["g.safetensors"]
    with safe_open(tmp_path / "g.safetensors", "pt") as file:
        assert {name: json.loads(text) for name, text in file.metadata().items()} == {
            "losses": {"mse": 0.1},
            "rows": [3, 1],
        }
        assert sorted(file.keys()) == ["a", "b"]
        assert file.get_tensor("b").dtype == torch.float64
