"""Opening data: text stays text, numbers are numbers, a row is never lost or shifted, and what is wrong is named."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetune.data_section import Source
from fleetune.train.sources import DataError, Table, open_source

KINDS = (".tsv", ".csv", ".json", ".jsonl", ".parquet")
ODD_TEXTS = ['"open', 'a "b" c', "null", "NA", "nan", "None", "007", "1e5", "True", " led ", "it's", "a,b", "中文 é 😀"]


def opened(path: Path, texts: Sequence[str] = ("text",), others: Sequence[str] = ("label",), **source: Any) -> Table:
    return open_source(Source(path=str(path), **source), "train", list(texts), list(others))


def refusal(path: Path, **source: Any) -> str:
    with pytest.raises(DataError) as caught:
        opened(path, **source)
    return str(caught.value)


def write(folder: Path, kind: str, rows: list[dict[str, Any]], name: str = "rows") -> Path:
    """Rows as other programs write them."""
    path = folder / f"{name}{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [list(rows[0]), *(map(str, row.values()) for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8", newline="\n")
    return path


# ---------------------------------------------------------------- text and numbers


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_what_stands_in_the_file(tmp_path: Path, kind: str) -> None:
    rows = [{"text": text, "label": i} for i, text in enumerate(ODD_TEXTS)]
    table = opened(write(tmp_path, kind, rows))
    assert table.columns == {"text": ODD_TEXTS, "label": list(range(len(ODD_TEXTS)))}
    assert table.names == ["text", "label"]
    assert table.index.tolist() == list(range(len(ODD_TEXTS)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_text_comes_back(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    alphabet = st.characters(exclude_categories=["Cs"], exclude_characters="\t\n" if kind == ".tsv" else "")
    texts = data.draw(st.lists(st.text(alphabet, max_size=8), min_size=1, max_size=5))
    path = write(tmp_path, kind, [{"text": text, "label": 1.5} for text in texts])
    assert opened(path).columns == {"text": texts, "label": [1.5] * len(texts)}


def test_csv_has_standard_quoting(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'label,text\r\n0,"one, ""two""\r\nthree"\r\n\r\n1,plain\r\n')
    assert opened(path).columns == {"text": ['one, "two"\r\nthree', "plain"], "label": [0, 1]}


def test_tsv_has_no_quoting_and_a_row_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes('text\tlabel\r\n"one\t0\r\n\r\ntwo"\rthree\u2028four\t1\r\n'.encode())
    assert opened(path).columns == {"text": ['"one', 'two"\rthree\u2028four'], "label": [0, 1]}


@pytest.mark.parametrize("kind", [".tsv", ".csv"])
@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["0", "1", "-2"], [0, 1, -2]),
        (["2.500", "0", "-1e-3", ".5"], [2.5, 0, -0.001, 0.5]),
        (["1", "", " 2 "], [1, None, 2]),
        (["1", "two", ""], ["1", "two", None]),
        (["007", "1"], ["007", "1"]),
        (["nan", "1"], ["nan", "1"]),
        (["True", "False"], ["True", "False"]),
    ],
)
def test_a_column_is_numbers_where_every_cell_is_one(
    tmp_path: Path, kind: str, cells: list[str], values: list[Any]
) -> None:
    found = opened(write(tmp_path, kind, [{"text": cell, "label": cell} for cell in cells])).columns
    assert found == {"text": cells, "label": values}
    assert [type(value) for value in found["label"]] == [type(value) for value in values]


def test_a_fraction_far_down_the_column_is_as_good_as_one_at_its_top(tmp_path: Path) -> None:
    scores = [1] * 20_000 + [2.5]
    table = opened(write(tmp_path, ".tsv", [{"text": "a", "label": score} for score in scores]))
    assert table.columns["label"] == scores


def test_json_keeps_its_types(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01", "label": "0"}, {"text": None, "label": True}, {"text": 7}, {"label": 1.5, "more": 1}]
    for kind in (".json", ".jsonl"):
        table = opened(write(tmp_path, kind, rows))
        assert table.columns == {"text": ["2020-01-01", None, 7, None], "label": ["0", True, None, 1.5]}
        assert table.names == ["text", "label", "more"]


def test_json_is_an_array_or_lines_whatever_its_suffix(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    array, lines = write(tmp_path, ".json", rows), write(tmp_path, ".jsonl", rows)
    (tmp_path / "swapped.jsonl").write_text("\n " + array.read_text())
    (tmp_path / "swapped.json").write_text("\n" + lines.read_text())
    for suffix in (".json", ".jsonl"):
        assert opened(tmp_path / f"swapped{suffix}").columns == opened(array).columns == opened(lines).columns


def test_parquet_keeps_its_types_and_knows_its_classes(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "when": datasets.Value("timestamp[s]"),
        }
    )
    when = datetime.datetime(2020, 1, 1)
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0], "when": [when, when]}, features=features)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    table = opened(tmp_path / "rows.parquet", others=("label", "when"))
    assert table.columns == {"text": ["a", "b"], "label": [1, 0], "when": [when, when]}
    assert table.class_names == {"label": ["neg", "pos"]}


@pytest.mark.parametrize("kind", [".tsv", ".csv", ".json", ".jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"text": "a", "label": 0}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert opened(path).columns == {"text": ["a"], "label": [0]}


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    text = "long " * 100_000
    for kind in KINDS:
        assert opened(write(tmp_path, kind, [{"text": text, "label": 0}])).columns["text"] == [text]


@pytest.mark.parametrize("name", ["rows[1]", "rows*", "a b,c", "train::x"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, ".csv", [{"text": "another", "label": 0}], name="rows1")
    path = write(tmp_path, ".csv", [{"text": "a", "label": 0}], name=name)
    assert opened(path).columns["text"] == ["a"]


def test_columns_that_the_data_lacks_are_left_out(tmp_path: Path) -> None:
    for kind in KINDS:
        table = opened(write(tmp_path, kind, [{"text": "a", "label": 0}]), texts=("text", "pair"), others=("score",))
        assert (list(table.columns), table.names) == (["text"], ["text", "label"])


# ---------------------------------------------------------------- where and limit

ROWS = [
    {"text": "a", "label": 0, "fold": 1, "split": "train", "gold": True, "zip": "007"},
    {"text": "b", "label": 1, "fold": 2, "split": "test", "gold": False, "zip": "7"},
    {"text": "c", "label": 0, "fold": 1, "split": "train", "gold": False, "zip": "x"},
    {"text": "d", "label": 1, "fold": 1, "split": "test", "gold": True, "zip": "007"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"split": "train"}, [0, 2]),
        ({"fold": 1}, [0, 2, 3]),
        ({"fold": 1.0}, [0, 2, 3]),
        ({"gold": True}, [0, 3]),
        ({"gold": False, "fold": 1}, [2]),
        ({"zip": "007"}, [0, 3]),
    ],
)
def test_where_keeps_the_rows_with_these_values(
    tmp_path: Path, kind: str, where: dict[str, Any], kept: list[int]
) -> None:
    table = opened(write(tmp_path, kind, ROWS), where=where)
    assert table.index.tolist() == kept
    assert table.columns["text"] == [ROWS[i]["text"] for i in kept]
    assert table.columns["label"] == [ROWS[i]["label"] for i in kept]


@pytest.mark.parametrize("kind", KINDS)
def test_limit_takes_the_first_of_the_rows_that_where_keeps(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ROWS)
    assert opened(path, limit=3).index.tolist() == [0, 1, 2]
    assert opened(path, limit=1, where={"split": "test"}).index.tolist() == [1]
    assert opened(path, limit=9).index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_where_of_a_column_or_value_that_is_not_there(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ROWS)
    assert refusal(path, where={"splits": "train"}) == (
        "data.train.where.splits = 'train': the data has no such column; "
        "it has text, label, fold, split, gold, zip; did you mean `split`?"
    )
    for where in ({"split": "dev"}, {"fold": "1.5"}, {"zip": 3}, {"gold": "yes"}):
        assert refusal(path, where=where) == f"data.train.path = {str(path)!r}: has no rows with {where}"


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"")
    assert refusal(path).startswith(f"data.train.path = {str(path)!r}: ")


@pytest.mark.parametrize(
    ("kind", "content"), [(".tsv", "text\tlabel\n"), (".csv", "text,label\n"), (".json", "[]"), (".jsonl", "\n\n")]
)
def test_a_file_without_rows(tmp_path: Path, kind: str, content: str) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_text(content)
    assert refusal(path) == f"data.train.path = {str(path)!r}: has no rows"


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        (".tsv", "text\tlabel\na\t0\t\nb\t1\t\n", "line 2: has 3 columns, the header has 2: ['a', '0', '']"),
        (".tsv", "text\tlabel\na\t0\n\nb\n", "line 4: has 1 columns, the header has 2: ['b']"),
        (".csv", 'text,label\n"a\nb",0\nc,d,1\n', "the row that ends in line 4: has 3 columns, the header has 2"),
        (".csv", 'text,label\n"a,0\nb,1\n', "the row that ends in line 3: unexpected end of data"),
        (".csv", 'text,label\n"a" b,0\n', "the row that ends in line 2: ',' expected after '\"'"),
        (".csv", "text,text,label\na,b,0\n", "line 1: the header names `text` twice"),
        (".tsv", "text\ttext\na\tb\n", "line 1: the header names `text` twice"),
        (".jsonl", '{"text": "a"}\n\n{"text": "b"\n', "line 3: Expecting ',' delimiter"),
        (".jsonl", '{"text": "a"}\n"b"\n', "line 2: is no object with a value for each column: b"),
        (".json", '[{"text": "a"}, 7]', "item 1: is no object with a value for each column: 7"),
        (".json", '[{"text": "a"}', "Expecting ',' delimiter"),
        (".json", '{\n  "rows": []\n}', "line 1: Expecting property name enclosed in double quotes"),
        (".parquet", "text,label\na,0\n", "Parquet magic bytes not found"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path: Path, kind: str, content: str, reason: str) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_text(content)
    message = refusal(path)
    assert message.startswith(f"data.train.path = {str(path)!r}: cannot be read: ")
    assert reason in message


@pytest.mark.parametrize("kind", [".tsv", ".csv", ".json", ".jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, [{"text": "cafe", "label": 0}])
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))
    assert "cannot be read: 'utf-8' codec can't decode byte 0xe9" in refusal(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for kind in KINDS:
        assert "No such file" in refusal(tmp_path / f"rows{kind}")


@pytest.mark.parametrize("field", ["name", "split", "revision"])
def test_what_is_for_hub_data_sets_is_refused_for_a_file(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, ".jsonl", ROWS)
    assert refusal(path, **{field: "test"}) == (
        f"data.train.{field} = 'test': is for hub data sets; rows of a file are chosen with `where`"
    )


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set that `datasets` loads by its name, as it does the hub's."""
    (tmp_path / "reviews").mkdir()
    write(tmp_path / "reviews", ".jsonl", ROWS, name="train")
    write(tmp_path / "reviews", ".jsonl", ROWS[:1], name="test")
    monkeypatch.chdir(tmp_path)
    return "reviews"


def test_a_hub_data_set_is_opened_by_name_and_split(hub_name: str) -> None:
    assert opened(Path(hub_name)).columns["text"] == ["a", "b", "c", "d"]
    assert opened(Path(hub_name), split="test").columns["text"] == ["a"]
    assert opened(Path(hub_name), limit=2).index.tolist() == [0, 1]
    assert opened(Path(hub_name), limit=1, where={"fold": 2}).index.tolist() == [1]


def test_a_hub_data_set_or_split_that_is_not_there(hub_name: str) -> None:
    assert 'cannot be read: Unknown split "dev"' in refusal(Path(hub_name), split="dev")
    assert refusal(Path("no-such/data-set")).startswith("data.train.path = 'no-such/data-set': cannot be read: ")


def test_what_is_wrong_with_a_hub_data_set_is_told_and_not_only_that_it_is(hub_name: str) -> None:
    Path(hub_name, "test.jsonl").write_text('{"text": "a", "label": 0}\n{"text": ')
    assert "cannot be read: JSON parse error" in refusal(Path(hub_name), split="test")
