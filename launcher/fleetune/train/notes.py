"""What the main rank tells while it trains: metrics.jsonl first, then the person, and wandb from the file."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from fleetune import runs
from fleetune.schema import Recipe
from fleetune.train import tracking
from fleetune.train.checkpoint import Saved
from fleetune.train.metrics_log import GENERATED, SHIFT, SHIFT_PICTURE, MetricsLog
from fleetune.train.progress import Progress
from fleetune.train.speed import figures, step_line

NOTE_SECONDS = 1.0  # and no more than a hundredth of the time, where the disk is slow


def say(line: str) -> None:
    print(line, flush=True)


@dataclass
class _Books:
    run: runs.Run
    total_steps: int
    log: MetricsLog
    feeder: Popen[bytes] | None
    progress: Path  # of this attempt, for the ledger
    first_step: int
    saved_step: int
    began: float  # training, in seconds since the epoch
    restoring: float  # seconds that it took to read the checkpoint
    saving: float = 0.0  # seconds that training stood still for checkpoints
    noted: float = 0.0  # when `progress` was written last
    pause: float = NOTE_SECONDS
    told: str | None = None  # what the person knows of wandb


@dataclass
class Notes:
    """The main rank's; another rank's has no books and tells nothing."""

    books: _Books | None = None

    def passed(self, step: int) -> None:
        """A step is done, logged or not; writes down where this attempt is, once a second at most."""
        if self.books is not None and time.time() - self.books.noted > self.books.pause:
            _note_progress(self.books, step)

    def step(self, step: int, values: dict[str, Any], losses: dict[str, float]) -> None:
        """What is logged of a step, and the losses whose sum is its loss."""
        if self.books is None:
            return
        self.books.log.write(step, values)
        say(step_line(step, self.books.total_steps, values, losses))
        if self.books.feeder is not None:
            _tell(self.books, tracking.status(self.books.run.path))

    def evaluated(self, step: int, metrics: dict[str, float], is_best: bool) -> None:
        if self.books is None:
            return
        self.books.log.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        say(f"eval  {step}/{self.books.total_steps}  {figures(metrics)}{'  (best so far)' if is_best else ''}")

    def generated(self, step: int, texts: list[list[str]]) -> None:
        """Prompts, each with what the model said."""
        if self.books is None or not texts:
            return
        self.books.log.write(step, {GENERATED: texts})
        for prompt, text in texts:
            say(f"said  {step}/{self.books.total_steps}  {prompt!r} -> {text!r}")

    def shifted(self, step: int, shift: dict[str, Any]) -> None:
        """How far each target is from the source, before training and after it."""
        if self.books is None or not shift:
            return
        if (self.books.run.path / SHIFT_PICTURE).exists():
            self.books.log.write(step, {SHIFT: SHIFT_PICTURE})
        for name, moments in shift.items():
            found = (f"{when} {of['mmd']:.4g} (p {of['p_value']:.3g})" for when, of in moments.items())
            say(f"shift  MMD² between source and {name}: {', '.join(found)}")

    def unwritten(self) -> str | None:
        """Why what was logged is not on disk, if it is not: no checkpoint may be ahead of metrics.jsonl."""
        try:
            if self.books is not None:
                self.books.log.sync()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def saved(self, saved: Saved | None, step: int) -> None:
        """`step` is where training stands, which may be further than what was saved."""
        if self.books is None or saved is None:
            return
        if saved.problem is not None:
            say(
                f"checkpoint of step {saved.step} could not be written: {saved.problem}; those before it are whole, "
                "and training goes on until the next is due"
            )
            return
        times = {"checkpoint/blocked_seconds": saved.blocked_seconds, "checkpoint/seconds": saved.seconds}
        self.books.log.write(step, times)
        self.books.saved_step = saved.step
        self.books.saving += saved.blocked_seconds
        _note_progress(self.books, step)

    def end(self, step: int, finished: bool) -> None:
        if self.books is None:
            return
        if self.books.feeder is not None:
            _tell(self.books, tracking.stop_feeder(self.books.feeder, self.books.run.path, finished=finished))
        try:
            self.books.log.close()
        except OSError as error:  # all that a checkpoint needs has been synced with it
            say(f"{self.books.run.metrics} lacks its last lines: {error.strerror}")
        _note_progress(self.books, step)
        if not finished:
            say(f"stopped after step {step}/{self.books.total_steps}; the same command goes on from there")


def start_notes(
    run: runs.Run, recipe: Recipe, total_steps: int, progress: Progress, logs: Path, restoring: float
) -> Notes:
    """Opens the JSONL and starts the process that feeds wandb from it. Reading the checkpoint took `restoring` s."""
    wandb, feeder = recipe.tracking.wandb, None
    log = MetricsLog(run.metrics, progress.step, progress.evaluated_step)
    if wandb is not None:
        feeder = tracking.start_feeder(
            run.path,
            project=wandb.project,
            entity=wandb.entity,
            mode=wandb.mode,
            name=recipe.name,
            tags=wandb.tags,
            config_path=run.recipe_file,
            run_id=run.info()["id"],
            log_path=run.path / "logs" / "wandb.log",
        )
    path, first = logs / "progress.json", progress.step + 1
    books = _Books(run, total_steps, log, feeder, path, first, progress.step, time.time(), restoring)
    _note_progress(books, progress.step)
    return Notes(books)


def _note_progress(books: _Books, step: int) -> None:
    books.noted = time.time()
    noted = {
        "first_step": books.first_step,
        "step": step,
        "saved_step": books.saved_step,
        "began": round(books.began, 3),
        "restoring": round(books.restoring, 3),
        "saving": round(books.saving, 3),
        "time": round(books.noted, 3),
    }
    with contextlib.suppress(OSError):  # a full disk: only the ledger lacks it
        runs.write_json(books.progress, noted)
    books.pause = max(NOTE_SECONDS, 100 * (time.time() - books.noted))


def _tell(books: _Books, line: str | None) -> None:
    """Says a line about wandb once."""
    if line is not None and line != books.told:
        books.told = line
        say(line)
