"""All that one run trains with: data, model, teachers, losses and engine, and its batches as tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fleetune import runs
from fleetune.batch import Batch, cut_batch, total_steps
from fleetune.losses import OF_DOMAINS
from fleetune.schema import Recipe, RecipeError, hours_between_failures
from fleetune.train import engine, source_weights, zero
from fleetune.train.alignment import Asked, Outputs, add_projections, asked_by, matches_of, run
from fleetune.train.batches import (
    Augmenter,
    MicroBatch,
    collate,
    collate_tokens,
    compose_epoch,
    cut_slots,
    cut_window,
    with_target,
)
from fleetune.train.data import Prepared, Split, prepare
from fleetune.train.distributed import World, gather_objects
from fleetune.train.domains import add_domain_heads
from fleetune.train.evaluate import evaluate
from fleetune.train.generate import continued, end_tokens, exact_match, generator
from fleetune.train.head import check_head, has_fused_head
from fleetune.train.model import build_model, load_tokenizer, padding_id
from fleetune.train.objectives import build_penalties, build_terms
from fleetune.train.packing import check_packs, pack
from fleetune.train.sequence_parallel import check_shared, share_of, share_sequences
from fleetune.train.sources import Ints
from fleetune.train.targets import OF_TARGETS, partners, target_split
from fleetune.train.teacher import LoadedTeacher, load_teachers, shared_vocabulary
from fleetune.train.teacher_cache import CachedTeacher
from fleetune.train.terms import Term
from fleetune.train.token_cache import CachedTokens

T = TypeVar("T")


@dataclass
class Setup:
    """All that one run trains with."""

    run: runs.Run
    recipe: Recipe
    world: World
    batch: Batch
    tokenizer: Any
    data: Prepared
    target: Split | None  # the rows of all target sets, where a loss is between them and the source
    total_steps: int
    terms: list[Term]
    teachers: list[LoadedTeacher | CachedTeacher | CachedTokens]
    asked: Asked  # of the student and its teachers, beside their logits
    engine: Any
    parameters: int
    trainable_parameters: int
    mtbf_hours: float

    def forward(
        self,
        inputs: dict[str, Any],
        compute: Callable[[Outputs], T],
        *,
        asked: Asked | None = None,
        dropout: bool | None = None,
    ) -> T:
        """What `compute` makes of the engine's forward pass: with dropout where gradients are wanted, or as it says.

        The outputs have what training asks for beside the logits, or what is `asked`.
        """
        dropout = torch.is_grad_enabled() if dropout is None else dropout
        if self.engine.module.training != dropout:
            self.engine.module.train(dropout)
        with self._precision():
            return run(self.engine, self.engine.module, inputs, asked or self.asked, compute)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        is_mixed = self.recipe.training.bf16 and not engine.keeps_bf16_weights(self.recipe)
        return torch.autocast(self.world.device.type, torch.bfloat16) if is_mixed else contextlib.nullcontext()

    def evaluate(self, split: str) -> dict[str, float]:
        forward = functools.partial(self.forward, asked=Asked())
        rows, recipe, evaluation = self.data.splits[split], self.recipe, self.recipe.evaluation
        metrics = evaluate(forward, rows, recipe, self.padding_id, self.world, self.data.domains(split))
        if evaluation.exact_match is not None:
            size = evaluation.per_device_eval_batch_size
            metrics["exact_match"] = exact_match(
                evaluation.exact_match, rows, self.tokenizer, self.generate, size, self.world
            )
        return metrics

    def evaluate_domains(self, split: str) -> dict[str, float]:
        """The split's metrics, and as NAME/METRIC those of each named source and target that has such a split."""
        metrics = self.evaluate(split) if split in self.data.splits else {}
        for name in self.recipe.data.target:
            if (target := f"target.{name}.{split}") in self.data.splits:
                metrics |= {f"{name}/{metric}": value for metric, value in self.evaluate(target).items()}
        return metrics

    def continued(self) -> list[list[str]]:
        """The recipe's prompts with what the model says; a collective on ZeRO-3."""
        if self.recipe.task != "causal_lm":
            return []
        return continued(self.recipe, self.tokenizer, self.data.report["format"]["train"], self.generate)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        self.engine.module.eval()
        partitioned = self.recipe.deepspeed.zero_stage == 3 and self.world.world_size > 1
        ends = end_tokens(self.engine.module, self.tokenizer, self.data.report["ends"]["train"])
        generate = generator(self.engine.module, self.padding_id, ends, self.world.device, partitioned=partitioned)
        with self._precision():
            return generate(prompts, max_new_tokens)

    @property
    def padding_id(self) -> int:
        found = padding_id(self.tokenizer)
        assert found is not None
        return found


def _check_alike(data: Prepared, world: World) -> None:
    """Every node prepares its data itself. Raises RecipeError, on every rank, where what they have differs."""
    found = gather_objects(data.report["content"], world)
    others = [rank for rank, content in enumerate(found) if content != found[0]]
    if others:
        raise RecipeError(
            f"data: {len(others)} of {len(found)} ranks have read other data than rank 0, the first of them rank "
            f"{others[0]}: a file that stands on each node's own disk is not the same everywhere"
        )


