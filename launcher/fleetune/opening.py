"""Which run a recipe is of: its folder made, taken up where it stands, or refused. Nothing here imports torch."""

from __future__ import annotations

import datetime
import os
import secrets
from pathlib import Path

from fleetune.batch import cut_batch
from fleetune.recipe import dump_recipe, flatten, parse_recipe
from fleetune.runs import (
    DONE,
    Run,
    read_json,
    read_jsonl,
    refuse_another_attempt,
    source_commit,
    versions,
    write_json,
    write_text,
)
from fleetune.schema import Recipe, RecipeError

ANOTHER_USERS = "belongs to another user; what stands in it is not opened"
MAY_CHANGE = (
    "output_dir",  # the folder was found by it; it may have moved
    "training.num_train_epochs",
    "training.max_steps",
    "training.logging_steps",
    "training.hang_timeout",
    # How a global batch is cut; the batch itself is compared.
    "training.global_batch_size",
    "training.gradient_accumulation_steps",
    "training.per_device_train_batch_size",
    "training.sequence_parallel_size",
    "tracking.",
    "checkpoint.",
    "retries.",
    "deepspeed.",
    "teacher.deepspeed.offload_",
)


def open_run(
    recipe: Recipe,
    layout: dict[str, int],
    fresh: bool = False,
    data: str | None = None,
    steps: int | None = None,
    is_queued: bool | None = None,
) -> Run:
    """Makes the recipe's run folder, or takes up the one that is there, on whatever ranks.

    One that began in fp32, on a machine without the bf16 that the recipe asks for, goes on so on any other. One that
    failed before it had logged or saved anything may be of another recipe now, and begins anew.
    `layout` holds nodes, nproc_per_node, threads; `data` is a hash of the prepared data; `steps` is the run's length;
    `is_queued` says whether a job of it may be in a cluster's queue: where one was ever sent, when absent.

    Raises:
        RecipeError: the folder is of another recipe, global batch, data or user, has gone further, is no run folder,
            cannot be made, or is at work.
    """
    if fresh:
        recipe = recipe.model_copy(update={"name": free_name(recipe)})
    run = Run(Path(recipe.output_dir) / recipe.name)
    refuse_another_user(run)
    is_there = (run.path / "run.json").exists()
    is_queued = (run.path / "job.json").exists() if is_queued is None else is_queued
    goes_on = is_there and (is_queued or _has_trained(run))
    if goes_on:
        recipe = as_it_began(recipe, run)
    text = dump_recipe(recipe)
    parse_recipe(text, str(run.recipe_file))  # as the ranks will: a name may have grown too long
    try:
        if is_there:
            refuse_another_attempt(run.path / "lease.json")  # before what it reads is changed
            refuse_another_recipe(run, recipe, layout, data, is_queued)
            _refuse_fewer_steps(run, steps)
        else:
            _make(run, recipe, layout)
        info = {**run.info(), "layout": layout, **({} if data is None else {"data": data})}
        if is_there and not goes_on:
            info.pop("fp32_for_bf16", None)
            info |= {"versions": versions(), "commit": source_commit()}
        write_json(run.path / "run.json", info)
        write_text(run.recipe_file, text)
    except OSError as error:
        raise RecipeError(f"output_dir/name = {str(run.path)!r}: cannot be written: {error.strerror}") from None
    return run


def free_name(recipe: Recipe) -> str:
    name, number = recipe.name, 2
    while (Path(recipe.output_dir) / name).exists():
        name, number = f"{recipe.name}-{number}", number + 1
    return name


def as_it_began(recipe: Recipe, run: Run) -> Recipe:
    """In the precision that the machines turned out to have on which the run began."""
    if (run.path / "run.json").exists() and run.info().get("fp32_for_bf16"):
        return recipe.model_copy(update={"training": recipe.training.model_copy(update={"bf16": False})})
    return recipe


