"""ZeRO 0 to 3 over 1, 2 and 4 ranks: the same fp32 losses, penalties and gradient norms."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import Job, make_run, work_together
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


KERNELS = ("auto", "torch", "reference")

Metrics = dict[tuple[int, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Metrics, dict[str, list[dict[str, Any]]]]:
    """Logged steps by (stage, ranks), and by kernels with cross-entropy alone: 43 rows in global batches of 16, so that
    every third window is short."""
    folder = tmp_path_factory.mktemp("zero")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 43)
    write_rows(folder / "validation.jsonl", 21, seed=1)
    made: dict[tuple[int, int], runs.Run] = {}
    for world_size in WORLD_SIZES:
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
            made[stage, world_size] = make_run(values, world_size)
    by_kernels = {
        kernels: make_run(recipe_values(folder, kernels, losses=LOSSES[:1]) | {"kernels": kernels}, 1)
        for kernels in KERNELS
    }
    jobs = {size: [Job(str(run.path)) for (_, ranks), run in made.items() if ranks == size] for size in WORLD_SIZES}
    jobs[1] += [Job(str(run.path)) for run in by_kernels.values()]
    work_together(list(jobs.items()))
    return (
        {key: read_metrics(run.metrics) for key, run in made.items()},
        {kernels: read_metrics(run.metrics) for kernels, run in by_kernels.items()},
    )


@pytest.fixture(scope="module")
def metrics(trained: tuple[Metrics, Any]) -> Metrics:
    return trained[0]


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


@pytest.mark.parametrize("kernels", KERNELS[1:])
def test_losses_are_the_same_whatever_computes_them(kernels: str, trained: tuple[Metrics, Any]) -> None:
    for expected, found in zip(trained[1]["auto"], trained[1][kernels], strict=True):
        for key in ("train/loss", "train/cross_entropy", "train/grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5)
