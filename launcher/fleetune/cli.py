"""The commands. Every body imports what it needs when it runs, so that help and completion stay fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetune import cluster_commands, eval_command, export_command, shift_command, sizes, teach_command
from fleetune.preparing import layout_of, plan, prepare, recipe_file
from fleetune.terminal import Nodes, Nproc, Overrides, RecipeFile, answer_of, fail, load, print_table

if TYPE_CHECKING:
    from fleetune.cluster.local import Layout, Outcome, Stop
    from fleetune.schema import Recipe

app = typer.Typer(
    name="fleetune",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: laying it out takes longer than all the rest of the start
    pretty_exceptions_enable=False,
    help="Fine-tune Transformers models from one YAML recipe, on a laptop or a cluster.",
)


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc_per_node: Nproc = None,
    nodes: Nodes = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="A new run under the next free name.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also train the same model from scratch.")] = False,
) -> None:
    """Train a recipe on this machine; the same command again goes on where it stopped."""
    import time

    from fleetune import runs
    from fleetune.cluster import local
    from fleetune.recipe import baseline_of

    loaded = load(recipe, overrides)
    baseline = baseline and not loaded.model.from_scratch
    if baseline and len(loaded.name) > 80:
        fail(
            f"{recipe}: name = {loaded.name!r}: too long for --baseline, which appends -from-scratch: "
            "at most 80 characters"
        )
    layout, began = plan(nodes, nproc_per_node), time.time()
    with local.stopping() as stop:
        typer.echo("preparing the data")
        try:
            loaded, report = prepare(recipe, loaded, overrides, layout, stop)
            _show_data(loaded, layout, report)
            outcome = _attempt(loaded, layout, report, stop, fresh=fresh, began=began)
            folders = [outcome.run.path]
            if baseline:
                scratch = baseline_of(outcome.run.recipe()).model_copy(
                    update={"name": f"{outcome.run.path.name}-from-scratch"}
                )
                typer.echo(f"\nbaseline  {scratch.name}: the same model from scratch")
                runs.write_json(outcome.run.path / "run.json", {**outcome.run.info(), "baseline": scratch.name})
                folders.append(_attempt(scratch, layout, {**report, "teachers": ""}, stop).run.path)
        except local.StoppedEarly:
            typer.echo("stopped before training began; the same command goes on")
            raise typer.Exit(runs.SAVED) from None
        except KeyboardInterrupt:
            fail("stopped at once", 130)
    typer.echo("")
    _print_comparison(folders)
    model = folders[0] / "model"
    typer.echo(f"model     {model.relative_to(Path.cwd()) if model.is_relative_to(Path.cwd()) else model}")


def _show_data(recipe: Recipe, layout: Layout, report: dict[str, Any]) -> None:
    """What cleaning did, and what the training data warns of."""
    from fleetune.batch import batch_warning, cut_batch
    from fleetune.schema import head_warning

    for step, touched in report["cleaning"].items():
        typer.echo(f"cleaning  {step}: " + ", ".join(f"{count} rows of {split}" for split, count in touched.items()))
    batch = cut_batch(recipe.training, layout.world_size)
    endless = report.get("endless", {}).get("train", 0)
    warnings = (
        report.get("warning"),
        report.get("guessed"),
        batch_warning(report["sequences"], batch),
        head_warning(recipe),
        f"{endless} rows of train end in nothing that the model learns to stop with" if endless else None,
    )
    for warning in warnings:
        if warning is not None:
            typer.echo(f"warning   {warning}")


def _attempt(
    recipe: Recipe,
    layout: Layout,
    report: dict[str, Any],
    stop: Stop,
    *,
    fresh: bool = False,
    began: float | None = None,
) -> Outcome:
    """One attempt with its progress shown; leaves the program where it fails."""
    from fleetune import runs
    from fleetune.cluster import local, progress
    from fleetune.schema import RecipeError

    try:
        with progress.shown() as watch:
            outcome = local.run_recipe(recipe, layout, report, fresh=fresh, watch=watch, stop=stop, began=began)
    except RecipeError as error:
        fail(str(error))
    if outcome.exit_code == runs.SAVED:
        typer.echo(f"{outcome.run.path}: {outcome.reason}")
        raise typer.Exit(runs.SAVED)
    if outcome.exit_code:
        more = "\n  the same command goes on from the last checkpoint" if outcome.exit_code == runs.FAILED else ""
        fail(f"{outcome.run.path}: {outcome.reason}{more}", outcome.exit_code)
    if outcome.was_finished:
        longer = "max_steps" if recipe.training.max_steps else "num_train_epochs"
        typer.echo(f"{outcome.run.path} is finished; --fresh trains it again, a longer training.{longer} goes on")
    return outcome


for command in (
    cluster_commands.submit,
    cluster_commands.status,
    cluster_commands.watch,
    cluster_commands.why,
    cluster_commands.cancel,
    cluster_commands.logs,
):
    app.command()(command)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc_per_node: Nproc = None,
    nodes: Nodes = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1.0, help="GB that a GPU has; this machine's when absent.", show_default=False)
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="PROFILE", help="A cluster profile: its nodes, ranks and GPUs.", show_default=False),
    ] = None,
) -> None:
    """Validate a recipe, show what it comes to, open its data. Nothing is started."""
    from fleetune.batch import cut_batch, steps_per_epoch, total_steps
    from fleetune.recipe import dump_recipe
    from fleetune.report import memory_lines, print_example, split_lines

    loaded = load(recipe, overrides)
    layout, gpus = plan(nodes, nproc_per_node), ["--gpu-memory", str(gpu_memory)] if gpu_memory else []
    if cluster is not None:
        if nodes > 1 or nproc_per_node or gpu_memory:
            fail(f"--cluster {cluster}: says how many nodes, ranks and GB there are; leave the other options out")
        layout, gpus = layout_of(cluster)
    typer.echo("preparing the data", err=True)  # which may take a while
    loaded, report = prepare(recipe, loaded, overrides, layout, elsewhere=bool(cluster or gpu_memory))
    batch = cut_batch(loaded.training, layout.world_size)
    typer.echo(dump_recipe(loaded))
    typer.echo(f"batch     {batch}")
    sequences = report["sequences"]
    steps = total_steps(loaded.training, sequences, batch)
    unit = "packs" if loaded.data.packing else "rows"
    typer.echo(f"steps     {steps}, {steps / steps_per_epoch(sequences, batch):.2f} epoch(s) of {sequences} {unit}")
    typer.echo(
        f"model     {sizes.count(report['parameters'])} parameters, "
        f"{sizes.count(report['trainable_parameters'])} trainable"
    )
    memory = ["--ranks", str(layout.world_size), *gpus]
    with recipe_file(loaded) as file:
        found = answer_of("memory", [file, *memory])
    for line in [*memory_lines(loaded, found), *split_lines(loaded, report)]:
        typer.echo(line)
    _show_data(loaded, layout, report)
    if "example" in report:
        print_example(report["example"]["train"])


app.command()(cluster_commands.doctor)


app.command()(teach_command.teach)
app.command("eval")(eval_command.evaluate)
app.command()(export_command.export)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
    latency: Annotated[bool, typer.Option("--latency", help="Also measure the models on this machine.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For --latency on the CPU; its cores when absent.", show_default=False)
    ] = None,
    by_run: Annotated[bool, typer.Option("--by-run", help="Each run alone, not the seeds of one together.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures.", show_default=False)
    ] = None,
) -> None:
    """A table of runs, each with its from-scratch baseline where there is one; seeds of one recipe are one."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        fail(f"--json {json_file}: there is no folder {json_file.parent}")
    if threads is not None and not latency:
        fail(f"--threads {threads}: is for --latency")
    _print_comparison(folders, latency=latency, threads=threads, by_run=by_run, json_file=json_file)


