"""Runs that are stopped on some ranks and go on with others, and with another ZeRO stage."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from ranks import Job, work_together
from safetensors.torch import load_file
from tiny import recipe_values, write_model, write_rows

from fleetune import runs, verify
from fleetune.cluster.local import Layout
from fleetune.schema import Recipe
from fleetune.train.metrics_log import read_metrics
from fleetune.train.reshard import WEIGHT, Stored

ALL = {"offload_optimizer": "cpu", "offload_param": "cpu"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 43)
    write_rows(folder / "validation.jsonl", 21, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """Each in steps of 16 examples, of which every third is short; the first evaluation, at step 2, stays the best."""

    def job(name: str, steps: int, stage: int, bf16: bool = False, **offload: str) -> Job:
        training = {"max_steps": steps, "lr_scheduler_type": "constant", "weight_decay": 0.1, "bf16": bf16}
        values = recipe_values(
            workspace,
            name,
            deepspeed={"zero_stage": stage, **offload},
            training={**training, "per_device_train_batch_size": 2},
            model={"freeze": ["bert.embeddings.word_embeddings.*"]},
            evaluation={"eval_steps": 2, "early_stopping_threshold": 10.0},
        )
        return Job(str(workspace / "runs" / name), values=values)

    work_together(
        [
            (1, [job("unbroken", 6, 0), job("growing", 2, 0), job("unbroken-bf16", 4, 2, True)]),
            (4, [job("shrinking", 2, 3)]),
            (2, [job("shrinking", 4, 1), job("growing", 6, 2, offload_optimizer="cpu"), job("bf16", 2, 2, True)]),
            (1, [job("shrinking", 6, 0), job("bf16", 4, 3, True, **ALL)]),
        ]
    )
    return workspace / "runs"


def relative(folder: Path, name: str, reference: str, key: str) -> list[float]:
    found, truth = (read_metrics(folder / run / "metrics.jsonl") for run in (name, reference))
    assert [line["step"] for line in found] == [line["step"] for line in truth]
    return [abs(one[key] - other[key]) / abs(other[key]) for one, other in zip(found, truth, strict=True)]


@pytest.mark.parametrize("name", ["shrinking", "growing"])
def test_on_other_ranks_and_stages_the_losses_are_those_of_one_never_stopped(trained: Path, name: str) -> None:
    """4 ranks of ZeRO-3, then 2 of ZeRO-1, then one without; and one without, then 2 of ZeRO-2 with offload."""
    losses, norms = (relative(trained, name, "unbroken", f"train/{key}") for key in ("loss", "grad_norm"))
    print(name, max(losses), max(norms))
    assert max(losses) < 1e-5
    assert max(norms) < 1e-5


def test_in_bf16_the_fp32_weights_are_taken_along(trained: Path) -> None:
    """What differs is how bf16 rounds, between steps that were not taken apart too: 1e-5 was seen, and 2e-3."""
    losses, norms = (relative(trained, "bf16", "unbroken-bf16", f"train/{key}") for key in ("loss", "grad_norm"))
    print(max(losses), max(norms))
    assert max(losses) < 1e-4
    assert max(norms) < 1e-2


@pytest.mark.parametrize("name", ["shrinking", "growing", "bf16"])
def test_no_example_comes_twice_and_none_is_left_out(trained: Path, name: str) -> None:
    """The hash is over all rows so far, in their order."""
    orders = [
        [line["data/order"] for line in read_metrics(trained / run / "metrics.jsonl")] for run in (name, "unbroken")
    ]
    assert orders[0] == orders[1][: len(orders[0])]


def test_the_best_checkpoint_may_be_of_a_layout_before(trained: Path) -> None:
    """That of step 2 on 4 ranks of ZeRO-3 is the model that one rank without ZeRO writes in the end: bit for bit."""
    run = runs.Run(trained / "shrinking")
    assert runs.read_json(run.eval)["best_step"] == 2
    model = load_file(run.model / "model.safetensors")
    stored = Stored(run.checkpoints / "step-00000002" / "engine", [])
    for name, tensor in model.items():
        found = torch.full((tensor.numel(),), torch.nan)
        stored.copy(name, WEIGHT, 0, found)
        assert torch.equal(found, tensor.flatten()), name


# ---------------------------------------------------------------- as a person does it


def test_the_same_command_goes_on_with_fewer_ranks_from_a_checkpoint_that_is_whole(workspace: Path) -> None:
    """The newest is damaged: it is named and not opened, and the one before is converted."""

    def start(stage: int, ranks: int) -> subprocess.Popen[str]:
        values = recipe_values(
            workspace, "typed", deepspeed={"zero_stage": stage}, checkpoint={"save_steps": 2, "save_total_limit": 3}
        )
        return verify.start(Recipe.model_validate(values | {"output_dir": str(workspace)}), Layout(1, ranks, 1))

    run = runs.Run(workspace / "typed")
    output, _ = start(3, 2).communicate(timeout=200)
    assert output.count("step  ") == 6, output
    newest = run.checkpoints / "step-00000006"
    damaged = newest / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    damaged.write_bytes(b"not" + damaged.read_bytes()[3:])
    runs.write_json(run.eval, {**runs.read_json(run.eval), "total_steps": 0})  # as if it had been killed before
    process = start(1, 1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == runs.DONE, output
    assert f"checkpoint step-00000006: engine/{damaged.name} is damaged" in output
    assert (
        "checkpoint step-00000004 is of another layout (ranks 2, now 1; ZeRO stage 3, now 1) and is converted: from "
        "here the run is the same to rounding, no more bit for bit"
    ) in output
    assert run.info()["layout"] == {"nodes": 1, "nproc_per_node": 1, "threads": 1}
    starts = [line["layout"] for line in runs.read_jsonl(run.attempts) if line["event"] == "start"]
    assert [(place["nproc_per_node"], place["zero_stage"]) for place in starts] == [(2, 3), (1, 1)]
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3, 4, 5, 6]
