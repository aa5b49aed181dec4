"""`fleetune sync`: what nodes without internet wrote is sent from elsewhere, while they write it: each step once."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import recipe_values
from wandb_server import Server, serving, wandb_environment, without_wandb

from fleetune import runs
from fleetune.train.metrics_log import MetricsLog
from fleetune.train.tracking import start_feeder, stop_feeder


class Training:
    """A run on a node that does not reach the server: its log, its lease, and its feeder, all real but the training."""

    def __init__(self, path: Path) -> None:
        self.run = runs.Run(path)
        path.mkdir()
        values = recipe_values(path, path.name, tracking={"wandb": {"project": "p"}})
        self.run.recipe_file.write_text(yaml.safe_dump(values), encoding="utf-8")
        runs.write_json(path / "run.json", {"id": path.name, "name": path.name})
        self.lease: Any = None

    def hold(self) -> None:
        """As an attempt does that has not come to training yet."""
        self.lease = runs.lease(self.run)
        self.lease.__enter__()

    def write(self, *steps: int) -> None:
        for step in steps:
            self.log.write(step, {"train/loss": step / 2})

    def begin(self, resume_step: int = 0, mode: Any = "offline") -> None:
        if self.lease is None:
            self.hold()
        self.log = MetricsLog(self.run.metrics, resume_step)
        name = self.run.path.name
        feeder = start_feeder(
            self.run.path,
            run_id=name,
            project="p",
            entity=None,
            mode=mode,
            name=name,
            tags=[],
            config_path=self.run.recipe_file,
            log_path=self.run.path / "logs" / "wandb.log",
        )
        assert feeder is not None
        self.feeder = feeder

    def end(self, finished: bool = True) -> None:
        if finished:
            (self.run.path / "eval.json").write_text('{"step": 1, "test": {"accuracy": 0.5}}', encoding="utf-8")
        stop_feeder(self.feeder, self.run.path, finished=finished)
        self.log.close()
        self.lease.__exit__(None, None, None)
        self.lease = None

    def kill(self) -> None:
        """The node dies: no file is closed, the lease goes stale."""
        os.killpg(self.feeder.pid, signal.SIGKILL)
        self.feeder.wait()
        self.log.close()
        held = runs.read_json(self.run.path / "lease.json")
        runs.write_json(self.run.path / "lease.json", held | {"host": "a dead node", "time": 0.0})


class Sync:
    """`fleetune sync` in the background, and what it says."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-m", "fleetune.cli", "sync", *words]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))

    def said(self) -> str:
        while not self._queue.empty():
            self.lines.append(self._queue.get())
        return "\n".join(self.lines)

    def end(self, seconds: float = 60.0) -> int:
        code = self.process.wait(seconds)
        time.sleep(0.1)
        return code


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, said: Callable[[], str] = str) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"waited in vain\n{said()}"
        time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    environment = without_wandb(os.environ)
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    with serving() as server:
        for name, value in wandb_environment(server.url, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def begun() -> Iterator[list[Sync]]:
    processes: list[Sync] = []
    yield processes
    for sync in processes:
        sync.process.kill()


def test_a_run_is_sent_while_it_is_written_over_kills_and_resumes(
    tmp_path: Path, server: Server, begun: list[Sync]
) -> None:
    training = Training(tmp_path / "one")
    training.begin()
    training.write(1, 2, 3)
    begun.append(sync := Sync("--watch", str(training.run.path)))
    wait_for(lambda: server.steps() == [1, 2], said=sync.said)
    training.write(4, 5, 6, 7, 8)
    wait_for(lambda: server.steps() == [1, 2, 3, 4, 5, 6, 7], said=sync.said)
    # It stops, and is taken up before the watch has looked; metrics.jsonl is cut back to a checkpoint behind what the
    # server has, and grows past it.
    training.end(finished=False)
    training.begin(resume_step=4)
    training.write(5, 6)
    time.sleep(4)
    training.write(7, 8, 9, 10)
    wait_for(lambda: server.steps() == list(range(1, 10)), said=sync.said)
    assert server.exit_codes == {}
    training.end()
    assert sync.end() == 0, sync.said()
    assert server.steps() == list(range(1, 11))
    assert [row["train/loss"] for row in server.history] == [step / 2 for step in range(1, 11)]
    assert server.summary["eval/test/accuracy"] == 0.5
    assert server.exit_codes == {"one": 0}
    assert sync.said().splitlines() == [
        f"wandb: one: {server.url}/e/p/runs/one",
        "wandb: one: all sent, up to step 10",
    ]
    assert runs.wandb_url(training.run) == f"{server.url}/e/p/runs/one"


def test_several_runs_each_to_its_end_and_one_that_has_not_begun(
    tmp_path: Path, server: Server, begun: list[Sync]
) -> None:
    first, second, late = (Training(tmp_path / name) for name in ("first", "second", "late"))
    for training in (first, second):
        training.begin()
        training.write(1, 2, 3)
    late.hold()
    begun.append(sync := Sync("--watch", *(str(t.run.path) for t in (first, second, late))))
    wait_for(lambda: server.steps("first") == server.steps("second") == [1, 2], said=sync.said)
    for child in psutil.Process(sync.process.pid).children(recursive=True):
        if child.name().startswith("wandb"):  # wandb's own service: all that it has open breaks
            child.kill()
    first.write(4)
    second.write(4)
    wait_for(lambda: server.steps("first") == server.steps("second") == [1, 2, 3], said=sync.said)
    first.end()
    second.kill()
    late.begin()
    late.write(1, 2)
    late.end()
    assert sync.end() == 0, sync.said()
    assert server.steps("late") == [1, 2]
    assert server.steps("first") == server.steps("second") == [1, 2, 3, 4]
    assert (server.exit_codes["first"], server.exit_codes["second"]) == (0, 1)


def test_a_server_that_does_not_answer_is_said_once_and_tried_again(
    tmp_path: Path, server: Server, begun: list[Sync]
) -> None:
    training = Training(tmp_path / "one")
    training.begin()
    training.write(1, 2)
    begun.append(sync := Sync("--watch", str(training.run.path)))
    wait_for(lambda: server.steps() == [1], said=sync.said)
    server.answering.clear()
    training.write(3, 4)
    training.end()
    said = f"wandb: no answer from {server.url} in 4 s; trying again until it works"
    wait_for(lambda: said in sync.said())
    time.sleep(11)  # it tries again
    server.answering.set()
    assert sync.end(120) == 0, sync.said()
    assert server.steps() == [1, 2, 3, 4]
    assert sync.said().count("trying again") == 1


def test_ctrl_c_ends_it_and_the_next_one_goes_on(tmp_path: Path, server: Server, begun: list[Sync]) -> None:
    training = Training(tmp_path / "one")
    training.begin()
    training.write(1, 2, 3)
    begun.append(sync := Sync("--watch", str(training.run.path)))
    wait_for(lambda: server.steps() == [1, 2], said=sync.said)
    sync.process.send_signal(signal.SIGINT)
    assert sync.end(20) == runs.SAVED
    assert sync.said().endswith("stopped; the same command goes on")
    assert server.exit_codes == {}  # it goes on, and is not shown as failed
    training.write(4)
    begun.append(once := Sync(str(training.run.path)))
    assert once.end() == 0
    assert once.said().endswith("wandb: one: sent, up to step 3")
    training.end()
    begun.append(last := Sync(str(training.run.path)))
    assert last.end() == 0
    assert server.steps() == [1, 2, 3, 4]
    assert server.exit_codes == {"one": 0}


def test_a_run_that_sends_by_itself_is_left_to_it(tmp_path: Path, server: Server, begun: list[Sync]) -> None:
    training = Training(tmp_path / "one")
    training.begin(mode="auto")
    training.write(1, 2, 3)
    wait_for(lambda: server.steps() == [1, 2])
    begun.append(sync := Sync("--watch", str(training.run.path)))
    wait_for(sync.said)
    assert sync.said() == "wandb: one: another process is sending this run; trying again until it works"
    training.write(4)
    training.end()
    assert sync.end() == 0, sync.said()
    assert server.steps() == [1, 2, 3, 4]


def test_what_the_server_says_late_is_not_sent_again(tmp_path: Path, server: Server) -> None:
    """Right after a run was closed, wandb's server may still show an earlier last step."""
    training = Training(tmp_path / "one")
    training.begin()
    training.write(1, 2, 3)
    training.end()
    once = Sync(str(training.run.path))
    assert once.end() == 0, once.said()
    graphql = server.graphql

    def late(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        reply = graphql(operation, variables)
        if operation == "RunResumeStatus":
            bucket = reply["model"]["bucket"]
            bucket |= {"summaryMetrics": '{"_step": 1}', "historyTail": '["{\\"_step\\": 1}"]'}
        return reply

    server.graphql = late  # type: ignore[method-assign]
    again = Sync(str(training.run.path))
    assert again.end() == 0, again.said()
    assert server.steps() == [1, 2, 3]
    # but a server that does not know the run gets all of it
    server.histories.clear()
    server.graphql = graphql  # type: ignore[method-assign]
    anew = Sync(str(training.run.path))
    assert anew.end() == 0, anew.said()
    assert server.steps() == [1, 2, 3]


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_a_folder_that_was_not_tracked_is_refused(tmp_path: Path, watch: list[str]) -> None:
    training = Training(tmp_path / "one")
    values = yaml.safe_load(training.run.recipe_file.read_text(encoding="utf-8"))
    training.run.recipe_file.write_text(yaml.safe_dump(values | {"tracking": {"wandb": None}}), encoding="utf-8")
    sync = Sync(*watch, str(training.run.path))
    assert sync.end() == 2
    assert sync.said().startswith(f"error: {training.run.path}: is ")
    shutil.rmtree(training.run.path)
    gone = Sync(*watch, str(training.run.path))
    assert gone.end() == 2
    assert "wandb/feeder.json" in gone.said()
