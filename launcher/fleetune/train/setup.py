"""All that one run trains with: data, model, teachers, losses and engine, and its batches as tensors."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fleetune import runs
from fleetune.batch import Batch, cut_batch, total_steps
from fleetune.schema import Recipe, hours_between_failures
from fleetune.train import engine, zero
from fleetune.train.alignment import Asked, Outputs, add_projections, asked_by, matches_of, run
from fleetune.train.batches import Augmenter, MicroBatch, collate, cut_window
from fleetune.train.data import Prepared, prepare
from fleetune.train.distributed import World
from fleetune.train.evaluate import evaluate
from fleetune.train.model import build_model, load_tokenizer
from fleetune.train.objectives import Term, build_penalties, build_terms
from fleetune.train.sources import Ints
from fleetune.train.teacher import LoadedTeacher, load_teachers
from fleetune.train.teacher_cache import CachedTeacher


@dataclass
class Setup:
    """All that one run trains with."""

    run: runs.Run
    recipe: Recipe
    world: World
    batch: Batch
    tokenizer: Any
    data: Prepared
    total_steps: int
    terms: list[Term]
    teachers: list[LoadedTeacher | CachedTeacher]
    asked: Asked  # of the student and its teachers, beside their logits
    engine: Any
    parameters: int
    trainable_parameters: int
    mtbf_hours: float

    def forward(self, inputs: dict[str, torch.Tensor], asked: Asked = Asked()) -> Outputs:  # noqa: B008
        """The engine's forward pass: with dropout where gradients are wanted."""
        if self.engine.module.training != torch.is_grad_enabled():
            self.engine.module.train(torch.is_grad_enabled())
        with torch.autocast(self.world.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            return run(self.engine, self.engine.module, inputs, asked)

    @property
    def autocast(self) -> bool:
        return self.recipe.training.bf16 and not engine.keeps_bf16_weights(self.recipe)

    def evaluate(self, split: str) -> dict[str, float]:
        def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.forward(inputs).logits

        return evaluate(logits, self.data.splits[split], self.recipe, self.tokenizer.pad_token_id, self.world)


def set_up(run: runs.Run, world: World, dtype: torch.dtype | None = None) -> Setup:
    """Data, models and engine for RUN; with `dtype` all weights are converted to it.

    Raises DataError, ModelError, RecipeError: what the recipe names is not there, or does not fit any more.
    """
    recipe = run.recipe()
    batch = cut_batch(recipe.training, world.world_size)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    config = engine.deepspeed_config(recipe, batch)
    model = build_model(recipe, data.label_names, engine.weights_dtype(recipe), config)
    sizes = {name: zero.numel(p) for name, p in model.named_parameters()}
    trainable = {name: sizes[name] for name, p in model.named_parameters() if p.requires_grad}
    teachers = load_teachers(recipe, data.label_names, tokenizer, batch, world, dtype)
    configs = [teacher.config for teacher in teachers if isinstance(teacher, LoadedTeacher)]
    matches = matches_of(recipe, model.config, configs)
    add_projections(model, matches, recipe)
    if dtype is not None:
        model.to(dtype)
    started = engine.start_engine(model, recipe, config, build_penalties(recipe, trainable))
    # Dropout differs from rank to rank, and from the weights' own draw.
    torch.manual_seed(int(np.random.SeedSequence([recipe.training.seed, world.rank]).generate_state(1)[0]))
    return Setup(
        run,
        recipe,
        world,
        batch,
        tokenizer,
        data,
        total_steps(recipe.training, len(data.splits["train"]), batch),
        build_terms(recipe, world.device, matches, [teacher.weight for teacher in teachers]),
        teachers,
        asked_by(recipe),
        started,
        sum(sizes.values()),
        sum(trainable.values()),
        recipe.checkpoint.mtbf_hours or hours_between_failures(run.info()["layout"]["nodes"]),
    )


def read_window(setup: Setup, rows: Ints, augment: Augmenter | None) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, on its device."""
    multiple = 8 if setup.world.device.type == "cuda" else 1  # the widths that a GPU's matrix units like
    return [
        collate(setup.data.splits["train"], piece, setup.tokenizer.pad_token_id, multiple, augment).to(
            setup.world.device
        )
        for piece in cut_window(rows, setup.batch, setup.world.rank)
    ]


def augmenter(setup: Setup, epoch: int) -> Augmenter | None:
    recipe = setup.recipe
    if not recipe.data.augmentation:
        return None
    return Augmenter(
        setup.data.splits["train"].texts,
        list(recipe.data.augmentation),
        setup.tokenizer,
        recipe.data.max_length,
        recipe.training.seed,
        epoch,
    )