def _print_comparison(
    folders: list[Path],
    *,
    latency: bool = False,
    threads: int | None = None,
    by_run: bool = False,
    json_file: Path | None = None,
) -> None:
    from fleetune import comparison, runs
    from fleetune.schema import RecipeError

    machine = None
    try:
        rows = comparison.rows_of(comparison.find(folders), by_run=by_run)
        if latency:
            threads = threads or plan(1, 1).threads
            typer.echo(f"measuring the latency of {len(rows)} model(s) with {threads} thread(s)")
            rows, machine = comparison.measure(rows, threads)
    except RecipeError as error:
        fail(str(error))
    except RuntimeError as error:
        fail(f"measuring failed: {error}", 1)
    for table in comparison.tables(rows):
        print_table(table, comparison.WIDTH)
    for note in comparison.notes(rows, machine):
        typer.echo(note)
    if json_file is not None:
        try:
            runs.write_json(json_file, comparison.as_json(rows, machine))
        except OSError as error:
            fail(f"--json {json_file}: cannot be written: {error.strerror}")


app.command()(shift_command.shift)


@app.command()
def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc_per_node: Nproc = None,
    nodes: Nodes = 1,
    steps: Annotated[int, typer.Option(min=2, help="Of each run.")] = 12,
    kills: Annotated[int, typer.Option(min=1, help="By SIGKILL, at random moments.")] = 3,
    seed: Annotated[int, typer.Option(help="Of those moments.")] = 0,
) -> None:
    """Prove on this machine that a run which is killed, or cut otherwise, is the same run."""
    import shutil
    import tempfile

    from fleetune import report
    from fleetune.verify import verify

    loaded = load(recipe, overrides)
    layout = plan(nodes, nproc_per_node)
    typer.echo("preparing the data")
    loaded, prepared = prepare(recipe, loaded, overrides, layout)
    Path(loaded.output_dir).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{loaded.name}-verify-", dir=loaded.output_dir))
    try:
        findings = verify(
            loaded, layout, prepared["dropout"], folder, steps=steps, kills=kills, seed=seed, say=typer.echo
        )
    except RuntimeError as error:
        fail(f"{error}\n  what is there stays in {folder}", 1)
    print_table(report.findings(findings))
    if not all(finding.holds for finding in findings):
        fail(f"not the same run; what is there stays in {folder}", 1)
    shutil.rmtree(folder)


app.command()(cluster_commands.sync)


@app.command()
def schema() -> None:
    """The JSON Schema of a recipe, for editors: # yaml-language-server: $schema=fleetune.schema.json"""
    import json

    from fleetune.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
