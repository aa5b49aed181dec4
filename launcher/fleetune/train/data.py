"""Data: open, clean, label, tokenise once into flat memory-mapped arrays, and compose batches.

A split is a few flat arrays: all token ids one after the other, and where each row begins. The cache is keyed by
content (files, tokenizer, settings), so ranks share it and nothing is tokenised twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import html
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fleetune.schema import Data, Recipe, RecipeError, Source

Ints = npt.NDArray[np.int64]
CACHE_FORMAT = 1  # raise it when the arrays or the cleaning change
SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """Data that is not there, or not what the recipe says of it: the key's path, the value and what would be right."""


# ---------------------------------------------------------------- opening


def open_source(source: Source, key: str, columns: list[str]) -> Any:
    """A `datasets.Dataset` of the source's rows. Raises DataError that names the key."""
    import datasets

    datasets.disable_progress_bars()
    suffix = Path(source.path).suffix
    local = Path(source.path).is_absolute()
    try:
        if not local:
            rows = datasets.load_dataset(
                source.path, source.name, split=source.split or "train", revision=source.revision
            )
        elif suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=source.path, split="train")
        elif suffix in (".json", ".jsonl"):
            rows = datasets.load_dataset("json", data_files=source.path, split="train")
        else:
            # Text stays text: without the converter "007" becomes 7 and "null" becomes nothing. A TSV has no quoting:
            # SST-2's has quotes that are never closed.
            rows = datasets.load_dataset(
                "csv",
                data_files=source.path,
                split="train",
                sep="\t" if suffix == ".tsv" else ",",
                quoting=3 if suffix == ".tsv" else 0,
                keep_default_na=False,
                na_values=[""],
                converters=dict.fromkeys(columns, str),
            )
    except Exception as error:  # datasets raises its own kinds, OSError, ValueError and pandas' kinds here
        raise DataError(f"data.{key}.path = {source.path!r}: cannot be read: {error}") from error
    for column, value in source.where.items():
        if column not in rows.column_names:
            raise _no_column(f"data.{key}.where.{column}", column, rows.column_names)
        rows = rows.select(np.flatnonzero([cell == value for cell in rows[column]]))
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if len(rows) == 0:
        raise DataError(
            f"data.{key}.path = {source.path!r}: has no rows" + (f" with {source.where}" if source.where else "")
        )
    return rows


def _no_column(key: str, value: str, columns: list[str]) -> DataError:
    import difflib

    near = difflib.get_close_matches(value, columns, n=1)
    return DataError(
        f"{key} = {value!r}: the data has no such column; it has {', '.join(columns)}"
        + (f"; did you mean `{near[0]}`?" if near else "")
    )


# ---------------------------------------------------------------- cleaning

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", re.DOTALL)


def _strip_html(text: str) -> str:
    return html.unescape(_TAG.sub(" ", text))


NORMALISE: dict[str, Callable[[str], str]] = {
    "unicode_nfc": lambda text: unicodedata.normalize("NFC", text),
    "unicode_nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "strip_html": _strip_html,
    "collapse_whitespace": lambda text: " ".join(text.split()),
}


@dataclass
class Rows:
    """Texts of one split, before tokenising; `index` is each row's number in its source."""

    texts: list[tuple[str, ...]]
    labels: list[Any]
    weights: list[float] | None
    index: list[int]

    def keep(self, kept: list[int]) -> None:
        self.texts = [self.texts[i] for i in kept]
        self.labels = [self.labels[i] for i in kept]
        self.weights = [self.weights[i] for i in kept] if self.weights is not None else None
        self.index = [self.index[i] for i in kept]


