"""Tracking never harms training: whole runs whose wandb cannot be reached, falls silent, or is killed with them.

launcher/benchmarks/wandb_outages.py measures the same on a real model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import recipe_values, write_model, write_rows
from wandb_server import (
    Server,
    black_hole,
    refusing,
    send_as_told,
    serving,
    sync,
    wandb_environment,
    without_wandb,
)

from fleetune import runs
from fleetune.train.metrics_log import read_metrics

STEPS = 40
ALL = list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", 160)
    write_rows(folder / "validation.jsonl", 16, seed=1)
    return folder


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


class Attempt:
    """`fleetune run` of a recipe, in the background."""

    def __init__(self, workspace: Path, name: str, url: str) -> None:
        values: dict[str, Any] = recipe_values(
            workspace,
            name,
            training={"max_steps": STEPS, "global_batch_size": 4},
            evaluation={"eval_steps": STEPS},
            checkpoint={"save_steps": 5},
            deepspeed={"zero_stage": 0},
            tracking={"wandb": {"project": "p"}},
        )
        recipe = workspace / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        self.run = runs.Run(workspace / "runs" / name)
        self.environment = {
            **without_wandb(os.environ),
            **wandb_environment(url, workspace / "home"),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fleetune.cli", "run", str(recipe)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def steps(self) -> list[int]:
        return [line["step"] for line in read_metrics(self.run.metrics)] if self.run.metrics.exists() else []

    def rank(self) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.cmdline()[1:3] == ["-m", "fleetune.train"]:
                return child
        raise AssertionError("no rank is there")

    def pause_after(self, step: int, condition: Callable[[], Any]) -> psutil.Process:
        """Stops the rank after a step until the condition holds: training is faster than wandb's start here."""
        wait_for(lambda: step in self.steps() or self.process.poll() is not None, 90.0)
        rank = self.rank()
        rank.suspend()
        wait_for(condition, 30.0)
        return rank

    def end(self) -> tuple[int, str]:
        output = self.process.communicate(timeout=120)[0]
        return self.process.returncode, output

    def ends_well(self) -> str:
        """It is done, every step is in metrics.jsonl once, and it did not wait for wandb: returns what it said."""
        code, output = self.end()
        assert code == 0, output[-4000:]
        assert self.run.attempts.stat().st_mtime - self.run.eval.stat().st_mtime < 10
        assert [line["step"] for line in runs.read_jsonl(self.run.metrics) if "train/loss" in line] == ALL
        assert "eval/accuracy" in read_metrics(self.run.metrics)[-1]
        return output


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def test_a_run_whose_server_cannot_be_reached_ends_in_time_and_can_be_sent(workspace: Path) -> None:
    with refusing() as refused, black_hole() as hole:  # both at a time, as most of it is starting Python
        attempts = [Attempt(workspace, "refused", refused), Attempt(workspace, "black-holed", hole)]
        outputs = [attempt.ends_well() for attempt in attempts]
    for attempt, output in zip(attempts, outputs, strict=True):
        assert "wandb: offline (" in output
        with serving() as server:
            told = send_as_told(output, attempt.environment | wandb_environment(server.url, workspace / "home"))
            assert told == f"fleetune sync {attempt.run.path}"
            assert server.steps() == ALL


def test_a_run_whose_server_falls_silent_ends_in_time_and_can_be_sent(workspace: Path, server: Server) -> None:
    attempt = Attempt(workspace, "silent", server.url)
    rank = attempt.pause_after(12, lambda: 10 in server.steps())
    server.answering.clear()
    rank.resume()
    output = attempt.ends_well()
    assert "not everything was sent" in output
    assert max(server.steps()) < STEPS
    server.answering.set()
    assert send_as_told(output, attempt.environment) == f"fleetune sync {attempt.run.path}"
    sync(attempt.run.path, attempt.environment)
    assert server.steps() == ALL


def test_through_kills_and_resumes_every_step_is_logged_once(workspace: Path, server: Server) -> None:
    """First the rank alone is killed, then with its feeder; each time past a checkpoint, so that steps come again."""
    for step, feeder_too in ((12, False), (27, True)):
        attempt = Attempt(workspace, "killed", server.url)
        # The feeder holds a step back until the next one begins.
        rank = attempt.pause_after(step, lambda step=step: step - 1 in server.steps())
        feeders = rank.children()
        rank.send_signal(signal.SIGKILL)
        if feeder_too:
            for feeder in feeders:
                os.killpg(feeder.pid, signal.SIGKILL)
        code, output = attempt.end()
        assert code == runs.FAILED, output[-4000:]
        assert server.steps() == list(range(1, max(server.steps()) + 1))
    attempt = Attempt(workspace, "killed", server.url)
    output = attempt.ends_well()
    assert "resuming after step" in output
    assert server.steps() == ALL
    losses = {line["step"]: line["train/loss"] for line in read_metrics(attempt.run.metrics)}
    assert {row["_step"]: row["train/loss"] for row in server.history} == pytest.approx(losses)
    assert "No runs to sync" in sync(attempt.run.path, attempt.environment)
