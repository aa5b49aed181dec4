"""metrics.jsonl holds everything; Weights & Biases gets each step once; training waits for nothing and nobody."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from wandb_server import KEY, Server, black_hole, refusing, serving, sync, wandb_environment

from fleetune.train.metrics_log import SHIFT, SHIFT_PICTURE, MetricsLog, read_metrics
from fleetune.train.tracking import start_feeder, status, stop_feeder
from fleetune.train.wandb_run import logged_steps, wandb_logs

# --- metrics.jsonl ---


def test_the_lines_of_a_step_are_merged(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    log.write(10, {"train/loss": 0.5})
    log.write(10, {"eval/accuracy": 0.75})
    log.write(20, {"train/loss": 0.25})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 10, "train/loss": 0.5, "eval/accuracy": 0.75},
        {"step": 20, "train/loss": 0.25},
    ]


def test_a_line_is_json_even_when_a_value_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    log.write(1, {"loss": math.nan, "norm": math.inf, "tokens": 3, "note": "é\u2028", "none": None})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "norm": None, "tokens": 3, "note": "é\u2028", "none": None}
    ]


def test_a_resumed_run_drops_what_it_computes_again_and_what_a_kill_has_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 2, "b": 4}\n{"step')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    MetricsLog(path, resume_step=2).write(3, {"a": 5})
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "b": 4}\n{"step": 3, "a": 5}\n'


def test_an_evaluation_that_is_done_again_is_dropped(tmp_path: Path) -> None:
    """A run that was stopped before the evaluation of step 2, went on, evaluated, and was killed before it saved."""
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    for step, values in ((1, {"loss": 1.0}), (1, {"eval/loss": 1.1}), (2, {"loss": 2.0}), (2, {"eval/loss": 2.1})):
        log.write(step, values)
    log.close()
    MetricsLog(tmp_path / "metrics.jsonl", resume_step=2, evaluated_step=2).close()
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 2.0, "eval/loss": 2.1}
    MetricsLog(tmp_path / "metrics.jsonl", resume_step=2, evaluated_step=1).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0, "eval/loss": 1.1},
        {"step": 2, "loss": 2.0},
    ]


def test_training_imports_neither_torch_nor_wandb_with_it() -> None:
    code = "import sys, fleetune.train.tracking; sys.exit(bool({'torch', 'wandb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "launcher"}).returncode == 0


# --- The feeder ---


class Run:
    """A run folder with metrics in it, and the feeder's life in one call each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        (path / "recipe.yaml").write_text("name: tiny\ntraining: {seed: 7}\n")
        self.log = MetricsLog(path / "metrics.jsonl", resume_step=0)

    def write(self, *steps: int) -> None:
        for step in steps:
            self.log.write(step, {"loss": step / 2})

    def resume(self, step: int) -> None:
        self.log.close()
        self.log = MetricsLog(self.path / "metrics.jsonl", resume_step=step)

    def start(self, mode: Any = "auto", init_timeout: float = 15.0) -> "subprocess.Popen[bytes]":
        feeder = start_feeder(
            self.path,
            run_id="abc",
            project="p",
            entity=None,
            mode=mode,
            name="tiny",
            tags=["t"],
            config_path=self.path / "recipe.yaml",
            log_path=self.path / "logs" / "wandb.log",
            init_timeout=init_timeout,
        )
        assert feeder is not None
        return feeder

    def stop(self, feeder: "subprocess.Popen[bytes]", timeout: float = 10.0, finished: bool = True) -> str | None:
        return stop_feeder(feeder, self.path, timeout, finished)

    def once(self, mode: str = "auto", init_timeout: float = 15.0) -> str:
        line = self.stop(self.start(mode, init_timeout), 30.0)
        assert line is not None, (self.path / "logs" / "wandb.log").read_text()
        return line

    def logged(self) -> list[int]:
        """The steps in all of wandb's logs, in the order of their start."""
        logs = sorted(wandb_logs(self.path), key=lambda log: log.parent.name.partition("run-")[2])
        return [step for log in logs for step in logged_steps(log)]


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """With a home that knows no key, and a server's address where nothing listens."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with refusing() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        yield Run(tmp_path / "run")


def test_without_a_key_every_step_is_logged_offline_once(run: Run) -> None:
    feeder = run.start()
    assert feeder.stdin is not None
    os.dup(feeder.stdin.fileno())  # as a forked data loader worker does
    run.write(10, 20)
    run.log.write(20, {"eval/accuracy": 0.75})
    run.write(30)
    wait_for(lambda: status(run.path))
    (run.path / "eval.json").write_text('{"step": 30, "test": {"accuracy": 0.8}}')
    line = run.stop(feeder)
    assert line == f"wandb: offline (no API key); send it later with: fleetune sync {run.path}"
    assert feeder.returncode == 0
    assert run.logged() == [10, 20, 30]


def test_a_malformed_key_means_offline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert run.once().startswith("wandb: offline (WANDB_API_KEY invalid: API key must have 40+ characters")


def test_a_server_that_refuses_is_left_alone_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run.write(1, 2)
    start = time.monotonic()
    assert "Connection refused" in run.once()
    assert time.monotonic() - start < 8
    assert run.logged() == [1, 2]
    # and the key stands in no file
    assert not [path for path in run.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@contextlib.contextmanager
def unheard() -> Iterator[str]:
    """Connects complete, and nothing follows."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@pytest.mark.parametrize(("mode", "address"), [("auto", black_hole), ("online", unheard)])
