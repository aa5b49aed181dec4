"""ZeRO 0 to 3 over 1, 2 and 4 ranks: the same fp32 losses, penalties and gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import make_run, train_together
from tiny import recipe_values, write_model, write_rows

from fleetune import runs
from fleetune.train.metrics_log import read_metrics

WORLD_SIZES = (1, 2, 4)
STAGES = (0, 1, 2, 3)
LOSSES = [
    {"kind": "cross_entropy", "label_smoothing": 0.1, "class_weights": [1.0, 3.0]},
    {"kind": "l1_penalty", "weight": 1e-4, "parameters": ["*.dense.weight"]},
    {"kind": "l2_penalty", "weight": 1e-3, "parameters": ["*.weight"]},
]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Logged steps by (stage, ranks): 43 rows in global batches of 16, so that every third window is short."""
    folder = tmp_path_factory.mktemp("zero")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 43)
    write_rows(folder / "validation.jsonl", 21, seed=1)
    found = {}
    for world_size in WORLD_SIZES:
        made: dict[int, runs.Run] = {}
        for stage in STAGES:
            values = recipe_values(
                folder,
                f"zero-{stage}-{world_size}",
                deepspeed={"zero_stage": stage},
                losses=LOSSES,
                data={"weight_column": "weight"},
                training={"max_grad_norm": 0.5},
            )
            values["data"] = {**recipe_values(folder, "x")["data"], "weight_column": "weight"}
            made[stage] = make_run(values, world_size)
        train_together(list(made.values()), world_size)
        found |= {(stage, world_size): read_metrics(run.metrics) for stage, run in made.items()}
    return found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_one_rank_without_zero(
    metrics: dict[tuple[int, int], Any], stage: int, world_size: int
) -> None:
    truth, found = metrics[0, 1], metrics[stage, world_size]
    assert [step["step"] for step in found] == [1, 2, 3, 4, 5, 6]
    for expected, step in zip(truth, found, strict=True):
        for key in ("train/loss", "train/cross_entropy", "train/l1_penalty", "train/l2_penalty", "train/grad_norm"):
            assert step[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (expected["step"], key)
    assert found[-1]["eval/loss"] == pytest.approx(truth[-1]["eval/loss"], rel=1e-5)


def test_penalties_are_not_zero_and_shrink_what_they_name(metrics: dict[tuple[int, int], Any]) -> None:
    for steps in metrics.values():
        assert steps[0]["train/l1_penalty"] > 0.01
        assert steps[-1]["train/l2_penalty"] < steps[0]["train/l2_penalty"]


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_losses_are_the_same_whatever_computes_them(kernels: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", 43)
    write_rows(tmp_path / "validation.jsonl", 21, seed=1)
    steps = []
    for which in ("auto", kernels):
        values = recipe_values(tmp_path, which if which != "auto" else f"beside-{kernels}", losses=LOSSES[:1])
        run = make_run(values | {"kernels": which}, 1)
        train_together([run], 1)
        steps.append(read_metrics(run.metrics))
    for expected, found in zip(*steps, strict=True):
        for key in ("train/loss", "train/cross_entropy", "train/grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5)