def set_up(run: runs.Run, world: World, dtype: torch.dtype | None = None) -> Setup:
    """Data, models and engine for RUN; with `dtype` all weights are converted to it.

    Raises DataError, ModelError, RecipeError: what the recipe names is not there, or does not fit any more.
    """
    recipe = run.recipe()
    batch = cut_batch(recipe.training, world.world_size)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    _check_alike(data, world)
    if recipe.reweight is not None:
        data = source_weights.weighted(recipe, data, run, world)
    config = engine.deepspeed_config(recipe, batch)
    model = build_model(recipe, data.label_names, engine.weights_dtype(recipe), config)
    sizes = {name: zero.numel(p) for name, p in model.named_parameters()}
    trainable = {name: sizes[name] for name, p in model.named_parameters() if p.requires_grad}
    teachers = load_teachers(recipe, data.label_names, tokenizer, batch, world, dtype)
    configs = [teacher.config for teacher in teachers if isinstance(teacher, LoadedTeacher)]
    matches = matches_of(recipe, model.config, configs)
    add_projections(model, matches, recipe)
    add_domain_heads(model, recipe)
    if dtype is not None:
        model.to(dtype)
    if batch.sequence_parallel_size > 1:
        share_sequences(model, batch.sequence_parallel_size, world)
    started = engine.start_engine(model, recipe, config, build_penalties(recipe, trainable))
    if has_fused_head(model):
        started.module.eval()
        check_head(started, recipe, model.config, world.device)
    if recipe.data.packing:
        started.module.eval()
        check_packs(started, model.config, batch.micro_batch_size, world.device)
    if batch.sequence_parallel_size > 1:
        started.module.eval()
        check_shared(started, batch.sequence_parallel_size, model.config, world)
    # Dropout differs from rank to rank, and from the weights' own draw.
    torch.manual_seed(int(np.random.SeedSequence([recipe.training.seed, world.rank]).generate_state(1)[0]))
    return Setup(
        run,
        recipe,
        world,
        batch,
        tokenizer,
        data,
        target_split(recipe, data) if any(loss.kind in OF_DOMAINS for loss in recipe.losses) else None,
        total_steps(recipe.training, data.report["sequences"], batch),
        build_terms(
            recipe,
            world.device,
            matches,
            [teacher.weight for teacher in teachers],
            shared_vocabulary(model.config, teachers),
        ),
        teachers,
        asked_by(recipe),
        started,
        sum(sizes.values()),
        sum(trainable.values()),
        recipe.checkpoint.mtbf_hours or hours_between_failures(run.info()["layout"]["nodes"]),
    )


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data, composed without regard to the number of ranks."""

    batches: list[Ints]  # each global batch: rows, or packs by their numbers
    packs: list[Ints] | None  # the rows of each pack
    augment: Augmenter | None
    partners: Ints | None = None  # (rows,) each source row's row of the target
    augment_target: Augmenter | None = None

    def rows(self, batch: Ints) -> Ints:
        """All that are read: the source's, then the target's."""
        rows = batch if self.packs is None else np.concatenate([self.packs[number] for number in batch])
        return rows if self.partners is None else np.concatenate([rows, self.partners[rows]])


def compose(setup: Setup, epoch: int) -> Epoch:
    training, data = setup.recipe.training, setup.recipe.data
    lengths, packs = setup.data.splits["train"].lengths, None
    if data.packing:
        packs = pack(lengths, data.max_length, training.seed, epoch)
        lengths = np.array([lengths[rows].sum() for rows in packs])
    size = setup.batch.global_batch_size
    batches = compose_epoch(lengths, size, training.seed, epoch, training.group_by_length)
    if setup.target is None:
        return Epoch(batches, packs, augmenter(setup, setup.data.splits["train"], epoch))
    return Epoch(
        batches,
        packs,
        augmenter(setup, setup.data.splits["train"], epoch),
        partners(lengths, setup.target.lengths, training.seed, epoch, training.group_by_length),
        augmenter(setup, setup.target, epoch, (OF_TARGETS,)),
    )


def read_window(setup: Setup, epoch: Epoch, batch: Ints) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch, on its device."""
    size = setup.batch.sequence_parallel_size
    multiple = size * (8 if setup.world.device.type == "cuda" else 1)  # the widths that a GPU's matrix units like
    split, padding = setup.data.splits["train"], setup.padding_id
    if epoch.partners is not None:
        return _read_both(setup, epoch, epoch.partners, batch, multiple)
    pieces = cut_window(batch, setup.batch, setup.world.rank)
    if epoch.packs is None:
        micros = [collate(split, piece, padding, multiple, epoch.augment) for piece in pieces]
    else:
        packs = epoch.packs
        micros = [collate_tokens(split, [packs[n] for n in piece], padding, multiple, packed=True) for piece in pieces]
    if size > 1:
        micros = [share_of(micro, setup.world.rank % size, size) for micro in micros]
    return [micro.to(setup.world.device) for micro in micros]


def _read_both(setup: Setup, epoch: Epoch, partners_: Ints, batch: Ints, multiple: int) -> list[MicroBatch]:
    source, target, padding = setup.data.splits["train"], setup.target, setup.padding_id
    assert target is not None
    micros = []
    for slot in cut_slots(batch, setup.batch):
        rows = slot[setup.world.rank]
        own = collate(source, rows, padding, multiple, epoch.augment)
        other = collate(target, partners_[rows], padding, multiple, epoch.augment_target)
        micros.append(with_target(own, other, padding, tuple(map(len, slot))).to(setup.world.device))
    return micros


def augmenter(setup: Setup, split: Split, epoch: int, stream: tuple[int, ...] = ()) -> Augmenter | None:
    recipe = setup.recipe
    if not recipe.data.augmentation:
        return None
    return Augmenter(
        split.texts,
        list(recipe.data.augmentation),
        setup.tokenizer,
        recipe.data.max_length,
        recipe.training.seed,
        epoch,
        stream,
    )
