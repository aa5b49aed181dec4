"""The one loop: what every rank runs for a run folder, read from top to bottom.

    python -m fleetune.train RUN
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune import runs
from fleetune.schema import LOWER_IS_BETTER, Recipe, best_metric_of, cut_batch, total_steps
from fleetune.train import checkpoint, distributed, engine as engines, model_folder, tracking, zero
from fleetune.train.batches import Augmenter, MicroBatch, collate, compose_epoch, cut_window
from fleetune.train.data import Ints, Prepared, prepare
from fleetune.train.distributed import World
from fleetune.train.evaluate import Forward, evaluate
from fleetune.train.model import build_model, load_tokenizer
from fleetune.train.objectives import Term, build_penalties, build_terms
from fleetune.train.optim import learning_rate


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient that is not finite: the step, the term, and the rows of the batch."""


@dataclass
class Progress:
    """Where training stands; stored in every checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    position: int = 0  # global batches of the epoch done
    examples: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluated_step: int | None = None
    evaluations_without_better: int = 0


def say(line: str) -> None:
    print(line, flush=True)


def train(run: runs.Run, world: World, logs: Path) -> None:
    """Trains RUN from where it stands to its end, and writes its model and eval.json.

    Raises:
        NonFiniteLoss: before the optimizer step; the last checkpoint is good.
        DataError, ModelError: what the recipe names is not there.
    """
    recipe = run.recipe()
    batch = cut_batch(recipe.training, world.world_size)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    total = total_steps(recipe.training, len(data.splits["train"]), batch)
    config = engines.deepspeed_config(recipe, batch)
    model = build_model(recipe, data.label_names, engines.weights_dtype(recipe), config)
    trainable = {name: zero.numel(p) for name, p in model.named_parameters() if p.requires_grad}
    parameters = sum(zero.numel(p) for p in model.parameters())
    terms, penalties = build_terms(recipe, world.device), build_penalties(recipe, trainable)
    engine = engines.start_engine(model, recipe, config, penalties)
    forward = _forward(engine, recipe, world)
    torch.manual_seed(int(np.random.SeedSequence([recipe.training.seed, world.rank]).generate_state(1)[0]))

    # Go on from the newest good checkpoint.
    progress = Progress()
    found, damaged = checkpoint.newest_good(run.checkpoints, world)
    if found is not None:
        progress = Progress(**checkpoint.load(engine, found, world))
    first_step, log, feeder = progress.step + 1, None, None
    if world.is_main:
        for problem in damaged:
            say(f"checkpoint {problem}; using the one before it")
        say(f"{'resuming at step ' + str(progress.step) if found else 'training'}: {total} steps of {batch}; "
            f"{parameters / 1e6:.1f}M parameters, {sum(trainable.values()) / 1e6:.1f}M trainable; "
            f"ZeRO-{recipe.deepspeed.zero_stage}, {_precision(recipe)}, {world.device.type}")
        log = tracking.MetricsLog(run.metrics, resume_step=progress.step)
        feeder = _start_tracking(run, recipe)
    clock = _Clock(world.device)
    logged = (progress.examples, progress.tokens, progress.train_seconds)

    while progress.step < total and not _stops_early(progress, recipe):
        batches = _epoch_batches(recipe, data, batch.global_batch_size, progress.epoch)
        augment = _augmenter(recipe, data, tokenizer, progress.epoch)
        for rows in batches[progress.position:]:
            step_start = time.perf_counter()
            with clock("data"):
                window = [collate(data.splits["train"], piece, tokenizer.pad_token_id, augment=augment).to(world.device)
                          for piece in cut_window(rows, batch, world.rank)]
            rate = learning_rate(recipe.training, progress.step, total)
            engines.set_learning_rate(engine, rate)
            losses, examples, tokens = _window(engine, forward, window, terms, clock, world, progress.step)
            with clock("step"):
                engine.step()
            losses.update(engine.penalty_values)
            grad_norm = engines.gradient_norm(engine)
            if not math.isfinite(grad_norm) and not recipe.training.fp16:
                raise NonFiniteLoss(f"step {progress.step + 1}: the gradient's norm is {grad_norm}; "
                                    f"rows {_rows(window, world)}")
            progress.step += 1
            progress.position += 1
            progress.examples += examples
            progress.tokens += tokens
            progress.train_seconds += time.perf_counter() - step_start

            # Log, from rank 0, to the JSONL first.
            if log is not None and (progress.step % recipe.training.logging_steps == 0 or progress.step == total):
                values = {"train/loss": sum(losses.values()), **{f"train/{name}": value for name, value in losses.items()},
                          "train/learning_rate": rate, "train/grad_norm": grad_norm,
                          "train/epoch": progress.epoch + progress.position / len(batches)}
                values |= _speed(progress, logged, clock.per_step(), parameters, world)
                logged = (progress.examples, progress.tokens, progress.train_seconds)
                log.write(progress.step, values)
                say(_line(progress.step, total, values))

            # Evaluate and save: at their steps, at the end of each epoch, and at the end.
            ends_epoch = progress.position == len(batches)
            if ends_epoch:
                progress.epoch, progress.position = progress.epoch + 1, 0
            last = progress.step == total
            if "validation" in data.splits and _is_due(progress.step, recipe.evaluation.eval_steps, ends_epoch or last):
                metrics = evaluate(forward, data.splits["validation"], recipe, tokenizer.pad_token_id, world)
                _judge(progress, metrics, recipe)
                if log is not None:
                    log.write(progress.step, {f"eval/{name}": value for name, value in metrics.items()})
                    say(f"eval  {progress.step}/{total}  " + _figures(metrics)
                        + ("  (best so far)" if progress.best_step == progress.step else ""))
            stop = last or _stops_early(progress, recipe)
            saves = recipe.checkpoint.save_steps or recipe.evaluation.eval_steps
            if stop or progress.best_step == progress.step or _is_due(progress.step, saves, ends_epoch):
                checkpoint.save(engine, run.checkpoints, progress.step, asdict(progress), world)
                if world.is_main:
                    runs.write_json(logs / "steps.json", {"first": first_step, "last": progress.step})
                    checkpoint.prune(run.checkpoints, recipe.checkpoint.save_total_limit, progress.best_step)
            if stop or ends_epoch:
                break

    # The best weights, the report on test, the model folder.
    if progress.best_step not in (None, progress.step):
        checkpoint.load_weights(engine, checkpoint.checkpoint_path(run.checkpoints, progress.best_step or 0))
    validation = progress.best_metrics or progress.last_metrics
    test = (evaluate(forward, data.splits["test"], recipe, tokenizer.pad_token_id, world) if "test" in data.splits else {})
    state = zero.gathered_state_dict(engine.module, world.is_main)
    if world.is_main:
        report = {
            "step": progress.step, "total_steps": total, "best_step": progress.best_step or progress.step,
            "validation": validation, "test": test, "parameters": parameters, "trainable_parameters": sum(trainable.values()),
            "train_seconds": round(progress.train_seconds, 3), "rows": data.report["rows"],
            "samples_per_second": round(progress.examples / max(progress.train_seconds, 1e-9), 3),
            "peak_memory_mb": round(_peak_memory_mb(world)),
        }
        model_folder.write(run, recipe, engine.module, state, tokenizer, data, report)
        runs.write_json(run.eval, report)
        say("done  " + "  ".join(f"{name}: {_figures(values)}" for name, values in (("validation", validation), ("test", test)) if values))
    distributed.barrier()
    if feeder is not None and (line := tracking.stop_feeder(feeder, run.path)):
        say(line)


def _window(engine: Any, forward: Forward, window: list[MicroBatch], terms: list[Term], clock: _Clock, world: World,
            step: int) -> tuple[dict[str, float], int, int]:
    """Forward and backward over one accumulation window: (each term's loss over all ranks, examples, tokens).

    Divisors are summed over all ranks and micro-batches first, and each term divides by its own; DeepSpeed averages
    gradients over ranks, which the factor world_size undoes. Raises NonFiniteLoss on every rank alike.
    """
    counts = torch.zeros(len(terms) + 2, dtype=torch.float64, device=world.device)
    for micro in window:
        counts += torch.stack([*(term.divisor(micro).double() for term in terms),
                               *torch.tensor([micro.examples, micro.tokens], dtype=torch.float64, device=world.device)])
    distributed.sum_over_ranks(counts)
    sums = torch.zeros(len(terms), dtype=torch.float64, device=world.device)
    for micro in window:
        with clock("forward"):
            logits = forward(micro.inputs)
            values = [term.weight * term.forward(logits, micro, counts[i]) for i, term in enumerate(terms)]
            sums += torch.stack([value.detach() for value in values]).double()
        with clock("backward"):
            engine.backward(torch.stack(values).sum() * world.world_size, scale_wrt_gas=False)
    losses = {term.name: value for term, value in zip(terms, distributed.sum_over_ranks(sums).tolist(), strict=True)}
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(f"step {step + 1}: {name} is {value}; rows {_rows(window, world)}")
    examples, tokens = counts[len(terms):].tolist()
    return losses, int(examples), int(tokens)


def _rows(window: list[MicroBatch], world: World) -> str:
    """The batch's rows by their numbers in the training data; a collective."""
    mine = [int(row) for micro in window if micro.examples for row in micro.rows]
    rows = sorted({row for rank in distributed.gather_objects(mine, world) for row in rank})
    return ", ".join(map(str, rows[:64])) + (f" and {len(rows) - 64} more" if len(rows) > 64 else "")


def _forward(engine: Any, recipe: Recipe, world: World) -> Forward:
    """The engine's forward pass to logits; at stage 0 with bf16 under autocast."""
    autocast = recipe.training.bf16 and not engines.keeps_bf16_weights(recipe)

    def forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        engine.module.train(torch.is_grad_enabled())
        with torch.autocast(world.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            return engine(**inputs).logits  # type: ignore[no-any-return]

    return forward


def _epoch_batches(recipe: Recipe, data: Prepared, global_batch_size: int, epoch: int) -> list[Ints]:
    return compose_epoch(data.splits["train"].lengths, global_batch_size, recipe.training.seed, epoch,
                         recipe.training.group_by_length)


def _augmenter(recipe: Recipe, data: Prepared, tokenizer: Any, epoch: int) -> Augmenter | None:
    if not recipe.data.augmentation:
        return None
    return Augmenter(data.splits["train"].texts, list(recipe.data.augmentation), tokenizer, recipe.data.max_length,
                     recipe.training.seed, epoch)


def _is_due(step: int, every: int | None, otherwise: bool) -> bool:
    return otherwise if every is None else step % every == 0 or otherwise


def _judge(progress: Progress, metrics: dict[str, float], recipe: Recipe) -> None:
    """Updates best and patience by the recipe's metric."""
    name = best_metric_of(recipe)
    value = metrics[name]
    sign = -1.0 if name in LOWER_IS_BETTER else 1.0
    progress.last_metrics, progress.evaluated_step = metrics, progress.step
    best = progress.best_value
    better = best is None or sign * (value - best) > recipe.evaluation.early_stopping_threshold
    if better and math.isfinite(value):
        progress.best_step, progress.best_value, progress.best_metrics = progress.step, value, metrics
        progress.evaluations_without_better = 0
    else:
        progress.evaluations_without_better += 1


def _stops_early(progress: Progress, recipe: Recipe) -> bool:
    patience = recipe.evaluation.early_stopping_patience
    return patience is not None and progress.evaluations_without_better >= patience


# ---------------------------------------------------------------- what is logged

class _Clock:
    """Seconds of each part of the step since it was last read; a GPU is waited for, so that parts are what they say."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.steps = device, dict[str, float](), 0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
        self.steps += part == "step"

    def per_step(self) -> dict[str, float]:
        values = {f"time/{part}": seconds / max(1, self.steps) for part, seconds in self.seconds.items()}
        self.seconds, self.steps = {}, 0
        return values


# Dense bf16 peak of the data sheets, in FLOP/s.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "MI300X": 1307e12, "A10": 125e12, "L4": 121e12}


def _speed(progress: Progress, logged: tuple[int, int, float], parts: dict[str, float], parameters: int,
           world: World) -> dict[str, float]:
    seconds = max(progress.train_seconds - logged[2], 1e-9)
    tokens = (progress.tokens - logged[1]) / seconds
    values = {"train/samples_per_second": (progress.examples - logged[0]) / seconds, "train/tokens_per_second": tokens,
              "train/memory_mb": _peak_memory_mb(world), **parts}
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
    if peak is not None:  # 6 FLOP a parameter and token, forward and backward (arXiv 2001.08361)
        values["train/mfu"] = 6.0 * parameters * tokens / (peak * world.world_size)
    return values


def _peak_memory_mb(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**20
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**20


def _line(step: int, total: int, values: dict[str, float]) -> str:
    return (f"step  {step}/{total}  loss {values['train/loss']:.4f}  lr {values['train/learning_rate']:.3g}  "
            f"grad norm {values['train/grad_norm']:.3f}  {values['train/samples_per_second']:.1f} samples/s  "
            f"{values['train/memory_mb']:.0f} MB")


def _figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _precision(recipe: Recipe) -> str:
    return "bf16" if recipe.training.bf16 else "fp16" if recipe.training.fp16 else "fp32"


def _start_tracking(run: runs.Run, recipe: Recipe) -> Any:
    wandb = recipe.tracking.wandb
    if wandb is None:
        return None
    return tracking.start_feeder(run.path, project=wandb.project, entity=wandb.entity, mode=wandb.mode, name=recipe.name,
                                 tags=wandb.tags, config_path=run.recipe_file, run_id=run.info()["id"],
                                 log_path=run.path / "logs" / "wandb.log")


