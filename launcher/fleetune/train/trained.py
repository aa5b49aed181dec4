"""A trained model's folder: a whole model, or an adapter that is put on the recipe's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fleetune import runs
from fleetune.schema import Recipe, RecipeError
from fleetune.train.lora import is_adapter, load_adapter
from fleetune.train.model import ModelError, auto_model, build_model


def recipe_and_model(folder: Path) -> tuple[Recipe, Path]:
    """The recipe and the model of a run, or of a model folder. Raises RecipeError where one is missing."""
    model = folder / "model" if (folder / "run.json").exists() else folder
    if not (model / "config.json").exists():
        what = (
            "is a run that has not written its model yet"
            if model != folder
            else "has no config.json: no model is there"
        )
        raise RecipeError(f"{folder}: {what}")
    if not (model / "recipe.yaml").exists():
        raise RecipeError(
            f"{model}: has no recipe.yaml, which says how its data is read; Fleetune writes one into every model"
        )
    return runs.Run(model).recipe(), model


def load_trained(recipe: Recipe, path: Path, dtype: torch.dtype | None = None, *, trust: bool = False) -> Any:
    """The model in eval mode, in its own dtype or in this one.

    Raises RecipeError where it cannot be loaded, and for an adapter where what it stands on cannot be.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        if not is_adapter(path):
            model = auto_model(recipe).from_pretrained(path, trust_remote_code=trust, dtype=dtype or "auto")
            return model.eval()
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        names = [config.id2label[i] for i in range(config.num_labels)] if recipe.task == "classification" else []
        plain = recipe.model.model_copy(
            update={"gradient_checkpointing": False, "mlp_tiles": None, "trust_remote_code": trust}
        )
        bare = recipe.model_copy(update={"model": plain, "kernels": "reference"})
        own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        model = build_model(bare, names, dtype or own, {"zero_optimization": {"stage": 0}})
        load_adapter(model, path)
        if (path / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except ModelError as error:
        raise RecipeError(str(error)) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RecipeError(f"{path}: cannot be loaded: {error}") from error
    return model.eval()
