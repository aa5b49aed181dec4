"""The one loop: what every rank runs for a run folder, read from top to bottom.

python -m fleetune.train RUN
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fleetune import runs, sizes
from fleetune.schema import teachers_of
from fleetune.train import (
    cadence,
    checkpoint,
    distributed,
    domain_shift,
    engine,
    manifest,
    model_folder,
    signals,
    source_weights,
    zero,
)
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.distributed import World
from fleetune.train.lora import adapter_names, has_adapter
from fleetune.train.node_load import node_load
from fleetune.train.notes import Notes, say, start_notes
from fleetune.train.optim import learning_rate
from fleetune.train.progress import Progress
from fleetune.train.setup import Epoch, Setup, compose, read_window, set_up
from fleetune.train.speed import Meter, figures, peak_memory_mb
from fleetune.train.teacher import is_broken
from fleetune.train.terms import Features
from fleetune.train.window import look_ahead, weighted


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient that is not finite: the step, the term, and the rows of the batch."""


def train(run: runs.Run, world: World, logs: Path) -> bool:
    """Trains RUN from where it stands to its end, and writes its model and eval.json.

    Returns whether it is finished; if not, it was asked to stop, is saved, and goes on later.

    Raises:
        NonFiniteLoss: a loss, before the optimizer step, or a gradient; the last checkpoint is good either way.
        SaveFailed: no checkpoint can be written any more.
        DataError, ModelError: what the recipe names is not there.
    """
    setup = set_up(run, world)
    recipe, total = setup.recipe, setup.total_steps
    if recipe.reweight is not None and world.is_main:
        source_weights.write(recipe, setup.data, run)
    progress, restoring = _resume(setup)
    saver = checkpoint.Saver(setup.engine, run, world, recipe.checkpoint, progress.step)
    note = start_notes(run, recipe, total, progress, logs, restoring) if world.is_main else Notes()
    meter, step_times = Meter(progress, setup.parameters, world), deque[float](maxlen=100)
    epoch, composed = Epoch([], None, None), -1
    if progress.step == 0:
        _store_beginning(setup)

    while True:
        # The step's boundary: all ranks agree whether to stop, and whether a save in the background is written.
        signals.beat("step")
        stop, writing = distributed.any_rank([signals.stop_requested(), saver.is_writing], world)
        if saver.is_open and not writing:
            _finish_save(setup, saver, progress, step_times, note)
            signals.beat("step")
        if stop:
            break

        # Evaluate every eval_steps or epoch, and at the end.
        ends_epoch, last = progress.position == 0, progress.step >= total
        if progress.evaluated_step < progress.step and _evaluates(setup, progress):
            try:
                metrics = setup.evaluate_domains("validation")
            except signals.Stopped:
                continue
            progress.judge(metrics, recipe)
            note.evaluated(progress.step, metrics, progress.best_step == progress.step)
            note.generated(progress.step, setup.continued())
            signals.beat("step")

        # Save with each evaluation that is the best, every save_steps or evaluation, and at the end.
        last = last or progress.stops_early(recipe)
        is_best = progress.best_step == progress.step
        if saver.started_step < progress.step and (is_best or last or _saves(setup, saver, progress, ends_epoch)):
            _finish_save(setup, saver, progress, step_times, note)
            saver.start(progress.step, asdict(progress), progress.best_step, note.unwritten())
            if last or not recipe.checkpoint.in_background:
                _finish_save(setup, saver, progress, step_times, note, must=last)
            signals.beat("step")
        if last:
            break

        # One epoch's global batches: the rows of each, whatever the number of ranks.
        if composed != progress.epoch:
            epoch, composed = compose(setup, progress.epoch), progress.epoch

        # One optimizer step: this rank's micro-batches, forward and backward over all of them, update.
        start = time.perf_counter()
        batch = epoch.batches[progress.position]
        with meter.part("data"):
            window = read_window(setup, epoch, batch)
        rate = learning_rate(recipe.training, progress.step, total)
        engine.set_learning_rate(setup.engine, rate)
        try:
            losses, examples, tokens = forward_backward(setup, window, meter, progress.step + 1)
            with meter.part("step"):
                setup.engine.step()
            losses |= setup.engine.penalty_values
            grad_norm = engine.gradient_norm(setup.engine)
            if not math.isfinite(grad_norm) and not recipe.training.fp16:
                raise NonFiniteLoss(
                    f"step {progress.step + 1}: the gradient's norm is {grad_norm}; {_rows(setup, window)}"
                )
        except NonFiniteLoss:
            with contextlib.suppress(checkpoint.SaveFailed):  # the last checkpoint may still be on its way to the disk
                note.saved(saver.finish(), progress.step)
            raise
        step_times.append(time.perf_counter() - start)
        progress.count(epoch.rows(batch), examples, tokens, step_times[-1])
        note.passed(progress.step)
        passes = progress.epoch + progress.position / len(epoch.batches)
        if progress.position == len(epoch.batches):
            progress.epoch, progress.position = progress.epoch + 1, 0

        # Log: the JSONL first, from which wandb is fed.
        if progress.step % recipe.training.logging_steps == 0 or _evaluates(setup, progress) or progress.step == total:
            progress.logged_step = progress.step
            values = {
                "train/loss": sum(losses.values()),
                **{f"train/{name}": loss for name, loss in losses.items()},
                "train/learning_rate": rate,
                "train/grad_norm": grad_norm,
                "train/epoch": passes,
                "data/order": progress.order,
                **meter.read(progress),
                **node_load(world),
            }
            note.step(progress.step, values, losses)

    # Asked to stop: what is done since the last save is saved, and nothing of it is lost.
    if stop:
        note.saved(saver.finish(), progress.step)
        if saver.saved_step < progress.step:
            saver.start(progress.step, asdict(progress), progress.best_step, note.unwritten())
            note.saved(saver.finish(must=True), progress.step)
    finished = not stop and _finish(setup, progress, note)
    note.end(progress.step, finished)
    return finished


