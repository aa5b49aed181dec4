"""The commands for a cluster: sending, seeing, stopping. Bodies import what they need when they run, as in `cli`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleetune.terminal import AnyRuns, Overrides, RecipeFile, RunFolder, fail, load, print_table

if TYPE_CHECKING:
    from fleetune.cluster.submit import Sent
    from fleetune.schema import Recipe


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
        Path | None, typer.Option(metavar="RUN", help="Start once this run is done.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="A new run under the next free name.")] = False,
) -> None:
    """Send a recipe to a Slurm cluster; the same command again attaches to the job that is there."""
    from fleetune import opening, runs
    from fleetune.cluster import preflight, slurm
    from fleetune.cluster.profile import load_profile
    from fleetune.cluster.submit import script, standing, submit, test_only
    from fleetune.schema import RecipeError

    loaded = load(recipe, overrides)
    try:
        profile = load_profile(cluster)
    except RecipeError as error:
        fail(str(error))
    try:
        if fresh:
            loaded = loaded.model_copy(update={"name": opening.free_name(loaded)})
        sent = standing(loaded, profile, after)
        for line in preflight.check(loaded, profile, cluster) if sent is None else ():
            typer.echo(f"warning   {line}", err=True)
        if sent is None and dry_run:
            text = script(loaded, profile, after)
            typer.echo(text)
            typer.echo(f"sbatch --test-only: {test_only(text)}")
            return
        sent = sent or submit(loaded, profile, after)
    except RecipeError as error:
        fail(preflight.of_extra(str(error), profile, cluster))
    except slurm.SlurmFailed as error:
        fail(str(error), 1)
    _say_what_is_there(sent, loaded)
    if dry_run:
        typer.echo("submit would send nothing")
        return
    typer.echo(f"see it    fleetune status {sent.run.path}")
    if (url := runs.wandb_url(sent.run)) is not None:
        typer.echo(f"wandb     {url}")
    elif loaded.tracking.wandb is not None and not profile.internet:
        typer.echo(f"send it   fleetune sync --watch {sent.run.path}")


def _say_what_is_there(sent: Sent, recipe: Recipe) -> None:
    if sent.changed:
        kept = f"job {sent.job} keeps what it was sent with; `fleetune cancel` first to send it anew"
        typer.echo(f"warning   changed since: {', '.join(sent.changed)}; {kept}", err=True)
    if sent.state == "FINISHED":
        longer = "max_steps" if recipe.training.max_steps else "num_train_epochs"
        typer.echo(f"{sent.run.path} is finished; --fresh trains it again, a longer training.{longer} goes on")
    else:
        typer.echo(f"{sent.run.path}: job {sent.job}, {'sent' if sent.is_new else sent.state.lower() + ' already'}")


def status(folders: AnyRuns = None) -> None:
    """What runs are doing: state, attempts, nodes, step, what is left, last loss, goodput."""
    from fleetune import report, runs
    from fleetune.cluster import slurm

    folders, others = _runs_among(folders or _runs_here())
    jobs: dict[Path, slurm.Job] = {}
    try:
        jobs = slurm.jobs_of(folders)
    except slurm.SlurmFailed as error:
        said = str(error).splitlines()[-1]
        typer.echo(f"warning: Slurm does not answer; this is what the runs' own files know ({said})", err=True)
    if folders:
        print_table(report.statuses(folders, jobs))
    for folder in folders:
        if (url := runs.wandb_url(runs.Run(folder))) is not None:
            typer.echo(f"{folder.name}: {url}")
    if others:
        fail("\n".join(others))


def watch(folders: AnyRuns = None) -> None:
    """Runs live in the terminal, with the loss as a chart, until all have ended or Ctrl-C."""
    import contextlib
    import time

    from rich.console import Console
    from rich.live import Live

    from fleetune import report
    from fleetune.cluster import slurm

    folders, others = _runs_among(folders or _runs_here())
    if others:
        fail("\n".join(others))
    console = Console()
    try:
        jobs = slurm.jobs_of(folders)
        if not console.is_terminal:
            Console(width=200).print(report.live(folders, jobs, 100))
            return
        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as shown:
            for looks in itertools.count():
                if looks % 5 == 4:  # every 10 s: the controller is everybody's
                    with contextlib.suppress(slurm.SlurmFailed):  # it may be starting anew
                        jobs = slurm.jobs_of(folders)
                if not (folders := _runs_among(folders)[0]):  # those that were taken away meanwhile are left out
                    return
                shown.update(report.live(folders, jobs, console.width), refresh=True)
                if not any(report.goes_on(folder, jobs.get(folder)) for folder in folders):
                    return
                time.sleep(2.0)
    except slurm.SlurmFailed as error:
        fail(str(error), 1)


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
    except RecipeError as error:
        fail(str(error))
    except slurm.SlurmFailed as error:
        fail(str(error), 1)


def _runs_among(folders: list[Path]) -> tuple[list[Path], list[str]]:
    """Those that are runs, and what is to be said of each of the others."""
    from fleetune.report import no_run

    others = {folder: said for folder in folders if (said := no_run(folder)) is not None}
    return [folder for folder in folders if folder not in others], list(others.values())


def _runs_here() -> list[Path]:
    found = sorted(path.parent for path in Path("runs").glob("*/run.json"))
    return found or fail("no run folder is given, and there is none in runs/")


def cancel(run: RunFolder, now: Annotated[bool, typer.Option("--now", help="Without saving.")] = False) -> None:
    """Stop a run on the cluster; it is saved first, and `submit` goes on with it."""
    from fleetune import runs
    from fleetune.cluster import slurm
    from fleetune.opening import refuse_closed
    from fleetune.schema import RecipeError

    file, was, is_first = run / "cancel.json", None, False
    try:
        refuse_closed(run)
        is_first = not file.exists()
        job = slurm.job_of(run)
        runs.write_json(file, {"job": job})  # before it is asked: what ends the attempt looks for this
        was = slurm.end(job, at_once=now)
    except RecipeError as error:
        fail(str(error))
    except slurm.SlurmFailed as error:
        fail(str(error), 1)
    finally:
        if was is None and is_first:
            file.unlink(missing_ok=True)
    if was is None:
        last = (runs.read_jsonl(runs.Run(run).attempts) or [{}])[-1]
        is_done = last.get("event") == "end" and last["exit_code"] == runs.DONE
        fail(f"{run}: {'is done' if is_done else f'its job {job} has ended'}; there is nothing to cancel")
    done = "had not begun, and is cancelled" if was == "PENDING" else "is asked to save and end"
    typer.echo(f"{run}: job {job} {'is cancelled' if now else done}")


def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option(min=0)] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="The last when absent.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows.")] = False,
) -> None:
    """The log of a rank; with -f until the run has ended, through all of its attempts."""
    import contextlib

    from fleetune import runs
    from fleetune.cluster.logs import followed, said
    from fleetune.report import no_run
    from fleetune.schema import RecipeError

    if (fault := no_run(run)) is not None:
        fail(fault)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for text in (followed if follow else said)(runs.Run(run), rank, attempt):
                sys.stdout.write(text)
                sys.stdout.flush()
    except RecipeError as error:
        fail(str(error))


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
        fail(str(error))
    rows = examine(profile, cluster)
    print_table(report.examined(rows), 140)
    problems = [f"{row.what}: {row.found}" for row in rows if row.state == "problem"]
    if problems:
        fail("\n".join(problems), 1)  # whole, where the table folds them


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
        fail(str(error))
    except NotSent as error:
        fail(str(error), 1)
    if code:
        typer.echo("stopped; the same command goes on")
        raise typer.Exit(code)
