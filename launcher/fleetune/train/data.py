"""Data: clean, label, and tokenise once into flat memory-mapped arrays.

A split is a few flat arrays: all token ids one after the other, and where each row begins. The cache is keyed by
content (files, tokenizer, settings), so ranks share it and nothing is tokenised twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.data_section import Source
from fleetune.schema import Recipe, RecipeError, is_source, sources_of, target_splits
from fleetune.train import language
from fleetune.train.cache import cache_folder, cache_key, file_hash, locked
from fleetune.train.cleaning import Rows, clean
from fleetune.train.labels import label_names, to_numbers
from fleetune.train.named_sources import Part, joined, place, spans, training_rows
from fleetune.train.sources import DataError, Ints, Table, no_column, open_source, row_of, weights_of

STALE_SECONDS = 24 * 3600.0  # for what a killed process was building, where no lock says whether it still is
PIECE = 1000  # rows that are tokenised at once: what the tokenizer holds of them goes with their full, uncut length


# ---------------------------------------------------------------- rows


def _read_rows(recipe: Recipe, source: Source, key: str) -> Rows:
    data = recipe.data
    text_columns = [column for column in (data.text_column, data.text_pair_column) if column is not None]
    is_trained = key.endswith("train") and is_source(key)
    weight_column = data.weight_column if is_trained else None  # weights are for training
    label_column = None if key in target_splits(recipe) else data.label_column  # a target's are not even read
    others = [column for column in (label_column, weight_column) if column is not None]
    table = open_source(source, key, text_columns, others)
    given = {field: getattr(data, field) for field in ("text_column", "text_pair_column")}
    for field, column in {**given, "label_column": label_column, "weight_column": weight_column}.items():
        if column is not None and column not in table.columns:
            raise no_column(f"data.{field}", column, table.names)
    columns = [_texts(table, field, column, key) for field, column in given.items() if column is not None]
    if label_column is None:
        return Rows(list(zip(*columns, strict=True)), [None] * len(table), None, table.index)
    weights = None if weight_column is None else weights_of(table, weight_column, key)
    labels = [None if isinstance(label, float) and np.isnan(label) else label for label in table.columns[label_column]]
    for i, label in enumerate(labels):
        if not isinstance(label, str | int | float | None):
            raise DataError(
                f"data.label_column = {label_column!r}: {row_of(table.index[i], key)} has {label!r}, which is no label "
                "(a number or a name)"
            )
    return Rows(list(zip(*columns, strict=True)), labels, weights, table.index, table.class_names.get(label_column))


_SURROGATE = re.compile("[\ud800-\udfff]")


def _texts(table: Table, field: str, column: str, key: str) -> list[str]:
    cells = table.columns[column]

    def place(i: int) -> str:
        return f"data.{field} = {column!r}: {row_of(table.index[i], key)}"

    for i, cell in enumerate(cells):
        if not isinstance(cell, str):
            if isinstance(cell, list | tuple | dict | bytes):
                raise DataError(f"{place(i)} has {str(cell)[:80]}, which is no text")
            cells[i] = "" if cell is None else str(cell)
        elif not cell.isascii() and _SURROGATE.search(cell):
            raise DataError(f"{place(i)} is not valid Unicode, it has half of a surrogate pair: {cell[:80]!r}")
    return cells


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Split:
    """Row i's token ids are `input_ids[offsets[i]:offsets[i + 1]]`; `token_type_ids` likewise."""

    input_ids: npt.NDArray[np.int32]  # (total tokens,)
    offsets: Ints  # (rows + 1,)
    token_type_ids: npt.NDArray[np.uint8] | None  # (total tokens,) of pairs, where the model has them
    labels: npt.NDArray[Any] | None  # (rows,) int64 classes or float32 values; None for language models and targets
    weights: npt.NDArray[np.float32] | None  # (rows,)
    index: Ints  # (rows,) the row's number in its source
    texts: Any | None  # training text as an Arrow column, only where it is augmented
    supervised: npt.NDArray[np.uint8] | None = None  # (total tokens,) of language models: which are learnt

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Prepared:
    splits: dict[str, Split]
    label_names: list[str]
    report: dict[str, Any]

    def domains(self, split: str) -> dict[str, slice]:
        """Where the rows of each of data.source stand in the split; empty without."""
        return spans(self.parts.get(split, []))

    def place(self, number: int) -> tuple[str | None, int]:
        """Of a training row, by its number in `index`: the name of its source, if it has one, and its row there."""
        return place(self.parts.get("train", []), number)

    @cached_property
    def parts(self) -> dict[str, list[Part]]:
        """By split, what is of each source of data.source; empty without."""
        found = self.report.get("parts", {})
        return {split: [Part(**part) for part in of_split] for split, of_split in found.items()}


