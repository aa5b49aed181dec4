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
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from fleetune import runs
from fleetune.schema import Recipe, RecipeError
from fleetune.train import distributed, engine
from fleetune.train.batches import collate, compose_epoch, cut_window
from fleetune.train.data import DataError
from fleetune.train.distributed import World
from fleetune.train.loop import NonFiniteLoss, _augmenter, forward_backward, set_up
from fleetune.train.model import ModelError
from fleetune.train.progress import Progress
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
    split, recipe = setup.data.splits["train"], setup.recipe
    rows = batch_rows(split.lengths, setup.batch.global_batch_size, recipe, batch)
    augment, multiple = _augmenter(setup, 0), 8 if world.device.type == "cuda" else 1
    window = [
        collate(split, piece, setup.tokenizer.pad_token_id, multiple, augment).to(world.device)
        for piece in cut_window(rows, setup.batch, world.rank)
    ]
    losses, _, _ = forward_backward(setup, window, Meter(Progress(), setup.parameters, world), 1)
    tensors = engine.whole_gradient(setup.engine, world.is_main)
    mine = [micro.rows.tolist() if micro.examples else [] for micro in window]
    every_rank = distributed.gather_objects(mine, world)
    seen = [row for slot in zip(*every_rank, strict=True) for piece in slot for row in piece]
    return Gradient(tensors, losses | setup.engine.penalty_values, seen)


def batch_rows(lengths: Ints, global_batch_size: int, recipe: Recipe, batch: int) -> Ints:
    """Raises RecipeError where the first epoch has no such batch."""
    training = recipe.training
    batches = compose_epoch(lengths, global_batch_size, training.seed, 0, training.group_by_length)
    if not -len(batches) <= batch < len(batches):
        raise RecipeError(f"--batch {batch}: the epoch has {len(batches)} batches")
    return batches[batch]


def _refuse_precision(run: runs.Run, float64: bool) -> None:
    recipe = run.recipe()
    if recipe.training.fp16:
        raise RecipeError("training.fp16 = True: the loss scale would stand in the gradient; use bf16 or fp32")
    if float64 and recipe.training.bf16:
        raise RecipeError("--float64: the recipe has training.bf16")
    if float64 and recipe.deepspeed.zero_stage:
        raise RecipeError(
            f"--float64: deepspeed.zero_stage = {recipe.deepspeed.zero_stage} adds gradients up in fp32; use 0"
        )


def save_gradient(gradient: Gradient, path: Path) -> None:
    metadata = {"losses": json.dumps(gradient.losses), "rows": json.dumps(gradient.rows)}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(gradient.tensors, beside, metadata)
    beside.replace(path)


@dataclass(frozen=True)
class Difference:
    """Of a gradient from a reference; both errors are relative to the norm of the whole reference."""

    whole: float
    worst: float  # over single tensors
    worst_tensor: str


def compare(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Difference:
    """Norms are taken in fp64.

    Raises:
        ValueError: the two are not of the same parameters.
    """
    if {name: t.shape for name, t in reference.items()} != {name: t.shape for name, t in other.items()}:
        raise ValueError("the gradients are of different parameters")
    errors = {name: float((other[name].double() - t.double()).norm()) for name, t in reference.items()}
    norm = float(torch.stack([t.double().norm() for t in reference.values()]).norm())
    worst = max(errors, key=lambda name: errors[name])
    whole = float(torch.tensor(list(errors.values()), dtype=torch.float64).norm())
    return Difference(whole / norm, errors[worst] / norm, worst)


def main() -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=0, help="which of the epoch's global batches; -1 is the last")
    parser.add_argument("--float64", action="store_true", help="model and gradient in fp64; ZeRO stage 0 alone")
    arguments = parser.parse_args()
    try:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        world = distributed.start()
        gradient = batch_gradient(runs.Run(arguments.run), world, arguments.batch, arguments.float64)
        if world.is_main:
            save_gradient(gradient, arguments.out)
        distributed.barrier()
        distributed.stop()
    except (NonFiniteLoss, DataError, ModelError, RecipeError) as error:
        print(f"fleetune: error: {error}", file=sys.stderr, flush=True)
        return runs.FAILED_FOR_GOOD
    except Exception as error:
        traceback.print_exc()
        print(f"fleetune: error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return runs.FAILED
    return runs.DONE


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through interpreter shutdown: after an error, the process group would wait for ranks that are gone.
    os._exit(code)
