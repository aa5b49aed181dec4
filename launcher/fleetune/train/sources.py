"""Opening data: a local .tsv, .csv, .json, .jsonl, .parquet or .txt file, or a hub data set, as columns.

Local files are read here rather than through `datasets`, which guesses types from the first 10,000 rows (a score of
2.5 further down is then an error), takes a delimiter too many in each row for an index and shifts the columns, makes
dates of text that looks like dates, and knows a file by its modification time instead of its content.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from fleetune.data_section import Source

Ints = npt.NDArray[np.int64]


class DataError(ValueError):
    """Data that is not there, or not what the recipe says of it: the key's path, the value and what would be right."""


@dataclass(frozen=True)
class Table:
    columns: dict[str, list[Any]]  # those asked for, as far as the data has them
    names: list[str]  # every column of the data
    index: Ints  # (rows,) each row's number in its source, from 0
    class_names: dict[str, list[str]]  # of the columns whose numbers the data itself says are classes

    def __len__(self) -> int:
        return len(self.index)


def open_source(source: Source, key: str, texts: list[str], others: list[str]) -> Table:
    """The rows that `where` and `limit` leave, of the columns `texts` and `others`.

    In .tsv and .csv a cell of `texts` is exactly what stands there; a column of `others` is numbers where all its cells
    are written as numbers, and None where a cell is empty. Raises DataError that names the key.
    """
    path = Path(source.path)
    for field in ("name", "split", "revision"):
        if path.is_absolute() and getattr(source, field) is not None:
            raise DataError(
                f"data.{key}.{field} = {getattr(source, field)!r}: is for hub data sets; "
                "rows of a file are chosen with `where`"
            )
    if not path.is_absolute():
        table = _read_hub(source, key, texts + others)
    else:
        try:
            parquet = path.suffix == ".parquet"
            table = _read_parquet(source, texts + others) if parquet else _read_text(source, texts, others)
        except (
            OSError,
            ValueError,
            ArithmeticError,
            LookupError,
            NotImplementedError,
        ) as error:  # Arrow's are of these
            raise _unreadable(source, key, error) from error
    for column in source.where:
        if table.names and column not in table.names:
            raise no_column(f"data.{key}.where.{column}", column, table.names, source.where[column])
    if len(table) == 0:
        where = f" with {source.where}" if source.where else ""
        raise DataError(f"data.{key}.path = {source.path!r}: has no rows{where}")
    return table


def load_hub(source: Source, key: str) -> Any:
    """The hub's `datasets.Dataset`, whole. Raises DataError that names the key."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split or "train", revision=source.revision)
    except Exception as error:  # of many kinds
        raise _unreadable(source, key, error) from error


def no_column(key: str, column: str, columns: list[str], value: Any = None) -> DataError:
    """`value` of the key, where that is not the column's name."""
    near = difflib.get_close_matches(column, columns, n=1)
    return DataError(
        f"{key} = {(column if value is None else value)!r}: the data has no such column; it has {', '.join(columns)}"
        + (f"; did you mean `{near[0]}`?" if near else "")
    )


def row_of(number: Any, key: str) -> str:
    return f"row {number} of {key} (counted from 0)"


