"""What a teacher says of every training row, stored once.

    python -m fleetune.train.teacher_cache RECIPE FOLDER [--top-k K | --samples R]

FOLDER/part-00000.parquet   row: its number in its source; logits (C,) in fp32, in the order of the data's labels
FOLDER/part-00000.arrow     of a language model: classes of each token, as token_cache.py says
FOLDER/teacher.json         whose they are and of what: teacher, tokens, data, labels; each part's SHA-256 once it is
                            written, and how many rows there are once all are

Each part is written beside and renamed, so what was broken off goes on. Run by one process, as `fleetune teach` does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fleetune import runs
from fleetune.batch import Batch
from fleetune.losses import Distillation
from fleetune.recipe import parse_recipe
from fleetune.schema import Recipe, RecipeError, Teacher, TeacherDeepSpeed, teachers_of
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch, collate
from fleetune.train.cache import tokenizer_hash
from fleetune.train.data import Split, prepare
from fleetune.train.distributed import World
from fleetune.train.model import load_config, load_tokenizer, padding_id
from fleetune.train.report import print_report
from fleetune.train.sources import Ints
from fleetune.train.token_cache import CachedTokens, Chosen, open_tokens, write_part

FORMAT = 1
PART = 4096  # rows
TOP_K = 64  # classes of a language model's token


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


def check_cache(
    recipe: Recipe, teacher: Teacher, key: str, split: Split, tokenizer: Any, label_names: list[str], config: Any
) -> str:
    """A hash of its content; `config` is the student's.

    Raises RecipeError where it is half written, damaged, or of other data, tokens, labels or another temperature.
    """
    where, folder = f"{key}.cache = {teacher.cache!r}", Path(str(teacher.cache))
    stored = _read(folder)
    if stored is None:
        raise RecipeError(f"{where}: there is no teacher.json of this form: `fleetune teach RECIPE` writes one")
    for name, value in _belongs_to(split, tokenizer, label_names).items():
        if stored.get(name) != value:
            others = f": {', '.join(map(str, stored[name]))}" if name == "labels" and name in stored else ""
            raise RecipeError(f"{where}: is of other {name}{others}; teach with this recipe")
    if recipe.task == "causal_lm":
        _check_chosen(recipe, where, stored.get("chosen", {}), recipe.model.resize_embeddings or config.vocab_size)
    if stored.get("rows") != len(split):
        raise RecipeError(f"{where}: is half written; the same `fleetune teach` goes on with it")
    for name, digest in stored["parts"].items():
        if _digest(folder / name) != digest:
            raise RecipeError(f"{where}: {name} is damaged or gone; the same `fleetune teach` writes it anew")
    return hashlib.sha256(json.dumps(stored["parts"], sort_keys=True).encode()).hexdigest()


def _check_chosen(recipe: Recipe, where: str, chosen: dict[str, Any], rows: int) -> None:
    for index, loss in enumerate(recipe.losses):
        if isinstance(loss, Distillation) and chosen.get("temperature") != loss.temperature:
            raise RecipeError(
                f"{where}: is of temperature {chosen.get('temperature')}, and losses.{index}.temperature is "
                f"{loss.temperature}: a few classes cannot be turned to another; teach with this recipe"
            )
    if chosen["vocabulary"] > rows:
        raise RecipeError(f"{where}: is of {chosen['vocabulary']} classes, and the student's head has {rows}")


def _read(folder: Path) -> dict[str, Any] | None:
    """teacher.json; None where there is none that this program wrote."""
    try:
        stored = runs.read_json(folder / "teacher.json")
    except (OSError, ValueError):
        return None
    parts = stored.get("parts") if isinstance(stored, dict) and stored.get("format") == FORMAT else None
    named = isinstance(parts, dict) and all(re.fullmatch(r"part-\d{5}\.(parquet|arrow)", name) for name in parts)
    return stored if named else None


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def open_cache(teacher: Teacher, share: float) -> CachedTeacher | CachedTokens:
    """Of a cache that was checked."""
    import pyarrow.parquet as parquet

    folder = Path(str(teacher.cache))
    stored = runs.read_json(folder / "teacher.json")
    if "chosen" in stored:
        return open_tokens([folder / name for name in stored["parts"]], stored, share, teacher.tail)
    tables = [parquet.read_table(folder / name) for name in stored["parts"]]
    rows = np.concatenate([table["row"].to_numpy() for table in tables])
    logits = np.concatenate([np.stack(table["logits"].to_numpy(zero_copy_only=False)) for table in tables])
    order = np.argsort(rows)
    return CachedTeacher(share, rows[order], torch.from_numpy(logits[order]))


def _belongs_to(split: Split, tokenizer: Any, label_names: list[str]) -> dict[str, Any]:
    """What a cache is of, beside its teacher: the cleaned, tokenised rows say what the recipe's data come to."""
    digest = hashlib.sha256()
    for array in (split.input_ids, split.offsets, split.index, split.token_type_ids, split.supervised):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return {"tokens": tokenizer_hash(tokenizer), "data": digest.hexdigest(), "labels": label_names}


# ---------------------------------------------------------------- writing