def prepare(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Opens, cleans and tokenises what the recipe names, or takes it from the cache. Raises DataError."""
    folder = cache_folder() / cache_key(recipe, tokenizer)
    if not (folder / "report.json").exists():
        with locked(folder.with_suffix(".lock")) as alone:
            if not (folder / "report.json").exists():
                _make(recipe, tokenizer, folder, alone)
    return load_prepared(folder)


def _make(recipe: Recipe, tokenizer: Any, folder: Path, alone: bool) -> None:
    """Builds beside and renames into place; whoever else is at it and was faster has made the same."""
    for left in folder.parent.glob(f"{folder.name}.*.building"):  # by a kill
        if alone or time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    building = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.building")
    building.mkdir()
    try:
        _build(recipe, tokenizer, building)
        if not (folder / "report.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def load_prepared(folder: Path) -> Prepared:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    splits = {}
    for name in report["rows"]:
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in (folder / name).glob("*.npy")}
        texts = None
        if (folder / name / "texts").exists():
            import datasets

            texts = datasets.load_from_disk(str(folder / name / "texts"))
        splits[name] = Split(
            arrays["input_ids"],
            arrays["offsets"],
            arrays.get("token_type_ids"),
            arrays.get("labels"),
            arrays.get("weights"),
            arrays["index"],
            texts,
            arrays.get("supervised"),
        )
    return Prepared(splits, report["label_names"], report)


def _build(recipe: Recipe, tokenizer: Any, folder: Path) -> None:
    data = recipe.data
    read = language.read_rows if recipe.task == "causal_lm" else _read_rows
    splits = {name: read(recipe, source, name) for name, source in sources_of(recipe)}
    if data.validation_fraction is not None:
        for name in [name for name in splits if is_source(name) and name.endswith("train")]:
            splits |= _split_off(name, splits[name], data.validation_fraction, recipe.training.seed)
    cleaning = clean(splits, list(data.cleaning))
    names = label_names(recipe, training_rows(recipe, splits)) if recipe.task == "classification" else []
    labels: dict[str, npt.NDArray[Any]] = {}
    if recipe.task != "causal_lm":
        labelled = [name for name in splits if name not in target_splits(recipe)]
        labels = {name: to_numbers(splits[name], name, recipe, names) for name in labelled}
    splits, labels, parts = joined(recipe, splits, labels)
    report: dict[str, Any] = {
        "rows": {},
        "label_names": names,
        "cleaning": cleaning,
        "tokens": {},
        "truncated": {},
        "labels": {},
        "parts": {role: [asdict(part) for part in of_role] for role, of_role in parts.items()},
    }
    for name, rows in splits.items():
        (folder / name).mkdir()
        if recipe.task == "causal_lm":
            for key, value in language.tokenise(recipe, tokenizer, name, rows, folder / name).items():
                report.setdefault(key, {})[name] = value
            continue
        if name in labels:
            np.save(folder / name / "labels.npy", labels[name])
            if names:
                report["labels"][name] = np.bincount(labels[name], minlength=len(names)).tolist()
        np.save(folder / name / "index.npy", rows.index)
        if rows.weights is not None:
            np.save(folder / name / "weights.npy", np.asarray(rows.weights, dtype=np.float32))
        if name in ("train", *target_splits(recipe)) and data.augmentation:
            import datasets

            texts = datasets.Dataset.from_dict({"text": [texts[0] for texts in rows.texts]})
            texts.save_to_disk(str(folder / name / "texts"))
        report["rows"][name] = len(rows.texts)
        report["tokens"][name], report["truncated"][name] = _tokenise(rows, tokenizer, data.max_length, folder / name)
    if names and min(report["labels"]["train"]) == 0:
        missing = [name for name, count in zip(names, report["labels"]["train"], strict=True) if count == 0]
        report["warning"] = f"no training row has the label {', '.join(missing[:10])}"
    report["sequences"] = report["rows"]["train"]
    if data.packing:
        offsets = np.load(folder / "train" / "offsets.npy")
        report["sequences"] = language.packs(np.diff(offsets), data.max_length)
    report["highest_token"] = max(int(np.load(ids, mmap_mode="r").max()) for ids in folder.glob("*/input_ids.npy"))
    report["content"] = _content(folder)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _content(folder: Path) -> str:
    """A hash of all arrays: what a run that goes on must find as it was."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.npy")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(bytes.fromhex(file_hash(str(path), path.parent.name)))
    return digest.hexdigest()[:32]


