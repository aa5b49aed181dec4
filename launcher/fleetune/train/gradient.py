"""The gradient of one global batch, as training forms it: reduced over ranks, with its penalties, not yet clipped.

    python -m fleetune.train.gradient RUN OUT.safetensors [--batch K] [--float64]

Every rank runs it, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as for training. Rank 0 writes
every trainable parameter's gradient by its name; the metadata holds the losses and the batch's rows as JSON. RUN is
only read, and K counts the first epoch's global batches.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from fleetune import runs
from fleetune.schema import RecipeError
from fleetune.train import distributed, engine
from fleetune.train.distributed import World
from fleetune.train.loop import forward_backward
from fleetune.train.progress import Progress
from fleetune.train.quantization import is_quantized
from fleetune.train.rank import run_rank
from fleetune.train.setup import Epoch, compose, read_window, set_up
from fleetune.train.sources import Ints
from fleetune.train.speed import Meter


@dataclass(frozen=True)
class Gradient:
    tensors: dict[str, torch.Tensor]  # by parameter, on CPU; on the main rank alone
    losses: dict[str, float]
    rows: list[int]  # of the global batch, in its order, by their numbers in the training data


def batch_gradient(run: runs.Run, world: World, batch: int = 0, float64: bool = False) -> Gradient:
    """Of the first epoch's global batch number `batch`; a negative one counts from the last.

    With float64 the model, the losses and the reduction are in fp64. DeepSpeed's ZeRO stages add gradients up in fp32
    whatever the model is, so that is for stage 0 alone.

    Raises:
        RecipeError: a precision or a batch that is not there.
        NonFiniteLoss, DataError, ModelError: as training does.
    """
    _refuse_precision(run, float64)
    setup = set_up(run, world, torch.float64 if float64 else None)
    epoch = compose(setup, 0)
    window = read_window(setup, epoch, batch_of(epoch, batch))
    losses, _, _ = forward_backward(setup, window, Meter(Progress(), setup.parameters, world), 1)
    tensors = engine.whole_gradient(setup.engine, world.is_main)
    mine = [micro.rows.tolist() if micro.examples else [] for micro in window]
    every_rank = distributed.gather_objects(mine, world)
    seen = [row for slot in zip(*every_rank, strict=True) for piece in slot for row in piece]
    return Gradient(tensors, losses | setup.engine.penalty_values, seen)


def batch_of(epoch: Epoch, number: int) -> Ints:
    """Raises RecipeError where the epoch has no such batch."""
    if not -len(epoch.batches) <= number < len(epoch.batches):
        raise RecipeError(f"--batch {number}: the epoch has {len(epoch.batches)} batches")
    return epoch.batches[number]


def _refuse_precision(run: runs.Run, float64: bool) -> None:
    recipe = run.recipe()
    if recipe.training.fp16:
        raise RecipeError("training.fp16 = True: the loss scale would stand in the gradient; use bf16 or fp32")
    if float64 and recipe.training.bf16:
        raise RecipeError("--float64: the recipe has training.bf16")
    if float64 and is_quantized(recipe):
        raise RecipeError("--float64: the recipe's weights are in 4 bits (model.lora.quantization)")
    if float64 and recipe.deepspeed.zero_stage:
        raise RecipeError(
            f"--float64: deepspeed.zero_stage = {recipe.deepspeed.zero_stage} adds gradients up in fp32; use 0"
        )


def save_gradient(gradient: Gradient, path: Path) -> None:
    metadata = {"losses": json.dumps(gradient.losses), "rows": json.dumps(gradient.rows)}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(gradient.tensors, beside, metadata)
    beside.replace(path)


def main(world: World) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=0, help="which of the epoch's global batches; -1 is the last")
    parser.add_argument("--float64", action="store_true", help="model and gradient in fp64; ZeRO stage 0 alone")
    arguments = parser.parse_args()
    gradient = batch_gradient(runs.Run(arguments.run), world, arguments.batch, arguments.float64)
    if world.is_main:
        save_gradient(gradient, arguments.out)
    distributed.barrier()
    return runs.DONE


if __name__ == "__main__":
    run_rank(main)
