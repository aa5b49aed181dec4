"""What a teacher says of every training row, stored once: `python -m fleetune.train.teacher_cache RECIPE FOLDER`.

FOLDER/part-00000.parquet   row: its number in its source; logits (C,) in fp32, in the order of the data's labels
FOLDER/teacher.json         whose they are and of what: teacher, tokenizer, data, labels, parts with their SHA-256

Each part is written beside and renamed, so what was broken off goes on; teacher.json is written first without `parts`,
and last with them. Run by one process, as `fleetune teach` does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fleetune import runs
from fleetune.batch import Batch
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, RecipeError, Teacher, teachers_of
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch, collate
from fleetune.train.cache import file_hash, tokenizer_hash
from fleetune.train.data import DataError, Split, prepare
from fleetune.train.distributed import World
from fleetune.train.model import ModelError, load_tokenizer
from fleetune.train.sources import Ints

FORMAT = 1
PART = 4096  # rows


@dataclass(frozen=True)
class CachedTeacher:
    """In a teacher's place: its logits by row."""

    weight: float
    rows: Ints  # (N,) ascending
    logits: torch.Tensor  # (N, C)

    def __call__(self, batch: MicroBatch) -> Outputs:
        places = torch.from_numpy(np.searchsorted(self.rows, batch.rows))
        return Outputs(self.logits[places].to(batch.labels.device, non_blocking=True))


# ---------------------------------------------------------------- reading


def check_cache(teacher: Teacher, key: str, split: Split, tokenizer: Any, label_names: list[str]) -> None:
    """Raises RecipeError where it is half written, damaged, or of other data, tokens or labels."""
    where, folder = f"{key}.cache = {teacher.cache!r}", Path(str(teacher.cache))
    try:
        stored = runs.read_json(folder / "teacher.json")
    except (OSError, ValueError):
        raise RecipeError(f"{where}: there is no teacher.json: `fleetune teach RECIPE` writes one") from None
    if stored.get("format") != FORMAT:
        raise RecipeError(f"{where}: is of format {stored.get('format')}, and this is {FORMAT}: teach anew")
    for name, value in _belongs_to(split, tokenizer, label_names).items():
        if stored[name] != value:
            others = f": {', '.join(stored[name])}" if name == "labels" else ""
            raise RecipeError(f"{where}: is of other {name}{others}; teach with this recipe")
    if "parts" not in stored:
        raise RecipeError(f"{where}: is half written; the same `fleetune teach` goes on with it")
    for name, digest in stored["parts"].items():
        if not (folder / name).exists() or file_hash(str(folder / name), key) != digest:
            raise RecipeError(f"{where}: {name} is damaged or gone; remove it, and `fleetune teach` writes it anew")


def open_cache(teacher: Teacher, share: float) -> CachedTeacher:
    """Of a cache that was checked."""
    import pyarrow.parquet as parquet

    folder = Path(str(teacher.cache))
    tables = [parquet.read_table(folder / name) for name in runs.read_json(folder / "teacher.json")["parts"]]
    rows = np.concatenate([table["row"].to_numpy() for table in tables])
    logits = np.concatenate([np.stack(table["logits"].to_numpy(zero_copy_only=False)) for table in tables])
    order = np.argsort(rows)
    return CachedTeacher(share, rows[order], torch.from_numpy(logits[order]))


def _belongs_to(split: Split, tokenizer: Any, label_names: list[str]) -> dict[str, Any]:
    """What a cache is of, beside its teacher: the cleaned, tokenised rows say what the recipe's data come to."""
    digest = hashlib.sha256()
    for array in (split.input_ids, split.offsets, split.index):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {"tokens": tokenizer_hash(tokenizer), "data": digest.hexdigest(), "labels": label_names}


# ---------------------------------------------------------------- writing


