"""Runs a recipe's teacher once over its training rows and stores what it says, in the form that `teacher_cache` reads.

    python -m fleetune.train.teach begin RECIPE FOLDER RANKS [--top-k K | --samples R]    # by one process
    python -m fleetune.train.teach write RECIPE FOLDER                                    # by every rank

The first checks the recipe against FOLDER and writes down what is to be stored there. Then each rank runs the teacher
over parts of its own, in rounds: so one that is cut over the ranks (teacher.deepspeed) is run by all of them at once.
Each part is written beside and renamed, so what was broken off goes on, on as many ranks as there are then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune import runs
from fleetune.batch import Batch
from fleetune.losses import Distillation
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, RecipeError, Teacher, teachers_of
from fleetune.train.rank import run_rank
from fleetune.train.report import print_report

if TYPE_CHECKING:
    from fleetune.train.data import Split
    from fleetune.train.distributed import World
    from fleetune.train.sources import Ints
    from fleetune.train.teacher import LoadedTeacher
    from fleetune.train.token_cache import Chosen

PART = 4096  # rows of a part at most
SHARE = 4  # parts of each of several ranks at least, so that none waits long for the others at the end
TOP_K = 64  # classes of a language model's token


# ---------------------------------------------------------------- what is to be stored


def begin(
    recipe: Recipe, folder: Path, ranks: int, top_k: int | None = None, samples: int | None = None
) -> dict[str, Any]:
    """Writes FOLDER/teacher.json, or finds that what it has is the same. Returns the teacher's key in the recipe.

    Of a language model the top k classes of each token that is learnt are stored, 64 when absent, or so many samples.

    Raises:
        RecipeError: there is not one teacher to run, or FOLDER is of another teacher or other data.
        DataError, ModelError: what the recipe names is not there.
    """
    from fleetune.train.data import prepare
    from fleetune.train.model import load_tokenizer
    from fleetune.train.teacher import load_teacher_config, weights_digest
    from fleetune.train.teacher_cache import FORMAT, belongs_to

    key, teacher = _only_teacher(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    split = data.splits["train"]
    config = load_teacher_config(recipe, teacher, key, tokenizer)
    of = {
        "name": teacher.model_name_or_path,
        "revision": teacher.revision,
        "weights": weights_digest(teacher, config),
    }
    stored = {"format": FORMAT, "teacher": of, **belongs_to(split, tokenizer, data.label_names)}
    if recipe.task == "causal_lm":
        stored["chosen"] = asdict(_chosen(recipe, config, top_k, samples))
    _begin_folder(folder, stored, PART if ranks == 1 else min(PART, -(-len(split) // (ranks * SHARE))))
    return {"key": key}


def _chosen(recipe: Recipe, teacher: Any, top_k: int | None, samples: int | None) -> Chosen:
    """The temperature is the distillation's; the classes are those that student and teacher share."""
    from fleetune.train.model import load_config
    from fleetune.train.token_cache import Chosen

    temperatures = [loss.temperature for loss in recipe.losses if isinstance(loss, Distillation)]
    if not temperatures:
        raise RecipeError("losses: has no distillation, whose temperature `fleetune teach` stores a language model at")
    student = load_config(recipe, [])
    vocabulary = min(recipe.model.resize_embeddings or student.vocab_size, teacher.vocab_size)
    if samples is not None:
        return Chosen("samples", samples, temperatures[0], vocabulary)
    return Chosen("top", min(top_k or TOP_K, vocabulary), temperatures[0], vocabulary)


def _only_teacher(recipe: Recipe) -> tuple[str, Teacher]:
    if recipe.task == "regression":
        raise RecipeError(f"task = {recipe.task!r}: soft targets, which `fleetune teach` stores, are of classes")
    named = [(key, teacher) for key, teacher in teachers_of(recipe) if teacher.cache is None]
    if len(named) != 1:
        raise RecipeError(f"teacher: there are {len(named)} to be run; `fleetune teach` runs one")
    return named[0]


def _begin_folder(folder: Path, stored: dict[str, Any], rows_of_a_part: int) -> None:
    """Raises RecipeError for a folder of something else."""
    from fleetune.train.teacher_cache import read

    there = read(folder)
    if there is not None:
        different = [name for name in stored if there.get(name) != stored[name]]
        if different == ["chosen"]:
            kept = ", ".join(f"{name} {value}" for name, value in there["chosen"].items())
            raise RecipeError(f"{folder}: is a cache of {kept}; choose another folder with --out")
        if different:
            raise RecipeError(f"{folder}: is a cache of another {different[0]}; choose another folder with --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder}: is no cache, and not empty; choose another folder with --out")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    runs.write_json(folder / "teacher.json", {**stored, "rows_of_a_part": rows_of_a_part, "parts": {}})