def _resume(setup: Setup) -> tuple[Progress, float]:
    """From the newest good checkpoint, or from the start; and the seconds that took."""
    start = time.perf_counter()
    found, damaged = manifest.newest_good(setup.run, setup.world)
    state, moved = checkpoint.load(setup.engine, found, setup.run, setup.world) if found is not None else ({}, None)
    progress = Progress(**state)
    if setup.world.is_main:
        for problem in damaged:
            say(f"checkpoint {problem}")
        if damaged and found is not None:
            say(f"checkpoint {found.name} is used")
        if moved is not None:
            say(f"checkpoint {moved}")
        precision = "bf16" if setup.recipe.training.bf16 else "fp16" if setup.recipe.training.fp16 else "fp32"
        begin = f"resuming after step {progress.step}" if found else "training"
        say(
            f"{begin}: {setup.total_steps} steps of {setup.batch}; "
            f"{sizes.count(setup.parameters)} parameters, {sizes.count(setup.trainable_parameters)} trainable; "
            f"ZeRO-{setup.recipe.deepspeed.zero_stage}, {precision}, {setup.world.device.type}"
        )
        _say_cadence(setup, progress)
    return progress, time.perf_counter() - start


def forward_backward(
    setup: Setup, window: list[MicroBatch], meter: Meter, step: int
) -> tuple[dict[str, float], int, int]:
    """Over one accumulation window: (each term's loss over all ranks, examples, tokens).

    Divisors are summed over all ranks and micro-batches first, and each term divides by its own; DeepSpeed averages
    gradients over ranks, which the factor world_size undoes. Raises NonFiniteLoss on every rank alike.
    """
    world, terms, done = setup.world, setup.terms, (step - 1) / setup.total_steps
    counts = torch.zeros(len(terms) + 2, dtype=torch.float64, device=world.device)
    for micro in window:
        for i, term in enumerate(terms):
            counts[i] += term.divisor(micro)
    counts[len(terms)], counts[len(terms) + 1] = (
        sum(micro.examples for micro in window),
        sum(micro.tokens for micro in window),
    )
    distributed.sum_over_ranks(counts)
    sums = torch.zeros(len(terms), dtype=torch.float64, device=world.device)
    reversal = {term.reversal: term.weight_at(done) for term in terms if term.reversal is not None}
    more = {"reversal": reversal} if reversal else {}
    with meter.part("forward"):
        replays = look_ahead(functools.partial(_draft, setup), terms, window)
    for micro, replay in zip(window, replays, strict=True):
        if setup.teachers:
            with meter.part("teacher"):
                taught = [teacher(micro) for teacher in setup.teachers]
        else:
            taught = []
        with meter.part("forward"):
            replay.restore()
            compute = functools.partial(weighted, terms, done, taught, micro, replay, counts)
            values = setup.forward({**micro.inputs, **more}, compute)
            sums += values[:-1].detach()
        with meter.part("backward"):
            setup.engine.backward(values[-1] * world.world_size, scale_wrt_gas=False)
    losses = dict(zip((term.name for term in terms), distributed.sum_over_ranks(sums).tolist(), strict=True))
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NonFiniteLoss(f"step {step}: {name} is {value}{_whose(setup, window)}; {_rows(setup, window)}")
    examples, tokens = counts[len(terms) :].tolist()
    return losses, int(examples), int(tokens)