def teach(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Runs the recipe's one teacher over its training rows, those that are not there yet; returns teacher.json.

    Raises:
        RecipeError: there is not one teacher to run, or FOLDER is of another teacher or other data.
        DataError, ModelError: what the recipe names is not there.
    """
    key, teacher = _only_teacher(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    split, world = data.splits["train"], _alone()
    loaded = _load(recipe, teacher, key, tokenizer, data.label_names, world)
    stored = {
        "format": FORMAT,
        "teacher": {"name": teacher.model_name_or_path, "revision": teacher.revision, "weights": _hash(loaded.module)},
        **_belongs_to(split, tokenizer, data.label_names),
    }
    _begin(folder, stored)
    parts, batch_size = {}, recipe.evaluation.per_device_eval_batch_size
    names = [(f"part-{start // PART:05d}.parquet", start) for start in range(0, len(split), PART)]
    for number, (name, start) in enumerate(names):
        if not (folder / name).exists():
            rows = np.arange(start, min(start + PART, len(split)))
            _write(folder / name, split.index[rows], _logits(loaded, split, rows, batch_size, tokenizer, world))
            print(f"taught {number + 1} of {len(names)} parts", file=sys.stderr, flush=True)
        parts[name] = file_hash(str(folder / name), key)
    runs.write_json(folder / "teacher.json", {**stored, "parts": parts})
    return {**stored, "rows": len(split), "parts": parts}


def _only_teacher(recipe: Recipe) -> tuple[str, Teacher]:
    named = [(key, teacher) for key, teacher in teachers_of(recipe) if teacher.cache is None]
    if len(named) != 1:
        raise RecipeError(f"teacher: there are {len(named)} to be run; `fleetune teach` runs one")
    return named[0]


def _load(recipe: Recipe, teacher: Teacher, key: str, tokenizer: Any, labels: list[str], world: World) -> Any:
    from fleetune.train.teacher import check_teacher, load_teacher, load_teacher_config

    config = load_teacher_config(recipe, teacher, key)
    check_teacher(recipe, teacher, key, config, tokenizer, labels)
    size = recipe.evaluation.per_device_eval_batch_size
    return load_teacher(recipe, teacher, key, config, labels, 1.0, Batch(size, 1, 1, size), world)


def _alone() -> World:
    return World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _begin(folder: Path, stored: dict[str, Any]) -> None:
    file = folder / "teacher.json"
    if file.exists():
        there = runs.read_json(file)
        there.pop("parts", None)
        different = [name for name in stored if there.get(name) != stored[name]]
        if different:
            raise RecipeError(f"{folder}: is a cache of another {different[0]}; choose another folder with --out")
    elif folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder}: is no cache, and not empty; choose another folder with --out")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    runs.write_json(file, stored)


def _logits(
    teacher: Any, split: Split, rows: Ints, batch_size: int, tokenizer: Any, world: World
) -> npt.NDArray[np.float32]:
    """(rows, C); rows of like length are run together."""
    found: dict[int, npt.NDArray[np.float32]] = {}
    for piece in _pieces(rows, split.lengths[rows], batch_size):
        logits = teacher(collate(split, piece, tokenizer.pad_token_id).to(world.device)).logits
        found.update(zip(piece.tolist(), logits.float().cpu().numpy(), strict=True))
    return np.stack([found[row] for row in rows.tolist()])


def _pieces(rows: Ints, lengths: Ints, size: int) -> Iterator[Ints]:
    order = rows[np.argsort(lengths, kind="stable")]
    yield from (order[start : start + size] for start in range(0, len(order), size))


def _write(path: Path, rows: Ints, logits: npt.NDArray[np.float32]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(logits.reshape(-1)), logits.shape[1])
    beside = path.with_suffix(".part")
    parquet.write_table(pyarrow.table({"row": rows, "logits": values}), beside)
    beside.replace(path)


def _hash(model: torch.nn.Module) -> str:
    """Of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        recipe = parse_recipe(arguments.recipe.read_text(encoding="utf-8"), str(arguments.recipe))
        report = teach(recipe, arguments.folder)
    except (RecipeError, DataError, ModelError) as error:
        print(f"fleetune: error: {error}", file=sys.stderr)
        return runs.WRONG
    json.dump(report, sys.stdout)
    return runs.DONE


if __name__ == "__main__":
    sys.exit(main())