def clean(splits: dict[str, Rows], steps: list[str]) -> dict[str, dict[str, int]]:
    """Runs the steps in order, in place; returns how many rows each touched, by split.

    Steps that change text run on every split; those that drop rows run on the training split alone, so that
    validation and test stay the sets that others report on.
    """
    report: dict[str, dict[str, int]] = {}
    for step in steps:
        touched: dict[str, int] = {}
        if step in NORMALISE:
            for name, rows in splits.items():
                changed = [tuple(NORMALISE[step](text) for text in texts) for texts in rows.texts]
                touched[name] = sum(a != b for a, b in zip(rows.texts, changed, strict=True))
                rows.texts = changed
        else:
            train = splits["train"]
            held_out = {texts for name, rows in splits.items() if name != "train" for texts in rows.texts}
            seen: set[tuple[str, ...]] = set()
            kept = []
            for i, texts in enumerate(train.texts):
                if step == "drop_empty":
                    drop = train.labels[i] is None or not all(text.strip() for text in texts)
                else:
                    drop = texts in (held_out if step == "drop_leaked" else seen)
                    seen.add(texts)
                if not drop:
                    kept.append(i)
            touched["train"] = len(train.texts) - len(kept)
            train.keep(kept)
        report[step] = touched
    if not splits["train"].texts:
        raise DataError(f"data.cleaning = {steps}: leaves no training rows")
    return report


# ---------------------------------------------------------------- labels


def _read_rows(dataset: Any, data: Data, key: str) -> Rows:
    columns = [data.text_column] + ([data.text_pair_column] if data.text_pair_column else [])
    for field, column in (
        ("text_column", data.text_column),
        ("text_pair_column", data.text_pair_column),
        ("label_column", data.label_column),
        ("weight_column", data.weight_column),
    ):
        if column is not None and column not in dataset.column_names:
            if field == "weight_column" and key != "train":
                continue  # weights are for training
            raise _no_column(f"data.{field}", column, dataset.column_names)
    table = [dataset[column] for column in columns]
    texts = [tuple("" if cell is None else str(cell) for cell in cells) for cells in zip(*table, strict=True)]
    weights = None
    if data.weight_column is not None and data.weight_column in dataset.column_names:
        weights = []
        for i, value in enumerate(dataset[data.weight_column]):
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
                raise DataError(
                    f"data.weight_column = {data.weight_column!r}: row {i} of {key} has {value!r}, "
                    "which is no weight (a number, 0 or more)"
                )
            weights.append(float(value))
        if not any(weights):
            raise DataError(f"data.weight_column = {data.weight_column!r}: every weight of {key} is 0")
    labels = [None if isinstance(label, float) and np.isnan(label) else label for label in dataset[data.label_column]]
    return Rows(texts, labels, weights, list(range(len(texts))))


def _label_names(recipe: Recipe, train: Rows, dataset: Any) -> list[str]:
    """The classes' names in the order of their numbers: from the recipe, the hub's features, or the training data."""
    feature = dataset.features[recipe.data.label_column]
    if recipe.model.label_names is not None:
        return recipe.model.label_names
    if hasattr(feature, "names"):
        return list(feature.names)
    found = Counter(label for label in train.labels if label is not None)
    if all(isinstance(label, str) for label in found):
        names = sorted(found)
    elif all(isinstance(label, int | bool) or (isinstance(label, float) and label.is_integer()) for label in found):
        highest = max(int(label) for label in found)
        if highest > 10_000 or min(int(label) for label in found) < 0:
            raise DataError(
                f"data.label_column = {recipe.data.label_column!r}: the labels go from {min(found)} to {highest}; "
                "classes are numbered from 0 up. For numbers as such use `task: regression`"
            )
        names = [str(i) for i in range(max(highest + 1, recipe.model.num_labels or 2))]
    else:
        kind = next(type(label).__name__ for label in found if not isinstance(label, int | str))
        raise DataError(
            f"data.label_column = {recipe.data.label_column!r}: labels are {kind}, not classes (whole numbers from 0, "
            "or names). For numbers as such use `task: regression`"
        )
    wanted = recipe.model.num_labels
    if wanted is not None and len(names) != wanted:
        raise DataError(
            f"model.num_labels = {wanted}: the training data has {len(names)} labels: {', '.join(names[:10])}"
        )
    return names