# ---------------------------------------------------------------- storing it


def write(recipe: Recipe, folder: Path, world: World) -> None:
    """Runs the teacher over the parts that are not there yet. Every rank calls it, for a folder that was begun.

    Raises:
        DataError, ModelError: what the recipe names is not there.
    """
    from fleetune.train.data import prepare
    from fleetune.train.distributed import gather_objects
    from fleetune.train.model import load_tokenizer, padding_id
    from fleetune.train.teacher import load_teacher
    from fleetune.train.teacher_cache import digest_of, write_logits
    from fleetune.train.token_cache import write_tokens

    key, teacher = _only_teacher(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    split, size = data.splits["train"], recipe.evaluation.per_device_eval_batch_size
    stored = runs.read_json(folder / "teacher.json")
    parts, length = dict(stored["parts"]), int(stored["rows_of_a_part"])
    suffix = "arrow" if "chosen" in stored else "parquet"
    names = [f"part-{number:05d}.{suffix}" for number in range(-(-len(split) // length))]
    mine = [name for name in names if name not in parts or digest_of(folder / name) != parts[name]]
    left = gather_objects(mine, world)[0]  # the main rank's word for it
    if left:
        batch = Batch(size, 1, 1, size)
        loaded = load_teacher(recipe, teacher, key, data.label_names, tokenizer, batch, world)
    for first in range(0, len(left), world.world_size):
        name = left[first + world.rank] if first + world.rank < len(left) else None
        done = None
        # Every layer of a teacher that is cut takes all ranks: they run it equally often, those without a part too.
        if name is not None or teacher.deepspeed.zero_stage:
            start = 0 if name is None else names.index(name) * length
            rows = np.arange(start, min(start + length, len(split)))
            pieces = list(_pieces(rows, split.lengths[rows], size))
            if teacher.deepspeed.zero_stage:
                pieces += pieces[:1] * (-(-length // size) - len(pieces))
            said = _said(recipe, loaded, split, pieces, stored.get("chosen"), padding_id(tokenizer) or 0, world)
            if name is not None:
                write_part = write_logits if "chosen" not in stored else write_tokens
                write_part(folder / name, split.index[rows], [said[row] for row in rows.tolist()])
                done = name, str(digest_of(folder / name))
        parts |= dict(one for one in gather_objects(done, world) if one is not None)
        if world.is_main:
            runs.write_json(folder / "teacher.json", {**stored, "parts": parts})
            print(f"taught {len(parts)} of {len(names)} parts", flush=True)
    if world.is_main:
        runs.write_json(folder / "teacher.json", {**stored, "parts": parts, "rows": len(split)})


def _pieces(rows: Ints, lengths: Ints, size: int) -> Iterator[Ints]:
    """Rows of like length together."""
    order = rows[np.argsort(lengths, kind="stable")]
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _said(
    recipe: Recipe,
    teacher: LoadedTeacher,
    split: Split,
    pieces: list[Ints],
    chosen: dict[str, Any] | None,
    pad_token_id: int,
    world: World,
) -> dict[int, Any]:
    """What the teacher says of the rows of all pieces, by row: its logits, or the classes of each token."""
    from fleetune.train.batches import collate
    from fleetune.train.token_cache import Chosen, said_of_tokens

    found: dict[int, Any] = {}
    for piece in pieces:
        if chosen is not None:
            said = said_of_tokens(
                teacher, split, piece, Chosen(**chosen), recipe.training.seed, pad_token_id, world.device
            )
            found.update(zip(piece.tolist(), said, strict=True))
        else:
            logits = teacher(collate(split, piece, pad_token_id).to(world.device)).logits
            assert logits is not None
            found.update(zip(piece.tolist(), logits.float().cpu().numpy(), strict=True))
    return found


def _run(world: World) -> int:
    recipe_file, folder = Path(sys.argv[2]), Path(sys.argv[3])
    write(parse_recipe(recipe_file.read_text(encoding="utf-8"), str(recipe_file)), folder, world)
    return runs.DONE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["begin"])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ranks", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    recipe = parse_recipe(given.recipe.read_text(encoding="utf-8"), str(given.recipe))
    return print_report(lambda: begin(recipe, given.folder, given.ranks, given.top_k, given.samples))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        run_rank(_run)
    sys.exit(main())
