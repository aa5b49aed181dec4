"""What the commands share: their arguments, how they fail, how they show a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fleetune.cluster.local import Stop
    from fleetune.schema import Recipe

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        show_default=False,
        help="Changes to the recipe, e.g. training.learning_rate=3e-5.",
    ),
]
Nodes = Annotated[int, typer.Option(min=1, help="More than 1 emulates nodes on this machine.")]
Nproc = Annotated[
    int | None, typer.Option(min=1, help="Ranks on each node; the GPUs, or 1, when absent.", show_default=False)
]


MANY = 100  # rows; rich takes milliseconds for each

AnyRuns = Annotated[
    list[Path] | None, typer.Argument(metavar="[RUN]...", help="Those in runs/ when absent.", show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]


def fail(message: str, code: int = 2) -> NoReturn:
    for line in message.splitlines():
        typer.echo(f"error: {line}" if not line.startswith(" ") else line, err=True)
    raise typer.Exit(code)


def load(file: Path, overrides: list[str] | None) -> Recipe:
    from fleetune.cluster.profile import is_profile
    from fleetune.recipe import load_recipe
    from fleetune.schema import RecipeError

    try:
        return load_recipe(file, overrides)
    except RecipeError as error:
        if is_profile(file):
            fail(f"{file}: is a cluster profile, not a recipe; it goes after --cluster")
        fail(str(error))


def origin_of(line: str, file: Path, overrides: list[str] | None) -> str:
    """Who set the key that a line of an error begins with."""
    key = line.partition(" ")[0].rstrip(":")
    given = [override.partition("=")[0] for override in overrides or ()]
    return "command line" if any(key == name or key.startswith(f"{name}.") for name in given) else str(file)


def answer_of(program: str, arguments: list[str], shown: str | None = None, stop: Stop | None = None) -> dict[str, Any]:
    """The JSON that a program of `train/` answers with; its lines that begin with `shown` are shown as they come.

    Leaves the program where that one fails. Raises StoppedEarly where it was asked to `stop` meanwhile.
    """
    import json
    import subprocess
    import tempfile

    from fleetune.cluster import local

    command, said = [sys.executable, "-m", f"fleetune.train.{program}", *arguments], []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
        process = subprocess.Popen(
            command, env=local.rank_environment(), stdout=answer, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if shown is not None and line.startswith(shown):
                typer.echo(line.rstrip())
        process.wait()
        if stop:
            raise local.StoppedEarly
        if process.returncode:
            fail(local.error_of("".join(said)), max(process.returncode, 1))
        answer.seek(0)
        return json.load(answer)  # type: ignore[no-any-return]


def print_table(table: Table, width: int = 200) -> None:
    """As wide as the terminal; of a fixed width elsewhere. Very many rows are plain columns."""
    from rich.console import Console

    if table.row_count > MANY:
        # The cells are escaped for rich.
        columns = [
            [str(column.header), *(str(cell).replace("\\[", "[") for cell in column.cells)] for column in table.columns
        ]
        widths = [max(map(len, column)) for column in columns]
        for row in zip(*columns, strict=True):
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    Console(width=None if sys.stdout.isatty() else width).print(table)