def _to_numbers(rows: Rows, key: str, recipe: Recipe, names: list[str]) -> npt.NDArray[Any]:
    column = f"data.label_column = {recipe.data.label_column!r}"
    if recipe.task == "regression":
        for i, label in enumerate(rows.labels):
            if isinstance(label, bool) or not isinstance(label, int | float) or not np.isfinite(label):
                raise DataError(f"{column}: row {rows.index[i]} of {key} has {label!r}, which is no number")
        return np.asarray(rows.labels, dtype=np.float32)
    number = {name: i for i, name in enumerate(names)}
    values = np.empty(len(rows.labels), dtype=np.int64)
    for i, label in enumerate(rows.labels):
        if isinstance(label, str):
            value = number.get(label, -1)
        else:
            value = int(label) if label is not None and float(label).is_integer() else -1
        if not 0 <= value < len(names):
            hint = "; drop such rows with the cleaning step drop_empty" if label is None and key == "train" else ""
            raise DataError(
                f"{column}: row {rows.index[i]} of {key} has {label!r}, which is none of the {len(names)} classes "
                f"({', '.join(names[:10])}){hint}"
            )
        values[i] = value
    return values


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Split:
    """Row i's token ids are `input_ids[offsets[i]:offsets[i + 1]]`; `token_type_ids` likewise, where the model has them."""

    input_ids: npt.NDArray[np.int32]  # (total tokens,)
    offsets: Ints  # (rows + 1,)
    token_type_ids: npt.NDArray[np.uint8] | None  # (total tokens,)
    labels: npt.NDArray[Any]  # (rows,) int64 classes or float32 values
    weights: npt.NDArray[np.float32] | None  # (rows,)
    index: Ints  # (rows,) the row's number in its source
    texts: Any | None  # training text as an Arrow column, only where it is augmented

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Prepared:
    splits: dict[str, Split]
    label_names: list[str]
    report: dict[str, Any]


