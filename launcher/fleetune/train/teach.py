"""Runs a recipe's teacher once over its training rows and stores what it says, in the form that `teacher_cache` reads.

    python -m fleetune.train.teach begin RECIPE FOLDER [--top-k K | --samples R]    # by one process
    python -m fleetune.train.teach write RECIPE FOLDER                              # by every rank
    python -m fleetune.train.teach end FOLDER                                       # by one process

The first checks the recipe against FOLDER and writes down what is to be stored there. Then each rank runs the teacher
over parts of its own, or all ranks together run one that is cut over them (teacher.deepspeed), for a part each. A part
is written beside and renamed, and its SHA-256 then stands beside it, so that what was broken off goes on, on as many
ranks as there are then. The last puts these into teacher.json, without which no recipe takes the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleetune import runs
from fleetune.batch import Batch
from fleetune.losses import Distillation
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, RecipeError, teacher_to_store
from fleetune.train import signals
from fleetune.train.rank import run_rank
from fleetune.train.report import print_report

if TYPE_CHECKING:
    from fleetune.train.data import Split
    from fleetune.train.distributed import World
    from fleetune.train.sources import Ints
    from fleetune.train.teacher import LoadedTeacher
    from fleetune.train.token_cache import Chosen

PART, LEAST_PART, PARTS = 4096, 256, 64  # rows of a part at most and at least; between them there are so many parts
ELSEWHERE = "choose another folder with --out"
TOP_K = 64  # classes of a language model's token


# ---------------------------------------------------------------- what is to be stored


def begin(recipe: Recipe, folder: Path, top_k: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """Writes FOLDER/teacher.json, or finds that what it has is the same.

    Of a language model the top k classes of each token that is learnt are stored, 64 when absent, or so many samples.
    Returns how many parts are left to be written.

    Raises:
        RecipeError: there is not one teacher to run, or FOLDER is of another teacher or other data, or cannot be
            written.
        DataError, ModelError: what the recipe names is not there.
    """
    from fleetune.train.data import prepare
    from fleetune.train.model import load_tokenizer
    from fleetune.train.teacher import dtype_of, load_teacher_config, weights_digest
    from fleetune.train.teacher_cache import FORMAT, belongs_to, known_of

    if recipe.task == "regression":
        raise RecipeError(f"task = {recipe.task!r}: soft targets, which `fleetune teach` stores, are of classes")
    key, teacher = teacher_to_store(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    split = data.splits["train"]
    config = load_teacher_config(recipe, teacher, key, tokenizer)
    of = {
        "model_name_or_path": teacher.model_name_or_path,
        "revision": teacher.revision,
        "dtype": str(dtype_of(recipe, teacher)).removeprefix("torch."),
        "weights": weights_digest(teacher, config),
    }
    stored = {"format": FORMAT, "teacher": of, **belongs_to(split, tokenizer, data.label_names)}
    if recipe.task == "causal_lm":
        stored["chosen"] = asdict(_chosen(recipe, config, top_k, samples))
    try:
        _begin_folder(folder, stored, known_of(recipe, split))
    except OSError as error:
        raise RecipeError(f"{folder}: cannot be written: {error.strerror}") from error
    return {"left": len(_left(folder, runs.read_json(folder / "teacher.json")))}


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


def _begin_folder(folder: Path, stored: dict[str, Any], known: dict[str, Any]) -> None:
    """Raises RecipeError for a folder of something else; one that no part was written to yet is begun anew."""
    from fleetune.train.teacher_cache import differences, read

    runs.refuse_another_attempt(folder / "lease.json")
    there = read(folder)
    if there is not None and (there["parts"] or any(folder.glob("part-*.sha256"))):
        for name, value in stored.items():
            if there.get(name) != value:
                why = differences(there, known) if name == "data" else ""
                raise RecipeError(f"{folder}: is a cache of {_other(name, there.get(name), value)}{why}; {ELSEWHERE}")
        return
    leavings = (".teacher.json.", ".lease.", *(("teacher.json", "lease.json", "logs", "part-") if there else ()))
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if not all(name.startswith(leavings) for name in names):
        raise RecipeError(f"{folder}: is no cache of this form, and not empty; remove it, or {ELSEWHERE}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    length = min(PART, max(LEAST_PART, -(-known["rows"] // PARTS)))
    more = {"known": known, "rows_of_a_part": length, "parts": {}}
    _write_stored(folder, {**stored, **more})


def _write_stored(folder: Path, stored: dict[str, Any]) -> None:
    """Without it the parts are worth nothing."""
    runs.write_text(folder / "teacher.json", json.dumps(stored, indent=1) + "\n", sync=True)


def _other(name: str, there: Any, wanted: Any) -> str:
    """How what is stored differs from what was asked for."""
    if name == "chosen":
        one, other = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (there, wanted))
        return f"{one}, and asked for are {other}"
    if name == "teacher" and (keys := [key for key in wanted if there.get(key) != wanted[key]]) != ["weights"]:
        return f"another teacher: its {keys[0]} is {there.get(keys[0])}, and this one's {wanted[keys[0]]}"
    return f"{'another' if name == 'teacher' else 'other'} {name}"


def _names(stored: dict[str, Any]) -> list[str]:
    """Of all parts."""
    suffix = "arrow" if "chosen" in stored else "parquet"
    return [f"part-{number:05d}.{suffix}" for number in range(-(-stored["known"]["rows"] // stored["rows_of_a_part"]))]


def _rows_of(stored: dict[str, Any], name: str) -> Ints:
    """Of a part."""
    start = _names(stored).index(name) * stored["rows_of_a_part"]
    return np.arange(start, min(start + stored["rows_of_a_part"], stored["known"]["rows"]))


def _left(folder: Path, stored: dict[str, Any]) -> list[str]:
    """The parts that are not there, or not as they were sealed."""
    from fleetune.train.teacher_cache import digest_of

    return [name for name in _names(stored) if digest_of(folder / name) != _sealed(folder, stored, name)]


def _sealed(folder: Path, stored: dict[str, Any], name: str) -> str:
    """The SHA-256 that a part was written with, or "-"; it stands beside the part until all are there."""
    with contextlib.suppress(OSError):
        return _seal(folder, name).read_text(encoding="ascii").strip()
    return str(stored["parts"].get(name, "-"))


def _seal(folder: Path, name: str) -> Path:
    return folder / f"{name}.sha256"


# ---------------------------------------------------------------- storing it


def write(recipe: Recipe, folder: Path, world: World) -> bool:
    """Runs the teacher over the parts that are left. Every rank calls it, for a folder that was begun.

    Returns whether it was done; not where a rank was asked to stop.

    Raises:
        DataError, ModelError: what the recipe names is not there.
    """
    from fleetune.train import distributed
    from fleetune.train.data import prepare
    from fleetune.train.model import ModelError, load_tokenizer, padding_id
    from fleetune.train.teacher import load_teacher
    from fleetune.train.teacher_cache import digest_of, write_logits
    from fleetune.train.token_cache import write_tokens

    key, teacher = teacher_to_store(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    split, size = data.splits["train"], recipe.evaluation.per_device_eval_batch_size
    stored = runs.read_json(folder / "teacher.json")
    names = _names(stored)
    missing = _left(folder, stored) if world.is_main else []
    for name in missing:
        _seal(folder, name).unlink(missing_ok=True)
    left: list[str] = distributed.gather_objects(missing, world)[0]
    is_cut = teacher.deepspeed.zero_stage > 0
    if not is_cut:  # no rank waits for another from here on
        distributed.stop()
    together = world if is_cut else replace(world, rank=0, world_size=1)
    signals.beat("load")
    loaded = load_teacher(recipe, teacher, key, data.label_names, tokenizer, Batch(size, 1, 1, size), together)
    write_part = write_tokens if "chosen" in stored else write_logits

    for first in range(0, len(left), world.world_size):
        beside = left[first : first + world.world_size]
        if world.rank >= len(beside) and not is_cut:
            break
        name = beside[min(world.rank, len(beside) - 1)]
        rows = _rows_of(stored, name)
        pieces = list(_pieces(rows, split.lengths[rows], size))
        if is_cut:  # every layer takes all ranks: they run it equally often, those without a part too
            most = max(-(-len(_rows_of(stored, other)) // size) for other in beside)
            pieces += pieces[:1] * (most - len(pieces))
        try:
            said = _said(recipe, loaded, split, pieces, stored.get("chosen"), padding_id(tokenizer) or 0, together)
        except signals.Stopped:
            return False
        except FloatingPointError as error:
            named = f"{key}.model_name_or_path = {teacher.model_name_or_path!r}"
            kind = stored["teacher"]["dtype"]
            raise ModelError(f"{named}: {error}: it is damaged, or {key}.dtype = {kind} too narrow for it") from error
        if world.rank < len(beside):
            write_part(folder / name, split.index[rows], [said[row] for row in rows.tolist()])
            runs.write_text(_seal(folder, name), f"{digest_of(folder / name)}\n")
        if world.is_main:
            to_come = sum(not _seal(folder, other).exists() for other in left)
            print(f"taught {len(names) - to_come} of {len(names)} parts", flush=True)
    return True


def end(folder: Path) -> dict[str, Any]:
    """Gathers the parts' seals. Returns the number of rows, the labels, what was chosen, and the bytes.

    Where that was done before, nothing is written. Raises RecipeError where a part is not there.
    """
    stored = runs.read_json(folder / "teacher.json")
    names = _names(stored)
    parts = {name: _sealed(folder, stored, name) for name in names}
    if "-" in parts.values():
        raise RecipeError(f"{folder}: not all parts are there; the same command goes on")
    if "rows" not in stored or parts != stored["parts"]:
        _write_stored(folder, {**stored, "parts": parts, "rows": stored["known"]["rows"]})
    for name in names:
        with contextlib.suppress(OSError):
            _seal(folder, name).unlink(missing_ok=True)
    size = sum((folder / name).stat().st_size for name in names)
    return {"rows": stored["known"]["rows"], "labels": stored["labels"], "chosen": stored.get("chosen"), "bytes": size}


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
    """What the teacher says of the rows of all pieces, by row: its logits, or the classes of each token.

    Raises Stopped on every rank of `world`, when one of them is asked to stop; FloatingPointError for
    what is not finite.
    """
    import torch

    from fleetune.train.batches import collate
    from fleetune.train.distributed import any_rank
    from fleetune.train.token_cache import Chosen, said_of_tokens

    found: dict[int, Any] = {}
    for piece in pieces:
        signals.beat("teaching")
        if any_rank([signals.stop_requested()], world)[0]:
            raise signals.Stopped
        if chosen is not None:
            said = said_of_tokens(
                teacher, split, piece, Chosen(**chosen), recipe.training.seed, pad_token_id, world.device
            )
            found.update(zip(piece.tolist(), said, strict=True))
        else:
            logits = teacher(collate(split, piece, pad_token_id).to(world.device)).logits
            assert logits is not None
            if not torch.isfinite(logits).all():
                bad_row = int(split.index[piece[int((~torch.isfinite(logits)).any(-1).nonzero()[0])]])
                raise FloatingPointError(f"its logits of training row {bad_row} are not finite")
            found.update(zip(piece.tolist(), logits.float().cpu().numpy(), strict=True))
    return found


def _write(world: World) -> int:
    recipe_file, folder = Path(sys.argv[2]), Path(sys.argv[3])
    done = write(parse_recipe(recipe_file.read_text(encoding="utf-8"), str(recipe_file)), folder, world)
    return runs.DONE if done else runs.SAVED


def _begin(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="fleetune.train.teach begin")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args(arguments)
    recipe = parse_recipe(given.recipe.read_text(encoding="utf-8"), str(given.recipe))
    return begin(recipe, given.folder, given.top_k, given.samples)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        run_rank(_write)
    make = {"begin": lambda: _begin(sys.argv[2:]), "end": lambda: end(Path(sys.argv[2]))}[sys.argv[1]]
    sys.exit(print_report(make))
