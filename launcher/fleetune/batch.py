"""How a global batch is cut into ranks and micro-batches, and how many steps a run comes to."""

from __future__ import annotations

from dataclasses import dataclass

from fleetune.schema import RecipeError, Training


@dataclass(frozen=True)
class Batch:
    """How a global batch is cut: `global_batch_size` examples = readers x accumulation x micro_batch_size.

    A reader is a rank, or `sequence_parallel_size` neighbouring ranks that share their sequences.
    """

    global_batch_size: int
    world_size: int
    gradient_accumulation_steps: int
    micro_batch_size: int
    sequence_parallel_size: int = 1

    @property
    def readers(self) -> int:
        return self.world_size // self.sequence_parallel_size

    def __str__(self) -> str:
        size = self.sequence_parallel_size
        readers = f"{self.readers} rank(s)" if size == 1 else f"{self.readers} group(s) of {size} ranks"
        return (
            f"{self.global_batch_size} examples a step = {readers} x "
            f"{self.gradient_accumulation_steps} micro-batch(es) x {self.micro_batch_size}"
        )


def cut_batch(training: Training, world_size: int) -> Batch:
    """Raises RecipeError where the batch does not divide over the ranks, or these not over sequences."""
    per_device, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    size = training.sequence_parallel_size
    if world_size % size:
        raise RecipeError(
            f"training.sequence_parallel_size = {size}: {world_size} rank(s) do not divide into groups of {size}"
        )
    readers = world_size // size
    if training.global_batch_size is None:
        accumulation = accumulation or 1
        return Batch(per_device * accumulation * readers, world_size, accumulation, per_device, size)
    key = f"training.global_batch_size = {training.global_batch_size}"
    per_reader, rest = divmod(training.global_batch_size, readers)
    if rest or not per_reader:
        whom = f"{readers} ranks" if size == 1 else f"{readers} groups of {size} ranks"
        raise RecipeError(
            f"{key}: does not divide over {whom}; the nearest that does: "
            f"{max(1, round(training.global_batch_size / readers)) * readers}"
        )
    accumulation = accumulation or next(
        a for a in range(1, per_reader + 1) if per_reader % a == 0 and per_reader // a <= per_device
    )
    micro, rest = divmod(per_reader, accumulation)
    if rest or micro > per_device:
        whom = "a rank" if size == 1 else f"for {size} ranks"
        raise RecipeError(
            f"{key}: {per_reader} examples {whom} are not {accumulation} micro-batches of at most {per_device} "
            "(training.per_device_train_batch_size)"
        )
    return Batch(training.global_batch_size, world_size, accumulation, micro, size)


def steps_per_epoch(rows: int, batch: Batch) -> int:
    """The last batch of an epoch may be short."""
    return -(-rows // batch.global_batch_size)


def total_steps(training: Training, rows: int, batch: Batch) -> int:
    """Optimizer steps of the whole run."""
    return training.max_steps or max(1, round(training.num_train_epochs * steps_per_epoch(rows, batch)))


def batch_warning(rows: int, batch: Batch) -> str | None:
    """Where the training data does not fill one global batch."""
    if batch.global_batch_size <= rows:
        return None
    return (
        f"the global batch of {batch.global_batch_size} examples is larger than train, so that each step is a whole "
        f"epoch of {rows}; training.global_batch_size sets it"
    )
