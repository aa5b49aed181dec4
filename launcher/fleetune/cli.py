"""The commands. Every body imports what it needs when it runs, so that help and completion stay fast."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fleetune.cluster.local import Layout, Outcome, Stop
    from fleetune.schema import Recipe

app = typer.Typer(
    name="fleetune",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: laying it out takes longer than all the rest of the start
    pretty_exceptions_enable=False,
    help="Fine-tune Transformers models from one YAML recipe, on a laptop or a cluster.",
)

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


def _fail(message: str, code: int = 2) -> NoReturn:
    for line in message.splitlines():
        typer.echo(f"error: {line}" if not line.startswith(" ") else line, err=True)
    raise typer.Exit(code)


def _load(file: Path, overrides: list[str] | None) -> Recipe:
    from fleetune.cluster.profile import is_profile
    from fleetune.recipe import load_recipe
    from fleetune.schema import RecipeError

    try:
        return load_recipe(file, overrides)
    except RecipeError as error:
        if is_profile(file):
            _fail(f"{file}: is a cluster profile, not a recipe; it goes after --cluster")
        _fail(str(error))


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

    loaded = _load(recipe, overrides)
    baseline = baseline and not loaded.model.from_scratch
    if baseline and len(loaded.name) > 80:
        _fail(
            f"{recipe}: name = {loaded.name!r}: too long for --baseline, which appends -from-scratch: "
            "at most 80 characters"
        )
    layout, began = _plan(nodes, nproc_per_node), time.time()
    with local.stopping() as stop:
        typer.echo("preparing the data")
        try:
            loaded, report = _prepare(recipe, loaded, layout, stop)
            _show_data(loaded, layout, report)
            outcome = _attempt(loaded, layout, report, stop, fresh=fresh, began=began)
            folders = [outcome.run.path]
            if baseline:
                scratch = outcome.run.recipe().model_copy(
                    update={
                        "name": f"{outcome.run.path.name}-from-scratch",
                        "model": loaded.model.model_copy(update={"from_scratch": True}),
                    }
                )
                typer.echo(f"\nbaseline  {scratch.name}: the same model from scratch")
                runs.write_json(outcome.run.path / "run.json", {**outcome.run.info(), "baseline": scratch.name})
                folders.append(_attempt(scratch, layout, report, stop).run.path)
        except local.StoppedEarly:
            typer.echo("stopped before training began; the same command goes on")
            raise typer.Exit(runs.SAVED) from None
        except KeyboardInterrupt:
            _fail("stopped at once", 130)
    typer.echo("")
    _print_comparison(folders)


def _plan(nodes: int, nproc_per_node: int | None) -> Layout:
    from fleetune.cluster import local
    from fleetune.schema import RecipeError

    try:
        return local.plan_layout(nodes, nproc_per_node)
    except RecipeError as error:
        _fail(str(error))


def _prepare(file: Path, recipe: Recipe, layout: Layout, stop: Stop | None = None) -> tuple[Recipe, dict[str, Any]]:
    """Checks the recipe against its model, data and machine; leaves the program where they do not fit.

    Returns the recipe as it runs here, and the report.
    """
    from fleetune.cluster import local
    from fleetune.schema import RecipeError, cut_batch

    try:
        cut_batch(recipe.training, layout.world_size)
        report = local.prepare(recipe, stop)
    except RecipeError as error:
        _fail("\n".join(f"{file}: {line}" for line in str(error).splitlines()))
    except local.PreparationFailed as error:
        _fail(f"preparing failed:\n{error}", 1)
    resolved = local.in_this_machines_precision(recipe, report)
    if resolved is not recipe:
        typer.echo("warning   training.bf16: this CPU has no arithmetic for bf16; fp32 is faster here and is used")
    return resolved, report


def _show_data(recipe: Recipe, layout: Layout, report: dict[str, Any]) -> None:
    """What cleaning did, and what the training data warns of."""
    from fleetune.schema import batch_warning, cut_batch

    for step, touched in report["cleaning"].items():
        typer.echo(f"cleaning  {step}: " + ", ".join(f"{count} rows of {split}" for split, count in touched.items()))
    batch = cut_batch(recipe.training, layout.world_size)
    for warning in (report.get("warning"), batch_warning(report["rows"]["train"], batch)):
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
        _fail(str(error))
    if outcome.exit_code == runs.SAVED:
        typer.echo(f"{outcome.run.path}: {outcome.reason}")
        raise typer.Exit(runs.SAVED)
    if outcome.exit_code:
        _fail(f"{outcome.run.path}: {outcome.reason}", outcome.exit_code)
    if outcome.was_finished:
        typer.echo(
            f"{outcome.run.path} is finished; --fresh trains it again, a longer training.num_train_epochs goes on"
        )
    return outcome


@app.command()
def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        Path, typer.Option(help="The cluster's profile, e.g. slurm/gpu8.yaml.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the script and what sbatch says of it; send nothing.")
    ] = False,
    after: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Start once this run's job is done.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="A new run under the next free name.")] = False,
) -> None:
    """Send a recipe to a Slurm cluster; the same command again attaches to the job that is there."""
    from fleetune import runs
    from fleetune.cluster import preflight, slurm
    from fleetune.cluster.profile import load_profile
    from fleetune.cluster.submit import script, submit, test_only
    from fleetune.schema import RecipeError

    loaded = _load(recipe, overrides)
    try:
        profile = load_profile(cluster)
        before = None if after is None else slurm.job_of(after)
        for line in preflight.check(loaded, profile, cluster):
            typer.echo(f"warning   {line}", err=True)
        if dry_run:
            text = script(loaded, profile, before)
            typer.echo(text)
            typer.echo(f"sbatch --test-only: {test_only(text)}")
            return
        sent = submit(loaded, profile, fresh, before)
    except RecipeError as error:
        _fail(str(error))
    except slurm.SlurmFailed as error:
        _fail(str(error), 1)
    typer.echo(f"{sent.run.path}: job {sent.job}, {'sent' if sent.is_new else sent.state.lower() + ' already'}")
    typer.echo(f"see it    fleetune status {sent.run.path}")
    if (url := runs.wandb_url(sent.run)) is not None:
        typer.echo(f"wandb     {url}")
    elif loaded.tracking.wandb is not None and not profile.internet:
        typer.echo(f"send it   fleetune sync --watch {sent.run.path}")


AnyRuns = Annotated[
    list[Path] | None, typer.Argument(metavar="[RUN]...", help="Those in runs/ when absent.", show_default=False)
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]


@app.command()
def status(folders: AnyRuns = None) -> None:
    """What runs are doing: state, attempts, nodes, step, what is left, last loss, goodput."""
    from fleetune import report, runs
    from fleetune.cluster import slurm
    from fleetune.schema import RecipeError

    folders = folders or _runs_here()
    try:
        _print_table(report.statuses(folders, slurm.jobs_of(folders)))
    except (RecipeError, slurm.SlurmFailed) as error:
        _fail(str(error))
    for folder in folders:
        if (url := runs.wandb_url(runs.Run(folder))) is not None:
            typer.echo(f"{folder.name}: {url}")


@app.command()
def watch(folders: AnyRuns = None) -> None:
    """Runs live in the terminal, with the loss as a chart, until all have ended or Ctrl-C."""
    import contextlib
    import time

    from rich.console import Console
    from rich.live import Live

    from fleetune import report
    from fleetune.cluster import slurm
    from fleetune.schema import RecipeError

    folders, console = folders or _runs_here(), Console()
    try:
        jobs = slurm.jobs_of(folders)
        if not console.is_terminal:
            Console(width=200).print(report.live(folders, jobs, 100))
            return
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as shown:
            for looks in itertools.count():
                if looks % 5 == 4:  # every 10 s: the controller is everybody's
                    jobs = slurm.jobs_of(folders)
                shown.update(report.live(folders, jobs, console.width), refresh=True)
                if not any(report.goes_on(folder, jobs.get(folder)) for folder in folders):
                    return
                time.sleep(2.0)
    except (RecipeError, slurm.SlurmFailed) as error:
        _fail(str(error))


@app.command()
def why(run: RunFolder) -> None:
    """What happened to a run, what to do, and where its time went."""
    import textwrap

    from fleetune import runs
    from fleetune.cluster import slurm
    from fleetune.cluster.why import why as paragraphs
    from fleetune.schema import RecipeError

    try:
        for paragraph in paragraphs(runs.Run(run)):
            typer.echo(textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False))
    except (RecipeError, slurm.SlurmFailed) as error:
        _fail(str(error))


def _runs_here() -> list[Path]:
    found = sorted(path.parent for path in Path("runs").glob("*/run.json"))
    return found or _fail("no run folder is given, and there is none in runs/")


@app.command()
def cancel(run: RunFolder, now: Annotated[bool, typer.Option("--now", help="Without saving.")] = False) -> None:
    """Stop a run on the cluster; it is saved first, and `submit` goes on with it."""
    from fleetune import runs
    from fleetune.cluster import slurm
    from fleetune.schema import RecipeError

    try:
        job = slurm.job_of(run)
        runs.write_json(run / "cancel.json", {"job": job})
        (slurm.cancel if now else slurm.stop)(job)
    except (RecipeError, slurm.SlurmFailed) as error:
        _fail(str(error))
    typer.echo(f"{run}: job {job} is asked to {'end at once' if now else 'save and end'}")


@app.command()
def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option(min=0)] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="The last when absent.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows.")] = False,
) -> None:
    """The log of a rank."""
    import time

    from fleetune import runs
    from fleetune.attempts import log_of
    from fleetune.schema import RecipeError

    try:
        path = log_of(runs.Run(run), rank, attempt)
    except RecipeError as error:
        _fail(str(error))
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(0.5)


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, nproc_per_node: Nproc = None, nodes: Nodes = 1) -> None:
    """Validate a recipe, show what it comes to, open its data. Nothing is started."""
    from fleetune.recipe import dump_recipe
    from fleetune.schema import cut_batch, steps_per_epoch, total_steps

    loaded = _load(recipe, overrides)
    layout = _plan(nodes, nproc_per_node)
    loaded, report = _prepare(recipe, loaded, layout)
    batch = cut_batch(loaded.training, layout.world_size)
    typer.echo(dump_recipe(loaded))
    typer.echo(f"batch     {batch}")
    rows = report["rows"]["train"]
    steps = total_steps(loaded.training, rows, batch)
    typer.echo(f"steps     {steps}, {steps / steps_per_epoch(rows, batch):.2f} epoch(s) of {rows} rows")
    typer.echo(
        f"model     {report['parameters'] / 1e6:.1f}M parameters, {report['trainable_parameters'] / 1e6:.1f}M trainable"
    )
    for split, count in report["rows"].items():
        labels = ", ".join(
            f"{name}: {n}" for name, n in zip(report["label_names"], report["labels"].get(split, ()), strict=False)
        )
        typer.echo(
            f"{split:<11}{count} rows, {report['tokens'][split] / count:.1f} tokens each, "
            f"{report['truncated'][split]} cut at {loaded.data.max_length}" + (f"; {labels}" if labels else "")
        )
    _show_data(loaded, layout, report)


@app.command()
def doctor(
    cluster: Annotated[
        Path | None, typer.Option(metavar="PROFILE", help="A cluster's profile to hold against it.", show_default=False)
    ] = None,
) -> None:
    """Look at this machine and its Slurm for what would go wrong. Nothing is changed."""
    from fleetune import report
    from fleetune.cluster.doctor import examine
    from fleetune.cluster.profile import load_profile
    from fleetune.schema import RecipeError

    try:
        profile = None if cluster is None else load_profile(cluster)
    except RecipeError as error:
        _fail(str(error))
    rows = examine(profile, cluster)
    _print_table(report.examined(rows), 140)
    problems = [f"{row.what}: {row.found}" for row in rows if row.state == "problem"]
    if problems:
        _fail("\n".join(problems), 1)  # whole, where the table folds them


@app.command("eval")
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
) -> None:
    """Evaluate a trained model on test or other data."""
    import json
    import subprocess

    from rich.table import Table

    from fleetune.cluster import local

    command = [sys.executable, "-m", "fleetune.train.evaluate_folder", str(run_or_model)]
    command += ["--data", data] if data is not None else []
    command += ["--split", split] if split is not None else []
    done = subprocess.run(command, env=local.rank_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        _fail(local.error_of(done.stderr), done.returncode)
    report = json.loads(done.stdout)
    table = Table(title=f"{report['model']} on {report['data']} ({report['rows']} rows)", title_justify="left")
    for name in report["metrics"]:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" for value in report["metrics"].values()))
    _print_table(table, 120)


@app.command()
def compare(folders: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)]) -> None:
    """A table of runs, each with its from-scratch baseline where there is one."""
    _print_comparison(folders)


def _print_table(table: Table, width: int = 200) -> None:
    """As wide as the terminal; of a fixed width elsewhere."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else width).print(table)