def _draft(setup: Setup, micro: MicroBatch, compute: Callable[[Outputs], list[Features]]) -> list[Features]:
    return setup.forward(micro.inputs, compute, dropout=True)


def _store_beginning(setup: Setup) -> None:
    """What the pretrained weights make of source and target, for the report on what training made of it."""
    with contextlib.suppress(signals.Stopped):  # the loop stops before its first step, and the next attempt begins anew
        features = domain_shift.measure(setup)
        if setup.world.is_main:
            domain_shift.store(setup.run, "before", features)


def _finish(setup: Setup, progress: Progress, note: Notes) -> bool:
    """The best weights, the report on test, the model folder, eval.json; False where it was asked to stop."""
    run, world = setup.run, setup.world
    signals.beat("finish")
    if progress.best_step is not None and progress.best_step != progress.step:
        best = manifest.checkpoint_path(run.checkpoints, progress.best_step)
        if manifest.problem_of(best, run, world) is None:
            checkpoint.load_weights(setup.engine, best, world)
        else:
            progress.best_step, progress.best_metrics = None, progress.last_metrics
            if world.is_main:
                say(f"checkpoint {best.name}, the best one, is damaged or gone; the model is that of the last step")
    try:
        test = setup.evaluate_domains("test")
        features = domain_shift.measure(setup)
    except signals.Stopped:
        return False
    signals.beat("finish")
    metrics = {"validation": progress.best_metrics or progress.last_metrics, "test": test}
    module = setup.engine.module
    state = zero.gathered_state_dict(module, world.is_main, adapter_names(module) if has_adapter(module) else None)
    if world.is_main:
        report = {
            "step": progress.step,
            "total_steps": setup.total_steps,
            "best_step": progress.best_step or progress.step,
            **metrics,
            "parameters": setup.parameters,
            "trainable_parameters": setup.trainable_parameters,
            "rows": setup.data.report["rows"],
            "train_seconds": round(progress.train_seconds, 3),
            "samples_per_second": round(progress.examples / max(progress.train_seconds, 1e-9), 3),
            "peak_memory_mb": round(peak_memory_mb(world)),
        }
        model_folder.write(run, setup.recipe, module, state, setup.tokenizer, setup.data, report)
        shift = domain_shift.report(run, setup.recipe, features)
        note.shifted(progress.step, shift)
        runs.write_json(run.eval, defined(report | ({"shift": shift} if shift else {})))
        say("done  " + "  ".join(f"{split}: {figures(values)}" for split, values in metrics.items() if values))
    distributed.barrier()
    return True


