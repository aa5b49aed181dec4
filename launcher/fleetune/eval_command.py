"""`fleetune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleetune.terminal import answer_of, fail, print_table


def evaluate(
    run_or_model: Annotated[
        Path, typer.Argument(help="A run's folder, or a model folder that Fleetune wrote.", show_default=False)
    ],
    data: Annotated[str | None, typer.Option(help="Other data: a file, or a hub data set.", show_default=False)] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="The recipe's split (test, or validation, when absent); with --data, the hub data set's.",
            show_default=False,
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="In place of data, tasks of EleutherAI's lm-eval, with commas between them: names that it knows, or "
            "paths of YAML files or folders of them, whose Python code beside them is run: give only your own.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --lm-eval: the first rows of each task.", show_default=False)
    ] = None,
) -> None:
    """Evaluate a trained model on test or other data."""
    if lm_eval is not None:
        for option, value in (("--data", data), ("--split", split)):
            if value is not None:
                fail(f"{option} {value}: --lm-eval brings its own data; leave one of them out")
        _by_lm_eval(run_or_model, lm_eval, limit)
        return
    if limit is not None:
        fail(f"--limit {limit}: is for --lm-eval")
    from fleetune.report import metrics

    arguments = [str(run_or_model)]
    arguments += ["--data", data] if data is not None else []
    arguments += ["--split", split] if split is not None else []
    print_table(metrics(answer_of("evaluate_folder", arguments, shown="evaluated ")), 120)


def _by_lm_eval(folder: Path, tasks: str, limit: int | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    report = answer_of("lm_evaluation", [str(folder), tasks, *(["--limit", str(limit)] if limit is not None else [])])
    table = Table(title=f"{escape(report['model'])} by lm-eval", title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("rows", "value", "standard error"):
        table.add_column(name, justify="right")
    for task in report["tasks"]:
        rows = "" if task["rows"] is None else str(task["rows"])
        for metric, (value, error) in task["metrics"].items():
            shown = "" if error is None else f"{error:.4f}"
            table.add_row(escape(task["task"]), escape(metric), rows, f"{value:.4f}", shown)
    print_table(table, 120)