def cache_folder() -> Path:
    """Node-local where the user says so (FLEETUNE_CACHE), else under the user's cache."""
    root = (
        os.environ.get("FLEETUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fleetune"
    )
    return Path(root) / "tokens"


def _file_hash(path: str) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cache_key(recipe: Recipe, tokenizer: Any) -> str:
    """What the arrays depend on: the data's content, the tokenizer's, and the settings that make one of the other."""
    sources = {}
    for name in SPLITS:
        source: Source | None = getattr(recipe.data, name)
        if source is None:
            continue
        if Path(source.path).is_absolute():
            content = _file_hash(source.path)
        else:
            content = open_source(
                source, name, []
            )._fingerprint  # the hub's revision and the loading, hashed by datasets
        sources[name] = [content, source.name, source.split, source.limit, source.where, Path(source.path).suffix]
    data = recipe.data.model_dump(exclude=set(SPLITS) | {"augmentation"})
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if getattr(tokenizer, "is_fast", False)
        else str(sorted(tokenizer.get_vocab().items()))
    )
    parts = [
        CACHE_FORMAT,
        recipe.task,
        sources,
        data,
        bool(recipe.data.augmentation),
        recipe.model.num_labels,
        recipe.model.label_names,
        recipe.training.seed if recipe.data.validation_fraction else None,
        sorted(tokenizer.model_input_names),
        hashlib.sha256(backend.encode()).hexdigest(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the cache is on local disk, where flock holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Opens, cleans and tokenises what the recipe names, or takes it from the cache. Raises DataError or RecipeError."""
    folder = cache_folder() / _cache_key(recipe, tokenizer)
    if not (folder / "report.json").exists():
        with _locked(folder.with_suffix(".lock")):
            if not (folder / "report.json").exists():
                building = folder.with_suffix(".building")
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir(parents=True)
                _build(recipe, tokenizer, building)
                shutil.rmtree(folder, ignore_errors=True)
                building.rename(folder)
    return load_prepared(folder)


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
            arrays["labels"],
            arrays.get("weights"),
            arrays["index"],
            texts,
        )
    return Prepared(splits, report["label_names"], report)


def _build(recipe: Recipe, tokenizer: Any, folder: Path) -> None:
    data = recipe.data
    columns = [column for column in (data.text_column, data.text_pair_column) if column]
    datasets = {
        name: open_source(source, name, columns) for name in SPLITS if (source := getattr(data, name)) is not None
    }
    splits = {name: _read_rows(dataset, data, name) for name, dataset in datasets.items()}
    if data.validation_fraction is not None:
        splits = {
            **_split_off(splits["train"], data.validation_fraction, recipe.training.seed),
            **{name: rows for name, rows in splits.items() if name != "train"},
        }
    cleaning = clean(splits, list(data.cleaning))
    names = [] if recipe.task == "regression" else _label_names(recipe, splits["train"], datasets["train"])
    report: dict[str, Any] = {
        "rows": {},
        "label_names": names,
        "cleaning": cleaning,
        "tokens": {},
        "truncated": {},
        "labels": {},
    }
    for name, rows in splits.items():
        labels = _to_numbers(rows, name, recipe, names)
        arrays, truncated = _tokenise(rows, tokenizer, data.max_length)
        arrays |= {"labels": labels, "index": np.asarray(rows.index, dtype=np.int64)}
        if rows.weights is not None:
            arrays["weights"] = np.asarray(rows.weights, dtype=np.float32)
        (folder / name).mkdir()
        for key, array in arrays.items():
            np.save(folder / name / f"{key}.npy", array)
        if name == "train" and data.augmentation:
            import datasets as hf_datasets

            hf_datasets.Dataset.from_dict({"text": [texts[0] for texts in rows.texts]}).save_to_disk(
                str(folder / name / "texts")
            )
        report["rows"][name] = len(rows.texts)
        report["tokens"][name] = len(arrays["input_ids"])
        report["truncated"][name] = truncated
        if names:
            report["labels"][name] = np.bincount(labels, minlength=len(names)).tolist()
    if names and min(report["labels"]["train"]) == 0:
        missing = [name for name, count in zip(names, report["labels"]["train"], strict=True) if count == 0]
        report["warning"] = f"no training row has the label {', '.join(missing[:10])}"
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _split_off(train: Rows, fraction: float, seed: int) -> dict[str, Rows]:
    count = round(len(train.texts) * fraction)
    if not 0 < count < len(train.texts):
        raise DataError(
            f"data.validation_fraction = {fraction}: of {len(train.texts)} rows that is {count} for validation; "
            "both sides need at least one"
        )
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x5A11D])).permutation(len(train.texts))
    chosen = set(order[:count].tolist())
    sides = {}
    for name, wanted in (("train", False), ("validation", True)):
        rows = Rows(train.texts, train.labels, train.weights, train.index)
        rows.keep([i for i in range(len(train.texts)) if (i in chosen) is wanted])
        sides[name] = rows
    return sides


def _tokenise(rows: Rows, tokenizer: Any, max_length: int) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """The flat arrays of a split, and how many rows were cut at max_length."""
    ids: list[npt.NDArray[np.int32]] = []
    types: list[npt.NDArray[np.uint8]] = []
    lengths: list[int] = []
    pairs = bool(rows.texts) and len(rows.texts[0]) == 2
    for start in range(0, len(rows.texts), 10_000):
        columns = [list(column) for column in zip(*rows.texts[start : start + 10_000], strict=True)]
        # Without truncation first would cost a second pass: the fast tokenizers say by `overflowing` what they cut.
        encoded = tokenizer(*columns, truncation=True, max_length=max_length)
        ids.extend(np.asarray(row, dtype=np.int32) for row in encoded["input_ids"])
        lengths.extend(len(row) for row in encoded["input_ids"])
        if pairs and "token_type_ids" in encoded:
            types.extend(np.asarray(row, dtype=np.uint8) for row in encoded["token_type_ids"])
    arrays: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.concatenate(ids),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    if types:
        arrays["token_type_ids"] = np.concatenate(types)
    full = [i for i, length in enumerate(lengths) if length == max_length]
    truncated = 0
    if full:
        columns = [list(column) for column in zip(*(rows.texts[i] for i in full), strict=True)]
        truncated = sum(
            len(row) > max_length for row in tokenizer(*columns, truncation=False, verbose=False)["input_ids"]
        )
    return arrays, truncated


__all__ = ["DataError", "Prepared", "RecipeError", "Rows", "Split", "clean", "open_source", "prepare"]
