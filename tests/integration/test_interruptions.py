"""Whole runs that are killed, asked to stop, hang, or find the disk full: nothing is lost, and nothing changes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import recipe_values, write_model, write_rows

from fleetune import runs, verify
from fleetune.cluster.local import Layout
from fleetune.schema import Recipe

STEPS = 16
LAYOUT = Layout(nodes=1, nproc_per_node=2, threads=1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that the random states count."""
    folder = tmp_path_factory.mktemp("interruptions")
    write_model(folder / "model", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    write_rows(folder / "train.jsonl", 90)
    write_rows(folder / "validation.jsonl", 31, seed=1)
    return folder


def recipe(workspace: Path, name: str, stage: int = 2, **sections: Any) -> Recipe:
    sections["training"] = {"max_steps": STEPS, "lr_scheduler_type": "cosine", **sections.get("training", {})}
    values = recipe_values(workspace, name, deepspeed={"zero_stage": stage}, **sections)
    return Recipe.model_validate(values | {"output_dir": str(workspace)})


def start(made: Recipe) -> subprocess.Popen[str]:
    return verify.start(made, LAYOUT)


def until(process: subprocess.Popen[str], begins: str) -> list[str]:
    """The output up to a line that begins so."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(begins):
            return lines
    raise AssertionError("\n".join(lines))


def rest(process: subprocess.Popen[str], timeout: float = 200.0) -> str:
    return process.communicate(timeout=timeout)[0]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return sorted((child for child in children if "fleetune.train" in child.cmdline()), key=lambda child: child.pid)


def last_attempt(workspace: Path, name: str) -> dict[str, Any]:
    return runs.read_jsonl(workspace / name / "attempts.jsonl")[-1]


@pytest.fixture(scope="module")
def unbroken(workspace: Path) -> tuple[Path, float, float]:
    return verify.run_unbroken(recipe(workspace, "unbroken"), LAYOUT)


def is_the_same(unbroken: tuple[Path, float, float], run: Path) -> bool:
    found = verify.same(unbroken[0], run)
    assert found == {"losses": "equal", "data order": "equal", "parameters": "equal"}
    return True


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize(("stage", "in_background", "seed"), [(2, True, 1), (3, False, 2)])
def test_a_run_that_is_killed_and_goes_on_is_the_same_run(
    workspace: Path, unbroken: tuple[Path, float, float], stage: int, in_background: bool, seed: int
) -> None:
    """The small form of `launcher/benchmarks/interruptions.py kills`; every ZeRO stage has the same fp32 losses."""
    checkpoint = {"async": in_background, "save_steps": 1}
    killed = recipe(workspace, f"killed-{seed}", stage, checkpoint=checkpoint)
    print(f"seed {seed}")
    broken = verify.run_broken(killed, LAYOUT, 2, STEPS, unbroken[1:], random.Random(seed), print)
    assert len(broken.kills) == 2
    reference = unbroken
    if stage != 2:
        reference = verify.run_unbroken(recipe(workspace, f"unbroken-{stage}", stage), LAYOUT)
    assert is_the_same(reference, broken.path)


# ---------------------------------------------------------------- stops


def test_asked_to_stop_it_saves_what_is_done_and_goes_on_as_the_same_run(
    workspace: Path, unbroken: tuple[Path, float, float]
) -> None:
    """SIGTERM to the launcher, SIGUSR2 to one rank, SIGINT to the launcher: exit 75, and no step is lost."""
    stopped = recipe(workspace, "stopped", checkpoint={"save_steps": 100})
    ways: list[tuple[int, signal.Signals, Callable[[subprocess.Popen[str]], int]]] = [
        (3, signal.SIGTERM, lambda process: process.pid),
        (7, signal.SIGUSR2, lambda process: ranks_of(process)[1].pid),
        (11, signal.SIGINT, lambda process: process.pid),
    ]
    for step, number, target in ways:
        process = start(stopped)
        until(process, f"step  {step}/")
        os.kill(target(process), number)
        output = rest(process)
        assert process.returncode == runs.SAVED, output
        assert "the same command goes on from there" in output
        end = last_attempt(workspace, "stopped")
        logged = max(line["step"] for line in runs.read_jsonl(workspace / "stopped" / "metrics.jsonl"))
        assert (end["exit_code"], end["last_step"]) == (runs.SAVED, logged)
    process = start(stopped)
    output = rest(process)
    assert process.returncode == runs.DONE, output
    assert f"resuming after step {logged}" in output
    assert is_the_same(unbroken, workspace / "stopped")


def test_asked_to_stop_while_it_evaluates_it_does_not_finish_that_first(workspace: Path) -> None:
    """The evaluation is done when the run goes on, and stands in the metrics once."""
    long = write_rows(workspace / "long.jsonl", 4000, seed=3)  # some seconds, however fast the machine
    values = {"data": {"train": {"path": str(workspace / "train.jsonl")}, "validation": {"path": str(long)}}}
    made = recipe(workspace, "evaluating", **values, evaluation={"per_device_eval_batch_size": 1, "eval_steps": 2})
    made = made.model_copy(update={"training": made.training.model_copy(update={"max_steps": 3})})
    process = start(made)
    until(process, "step  2/")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output = rest(process)
    assert (process.returncode, "eval  2/" in output) == (runs.SAVED, False), output
    process = start(made)
    output = rest(process)
    assert process.returncode == runs.DONE, output
    assert output.index("eval  2/") < output.index("step  3/")
    evaluated = [
        line["step"] for line in runs.read_jsonl(workspace / "evaluating" / "metrics.jsonl") if "eval/loss" in line
    ]
    assert evaluated == [2, 3]


def test_asked_to_stop_before_it_began_it_leaves_at_once(workspace: Path) -> None:
    process = start(recipe(workspace, "early"))
    until(process, "preparing")
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    output = rest(process)
    assert process.returncode == runs.SAVED, output
    assert time.monotonic() - begun < 5
    assert "the same command goes on" in output
    assert not (workspace / "early").exists()


def test_a_second_ctrl_c_stops_at_once(workspace: Path) -> None:
    process = start(recipe(workspace, "impatient", training={"max_steps": 1000}))
    until(process, "step  2/")
    ranks = ranks_of(process)
    ranks[0].suspend()  # so that the first cannot be obeyed
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    begun = time.monotonic()
    output = rest(process)
    assert process.returncode == 130, output
    assert time.monotonic() - begun < 5
    assert not any(rank.is_running() for rank in ranks)
    assert last_attempt(workspace, "impatient")["exit_code"] == 130


# ---------------------------------------------------------------- hangs


def test_a_rank_that_is_stopped_is_found_and_named_and_the_run_fails_ready_to_go_on(workspace: Path) -> None:
    made = recipe(workspace, "hanging", training={"max_steps": 1000, "hang_timeout": 5.0}, checkpoint={"save_steps": 3})
    process = start(made)
    until(process, "step  4/")  # past a save, and before the next
    ranks = ranks_of(process)
    ranks[1].suspend()
    output = rest(process)
    assert process.returncode == runs.FAILED, output
    assert "the ranks hang in their step" in output
    assert "rank 1 is stopped" in output
    assert re.search(r"rank 0 is at \S+:\d+ in \w+", output)
    stacks = (workspace / "hanging" / "logs" / "attempt-1" / "rank-0.log").read_text(encoding="utf-8")
    assert "most recent call first" in stacks
    assert "loop.py" in stacks
    assert not any(rank.is_running() for rank in ranks)
    assert list((workspace / "hanging" / "checkpoints").glob("step-*/MANIFEST.json"))


# ---------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MB, a checkpoint being 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)]
    if (
        os.getuid() != 0
        or not shutil.which("mount")
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("a file system of its own cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def on(disk: Path, made: Recipe) -> Recipe:
    return made.model_copy(update={"output_dir": str(disk)})


def fill(disk: Path, process: subprocess.Popen[str]) -> Path:
    """With the ranks asleep, which else may be writing."""
    ballast, ranks = disk / "ballast", ranks_of(process)
    for rank in ranks:
        rank.suspend()
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    for rank in ranks:
        rank.resume()
    return ballast


LATE: dict[str, Any] = {"evaluation": {"eval_steps": STEPS}}  # the last step is the best, whose save does not fail


@pytest.fixture(scope="module")
def unbroken_late(workspace: Path) -> tuple[Path, float, float]:
    return verify.run_unbroken(recipe(workspace, "unbroken-late", **LATE), LAYOUT)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_leaves_the_old_checkpoints_and_training_goes_on(
    workspace: Path, small_disk: Path, unbroken_late: tuple[Path, float, float], in_background: bool
) -> None:
    """Freed before the third save in a row fails, nothing is missing at the end."""
    made = on(small_disk, recipe(workspace, "full", checkpoint={"save_steps": 4, "async": in_background}, **LATE))
    process = start(made)
    until(process, "step  7/")
    ballast = fill(small_disk, process)
    lines = until(process, "checkpoint of step")
    assert "could not be written: No space left on device" in lines[-1]
    kept = list((small_disk / "full" / "checkpoints").glob("step-*/MANIFEST.json"))
    assert [path.parent.name for path in kept] == ["step-00000004"]
    ballast.unlink()
    output = rest(process)
    assert process.returncode == runs.DONE, output
    assert is_the_same(unbroken_late, small_disk / "full")


def test_after_three_saves_that_failed_the_run_does(workspace: Path, small_disk: Path) -> None:
    made = on(small_disk, recipe(workspace, "fuller", training={"max_steps": 1000}, checkpoint={"save_steps": 2}))
    process = start(made)
    until(process, "step  3/")
    fill(small_disk, process)
    output = rest(process)
    assert process.returncode == runs.FAILED, output
    assert output.count("could not be written") == 2
    assert "cannot be written: No space left on device" in output
    steps = [path.name for path in (small_disk / "fuller" / "checkpoints").iterdir()]
    assert steps == ["step-00000002"]


# ---------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    workspace: Path, unbroken: tuple[Path, float, float]
) -> None:
    whole = recipe(workspace, "damaged", checkpoint={"save_steps": 3})
    process = start(whole)
    until(process, "step  9/")
    process.send_signal(signal.SIGTERM)
    rest(process)
    newest = max((workspace / "damaged" / "checkpoints").glob("step-*"))
    file = newest / "engine" / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    process = start(whole)
    output = rest(process)
    assert process.returncode == runs.DONE, output
    assert f"checkpoint {newest.name}: engine/{file.name} is damaged" in output
    assert re.search(r"checkpoint step-0000000\d is used", output)
    assert is_the_same(unbroken, workspace / "damaged")


def test_another_global_batch_and_other_data_are_refused(workspace: Path, unbroken: tuple[Path, float, float]) -> None:
    """What would not be the same run is an error before anything starts; tests/test_runs.py has each by itself."""
    attempts = (unbroken[0] / "attempts.jsonl").read_bytes()
    rows = (workspace / "train.jsonl").read_text(encoding="utf-8")
    (workspace / "train.jsonl").write_text(rows.replace("good", "better", 1), encoding="utf-8")
    command = [sys.executable, "-m", "fleetune.cli", "run", str(workspace / "unbroken.yaml"), "training.max_steps=20"]
    command += ["training.global_batch_size=8"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    finally:
        (workspace / "train.jsonl").write_text(rows, encoding="utf-8")
    assert done.returncode == runs.WRONG, done.stdout + done.stderr
    for said in ("8 examples a step", "the run's steps are of 16", "the data are not those"):
        assert said in done.stderr
    assert (unbroken[0] / "attempts.jsonl").read_bytes() == attempts