def test_a_server_that_never_answers_is_given_up(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str, address: Callable[[], AbstractContextManager[str]]
) -> None:
    with address() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run.write(1, 2)
        start = time.monotonic()
        assert run.once(mode, init_timeout=2.0).startswith("wandb: offline (")
    assert time.monotonic() - start < 12
    assert run.logged() == [1, 2]
    assert [log.parent.name.startswith("offline") for log in wandb_logs(run.path)] == [True]


def test_wandb_mode_is_obeyed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments: dict[str, Any] = {"run_id": "a", "project": None, "entity": None, "name": None, "tags": []}
    paths = {"config_path": run.path / "recipe.yaml", "log_path": run.path / "log"}
    assert start_feeder(run.path, mode="auto", **arguments, **paths) is None


def test_a_killed_feeder_loses_and_repeats_nothing(run: Run) -> None:
    feeder = run.start("offline")
    run.write(*range(0, 2000, 10))  # several blocks of the log
    wait_for(lambda: len(run.logged()) > 50)
    run.write(*range(2000, 3000, 10))
    time.sleep(0.6)  # now some are fed that wandb has not written yet
    os.killpg(feeder.pid, signal.SIGKILL)
    feeder.wait()
    run.write(3000)
    run.once("offline")
    assert run.logged() == list(range(0, 3010, 10))


