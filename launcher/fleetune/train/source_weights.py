"""What the recipe's `reweight` comes to: a weight for every row of train, fitted once and kept by row.

RUN/source_weights.jsonl   {"row": its number in its source, "weight": ...} a line, and with data.source the "source"
RUN/source_weights.png     how they are spread
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fleetune import runs
from fleetune.schema import Recipe, RecipeError
from fleetune.train.cache import cache_folder, locked
from fleetune.train.data import Prepared
from fleetune.train.distributed import World, gather_objects
from fleetune.train.reweight import Floats, effective_sample_size
from fleetune.train.speed import available_memory
from fleetune.train.targets import target_split

SMALL = 0.25  # of the rows: an effective sample size that is warned of


def describe(recipe: Recipe, weights: Floats) -> dict[str, Any]:
    """For the report of what was prepared."""
    assert recipe.reweight is not None
    return {
        "method": recipe.reweight.method,
        "rows": len(weights),
        "effective_sample_size": effective_sample_size(weights),
        "at_the_highest": int((weights >= recipe.reweight.clip * (1 - 1e-9)).sum()),
    }


def warning(described: dict[str, Any]) -> str | None:
    size, rows = described["effective_sample_size"], described["rows"]
    if size >= SMALL * rows:
        return None
    return (
        f"reweight: a few rows of train have most of the weight: its {rows} rows tell as much as {size:.0f} of equal "
        "weight would (their effective sample size); a lower reweight.clip evens them out"
    )


def fitted(recipe: Recipe, data: Prepared) -> Floats:  # (rows of train,)
    """By the features of the recipe's pretrained encoder, or as this machine has stored it.

    Raises:
        ModelError: the encoder cannot be loaded.
        RecipeError: no weights can be fitted.
    """
    file = cache_folder().parent / "weights" / f"{_key(recipe, data)}.npy"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            values = _fit(recipe, data)
            beside = file.with_suffix(f".{os.getpid()}.npy")
            np.save(beside, values)
            beside.replace(file)
        found: Floats = np.load(file)
    return found


def _key(recipe: Recipe, data: Prepared) -> str:
    from fleetune.train.model import load_config
    from fleetune.train.teacher import weights_digest

    assert recipe.reweight is not None
    model = recipe.model
    of = [
        data.report["content"],
        model.model_name_or_path,
        model.revision,
        weights_digest(model, load_config(recipe, data.label_names)),
        recipe.data.max_length,
        recipe.reweight.model_dump(),
        recipe.training.seed,
        runs.versions(),
    ]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:32]


def _fit(recipe: Recipe, data: Prepared) -> Floats:
    from fleetune.train.features import load_encoder, split_features
    from fleetune.train.reweight import domain_classifier_weights, kernel_mean_matching_weights, matching_bytes

    settings, target = recipe.reweight, target_split(recipe, data)
    assert settings is not None
    assert target is not None
    rows, free = len(data.splits["train"]), available_memory()
    if settings.method == "kernel_mean_matching" and matching_bytes(rows) > free:
        raise RecipeError(
            f"reweight.method = {settings.method!r}: {rows} rows of train need {matching_bytes(rows) / 1e9:.1f} GB of "
            f"memory, and {free / 1e9:.1f} are free here; domain_classifier takes any number of rows"
        )
    encoder = load_encoder(recipe.model, recipe.data.max_length)
    sides = [split_features(encoder, split).double().numpy() for split in (data.splits["train"], target)]
    try:
        if settings.method == "domain_classifier":
            found = domain_classifier_weights(*sides, clip=settings.clip, seed=recipe.training.seed)
        else:
            found = kernel_mean_matching_weights(*sides, clip=settings.clip)
    except ValueError as error:
        raise RecipeError(f"reweight.method = {settings.method!r}: {error}") from None
    return found.values


# ---------------------------------------------------------------- of a run


def weighted(recipe: Recipe, data: Prepared, run: runs.Run, world: World) -> Prepared:
    """With the weights on train's rows: the run's own once it has a checkpoint. A collective: the main rank fits."""
    values = None
    if world.is_main:
        stored = run.path / "source_weights.jsonl"
        if stored.exists() and any(run.checkpoints.glob("step-*")):
            values = np.array([line["weight"] for line in runs.read_jsonl(stored)])
        else:  # until then the recipe may change, and the data
            stored.unlink(missing_ok=True)
            values = fitted(recipe, data)
    values = gather_objects(values, world)[0]
    train = dataclasses.replace(data.splits["train"], weights=values.astype(np.float32))
    return dataclasses.replace(data, splits={**data.splits, "train": train})


def write(recipe: Recipe, data: Prepared, run: runs.Run) -> None:
    """Into the run's folder, unless they are there."""
    stored, train = run.path / "source_weights.jsonl", data.splits["train"]
    if stored.exists():
        return
    assert train.weights is not None
    lines = []
    for number, weight in zip(train.index, train.weights, strict=True):
        source, row = data.place(int(number))
        lines.append(json.dumps(({"source": source} if source else {}) | {"row": row, "weight": float(weight)}))
    draw_histogram(run.path / "source_weights.png", np.asarray(train.weights, dtype=np.float64), recipe)
    beside = stored.with_suffix(".part")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(stored)


def draw_histogram(file: Path, weights: Floats, recipe: Recipe) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    described = describe(recipe, weights)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.hist(weights, bins=60, log=True)
    axis.set(xlabel="weight (their mean is 1)", ylabel=f"rows of train, of {len(weights)}")
    axis.set_title(f"{described['method']}: effective sample size {described['effective_sample_size']:.0f}")
    figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
