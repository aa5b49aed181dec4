"""How far each target is from the source in the model's own features, before the first step and after the last.

RUN/shift/before.safetensors, after.safetensors   by split, (rows, D): the mean over each text's tokens of what the last
                                                  layer gives, as `fleetune shift` has it
RUN/shift/shift.png                               both, in the plane of their first two principal components

MMD² is unbiased, over a sample of the rows of each side, with a permutation test's p-value. Its kernel's bandwidth is
that of the features it compares, so that features which only shrink are no nearer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fleetune import runs
from fleetune.schema import Recipe, target_splits
from fleetune.train.alignment import Asked, Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.data import Prepared, Split
from fleetune.train.evaluate import rows_of
from fleetune.train.feature_plot import draw_features
from fleetune.train.metrics_log import SHIFT_PICTURE
from fleetune.train.notes import say
from fleetune.train.setup import Setup
from fleetune.train.shift import two_sample
from fleetune.train.sources import Ints

Features = dict[str, torch.Tensor]  # by split: (rows, D) in fp32, on the CPU

SAMPLED = 0x5417F7  # sets the draw apart from others of the same seed
PERMUTATIONS = 1000


def samples(recipe: Recipe, data: Prepared) -> dict[str, Split]:
    """So many rows of the source and of each target as the recipe wants; none where there is nothing to compare."""
    found = {name: data.splits[name] for name in ("train", *target_splits(recipe)) if len(data.splits[name]) > 1}
    if "train" not in found or len(found) < 2 or recipe.evaluation.shift_rows is None:
        return {}
    return {name: _sample(split, recipe.evaluation.shift_rows, recipe.training.seed) for name, split in found.items()}


def _sample(split: Split, count: int, seed: int) -> Split:
    random = np.random.default_rng(np.random.SeedSequence([seed, SAMPLED]))
    return only(split, np.sort(random.permutation(len(split))[:count]))


def only(split: Split, rows: Ints) -> Split:
    """These rows, without what only training needs."""
    spans = [slice(split.offsets[row], split.offsets[row + 1]) for row in rows]
    types = split.token_type_ids
    return Split(
        np.concatenate([split.input_ids[span] for span in spans]),
        np.concatenate([[0], np.cumsum(split.lengths[rows])]),
        None if types is None else np.concatenate([types[span] for span in spans]),
        None,
        None,
        split.index[rows],
        None,
    )


def measure(setup: Setup) -> Features:
    """Of the weights as they are, on every rank; a collective.

    Empty where the recipe has no target, or the model has an encoder and a decoder and so no one last layer. The
    batches are those of training: the states of all layers are held at once.

    Raises Stopped on every rank, when one of them is asked to stop.
    """
    if getattr(setup.engine.module.config, "is_encoder_decoder", False):
        return {}

    def forward(inputs: dict[str, Any], compute: Callable[[Outputs], torch.Tensor]) -> torch.Tensor:
        return setup.forward(inputs, compute, asked=Asked(hidden_states=True))

    size = setup.batch.micro_batch_size
    return {
        name: torch.from_numpy(rows_of(forward, _mean_state, split, size, setup.padding_id, setup.world)).float()
        for name, split in samples(setup.recipe, setup.data).items()
    }


def _mean_state(batch: MicroBatch, outputs: Outputs) -> torch.Tensor:  # (B, D)
    mask = batch.inputs["attention_mask"][:, :, None].float()
    states: torch.Tensor = outputs.hidden_states[-1].float() * mask
    return states.sum(1) / mask.sum(1)


# ---------------------------------------------------------------- of a run, by the main rank


def store(run: runs.Run, when: str, features: Features) -> None:
    """By rename, so that half a file is never read."""
    if features:
        (run.path / "shift").mkdir(exist_ok=True)
        beside = run.path / "shift" / f".{when}.{os.getpid()}"
        save_file(features, beside)
        beside.replace(run.path / "shift" / f"{when}.safetensors")


def report(run: runs.Run, recipe: Recipe, after: Features) -> dict[str, Any]:
    """By target: {before: {mmd, p_value, rows: [source, target]}, after: ...}; stores the features, and draws them.

    Rows that are not finite are left out of the figures and the picture, and so is a side with less than two others. A
    run that has lost what it had of its beginning tells its end alone. Figures that overflow are NaN.
    """
    if not after:
        return {}
    store(run, "after", after)
    moments = {when: _finite(when, features) for when, features in (_beginning(run) | {"after": after}).items()}
    found: dict[str, Any] = {}
    for when, features in moments.items():
        for split in sorted(features.keys() - {"train"}):
            test = two_sample(features["train"], features[split], PERMUTATIONS, recipe.training.seed)
            rows = [len(features["train"]), len(features[split])]
            moment = {"mmd": test.mmd, "p_value": test.p_value, "rows": rows}
            found.setdefault(shown(split), {})[when] = moment
    panels = {}
    for when, features in moments.items():
        sides = sorted(features, key=lambda split: (split != "train", split))
        apart = ", ".join(f"{found[shown(split)][when]['mmd']:.3g}" for split in sides[1:])
        panels[f"{when} training: MMD² {apart}"] = {shown(split): features[split] for split in sides}
    _draw(run, {title: sides for title, sides in panels.items() if sides})
    return found


def _beginning(run: runs.Run) -> dict[str, Features]:
    try:
        return {"before": load_file(run.path / "shift" / "before.safetensors")}
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError) as error:
        say(f"shift  the features of before training cannot be read: {error}")
        return {}


def _finite(when: str, features: Features) -> Features:
    """Says what it leaves out; empty where nothing is left to compare."""
    found = {}
    for split, rows in features.items():
        kept = rows[rows.isfinite().all(1)]
        if len(kept) < len(rows):
            say(
                f"shift  {when} training: {len(rows) - len(kept)} of the {len(rows)} rows of {shown(split)} have "
                "features that are not finite, and are left out"
            )
        if len(kept) > 1:
            found[split] = kept
    return found if "train" in found and len(found) > 1 else {}


def _draw(run: runs.Run, panels: dict[str, Features]) -> None:
    """By rename; says so where it cannot be drawn."""
    if not panels:
        return
    picture = run.path / SHIFT_PICTURE
    beside = picture.with_name(f".{picture.name}.{os.getpid()}")
    try:
        draw_features(beside, panels)
        beside.replace(picture)
    except Exception as error:  # of many kinds: no picture is worth a training that is done
        beside.unlink(missing_ok=True)
        say(f"shift  the picture could not be drawn: {type(error).__name__}: {error}")


def shown(split: str) -> str:
    """As the recipe names it; data.train has no name."""
    return "source" if split == "train" else split.split(".")[1]