def _split_off(name: str, train: Rows, fraction: float, seed: int) -> dict[str, Rows]:
    count = round(len(train.texts) * fraction)
    if not 0 < count < len(train.texts):
        raise DataError(
            f"data.validation_fraction = {fraction}: of the {len(train.texts)} rows of {name} that is {count} for "
            "validation; both sides need at least one"
        )
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5A11D])).permutation(len(train.texts))
    chosen = set(order[:count].tolist())
    return {
        name: train.only([i for i in range(len(train.texts)) if i not in chosen]),
        f"{name.removesuffix('train')}validation": train.only(sorted(chosen)),
    }


def _tokenise(rows: Rows, tokenizer: Any, max_length: int, folder: Path) -> tuple[int, int]:
    """Writes the split's flat arrays, piece by piece; returns how many tokens there are and how many rows were cut."""
    pairs = len(rows.texts[0]) == 2
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= special:
        raise DataError(f"data.max_length = {max_length}: leaves no room for text; {special} are special tokens")
    lengths: list[Ints] = []
    truncated = 0
    has_types = pairs and "token_type_ids" in tokenizer.model_input_names
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context((folder / "input_ids.raw").open("wb"))
        types = stack.enter_context((folder / "token_type_ids.raw").open("wb")) if has_types else None
        for start in range(0, len(rows.texts), PIECE):
            columns = [list(column) for column in zip(*rows.texts[start : start + PIECE], strict=True)]
            encoded = encode(tokenizer, columns, max_length, return_token_type_ids=has_types)
            lengths.append(np.fromiter((len(row) for row in encoded["input_ids"]), dtype=np.int64))
            np.concatenate(encoded["input_ids"], dtype=np.int32).tofile(ids)
            if types is not None:
                np.concatenate(encoded["token_type_ids"], dtype=np.uint8, casting="unsafe").tofile(types)
            truncated += _truncated(encoded, tokenizer, columns, max_length)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    np.save(folder / "offsets.npy", offsets)
    for name, dtype in (("input_ids", np.int32), ("token_type_ids", np.uint8)):
        raw = folder / f"{name}.raw"
        if raw.exists():
            np.save(folder / f"{name}.npy", np.memmap(raw, dtype=dtype, mode="r"))
            raw.unlink()
    return int(offsets[-1]), truncated


def encode(tokenizer: Any, columns: list[list[str]], max_length: int, return_token_type_ids: bool = False) -> Any:
    """The tokenizer's own encoding, cut at max_length. A row never comes out without any token."""
    encoded = tokenizer(
        *columns,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=return_token_type_ids,
    )
    for i, row in enumerate(encoded["input_ids"]):
        if not row:  # an empty text, and a tokenizer without special tokens
            known = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
            encoded["input_ids"][i] = [next(token for token in known if token is not None)]
    return encoded


def _truncated(encoded: Any, tokenizer: Any, columns: list[list[str]], max_length: int) -> int:
    """How many rows were cut: a fast tokenizer keeps what it cut off; a slow one has to encode full rows again."""
    full = [i for i, row in enumerate(encoded["input_ids"]) if len(row) == max_length]
    if encoded.encodings is not None:
        return sum(bool(encoded.encodings[i].overflowing) for i in full)
    if not full:
        return 0
    whole = tokenizer(*([column[i] for i in full] for column in columns), verbose=False)
    return sum(len(row) > max_length for row in whole["input_ids"])


__all__ = ["DataError", "Prepared", "RecipeError", "Rows", "Split", "clean", "open_source", "prepare"]
