"""`fleetune teach`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetune import sizes
from fleetune.preparing import plan, prepare, recipe_file
from fleetune.terminal import Nproc, Overrides, RecipeFile, answer_of, fail, load

if TYPE_CHECKING:
    from fleetune.cluster.local import Layout
    from fleetune.schema import Recipe


def teach(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc_per_node: Nproc = None,
    out: Annotated[
        Path | None, typer.Option(help="Where it is stored; output_dir/NAME-taught when absent.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Of a language model: classes of a token; 64.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="In their place: classes drawn from it, unbiased.", show_default=False)
    ] = None,
) -> None:
    """Run a recipe's teacher once over the training rows and store what it says, for `teacher.cache`."""
    import shlex

    from fleetune.losses import OF_LAYERS

    if top_k is not None and samples is not None:
        fail(f"--samples {samples}: stands in the place of --top-k; leave one out")
    given = load(recipe, overrides)
    if given.task != "causal_lm" and (top_k or samples):
        option = f"--top-k {top_k}" if top_k else f"--samples {samples}"
        fail(f"{option}: is of a language model; of task: {given.task} all logits are stored")
    chosen = ["--top-k", str(top_k)] if top_k else ["--samples", str(samples)] if samples else []
    layout = plan(1, nproc_per_node)
    loaded, _ = prepare(recipe, given, overrides, None)
    folder = out or Path(loaded.output_dir) / f"{loaded.name}-taught"
    key, taught = _store(loaded, layout, folder, chosen)
    kinds = {"top": "the top {} classes of each token", "samples": "{} samples of each token"}
    what = kinds[taught["chosen"]["kind"]].format(taught["chosen"]["count"]) if taught["chosen"] else ""
    what = what or f"{len(taught['labels'])} logits"
    typer.echo(f"{folder}: {what} of {taught['rows']} rows, {sizes.volume(taught['bytes'])}")
    typer.echo(f"train with it: {key}.model_name_or_path=null {shlex.quote(f'{key}.cache={folder}')}")
    if beyond := list(dict.fromkeys(loss.kind for loss in loaded.losses if loss.kind in OF_LAYERS)):
        typer.echo(f"and without the losses of kind {', '.join(beyond)}, which need the teacher itself")


def _store(recipe: Recipe, layout: Layout, folder: Path, chosen: list[str]) -> tuple[str, dict[str, Any]]:
    """The teacher's key, and what was stored; leaves the program where it fails or is asked to stop."""
    from fleetune import runs
    from fleetune.cluster import local
    from fleetune.schema import RecipeError

    run = runs.Run(folder)
    with recipe_file(recipe) as file:
        begun = answer_of("teach", ["begin", file, str(folder), *chosen])
        if begun["left"]:
            program = ["fleetune.train.teach", "write", file, str(folder)]
            logs = run.logs(len(list((folder / "logs").glob("*"))) + 1)
            try:
                with runs.lease(run) as lease, local.stopping() as stop:
                    code, reason = local.run_program(layout, program, logs, typer.echo, stop, lease.beat)
            except RecipeError as error:
                fail(str(error))
            except OSError as error:
                fail(f"{folder}: cannot be written: {error.strerror}")
            except KeyboardInterrupt:
                fail(f"{folder}: stopped at once; the same command goes on", 130)
            if code == runs.SAVED:
                typer.echo(f"{folder}: {reason}; the same command goes on")
                raise typer.Exit(runs.SAVED)
            if code:
                more = "\n  the same command goes on with what is stored" if code == runs.FAILED else ""
                fail(f"{folder}: {reason}{more}", code)
    return begun["key"], answer_of("teach", ["end", str(folder)])
