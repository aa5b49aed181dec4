"""A recipe for a few steps, to try what it does and not what it comes to."""

from __future__ import annotations

from pathlib import Path

from fleetune.data_section import Source
from fleetune.schema import Recipe


def short_form(recipe: Recipe, name: str, folder: Path, steps: int, save_steps: int) -> Recipe:
    """The recipe for so many steps, every one logged, with little evaluation and no tracking."""
    sources = {
        key: source.model_copy(update={"test": None, "validation": _short(source.validation)})
        for key, source in recipe.data.source.items()
    }
    targets = {
        key: target.model_copy(update={"validation": None, "test": None}) for key, target in recipe.data.target.items()
    }
    return recipe.model_copy(
        update={
            "name": name,
            "output_dir": str(folder),
            "training": recipe.training.model_copy(update={"max_steps": steps, "logging_steps": 1}),
            "checkpoint": recipe.checkpoint.model_copy(update={"save_steps": save_steps, "mtbf_hours": None}),
            "tracking": recipe.tracking.model_copy(update={"wandb": None}),
            "data": recipe.data.model_copy(
                update={
                    "validation": _short(recipe.data.validation),
                    "test": None,
                    "source": sources,
                    "target": targets,
                }
            ),
            "evaluation": recipe.evaluation.model_copy(update={"shift_rows": None}),
        }
    )


def _short(validation: Source | None) -> Source | None:
    return None if validation is None else validation.model_copy(update={"limit": min(validation.limit or 64, 64)})
