"""What `fleetune verify` compares, and that it sees a difference; whole verifications are the README's test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import recipe_values

from fleetune import verify
from fleetune.cluster.local import Layout
from fleetune.schema import Recipe
from fleetune.short_form import short_form

STEPS: list[dict[str, Any]] = [
    {"step": step, "train/loss": 1.0 / step, "data/order": f"{step:x}", "time/step": 0.1} for step in (1, 2, 3)
]


def make_run(folder: Path, lines: list[dict[str, Any]], model: bytes = b"weights") -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(model)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def changed(step: int, **values: Any) -> list[dict[str, Any]]:
    return [{**line, **values} if line["step"] == step else line for line in STEPS]


@pytest.mark.parametrize(
    ("lines", "model", "differs"),
    [
        (STEPS, b"weights", {}),
        (changed(2, **{"time/step": 9.0, "train/samples_per_second": 3.0}), b"weights", {}),
        (
            changed(2, **{"train/loss": 0.5000001}),
            b"weights",
            {"losses": "step 2: train/loss is 0.5 against 0.5000001"},
        ),
        (changed(3, **{"eval/loss": 0.1}), b"weights", {"losses": "step 3: eval/loss is None against 0.1"}),
        (changed(1, **{"data/order": "f"}), b"weights", {"data order": "step 1: data/order is 1 against f"}),
        (STEPS[:2], b"weights", {"losses": "steps 3 against 2"}),
        (STEPS, b"Weights", {"parameters": "the models differ"}),
    ],
)
def test_what_differs_is_named(
    tmp_path: Path, lines: list[dict[str, Any]], model: bytes, differs: dict[str, str]
) -> None:
    found = verify.same(make_run(tmp_path / "one", STEPS), make_run(tmp_path / "other", lines, model))
    assert found == {"losses": "equal", "data order": "equal", "parameters": "equal", **differs}


def test_a_step_may_be_written_in_parts_and_not_twice(tmp_path: Path) -> None:
    parts = make_run(tmp_path / "parts", [*STEPS, {"step": 3, "eval/loss": 0.1}])
    assert verify.exact_metrics(parts)[3] == {"train/loss": 1 / 3, "data/order": "3", "eval/loss": 0.1}
    with pytest.raises(ValueError, match="step 3 was logged twice"):
        verify.exact_metrics(make_run(tmp_path / "twice", [*STEPS, STEPS[2]]))


@pytest.mark.parametrize(("ranks", "size", "expected"), [(1, 16, 3), (2, 16, 4), (3, 12, 4)])
def test_the_cuts_are_of_one_global_batch(ranks: int, size: int, expected: int) -> None:
    recipe = Recipe.model_validate(recipe_values(Path("/nowhere"), "cuts", training={"global_batch_size": size}))
    cuts = verify.cuts_of(recipe, Layout(1, ranks, 1))
    assert len(set(cuts)) == len(cuts) == expected
    for cut in cuts:
        assert cut.world_size * cut.gradient_accumulation_steps * cut.micro_batch_size == cut.global_batch_size == size
    assert cuts[0].world_size == 1


def test_errors_are_relative_to_the_whole_reference() -> None:
    one = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([[4.0]], np.float32)}
    other = {"a": np.array([3.0, 0.5], np.float32), "b": np.array([[4.0]], np.float32)}
    assert verify.difference(one, one).whole == 0.0
    assert verify.difference(one, other) == verify.Difference(0.1, 0.1, "a")
    with pytest.raises(ValueError, match="of different parameters"):
        verify.difference(one, {"a": one["a"]})


def test_an_error_below_fp32_is_seen() -> None:
    assert verify.difference({"a": np.ones(1)}, {"a": np.ones(1) + 1e-13}).whole == pytest.approx(1e-13, rel=1e-2)


def test_the_short_form_changes_length_logging_and_data_for_evaluation_alone(tmp_path: Path) -> None:
    values = recipe_values(tmp_path, "long", tracking={"wandb": {"mode": "offline"}})
    values["data"]["test"] = {"path": str(tmp_path / "test.jsonl")}
    recipe = Recipe.model_validate(values)
    short = short_form(recipe, "short", tmp_path, 5, 2)
    assert (short.name, short.training.max_steps, short.training.logging_steps) == ("short", 5, 1)
    assert (short.checkpoint.save_steps, short.tracking.wandb, short.data.test) == (2, None, None)
    assert short.data.validation is not None
    assert short.data.validation.limit == 64
    assert short.data.train == recipe.data.train
    assert short.model == recipe.model