def test_the_feeder_finishes_by_itself_when_training_dies(run: Run) -> None:
    training = f"""
import os, sys, time
from pathlib import Path
from fleetune.train import tracking
run = Path({str(run.path)!r})
feeder = tracking.start_feeder(run, run_id="abc", project="p", entity=None, mode="offline", name=None, tags=[],
                               config_path=run / "recipe.yaml", log_path=run / "log")
print(feeder.pid, flush=True)
if os.fork() == 0:  # a data loader worker, which inherits the pipe and outlives us for a while
    os.close(1)
    time.sleep(10)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": "launcher"}
    with subprocess.Popen([sys.executable, "-c", training], stdout=subprocess.PIPE, env=environment) as trainer:
        assert trainer.stdout is not None
        feeder = int(trainer.stdout.readline())
        run.write(1, 2, 3)
        wait_for(lambda: status(run.path))
        trainer.kill()
    wait_for(lambda: run.logged() == [1, 2, 3])
    wait_for(lambda: not is_alive(feeder))


def test_a_feeder_that_hangs_is_killed(run: Run) -> None:
    feeder = run.start("offline")
    run.write(1)
    wait_for(lambda: status(run.path))
    os.kill(feeder.pid, signal.SIGSTOP)
    start = time.monotonic()
    line = run.stop(feeder, timeout=0.5)
    assert time.monotonic() - start < 2
    assert line is not None
    assert "fleetune sync" in line


def test_the_signals_of_training_do_not_end_it(run: Run) -> None:
    feeder = run.start("offline")
    run.write(1)
    wait_for(lambda: status(run.path))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(feeder.pid, number)
    # wandb's own service does not ignore SIGTERM.
    subprocess.run(["pkill", "-TERM", "-P", str(feeder.pid), "wandb-core"], check=True)
    run.write(2, 3)
    run.stop(feeder)
    assert run.logged() == [1, 2, 3]


# --- A server ---


@pytest.fixture
def server(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as server:
        for name, value in wandb_environment(server.url, run.path.parent / "home").items():
            monkeypatch.setenv(name, value)
        yield server


def test_online_the_server_has_every_step_and_the_summary(run: Run, server: Server) -> None:
    feeder = run.start()
    run.write(10, 20)
    run.log.write(20, {"eval/accuracy": 0.75})
    (run.path / "eval.json").write_text('{"step": 20, "test": {"accuracy": 0.8}}')
    assert run.stop(feeder) == f"wandb: {server.url}/e/p/runs/abc"
    assert [(row["_step"], row["loss"], row.get("eval/accuracy")) for row in server.history] == [
        (10, 5.0, None),
        (20, 10.0, 0.75),
    ]
    assert server.summary["eval/test/accuracy"] == 0.8
    assert "No runs to sync" in sync(run.path)


def test_offline_attempts_are_one_run_once_they_are_sent(run: Run, server: Server) -> None:
    run.write(10, 20, 30)
    run.once("offline")
    run.resume(10)
    run.write(20, 30, 40)  # two steps are computed again
    run.once("offline")
    sync(run.path)
    assert server.steps() == [10, 20, 30, 40]
    assert [row["loss"] for row in server.history] == [5.0, 10.0, 15.0, 20.0]


def test_the_last_step_of_a_stopped_attempt_waits_for_what_the_next_one_adds(run: Run, server: Server) -> None:
    """As the evaluation that the stop came before; a step that wandb has takes nothing more."""
    run.write(10, 20)
    run.stop(run.start(), finished=False)
    assert server.steps() == [10]
    run.resume(20)
    run.log.write(20, {"eval/accuracy": 0.75})
    run.write(30)
    run.once()
    assert [(row["_step"], row["loss"], row.get("eval/accuracy")) for row in server.history] == [
        (10, 5.0, None),
        (20, 10.0, 0.75),
        (30, 15.0, None),
    ]


def test_numbers_are_sent_and_no_text(run: Run, server: Server) -> None:
    """The order of the data is a hash, for `fleetune verify` and no chart."""
    run.log.write(10, {"loss": 5.0, "data/order": "0f"})
    run.once()
    assert [row.keys() & {"loss", "data/order"} for row in server.history] == [{"loss"}]


def draw(run: Run) -> None:
    import base64

    (run.path / SHIFT_PICTURE).parent.mkdir()
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
    (run.path / SHIFT_PICTURE).write_bytes(base64.b64decode(pixel))
    (run.path / "eval.json").write_text('{"shift": {"dvd": {"after": {"mmd": 0.25, "p_value": 0.001}}}}')


def test_the_picture_of_the_domains_is_sent_with_the_last_step(run: Run, server: Server) -> None:
    run.write(10, 20)
    draw(run)
    run.log.write(20, {SHIFT: SHIFT_PICTURE})
    run.once()
    assert [row["_step"] for row in server.history] == [10, 20]
    assert server.history[1][SHIFT]["_type"] == "image-file"
    assert server.summary[SHIFT]["_type"] == "image-file"
    assert server.summary["eval/shift/dvd/after/mmd"] == 0.25


def test_a_picture_whose_step_went_out_before_a_kill_stands_in_the_summary(run: Run, server: Server) -> None:
    run.write(10, 20)
    run.once()
    draw(run)
    run.resume(20)
    run.log.write(20, {SHIFT: SHIFT_PICTURE})
    run.once()
    assert server.steps() == [10, 20]
    assert SHIFT not in server.history[1]
    assert server.summary[SHIFT]["_type"] == "image-file"


def test_a_picture_that_is_gone_is_no_error(run: Run, server: Server) -> None:
    run.log.write(10, {"loss": 5.0, SHIFT: SHIFT_PICTURE})
    run.once()
    assert [row.keys() & {"loss", SHIFT} for row in server.history] == [{"loss"}]


def send(run: Path) -> str:
    """What the line tells the user to do once the run was online."""
    command = [sys.executable, "-m", "fleetune.cli", "sync", str(run)]
    environment = os.environ | {"PYTHONPATH": "launcher"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def send_line(run: Run) -> str:
    return f"send it later with: fleetune sync {run.path}"


def test_what_a_killed_attempt_did_not_send_the_next_one_does(run: Run, server: Server) -> None:
    run.write(10, 20)
    feeder = run.start()
    wait_for(lambda: server.steps() == [10])
    server.answering.clear()
    run.write(30)
    os.killpg(feeder.pid, signal.SIGKILL)
    line = run.stop(feeder)
    assert line == f"wandb: stopped before all was sent; {send_line(run)}"
    server.answering.set()
    run.write(40)
    run.once()
    assert server.steps() == [10, 20, 30, 40]
    assert "No runs to sync" in sync(run.path)


def test_a_server_that_falls_silent_costs_seconds_and_no_step(run: Run, server: Server) -> None:
    feeder = run.start()
    run.write(10, 20, 30)
    wait_for(lambda: server.steps() == [10, 20])
    server.answering.clear()
    run.write(40)
    start = time.monotonic()
    line = run.stop(feeder, timeout=8.0)
    assert time.monotonic() - start < 7.5  # it gives up by itself
    assert line == f"wandb: {server.url}/e/p/runs/abc; not everything was sent, {send_line(run)}"
    server.answering.set()
    assert "No runs to sync" in sync(run.path)  # it would send again what the server has
    assert send(run.path) == f"wandb: run: {server.url}/e/p/runs/abc\nwandb: run: all sent, up to step 40\n"
    assert [(row["_step"], row["loss"]) for row in server.history] == [(10, 5.0), (20, 10.0), (30, 15.0), (40, 20.0)]
    send(run.path)
    assert server.steps() == [10, 20, 30, 40]


def test_steps_are_sent_once_through_every_kind_of_interruption(run: Run, server: Server) -> None:
    """Online and killed; online and black-holed; offline; then what is left is sent."""
    run.write(10, 20, 30)
    feeder = run.start()
    wait_for(lambda: server.steps() == [10, 20])
    os.killpg(feeder.pid, signal.SIGKILL)
    feeder.wait()
    run.resume(20)
    feeder = run.start()
    run.write(30, 40, 50)
    wait_for(lambda: server.steps() == [10, 20, 30, 40])
    server.answering.clear()
    run.write(60)
    run.stop(feeder, timeout=8.0)
    run.resume(50)
    run.write(60, 70)
    assert run.once("offline") == f"wandb: offline (as chosen); {send_line(run)}"
    server.answering.set()
    assert "No runs to sync" in sync(run.path)
    send(run.path)
    assert server.steps() == [10, 20, 30, 40, 50, 60, 70]


def test_what_cannot_be_sent_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write(10, 20)
    run.once("offline")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        send(run.path)
    assert failed.value.stderr.startswith(f"error: {run.path}: not sent: WANDB_API_KEY invalid: ")
    assert "Traceback" not in failed.value.stderr
    assert run.logged() == [10, 20]
