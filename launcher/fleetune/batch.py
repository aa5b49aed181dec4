"""How a global batch is cut into ranks and micro-batches, and how many steps a run comes to."""

from __future__ import annotations

from dataclasses import dataclass

from fleetune.schema import RecipeError, Training


@dataclass(frozen=True)
class Batch:
    """How a global batch is cut: `global_batch_size` examples = world_size x accumulation x micro_batch_size."""

    global_batch_size: int
    world_size: int
    gradient_accumulation_steps: int
    micro_batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} examples a step = {self.world_size} rank(s) x "
            f"{self.gradient_accumulation_steps} micro-batch(es) x {self.micro_batch_size}"
        )


def cut_batch(training: Training, world_size: int) -> Batch:
    """Raises RecipeError where the batch does not divide over the ranks."""
    per_device, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.global_batch_size is None:
        accumulation = accumulation or 1
        return Batch(per_device * accumulation * world_size, world_size, accumulation, per_device)
    key = f"training.global_batch_size = {training.global_batch_size}"
    per_rank, rest = divmod(training.global_batch_size, world_size)
    if rest or not per_rank:
        raise RecipeError(
            f"{key}: does not divide over {world_size} ranks; the nearest that does: "
            f"{max(1, round(training.global_batch_size / world_size)) * world_size}"
        )
    accumulation = accumulation or next(
        a for a in range(1, per_rank + 1) if per_rank % a == 0 and per_rank // a <= per_device
    )
    micro, rest = divmod(per_rank, accumulation)
    if rest or micro > per_device:
        raise RecipeError(
            f"{key}: {per_rank} examples a rank are not {accumulation} micro-batches of at most {per_device} "
            "(training.per_device_train_batch_size)"
        )
    return Batch(training.global_batch_size, world_size, accumulation, micro)


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