def defined(value: Any) -> Any:
    """With None in the place of every number that is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: defined(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whose(setup: Setup, window: list[MicroBatch]) -> str:
    """Says so where it comes of a teacher and not of the student; a collective."""
    if not setup.teachers:
        return ""
    broken = distributed.any_rank([is_broken(teacher, window) for teacher in setup.teachers], setup.world)
    keys = [key for (key, _), bad in zip(teachers_of(setup.recipe), broken, strict=True) if bad]
    return f", and so is what {' and '.join(keys)} says of these rows" if keys else ""


def _rows(setup: Setup, window: list[MicroBatch]) -> str:
    """The global batch's rows by their numbers in the training data, of named sources with the name; a collective."""
    mine = [int(row) for micro in window if micro.examples for row in micro.rows]
    rows = sorted({row for rank in distributed.gather_objects(mine, setup.world) for row in rank})
    places = [" ".join(str(part) for part in setup.data.place(row) if part is not None) for row in rows[:64]]
    return "training rows " + ", ".join(places) + (f" and {len(rows) - 64} more" if len(rows) > 64 else "")


def _saves(setup: Setup, saver: checkpoint.Saver, progress: Progress, ends_epoch: bool) -> bool:
    """Whether a save is due by save_steps; alike on every rank."""
    save_steps = setup.recipe.checkpoint.save_steps
    if save_steps == "auto":  # one that is still being written is not waited for: that would stop training
        every = cadence.steps_between_saves(progress.save_seconds, progress.step_seconds, setup.mtbf_hours)
        return not saver.is_open and progress.step - saver.started_step >= every
    return _due(progress.step, save_steps or setup.recipe.evaluation.eval_steps, ends_epoch, last=False)


def _finish_save(
    setup: Setup, saver: checkpoint.Saver, progress: Progress, step_times: deque[float], note: Notes, must: bool = False
) -> None:
    """Makes the open save, if there is one, a checkpoint, and takes down what it cost for `save_steps: auto`.

    A collective. Raises SaveFailed as Saver.finish does.
    """
    saved = saver.finish(must)
    note.saved(saved, progress.step)
    if setup.recipe.checkpoint.save_steps != "auto" or saved is None or saved.problem is not None or not step_times:
        return
    is_first = progress.save_seconds is None
    # The slowest rank's: the others wait for it. A step's median, so that a first one that compiles is no matter.
    measured = [saved.blocked_seconds, statistics.median(step_times)]
    blocked, progress.step_seconds = distributed.max_over_ranks(measured, setup.world)
    progress.save_seconds = cadence.averaged(progress.save_seconds, blocked)
    if is_first:
        _say_cadence(setup, progress)


def _say_cadence(setup: Setup, progress: Progress) -> None:
    known = setup.recipe.checkpoint.save_steps == "auto" and setup.world.is_main
    if known and progress.save_seconds is not None and progress.step_seconds is not None:
        is_given = setup.recipe.checkpoint.mtbf_hours is not None
        say(cadence.sentence(progress.save_seconds, progress.step_seconds, setup.mtbf_hours, is_given))


def _due(step: int, every: int | None, ends_epoch: bool, last: bool) -> bool:
    return last or (ends_epoch if every is None else step % every == 0)


def _evaluates(setup: Setup, progress: Progress) -> bool:
    """Whether this step is followed by an evaluation."""
    last, ends_epoch = progress.step >= setup.total_steps, progress.position == 0
    eval_steps = setup.recipe.evaluation.eval_steps
    return "validation" in setup.data.splits and _due(progress.step, eval_steps, ends_epoch, last)