def _make(run: Run, recipe: Recipe, layout: dict[str, int]) -> None:
    """The folder with its run.json; takes up one that a kill has left without."""
    run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(not path.name.startswith(".run.json.") for path in run.path.iterdir()):
        raise RecipeError(
            f"output_dir/name = {str(run.path)!r}: is there already and is no run folder; "
            "choose another name, or --fresh"
        )
    run.path.chmod(0o700)
    made = {
        "id": secrets.token_hex(4),
        "name": recipe.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    write_json(run.path / "run.json", {**made, "commit": source_commit(), "layout": layout})


def differences(stored: Recipe, new: Recipe, may_change: tuple[str, ...] = MAY_CHANGE) -> list[str]:
    """A line for each key that differs and may not, when a run is taken up again."""
    old, now = (
        {key: value for key, value in flatten(recipe.model_dump(mode="json")) if value not in (None, [], {})}
        for recipe in (stored, new)
    )
    keys = [key for key in {**old, **now} if old.get(key) != now.get(key) and not key.startswith(may_change)]
    said = [{key: repr(values[key]) if key in values else "nothing" for key in keys} for values in (old, now)]
    return [f"{key}: {said[0][key]} in the run, {said[1][key]} now" for key in keys]


def _refuse_fewer_steps(run: Run, steps: int | None) -> None:
    reached = max((int(path.parent.name[5:]) for path in run.checkpoints.glob("step-*/MANIFEST.json")), default=0)
    if steps is not None and reached > steps:
        raise RecipeError(
            f"training.max_steps: the recipe comes to {steps} steps, and {run.path} has done {reached} (--fresh begins "
            "anew)"
        )


def refuse_another_user(run: Run) -> None:
    """Raises RecipeError where the run's folder is another user's. Before any look into it, which may be forbidden."""
    try:
        owner = run.path.stat().st_uid
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of what is no path at all
        return
    except OSError as error:
        raise RecipeError(f"output_dir/name = {str(run.path)!r}: cannot be read: {error.strerror}") from None
    if owner != os.getuid():
        raise RecipeError(f"{run.path}: {ANOTHER_USERS}")


def refuse_closed(folder: Path) -> None:
    """Raises RecipeError where what stands in the folder may not be looked at."""
    try:
        (folder / "run.json").stat()
    except PermissionError:
        raise RecipeError(f"{folder}: {ANOTHER_USERS}") from None
    except OSError:
        pass


def refuse_another_recipe(
    run: Run, recipe: Recipe, layout: dict[str, int], data: str | None = None, is_queued: bool = False
) -> None:
    """Raises RecipeError with the differences where the run that is there is of another recipe, or another user's."""
    refuse_another_user(run)
    changed = (
        differences(run.recipe(), as_it_began(recipe, run)) if run.recipe_file.exists() else []
    )  # killed before it was written
    if changed and (is_queued or _has_trained(run)):
        raise RecipeError(
            f"{run.path} is a run of another recipe (--fresh takes the next free name):\n  " + "\n  ".join(changed)
        )
    moved = _other_batch(run, recipe, layout) if run.recipe_file.exists() else []
    if data is not None and run.info().get("data", data) != data:
        moved.append("the data are not those it was trained on: a file, what is made of it, or a teacher has changed")
    if moved and any(run.checkpoints.glob("step-*")):
        raise RecipeError(f"{run.path} goes on only as it began (--fresh begins anew):\n  " + "\n  ".join(moved))


def refuse_replaced(run: Run, recipe: Recipe) -> None:
    """Raises RecipeError where the run that was opened is of another recipe by now: as long as it has not trained,
    another process may open it so."""
    named = recipe.model_copy(update={"name": run.path.name})  # a fresh one has another than was asked for
    if changed := differences(run.recipe(), as_it_began(named, run)):
        raise RecipeError(f"{run.path}: another recipe has just taken its place:\n  " + "\n  ".join(changed))


def _has_trained(run: Run) -> bool:
    logged = run.metrics.exists() and run.metrics.stat().st_size > 0
    return logged or any(run.checkpoints.glob("step-*"))


def _other_batch(run: Run, recipe: Recipe, layout: dict[str, int]) -> list[str]:
    """A line where the steps are not of as many examples as before."""
    before, now = (
        cut_batch(one.training, place["nodes"] * place["nproc_per_node"])
        for one, place in ((run.recipe(), run.info()["layout"]), (recipe, layout))
    )
    size = before.global_batch_size
    if size == now.global_batch_size:
        return []
    return [
        f"{now}: the run's steps are of {size}; training.global_batch_size={size} keeps that on any number of ranks"
    ]


def is_finished(run: Run, steps: int) -> bool:
    """Whether the run has its report and has no more steps to go: it reached them, or stopped early."""
    if not run.eval.exists() or not run.attempts.exists():
        return False
    report, attempts = read_json(run.eval), read_jsonl(run.attempts)
    return bool(attempts) and attempts[-1].get("exit_code") == DONE and report["total_steps"] == steps