def weights_of(table: Table, column: str, key: str) -> list[float]:
    """The column that weighs the rows of this split. Raises DataError for what is no weight."""
    for i, value in enumerate(table.columns[column]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
            raise DataError(
                f"data.weight_column = {column!r}: {row_of(table.index[i], key)} has {value!r}, "
                "which is no weight (a number, 0 or more)"
            )
    weights = [float(value) for value in table.columns[column]]
    if not any(weights):
        raise DataError(f"data.weight_column = {column!r}: every weight of {key} is 0")
    return weights


def _unreadable(source: Source, key: str, error: BaseException) -> DataError:
    while error.__cause__ is not None:  # datasets hides it below `An error occurred while generating the dataset`
        error = error.__cause__
    return DataError(f"data.{key}.path = {source.path!r}: cannot be read: {str(error) or type(error).__name__}")


def _matches(cell: Any, value: bool | int | float | str) -> bool:
    if isinstance(cell, str) and isinstance(value, bool):  # a cell of .csv is text
        return cell.lower() == str(value).lower()
    if isinstance(cell, str) and not isinstance(value, str):
        return _NUMBER.fullmatch(cell.strip()) is not None and float(cell) == value
    return bool(cell == value)


# ---------------------------------------------------------------- typed: Parquet and the hub


def _read_parquet(source: Source, wanted: list[str]) -> Table:
    import datasets
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(source.path)
    schema = file.schema_arrow
    needed = [column for column in dict.fromkeys([*wanted, *source.where]) if column in schema.names]
    rows = file.read(columns=needed)
    features = datasets.Features.from_arrow_schema(schema) if b"huggingface" in (schema.metadata or {}) else {}
    return _select(source, wanted, schema.names, rows.num_rows, features, lambda column: rows[column].to_pylist())


def _read_hub(source: Source, key: str, wanted: list[str]) -> Table:
    rows = load_hub(source, key)
    if source.limit is not None and not source.where:
        rows = rows.select(range(min(source.limit, len(rows))))
    return _select(source, wanted, rows.column_names, len(rows), rows.features, lambda column: list(rows[column]))


def _select(
    source: Source, wanted: list[str], names: list[str], rows: int, features: Any, read: Callable[[str], list[Any]]
) -> Table:
    kept = np.arange(rows)
    for column, value in source.where.items():
        cells = read(column) if column in names else []
        matching = [_matches(cells[i], value) for i in kept] if cells else [False] * len(kept)
        kept = kept[np.asarray(matching, dtype=bool)]
    kept = kept[: source.limit]
    there = [column for column in wanted if column in names]
    columns = {column: read(column) for column in there}
    if len(kept) < rows:
        columns = {column: [cells[i] for i in kept] for column, cells in columns.items()}
    classes = {column: list(features[column].names) for column in there if hasattr(features.get(column), "names")}
    return Table(columns, list(names), kept, classes)


# ---------------------------------------------------------------- text: TSV, CSV, JSON

_NUMBER = re.compile(r"-?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")  # not 007, which is a name


def _read_text(source: Source, texts: list[str], others: list[str]) -> Table:
    path = Path(source.path)
    columns: dict[str, list[Any]] = {column: [] for column in texts + others}
    names: dict[str, None] = {}
    index: list[int] = []
    read = _delimited if path.suffix in (".csv", ".tsv") else _paragraphs if path.suffix == ".txt" else _objects
    for number, record in enumerate(read(path)):
        if record.keys() != names.keys():
            names.update(dict.fromkeys(record))
        if not all(_matches(record.get(column), value) for column, value in source.where.items()):
            continue
        for column, cells in columns.items():
            cells.append(record.get(column))
        index.append(number)
        if len(index) == source.limit:
            break
    if path.suffix in (".csv", ".tsv"):
        columns |= {column: _numbers(columns[column]) for column in others if column in names}
    there = {column: cells for column, cells in columns.items() if column in names}
    return Table(there, list(names), np.asarray(index, dtype=np.int64), {})


def _numbers(cells: list[str]) -> list[Any]:
    if not all(_NUMBER.fullmatch(cell.strip()) for cell in cells if cell.strip()):
        return [cell or None for cell in cells]
    number = {cell: _number(cell) for cell in set(cells)}
    return [number[cell] for cell in cells]


def _number(cell: str) -> int | float | None:
    if not cell.strip():
        return None
    return int(cell) if cell.strip().removeprefix("-").isdigit() else float(cell)


def _delimited(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a .csv with standard quoting, or of a .tsv without: SST-2's has quotes that are never closed."""
    tabs = path.suffix == ".tsv"
    with path.open(encoding="utf-8-sig", newline="\n" if tabs else "") as file:
        lines: Any = (line.removesuffix("\n").removesuffix("\r").split("\t") for line in file)
        if not tabs:
            csv.field_size_limit(2**31 - 1)
            lines = csv.reader(file, strict=True)
        number, header = 0, list[str]()
        try:
            for cells in lines:
                number += 1
                if cells in ([], [""]):
                    continue
                if not header:
                    header = cells
                    twice = [name for name in header if header.count(name) > 1]
                    if twice:
                        raise ValueError(f"the header names `{twice[0]}` twice")
                elif len(cells) != len(header):
                    raise ValueError(f"has {len(cells)} columns, the header has {len(header)}: {str(cells)[:200]}")
                else:
                    yield dict(zip(header, cells, strict=True))
        except UnicodeDecodeError:
            raise
        except (ValueError, csv.Error) as error:
            place = f"line {number}" if tabs else f"the row that ends in line {lines.line_num}"
            raise ValueError(f"{place}: {error}") from None


def _paragraphs(path: Path) -> Iterator[dict[str, Any]]:
    """What empty lines part."""
    with path.open(encoding="utf-8-sig") as file:
        for is_text, lines in itertools.groupby(file, key=lambda line: bool(line.strip())):
            if is_text:
                yield {"text": "".join(lines).rstrip()}


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array, or of lines of JSON; the file's first character says which."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        is_array = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        values = ((f"item {i}", value) for i, value in enumerate(json.load(file))) if is_array else _lines(file)
        for place, value in values:
            if not isinstance(value, dict):
                raise ValueError(f"{place}: is no object with a value for each column: {str(value)[:80]}")
            yield value


def _lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from None
