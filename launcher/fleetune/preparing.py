"""What the commands do first that run or look at a recipe: where it will run, and whether it fits there.

Bodies import what they need when they run, as in `cli`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fleetune.terminal import fail, origin_of

if TYPE_CHECKING:
    from fleetune.cluster.local import Layout, Stop
    from fleetune.schema import Recipe


def plan(nodes: int, nproc_per_node: int | None) -> Layout:
    from fleetune.cluster import local
    from fleetune.schema import RecipeError

    try:
        return local.plan_layout(nodes, nproc_per_node)
    except RecipeError as error:
        fail(str(error))


def prepare(
    file: Path,
    recipe: Recipe,
    overrides: list[str] | None,
    layout: Layout | None,
    stop: Stop | None = None,
    elsewhere: bool = False,
) -> tuple[Recipe, dict[str, Any]]:
    """Checks the recipe against its model, data and machine; leaves the program where they do not fit.

    Without a layout it is not trained, and how its batches are cut does not matter.

    Returns the recipe as it runs here, and the report.
    """
    from fleetune.batch import cut_batch
    from fleetune.cluster import local
    from fleetune.recipe import in_this_machines_precision
    from fleetune.schema import RecipeError

    try:
        if layout is not None:
            cut_batch(recipe.training, layout.world_size)
        report = local.prepare(recipe, stop, elsewhere)
    except RecipeError as error:
        fail("\n".join(f"{origin_of(line, file, overrides)}: {line}" for line in str(error).splitlines()))
    except local.PreparationFailed as error:
        fail(f"preparing failed:\n{error}", 1)
    resolved = recipe if elsewhere else in_this_machines_precision(recipe, report)
    if resolved is not recipe:
        typer.echo("warning   training.bf16: this CPU has no arithmetic for bf16; fp32 is faster here and is used")
    return resolved, report | {"fp32_for_bf16": resolved is not recipe}


def layout_of(cluster: Path) -> tuple[Layout, list[str]]:
    """Of a profile; and what the estimate of memory is to know of its GPUs."""
    from fleetune.cluster.local import Layout
    from fleetune.cluster.profile import load_profile
    from fleetune.schema import RecipeError

    try:
        profile = load_profile(cluster)
    except RecipeError as error:
        fail(str(error))
    memory = ["--gpu-memory", str(profile.gpu_memory)] if profile.gpu_memory else []
    device = ["--device", "cuda" if profile.gpus_per_node else "cpu"]
    return Layout(profile.nodes, profile.ranks, profile.cpus_per_rank), device + (
        memory if profile.gpus_per_node else []
    )


@contextlib.contextmanager
def recipe_file(recipe: Recipe) -> Iterator[str]:
    """The resolved recipe, for a program that reads one."""
    import tempfile

    from fleetune.recipe import dump_recipe

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(dump_recipe(recipe))
        file.flush()
        yield file.name