def teach(recipe: Recipe, folder: Path, top_k: int | None = None, samples: int | None = None) -> dict[str, Any]:
    """Runs the recipe's one teacher over its training rows, those that are not there yet.

    Of a language model it stores the top k classes of each token that is learnt, 64 when absent, or so many samples.
    Returns its key, the number of rows, the labels, and the bytes of all parts.

    Raises:
        RecipeError: there is not one teacher to run, or FOLDER is of another teacher or other data.
        DataError, ModelError: what the recipe names is not there.
    """
    from fleetune.train.teacher import load_teacher  # which reads caches by this module

    key, teacher = _only_teacher(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    split, world = data.splits["train"], _alone()
    size = recipe.evaluation.per_device_eval_batch_size
    loaded = load_teacher(recipe, teacher, key, data.label_names, tokenizer, Batch(size, 1, 1, size), world)
    of = {"name": teacher.model_name_or_path, "revision": teacher.revision, "weights": _hash(loaded.module)}
    stored = {"format": FORMAT, "teacher": of, **_belongs_to(split, tokenizer, data.label_names)}
    chosen = _chosen(recipe, loaded.config, top_k, samples) if recipe.task == "causal_lm" else None
    if chosen is not None:
        stored["chosen"] = asdict(chosen)
    parts = _begin(folder, stored)
    suffix = "parquet" if chosen is None else "arrow"
    names = [(f"part-{start // PART:05d}.{suffix}", start) for start in range(0, len(split), PART)]
    for number, (name, start) in enumerate(names):
        if name in parts and _digest(folder / name) == parts[name]:
            continue
        rows = np.arange(start, min(start + PART, len(split)))
        if chosen is None:
            _write(folder / name, split.index[rows], _logits(loaded, split, rows, size, tokenizer, world))
        else:
            settings = {
                "batch_size": size,
                "pad_token_id": padding_id(tokenizer),
                "device": world.device,
                "seed": recipe.training.seed,
            }
            write_part(folder / name, loaded, split, rows, chosen, settings)
        parts[name] = str(_digest(folder / name))
        runs.write_json(folder / "teacher.json", {**stored, "parts": parts})
        print(f"taught {number + 1} of {len(names)} parts", file=sys.stderr, flush=True)
    runs.write_json(folder / "teacher.json", {**stored, "parts": parts, "rows": len(split)})
    size = sum((folder / name).stat().st_size for name, _ in names)
    return {"key": key, "rows": len(split), "labels": data.label_names, "bytes": size, "chosen": stored.get("chosen")}


def _chosen(recipe: Recipe, teacher: Any, top_k: int | None, samples: int | None) -> Chosen:
    """The temperature is the distillation's; the classes are those that student and teacher share."""
    temperatures = [loss.temperature for loss in recipe.losses if isinstance(loss, Distillation)]
    if not temperatures:
        raise RecipeError("losses: has no distillation, whose temperature `fleetune teach` stores a language model at")
    student = load_config(recipe, [])
    vocabulary = min(recipe.model.resize_embeddings or student.vocab_size, teacher.vocab_size)
    if samples is not None:
        return Chosen("samples", samples, temperatures[0], vocabulary)
    return Chosen("top", min(top_k or TOP_K, vocabulary), temperatures[0], vocabulary)


def _only_teacher(recipe: Recipe) -> tuple[str, Teacher]:
    """With its key; held by this one process, whatever holds it in training."""
    if recipe.task == "regression":
        raise RecipeError(f"task = {recipe.task!r}: soft targets, which `fleetune teach` stores, are of classes")
    named = [(key, teacher) for key, teacher in teachers_of(recipe) if teacher.cache is None]
    if len(named) != 1:
        raise RecipeError(f"teacher: there are {len(named)} to be run; `fleetune teach` runs one")
    key, teacher = named[0]
    return key, teacher.model_copy(update={"deepspeed": TeacherDeepSpeed()})


def _alone() -> World:
    return World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _begin(folder: Path, stored: dict[str, Any]) -> dict[str, str]:
    """The parts that are there, with their digests. Raises RecipeError for a folder of something else."""
    there = _read(folder)
    if there is not None:
        different = [name for name in stored if there.get(name) != stored[name]]
        if different == ["chosen"]:
            kept = ", ".join(f"{name} {value}" for name, value in there["chosen"].items())
            raise RecipeError(f"{folder}: is a cache of {kept}; choose another folder with --out")
        if different:
            raise RecipeError(f"{folder}: is a cache of another {different[0]}; choose another folder with --out")
        return dict(there["parts"])
    if folder.exists() and any(folder.iterdir()):
        raise RecipeError(f"{folder}: is no cache, and not empty; choose another folder with --out")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    runs.write_json(folder / "teacher.json", {**stored, "parts": {}})
    return {}


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
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--samples", type=int)
    given = parser.parse_args()
    recipe = parse_recipe(given.recipe.read_text(encoding="utf-8"), str(given.recipe))
    return print_report(lambda: teach(recipe, given.folder, given.top_k, given.samples))


if __name__ == "__main__":
    sys.exit(main())
