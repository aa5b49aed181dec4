"""What a teacher said of every training row, as `teach` has stored it: whether it belongs to a recipe, and reading it.

FOLDER/part-00000.parquet   row: its number in its source; logits (C,) in fp32, in the order of the data's labels
FOLDER/part-00000.arrow     of a language model: classes of each token, as token_cache.py says
FOLDER/part-00000.*.sha256  of a part, until all are there
FOLDER/teacher.json         whose they are and of what: teacher, tokens, data, labels; how many rows a part has;
                            once all parts are written, the SHA-256 of each and how many rows there are
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fleetune import runs
from fleetune.losses import Distillation
from fleetune.schema import Recipe, RecipeError, Teacher
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch
from fleetune.train.cache import tokenizer_hash
from fleetune.train.data import Split
from fleetune.train.sources import Ints
from fleetune.train.token_cache import CachedTokens, open_tokens, put_in_place

FORMAT = 2


@dataclass(frozen=True)
class CachedTeacher:
    """In a teacher's place: its logits by row."""

    weight: float
    rows: Ints  # (N,) ascending
    logits: torch.Tensor  # (N, C)

    def __call__(self, batch: MicroBatch) -> Outputs:
        places = torch.from_numpy(np.searchsorted(self.rows, batch.rows))
        return Outputs(self.logits[places].to(batch.labels.device, non_blocking=True))


def check_cache(
    recipe: Recipe, teacher: Teacher, key: str, split: Split, tokenizer: Any, label_names: list[str], config: Any
) -> str:
    """A hash of its content; `config` is the student's.

    Raises RecipeError where it is half written, damaged, or of other data, tokens, labels or another temperature.
    """
    where, folder = f"{key}.cache = {teacher.cache!r}", Path(str(teacher.cache))
    stored = read(folder)
    if stored is None:
        raise RecipeError(
            f"{where}: there is no teacher.json of this form; `fleetune teach` writes one, to a new folder"
        )
    for name, value in belongs_to(split, tokenizer, label_names).items():
        if stored.get(name) != value:
            others = f": {', '.join(map(str, stored[name]))}" if name == "labels" and name in stored else ""
            others = differences(stored, known_of(recipe, split)) if name == "data" else others
            raise RecipeError(f"{where}: is of other {name}{others}; teach anew for this recipe, to another folder")
    if recipe.task == "causal_lm":
        _check_chosen(recipe, where, stored.get("chosen", {}), recipe.model.resize_embeddings or config.vocab_size)
    if stored.get("rows") != len(split):
        raise RecipeError(f"{where}: is half written; the same `fleetune teach` goes on with it")
    for name, digest in stored["parts"].items():
        if digest_of(folder / name) != digest:
            raise RecipeError(f"{where}: {name} is damaged or gone; the same `fleetune teach` writes it anew")
    return hashlib.sha256(json.dumps(stored["parts"], sort_keys=True).encode()).hexdigest()


def _check_chosen(recipe: Recipe, where: str, chosen: dict[str, Any], rows: int) -> None:
    for index, loss in enumerate(recipe.losses):
        if isinstance(loss, Distillation) and chosen.get("temperature") != loss.temperature:
            raise RecipeError(
                f"{where}: is of temperature {chosen.get('temperature')}, and losses.{index}.temperature is "
                f"{loss.temperature}: a few classes cannot be turned to another; teach anew, to another folder"
            )
    if chosen["vocabulary"] > rows:
        raise RecipeError(f"{where}: is of {chosen['vocabulary']} classes, and the student's head has {rows}")


def read(folder: Path) -> dict[str, Any] | None:
    """teacher.json; None where there is none that this program wrote."""
    try:
        stored = runs.read_json(folder / "teacher.json")
    except (OSError, ValueError):
        return None
    parts = stored.get("parts") if isinstance(stored, dict) and stored.get("format") == FORMAT else None
    named = isinstance(parts, dict) and all(re.fullmatch(r"part-\d{5}\.(parquet|arrow)", name) for name in parts)
    return stored if named else None


def digest_of(path: Path) -> str | None:
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


def known_of(recipe: Recipe, split: Split) -> dict[str, Any]:
    """What a person would look at where the data are others."""
    data = recipe.data
    return {
        "rows": len(split),
        "data.max_length": data.max_length,
        "training.seed": recipe.training.seed if data.validation_fraction else None,
    }


def differences(stored: dict[str, Any], known: dict[str, Any]) -> str:
    """What of `known` is another in what is stored: " (rows: 90 there, 80 here)"; "" where all is alike."""
    there, notes = stored.get("known", {}), {"training.seed": ", which chooses the rows of data.validation_fraction"}
    found = [
        f"{name}: {there.get(name)} there, {value} here{notes.get(name, '')}"
        for name, value in known.items()
        if there.get(name) != value
    ]
    return f" ({'; '.join(found)})" if found else ""


def belongs_to(split: Split, tokenizer: Any, label_names: list[str]) -> dict[str, Any]:
    """What a cache is of, beside its teacher: the cleaned, tokenised rows say what the recipe's data come to."""
    digest = hashlib.sha256()
    for array in (split.input_ids, split.offsets, split.index, split.token_type_ids, split.supervised):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return {"tokens": tokenizer_hash(tokenizer), "data": digest.hexdigest(), "labels": label_names}


def write_logits(path: Path, rows: Ints, said: list[npt.NDArray[np.float32]]) -> None:
    """A part, by rename: each row's logits (C,)."""
    import pyarrow
    import pyarrow.parquet as parquet

    logits = np.stack(said)
    values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(logits.reshape(-1)), logits.shape[1])
    beside = path.with_suffix(".part")
    parquet.write_table(pyarrow.table({"row": rows, "logits": values}), beside)
    put_in_place(beside, path)
