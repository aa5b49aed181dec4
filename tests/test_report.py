"""What a person is shown of runs: a line for each, a chart, times in words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.testing import CliRunner

from fleetune import eval_command, report, runs
from fleetune.attempts import end_attempt, start_attempt
from fleetune.cli import app
from fleetune.cluster.slurm import Job
from fleetune.runs import Run
from fleetune.terminal import MANY, print_table


def make_run(folder: Path, name: str, **info: Any) -> Run:
    run = Run(folder / name)
    run.path.mkdir()
    runs.write_json(run.path / "run.json", {"id": "1", "name": name, **info})
    return run


def log(run: Run, step: int, loss: float) -> None:
    runs.append_jsonl(run.metrics, {"step": step, "train/loss": loss, "train/samples_per_second": 8.0})


def row(run: Run, job: Job | None = None) -> dict[str, str]:
    table = report.statuses([run.path], {} if job is None else {run.path: job})
    return {str(column.header): str(next(iter(column.cells))) for column in table.columns}


def job(state: str, reason: str = "None") -> Job:
    return Job("7", state, reason, "node[1-2]", "x")


def test_a_run_at_work_has_its_step_its_loss_and_what_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", total_steps=400, global_batch_size=16)
    start_attempt(run, ["node1", "node2"])
    log(run, 100, 0.25)
    found = row(run, job("RUNNING"))
    assert found | {"goodput": ""} == {
        "run": "a", "state": "running", "attempts": "1", "nodes": "node1, node2", "step": "100/400", "left": "10 min",
        "loss": "0.2500", "goodput": "", "what happened last": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "word"), [(runs.DONE, "done"), (runs.SAVED, "stopped"), (runs.FAILED, "failed"), (runs.WRONG, "failed")]
)
def test_a_run_that_has_ended_says_how_and_has_nothing_left(tmp_path: Path, code: int, word: str) -> None:
    run = make_run(tmp_path, "a", total_steps=400, global_batch_size=16)
    start_attempt(run, ["here"])
    log(run, 100, 0.25)
    end_attempt(run, 1, code, "rank 1: [bold]broke[/]\n  log: x")
    assert {"state": word, "left": "", "what happened last": r"rank 1: \[bold]broke\[/]"}.items() <= row(run).items()


def test_a_run_that_waits_says_for_what_and_one_cut_off_is_not_at_work(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    assert row(run)["state"] == "not begun"
    assert row(run, job("PENDING", "Priority"))["state"] == "pending (Priority)"
    start_attempt(run, ["here"])
    assert row(run)["state"] == "cut off"
    with runs.lease(run):
        assert row(run)["state"] == "running"


def test_the_step_is_the_last_that_is_known_and_not_the_last_that_was_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", total_steps=60, global_batch_size=16)
    start_attempt(run, ["here"])
    told = {"first_step": 1, "step": 7, "saved_step": 0, "began": 1.0, "restoring": 0.0, "saving": 0.0, "time": 2.0}
    runs.write_json(run.logs(1) / "progress.json", told)
    assert row(run)["step"] == "7/60"
    log(run, 10, 0.5)
    assert row(run)["step"] == "10/60"


def test_a_run_whose_node_was_lost_says_so_and_not_how_the_attempt_before_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    start_attempt(run, ["node1"])
    end_attempt(run, 1, runs.SAVED, "preempted: stopped and saved", "preemption")
    lost = Job("7", "PENDING", "BeginTime", "", "x", lost="a node failed")
    assert row(run, lost)["what happened last"] == "a node failed"


def test_very_many_runs_are_plain_lines_with_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("run", "what happened last")
    for number in range(MANY + 1):
        table.add_row(f"run-{number}", escape("killed [SIGKILL]"))
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "what", "happened", "last"]
    assert lines[1:] == [f"{f'run-{number}':<9}killed [SIGKILL]" for number in range(MANY + 1)]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    assert report.no_run(make_run(tmp_path, "a").path) is None
    assert report.no_run(tmp_path / "b") == f"{tmp_path}/b: is no run folder (it has no run.json)"


def test_what_is_no_run_does_not_hide_the_runs_beside_it(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["status", str(tmp_path / "b"), str(make_run(tmp_path, "a").path)])
    assert (done.exit_code, done.stderr) == (2, f"error: {tmp_path}/b: is no run folder (it has no run.json)\n")
    assert "not begun" in done.stdout


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (250, "4 min 10 s"), (3600, "1 h"), (9000, "2 h 30 min"),
     (90000, "1 d 1 h")],
)  # fmt: skip
def test_times_are_said_in_two_units_at_most(seconds: float, said: str) -> None:
    assert report.duration(seconds) == said


def test_a_chart_has_its_highest_point_on_top_and_its_ends_beside_it() -> None:
    lines = report.chart([(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)], width=2, height=1)
    assert lines == ["1 ⠑⢄", "  03"]
    assert report.chart([], 10, 4) == []
    assert report.chart([(5, float("nan"))], 10, 4) == []
    assert len(report.chart([(5, 2.0)], 10, 4)) == 5


def test_watching_shows_the_runs_and_the_loss_of_the_first_that_has_one(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "first"), make_run(tmp_path, "second")
    for step in range(1, 6):
        log(second, step, 1.0 / step)
    console = Console(file=io.StringIO(), width=120)
    console.print(report.live([first.path, second.path], {}, 120))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "train/loss of second by step" in shown
    assert "0.2" in shown


def test_an_evaluation_has_a_line_for_each_domain() -> None:
    found = {"model": "m", "data": "test", "rows": 9, "metrics": {"loss": 0.5, "accuracy": 0.75}}
    table = report.metrics(found)
    assert [list(column.cells) for column in table.columns] == [["0.5000"], ["0.7500"]]
    of_books = {"books/loss": 0.25, "books/accuracy": 1.0}
    table = report.metrics({**found, "metrics": {"loss": 0.5, "accuracy": 0.75, **of_books}})
    assert {str(column.header): list(column.cells) for column in table.columns} == {
        "domain": ["all", "books"], "loss": ["0.5000", "0.2500"], "accuracy": ["0.7500", "1.0000"],
    }  # fmt: skip


def test_an_evaluation_names_its_paths_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"model": "a[x]", "data": "b[y].tsv", "rows": 9, "metrics": {"loss": 0.5}}
    console = Console(file=io.StringIO(), width=120)
    console.print(report.metrics(found))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a[x] on b[y].tsv (9 rows)" in " ".join(said.split())
    task = {"task": "t[y]", "rows": 9, "metrics": {"acc": (0.5, None)}}
    monkeypatch.setattr(eval_command, "answer_of", lambda *_: {"model": "a[x]", "tasks": [task]})
    said = CliRunner().invoke(app, ["eval", "a[x]", "--lm-eval", "t[y]"]).stdout
    assert "a[x] by lm-eval" in said
    assert "t[y]" in said