def _print_comparison(folders: list[Path]) -> None:
    from fleetune import report
    from fleetune.schema import RecipeError

    try:
        table = report.comparison(folders)
    except RecipeError as error:
        _fail(str(error))
    _print_table(table)


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

    loaded = _load(recipe, overrides)
    layout = _plan(nodes, nproc_per_node)
    typer.echo("preparing the data")
    loaded, prepared = _prepare(recipe, loaded, layout)
    Path(loaded.output_dir).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{loaded.name}-verify-", dir=loaded.output_dir))
    try:
        findings = verify(
            loaded, layout, prepared["dropout"], folder, steps=steps, kills=kills, seed=seed, say=typer.echo
        )
    except RuntimeError as error:
        _fail(f"{error}\n  what is there stays in {folder}", 1)
    _print_table(report.findings(findings))
    if not all(finding.holds for finding in findings):
        _fail(f"not the same run; what is there stays in {folder}", 1)
    shutil.rmtree(folder)


@app.command()
def sync(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Go on until every run has ended.")] = False,
) -> None:
    """Send to Weights & Biases what it does not have of runs; they may be at work, on nodes that do not reach it."""
    from fleetune.schema import RecipeError
    from fleetune.sync import NotSent, sync

    try:
        code = sync(folders, watch)
    except RecipeError as error:
        _fail(str(error))
    except NotSent as error:
        _fail(str(error), 1)
    if code:
        typer.echo("stopped; the same command goes on")
        raise typer.Exit(code)


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
