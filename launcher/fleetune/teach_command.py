"""`fleetune teach`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetune import sizes
from fleetune.preparing import plan, prepare, recipe_file
from fleetune.terminal import Nproc, Overrides, RecipeFile, answer_of, fail, load

if TYPE_CHECKING:
    from fleetune.cluster.local import Layout, Stop
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

    from fleetune.cluster import local
    from fleetune.runs import SAVED
    from fleetune.schema import RecipeError

    if top_k is not None and samples is not None:
        fail(f"--samples {samples}: stands in the place of --top-k; leave one out")
    given = load(recipe, overrides)
    if given.task != "causal_lm" and (top_k or samples):
        option = f"--top-k {top_k}" if top_k else f"--samples {samples}"
        fail(f"{option}: is of a language model; of task: {given.task} all logits are stored")
    chosen = ["--top-k", str(top_k)] if top_k else ["--samples", str(samples)] if samples else []
    folder = out or Path(given.output_dir) / f"{given.name}-taught"
    try:
        words = _trains_with_it(recipe, given, folder)
    except RecipeError as error:
        fail(f"{recipe}: {error}")
    layout = plan(1, nproc_per_node)
    with local.stopping() as stop:
        try:
            loaded, report = prepare(recipe, given, overrides, None, stop)
            if "guessed" in report:
                typer.echo(f"warning   {report['guessed']}")
            taught = _store(loaded, layout, folder, chosen, stop)
        except local.StoppedEarly:
            typer.echo("stopped; the same command goes on")
            raise typer.Exit(SAVED) from None
        except KeyboardInterrupt:
            fail(f"{folder}: stopped at once; the same command goes on", 130)
    kinds = {"top": "the top {} classes of each token", "samples": "{} samples of each token"}
    what = kinds[taught["chosen"]["kind"]].format(taught["chosen"]["count"]) if taught["chosen"] else ""
    what = what or f"{len(taught['labels'])} logits"
    typer.echo(f"{folder}: {what} of {taught['rows']} rows, {sizes.volume(taught['bytes'])}")
    changed = {word.partition("=")[0] for word in words}
    kept = [word for word in overrides or () if word.partition("=")[0] not in changed]
    command = ["fleetune", "run", str(recipe), *kept, *words]
    typer.echo(f"train with it: {' '.join(map(shlex.quote, command))}")


def _trains_with_it(file: Path, recipe: Recipe, folder: Path) -> list[str]:
    """The overrides that train with what is stored: without the losses that need the teacher itself.

    Raises RecipeError where no such training is possible, which is better known before the teacher has run.
    """
    import json

    from fleetune.losses import OF_LAYERS
    from fleetune.recipe import dump_recipe, parse_recipe
    from fleetune.schema import RecipeError, teacher_to_store

    key, teacher = teacher_to_store(recipe)
    words = [f"{key}.model_name_or_path=null", f"{key}.cache={_as_yaml(str(folder))}"]
    words += [f"{key}.dtype=auto"] if teacher.dtype != "auto" else []
    left = [loss for loss in recipe.losses if loss.kind not in OF_LAYERS]
    if left != list(recipe.losses):
        words.append(f"losses={json.dumps([loss.model_dump(mode='json', exclude_defaults=True) for loss in left])}")
    stored = teacher.model_copy(update={"model_name_or_path": None, "cache": str(folder), "dtype": "auto"})
    changed: dict[str, Any] = {"losses": left, "teacher": stored}
    if key != "teacher":
        changed = {"losses": left, "teachers": [stored if one is teacher else one for one in recipe.teachers]}
    try:
        parse_recipe(dump_recipe(recipe.model_copy(update=changed)), str(file))
    except RecipeError as error:
        raise RecipeError(f"no training could use what would be stored:\n{error}") from None
    return words


def _as_yaml(text: str) -> str:
    """In quotes where it would be something else without: a number, or nothing."""
    import contextlib
    import json

    from fleetune.schema import RecipeError
    from fleetune.strict_yaml import parse_yaml

    with contextlib.suppress(RecipeError):
        if parse_yaml(text, "") == text:
            return text
    return json.dumps(text)


def _store(recipe: Recipe, layout: Layout, folder: Path, chosen: list[str], stop: Stop) -> dict[str, Any]:
    """What was stored; leaves the program where it fails or is asked to stop."""
    from fleetune import runs
    from fleetune.cluster import local
    from fleetune.schema import RecipeError

    run = runs.Run(folder)
    with recipe_file(recipe) as file:
        begun = answer_of("teach", ["begin", file, str(folder), *chosen], stop=stop)
        if begun["left"]:
            program = ["fleetune.train.teach", "write", file, str(folder)]
            logs = run.logs(len(list((folder / "logs").glob("*"))) + 1)
            try:
                with runs.lease(run) as lease:
                    code, reason = local.run_program(layout, program, logs, typer.echo, stop, lease.beat)
            except RecipeError as error:
                fail(str(error))
            except OSError as error:
                fail(f"{folder}: cannot be written: {error.strerror}")
            if code == runs.SAVED:
                typer.echo(f"{folder}: {reason}; the same command goes on")
                raise typer.Exit(runs.SAVED)
            if code:
                more = "\n  the same command goes on with what is stored" if code == runs.FAILED else ""
                fail(f"{folder}: {reason}{more}", code)
        else:
            typer.echo(f"{folder}: was stored before")
    return answer_of("teach", ["end", str(folder)], stop=stop)
