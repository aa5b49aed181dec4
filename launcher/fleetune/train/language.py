"""A language model's data: rows of any format, cleaned, tokenised, and marked with which tokens are learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.data_section import Source
from fleetune.schema import Recipe
from fleetune.train.cleaning import NAMES, Rows
from fleetune.train.conversations import Encoded, Encoder, cut, ending, show
from fleetune.train.formats import FORMATS, Format, NothingToLearn, columns_of, find_format
from fleetune.train.packing import pack
from fleetune.train.sources import DataError, Ints, no_column, open_source, row_of, weights_of

BINS = 10  # of the lengths' histogram


def read_rows(recipe: Recipe, source: Source, key: str) -> Rows:
    """Each row's texts, and in its label's place the row itself, which holds them."""
    data = recipe.data
    columns = list(dict.fromkeys(name for f in FORMATS for name in columns_of(f, data.text_column).names))
    weight_column = data.weight_column if key == "train" else None  # weights are for training
    table = open_source(source, key, columns, [weight_column] if weight_column else [])
    if weight_column is not None and weight_column not in table.columns:
        raise no_column("data.weight_column", weight_column, table.names)
    names = [name for name in columns if name in table.columns]
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(*(table.columns[n] for n in names), strict=True)]
    if not rows:
        raise DataError(
            f"data.{key}.path = {source.path!r}: has none of the columns that a format reads; it has "
            f"{', '.join(table.names)}; data.text_column names the one of plain text"
        )
    weights = None if weight_column is None else weights_of(table, weight_column, key)
    return Rows([tuple(_texts(row)) for row in rows], rows, weights, table.index)


def _texts(value: Any) -> Iterator[str]:
    """Every text in the row that is not empty, in order."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in NAMES:
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _with_texts(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(texts) if value else value
    if isinstance(value, dict):
        return {name: inner if name in NAMES else _with_texts(inner, texts) for name, inner in value.items()}
    return [_with_texts(inner, texts) for inner in value] if isinstance(value, list) else value


def tokenise(recipe: Recipe, tokenizer: Any, key: str, rows: Rows, folder: Path) -> dict[str, Any]:
    """Writes the split's flat arrays; returns its counts, the format, and one example as it is learnt.

    Raises DataError for a row that is not of the format, and where no row has anything to learn.
    """
    data = recipe.data
    format_ = data.format or _find_format(recipe, key, rows)
    counts = {"truncated": 0, "too_long": 0, "empty": 0, "supervised": 0, "endless": 0}
    lengths, kept, example = [], [], None
    ends = Counter[int]()
    with (folder / "input_ids.raw").open("wb") as ids, (folder / "supervised.raw").open("wb") as marks:
        for i, whole in enumerate(_encoded(recipe, tokenizer, format_, key, rows)):
            encoded = None if whole is None else cut(whole, data.max_length, data.too_long)
            if whole is None or encoded is None:
                counts["empty" if whole is None else "too_long"] += 1
                continue
            example = example or show(encoded, tokenizer)
            counts["truncated"] += len(encoded.input_ids) < len(whole.input_ids)
            end = ending(whole, tokenizer)
            counts["endless"] += end is None
            ends.update([] if end is None else [end])
            counts["supervised"] += sum(encoded.supervised)
            np.asarray(encoded.input_ids, dtype=np.int32).tofile(ids)
            np.asarray(encoded.supervised, dtype=np.uint8).tofile(marks)
            lengths.append(len(encoded.input_ids))
            kept.append(i)
    if not kept:
        raise DataError(
            f"data.max_length = {data.max_length}: no row of {key} has something to learn within it; "
            f"{counts['empty']} have nothing at all, {counts['too_long']} not in what data.too_long = "
            f"{data.too_long!r} leaves. The first row: {str(rows.labels[0])[:600]}"
        )
    _save(folder, rows, kept, np.asarray(lengths, dtype=np.int64))
    signs = sorted(token for token, count in ends.items() if _ends_turns(tokenizer, token, count / len(kept)))
    found = {"rows": len(kept), "tokens": sum(lengths), "format": format_, "example": example, "ends": signs}
    return {**found, **counts, "lengths": _histogram(np.asarray(lengths), data.max_length)}


def _ends_turns(tokenizer: Any, token: int, share: float) -> bool:
    """Whether a token that this share of the rows ends in is a sign, and not the last word of some answers."""
    return token == tokenizer.eos_token_id or tokenizer.added_tokens_decoder[token].special or share > 0.5


def _encoded(recipe: Recipe, tokenizer: Any, format_: Format, key: str, rows: Rows) -> Iterator[Encoded | None]:
    """Each row whole; None where it is well formed and teaches nothing."""
    data = recipe.data
    try:
        encoder = Encoder(
            tokenizer,
            format_,
            chat_template=data.chat_template,
            loss_on=data.loss_on,
            text_column=data.text_column,
        )
    except ValueError as error:
        raise DataError(str(error)) from None
    for i, row in enumerate(rows.labels):
        try:
            yield encoder.encode(_with_texts(row, iter(rows.texts[i])))
        except NothingToLearn:
            yield None
        except ValueError as error:
            raise DataError(f"{row_of(rows.index[i], key)}: {error}") from None


def _find_format(recipe: Recipe, key: str, rows: Rows) -> Format:
    try:
        return find_format(list(rows.labels[0]), rows.labels[:100], recipe.data.text_column)
    except ValueError as error:
        raise DataError(f"{error} (in {key})") from None


def _save(folder: Path, rows: Rows, kept: list[int], lengths: Ints) -> None:
    for name, dtype in (("input_ids", np.int32), ("supervised", np.uint8)):
        raw = folder / f"{name}.raw"
        np.save(folder / f"{name}.npy", np.memmap(raw, dtype=dtype, mode="r"))
        raw.unlink()
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / "index.npy", rows.index[np.asarray(kept, dtype=np.int64)])
    if rows.weights is not None:
        np.save(folder / "weights.npy", np.asarray([rows.weights[i] for i in kept], dtype=np.float32))


def _histogram(lengths: Ints, max_length: int) -> list[int]:
    """How many rows have each tenth of max_length."""
    return [int(count) for count in np.histogram(lengths, bins=BINS, range=(0, max_length))[0]]


def packs(lengths: Ints, max_length: int) -> int:
    """How many sequences packing makes of the rows: the same in every epoch."""
    return len(pack(lengths, max_length, 0, 0))
