"""Preparing data: columns, labels, weights, cleaning, the split, the arrays, and the cache that holds them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fleetune.schema import Recipe
from fleetune.train import data as data_module
from fleetune.train.cache import cache_folder
from fleetune.train.data import PIECE, DataError, Prepared, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "cache"))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(
    train: Path | str | dict[str, Any],
    task: str = "classification",
    model: dict[str, Any] | None = None,
    seed: int = 0,
    **data: Any,
) -> Recipe:
    sources = {
        name: {"path": str(source)} if isinstance(source, Path | str) else source
        for name, source in {
            "train": train,
            "validation": data.pop("validation", None),
            "test": data.pop("test", None),
        }.items()
        if source is not None
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": task,
            "model": {"model_name_or_path": "none", **(model or {})},
            "data": {**sources, **data},
            "training": {"seed": seed},
        }
    )


def labelled(folder: Path, labels: list[Any], name: str = "train") -> Path:
    return jsonl(folder / f"{name}.jsonl", [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])


def texts_of(prepared: Prepared, split: str, tokenizer: Any) -> list[str]:
    """Each row's tokens as text again, without special tokens."""
    rows = prepared.splits[split]
    return [
        tokenizer.decode(rows.input_ids[begin:end], skip_special_tokens=True)
        for begin, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    ]


def refusal(recipe: Recipe, tokenizer: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(recipe, tokenizer)
    return str(caught.value)


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("field", ["text_column", "text_pair_column", "label_column", "weight_column"])
def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path, tokenizer: Any, field: str) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": 0, "other": 1}])
    assert refusal(recipe(train, **{field: "othr"}), tokenizer) == (
        f"data.{field} = 'othr': the data has no such column; it has text, label, other; did you mean `other`?"
    )


def test_every_split_needs_the_columns(tmp_path: Path, tokenizer: Any) -> None:
    train = labelled(tmp_path, [0, 1])
    validation = jsonl(tmp_path / "validation.jsonl", [{"sentence": "a", "label": 0}])
    assert refusal(recipe(train, validation=validation), tokenizer) == (
        "data.text_column = 'text': the data has no such column; it has sentence, label"
    )


def test_numbers_and_nothing_are_text_too(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": 7, "label": 0}, {"text": None, "label": 1}, {"text": "null", "label": 1}]
    prepared = prepare(recipe(jsonl(tmp_path / "train.jsonl", rows)), tokenizer)
    assert texts_of(prepared, "train", tokenizer) == ["7", "", "null"]


@pytest.mark.parametrize("cell", [["a", "b"], {"a": 1}])
@pytest.mark.parametrize("column", ["text", "other"])
def test_a_list_is_no_text(tmp_path: Path, tokenizer: Any, column: str, cell: Any) -> None:
    row = {"text": "a", "other": "b", "label": 0}
    train = jsonl(tmp_path / "train.jsonl", [row, row | {column: cell}])
    field = {"text": "text_column", "other": "text_pair_column"}[column]
    assert (
        refusal(recipe(train, text_pair_column="other"), tokenizer)
        == f"data.{field} = {column!r}: row 1 of train (counted from 0) has {cell}, which is no text"
    )


def test_half_of_a_surrogate_pair_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": "é", "label": 0}, {"text": "cut \ud83d", "label": 0}])
    assert refusal(recipe(train), tokenizer).startswith(
        "data.text_column = 'text': row 1 of train (counted from 0) is not valid Unicode"
    )


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([1, 0, 2], ["0", "1", "2"], [1, 0, 2]),
        ([1.0, 0.0], ["0", "1"], [1, 0]),
        ([True, False], ["0", "1"], [1, 0]),
        ([0, 0], ["0", "1"], [0, 0]),
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        (["10", "9"], ["9", "10"], [1, 0]),
        (["yes", "", "no"], ["", "no", "yes"], [2, 0, 1]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, tokenizer: Any, labels: list[Any], names: list[str], numbers: list[int]
) -> None:
    prepared = prepare(recipe(labelled(tmp_path, labels)), tokenizer)
    assert prepared.label_names == names
    assert prepared.splits["train"].labels.dtype == np.int64
    assert prepared.splits["train"].labels.tolist() == numbers
    assert prepared.report["labels"] == {"train": np.bincount(numbers, minlength=len(names)).tolist()}


def test_a_class_without_training_rows_is_told(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare(recipe(labelled(tmp_path, [0, 3])), tokenizer)
    assert prepared.label_names == ["0", "1", "2", "3"]
    assert prepared.report["warning"] == "no training row has the label 1, 2"


def classed(folder: Path, names: list[str], labels: list[int], name: str = "train") -> Path:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    columns = {"text": [f"text {i}" for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return folder / f"{name}.parquet"


def test_classes_that_the_data_knows_keep_their_names_and_order(tmp_path: Path, tokenizer: Any) -> None:
    train = classed(tmp_path, ["pos", "neg"], [1, 0, 0])
    validation = classed(tmp_path, ["neg", "pos"], [1, 0], "validation")
    test = labelled(tmp_path, ["pos", "neg"], "test")
    prepared = prepare(recipe(train, validation=validation, test=test), tokenizer)
    assert prepared.label_names == ["pos", "neg"]
    assert [prepared.splits[name].labels.tolist() for name in prepared.splits] == [[1, 0, 0], [0, 1], [0, 1]]


def test_five_stars_are_names_where_they_are_written_as_names(tmp_path: Path, tokenizer: Any) -> None:
    """A file of one split may write "1" where another writes 1: both are the first class of "1" to "5"."""
    train = labelled(tmp_path, ["5", "1", "3", "2", "4"])
    validation = tmp_path / "validation.csv"
    validation.write_text("text,label\na,1\nb,5\n")
    prepared = prepare(recipe(train, validation=validation), tokenizer)
    assert prepared.label_names == ["1", "2", "3", "4", "5"]
    assert prepared.splits["validation"].labels.tolist() == [0, 4]
    assert "has 0, which is none of the 5 classes (1, 2, 3, 4, 5)" in refusal(
        recipe(train, validation=labelled(tmp_path, [0], "validation")), tokenizer
    )


def test_the_known_number_of_a_class_goes_before_its_name(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare(recipe(classed(tmp_path, ["1", "2", "3"], [0, 1, 2])), tokenizer)
    assert prepared.splits["train"].labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        (["bad", "good"], [1, 0], [1, 0]),
        (["bad", "good"], ["good", "bad"], [1, 0]),
        (["good", "bad"], ["good", "bad"], [0, 1]),
        (["1", "2"], [2, 1.0], [1, 0]),
    ],
)
def test_the_recipe_may_name_the_classes(
    tmp_path: Path, tokenizer: Any, names: list[str], labels: list[Any], numbers: list[int]
) -> None:
    prepared = prepare(recipe(labelled(tmp_path, labels), model={"label_names": names}), tokenizer)
    assert (prepared.label_names, prepared.splits["train"].labels.tolist()) == (names, numbers)


def test_the_recipes_names_replace_the_datas_in_its_order(tmp_path: Path, tokenizer: Any) -> None:
    train = classed(tmp_path, ["neg", "pos"], [1, 0])
    prepared = prepare(recipe(train, model={"label_names": ["negative", "positive"]}), tokenizer)
    assert prepared.splits["train"].labels.tolist() == [1, 0]
    prepared = prepare(recipe(train, model={"label_names": ["pos", "neg", "mixed"]}), tokenizer)
    assert prepared.splits["train"].labels.tolist() == [0, 1]


def test_num_labels_has_to_fit(tmp_path: Path, tokenizer: Any) -> None:
    for train in (labelled(tmp_path, ["a", "b"]), classed(tmp_path, ["a", "b"], [0, 1])):
        assert refusal(recipe(train, model={"num_labels": 3}), tokenizer) == (
            "model.num_labels = 3: the training data has 2 labels: a, b"
        )
    assert prepare(recipe(labelled(tmp_path, [0, 1]), model={"num_labels": 3}), tokenizer).label_names == [
        "0",
        "1",
        "2",
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [0, None],
            "row 1 of train (counted from 0) has no label; drop such rows with the cleaning step drop_empty",
        ),
        ([0, math.nan], "row 1 of train (counted from 0) has no label"),
        ([None, None], "no row of train has a label"),
        ([0, 0.5], "0.5 stands among the labels"),
        ([0, "pos", 1], "'pos' stands among the labels"),
        ([0, math.inf], "inf stands among the labels"),
        ([-1, 1], "the labels go from -1 to 1; classes are numbered from 0 up"),
        ([0, 20_000], "the labels go from 0 to 20000; classes are numbered from 0 up"),
        ([0, [1]], "row 1 of train (counted from 0) has [1], which is no label (a number or a name)"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, tokenizer: Any, labels: list[Any], message: str) -> None:
    assert refusal(recipe(labelled(tmp_path, labels)), tokenizer).startswith(f"data.label_column = 'label': {message}")


@pytest.mark.parametrize("label", ["maybe", 2, -1, 0.5, "1"])
def test_a_label_that_train_does_not_have(tmp_path: Path, tokenizer: Any, label: Any) -> None:
    train, validation = labelled(tmp_path, ["no", "yes"]), labelled(tmp_path, ["yes", label], "validation")
    assert refusal(recipe(train, validation=validation), tokenizer) == (
        f"data.label_column = 'label': row 1 of validation (counted from 0) has {label!r}, which is none of the "
        "2 classes (no, yes)"
    )


def test_rows_are_counted_as_in_their_source(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"text {i}", "label": i % 2, "fold": i % 3} for i in range(9)]
    prepared = prepare(
        recipe({"path": str(jsonl(tmp_path / "train.jsonl", rows)), "where": {"fold": 1}}),
        tokenizer,
    )
    assert prepared.splits["train"].index.tolist() == [1, 4, 7]
    rows[4]["label"] = "x"
    source = {"path": str(jsonl(tmp_path / "train.jsonl", rows)), "where": {"fold": 1}}
    assert "row 4 of train (counted from 0) has 'x'" in refusal(
        recipe(source, model={"num_labels": 2, "label_names": ["a", "b"]}), tokenizer
    )


def test_regression_has_numbers_for_labels(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare(recipe(labelled(tmp_path, [1, 2.5, -3]), task="regression"), tokenizer)
    assert prepared.splits["train"].labels.dtype == np.float32
    assert prepared.splits["train"].labels.tolist() == [1.0, 2.5, -3.0]
    assert (prepared.label_names, prepared.report["labels"]) == ([], {})


@pytest.mark.parametrize("label", ["2.5", math.inf, True])
def test_regression_refuses_what_is_no_number(tmp_path: Path, tokenizer: Any, label: Any) -> None:
    assert refusal(recipe(labelled(tmp_path, [1.0, label]), task="regression"), tokenizer) == (
        f"data.label_column = 'label': row 1 of train (counted from 0) has {label!r}, which is no number"
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_row_without_a_label_is_told_as_that(tmp_path: Path, tokenizer: Any, task: str, nothing: Any) -> None:
    train, validation = labelled(tmp_path, [0, 1]), labelled(tmp_path, [1, 0, nothing], "validation")
    assert refusal(recipe(train, task, validation=validation), tokenizer) == (
        "data.label_column = 'label': row 2 of validation (counted from 0) has no label"
    )


# ---------------------------------------------------------------- weights


def weighted(folder: Path, weights: list[Any], name: str = "train") -> Path:
    rows = [{"text": f"text {i}", "label": i % 2, "weight": weight} for i, weight in enumerate(weights)]
    return jsonl(folder / f"{name}.jsonl", rows)


def test_weights_are_kept_for_training_alone(tmp_path: Path, tokenizer: Any) -> None:
    train, validation = weighted(tmp_path, [0, 0.5, 2]), weighted(tmp_path, [-1, None], "validation")
    test = labelled(tmp_path, [0, 1], "test")
    prepared = prepare(recipe(train, validation=validation, test=test, weight_column="weight"), tokenizer)
    weights = prepared.splits["train"].weights
    assert weights is not None
    assert (weights.dtype, weights.tolist()) == (np.float32, [0.0, 0.5, 2.0])
    assert prepared.splits["validation"].weights is None
    assert prepare(recipe(train), tokenizer).splits["train"].weights is None


@pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf, None, "1", True])
def test_what_is_no_weight(tmp_path: Path, tokenizer: Any, weight: Any) -> None:
    message = refusal(recipe(weighted(tmp_path, [1, 1, weight]), weight_column="weight"), tokenizer)
    assert message == (
        f"data.weight_column = 'weight': row 2 of train (counted from 0) has {weight!r}, which is no weight "
        "(a number, 0 or more)"
    )


def test_weights_that_are_all_zero(tmp_path: Path, tokenizer: Any) -> None:
    message = refusal(recipe(weighted(tmp_path, [0, 0.0]), weight_column="weight"), tokenizer)
    assert message == "data.weight_column = 'weight': every weight of train is 0"


# ---------------------------------------------------------------- cleaning


def test_cleaning_is_reported_and_held_out_rows_stay(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": text, "label": 0} for text in ("<p>a", "", "b", " a ", "c")])
    test = jsonl(tmp_path / "test.jsonl", [{"text": text, "label": 0} for text in ("", "b", "b")])
    steps = ["strip_html", "collapse_whitespace", "drop_empty", "drop_duplicates", "drop_leaked"]
    prepared = prepare(recipe(train, test=test, cleaning=steps), tokenizer)
    assert prepared.report["cleaning"] == {
        "strip_html": {"train": 1, "test": 0},
        "collapse_whitespace": {"train": 2, "test": 0},
        "drop_empty": {"train": 1},
        "drop_duplicates": {"train": 1},
        "drop_leaked": {"train": 1},
    }
    assert prepared.report["rows"] == {"train": 2, "test": 3}
    assert texts_of(prepared, "train", tokenizer) == ["a", "c"]
    assert prepared.splits["train"].index.tolist() == [0, 4]
    assert texts_of(prepared, "test", tokenizer) == ["", "b", "b"]


# ---------------------------------------------------------------- a validation split of the training data


def test_validation_is_split_off_by_seed(tmp_path: Path, tokenizer: Any) -> None:
    train = weighted(tmp_path, list(range(1, 41)))
    found = {}
    for seed in (0, 1):
        splits = prepare(recipe(train, seed=seed, validation_fraction=0.25, weight_column="weight"), tokenizer).splits
        assert list(splits) == ["train", "validation"]
        chosen = splits["validation"].index.tolist()
        assert len(chosen) == 10
        assert sorted(chosen + splits["train"].index.tolist()) == list(range(40))
        for split in splits.values():  # labels, weights and text go with their rows
            assert split.weights is not None
            assert split.weights.tolist() == [i + 1 for i in split.index]
            assert split.labels.tolist() == [i % 2 for i in split.index]
        found[seed] = chosen
    assert found[0] != found[1]
    jsonl(tmp_path / "other.jsonl", [json.loads(line) | {"more": 1} for line in train.open()])
    again = prepare(recipe(tmp_path / "other.jsonl", validation_fraction=0.25), tokenizer)  # not from the cache
    assert again.splits["validation"].index.tolist() == found[0]


def test_a_split_leaves_test_alone_and_keeps_a_row_on_both_sides(tmp_path: Path, tokenizer: Any) -> None:
    train, test = labelled(tmp_path, [0, 1, 0, 1]), labelled(tmp_path, [1], "test")
    prepared = prepare(recipe(train, test=test, validation_fraction=0.5), tokenizer)
    assert prepared.report["rows"] == {"train": 2, "validation": 2, "test": 1}
    for fraction, count in ((0.1, 0), (0.9, 4)):
        assert refusal(recipe(train, validation_fraction=fraction), tokenizer) == (
            f"data.validation_fraction = {fraction}: of the 4 rows of train that is {count} for validation; "
            "both sides need at least one"
        )


def test_a_fault_in_a_row_that_was_split_off_names_its_place_in_the_file(tmp_path: Path, tokenizer: Any) -> None:
    train = labelled(tmp_path, [0, 1] * 20)
    chosen = prepare(recipe(train, validation_fraction=0.25), tokenizer).splits["validation"].index.tolist()
    for label, said in ((None, "has no label"), (7, "has 7, which is none of the 2 classes (0, 1)")):
        train = labelled(tmp_path, [label if i == chosen[3] else i % 2 for i in range(40)])
        given = {"num_labels": 2, "label_names": ["0", "1"]}
        assert refusal(recipe(train, model=given, validation_fraction=0.25), tokenizer) == (
            f"data.label_column = 'label': row {chosen[3]} of train (counted from 0), which data.validation_fraction "
            f"puts into validation, {said}"
        )


# ---------------------------------------------------------------- tokens


def test_the_arrays_hold_what_the_tokenizer_gives(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"text number {i} " + "long " * (i % 7) for i in range(2 * PIECE + 5)]
    train = jsonl(tmp_path / "train.jsonl", [{"text": text, "label": 0} for text in texts])
    prepared = prepare(recipe(train, max_length=8), tokenizer)
    split = prepared.splits["train"]
    expected = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert split.input_ids.dtype == np.int32
    assert split.input_ids.tolist() == [token for row in expected for token in row]
    assert split.offsets.tolist() == [0, *np.cumsum([len(row) for row in expected])]
    assert split.lengths.tolist() == [len(row) for row in expected]
    assert split.token_type_ids is None
    assert prepared.report["tokens"] == {"train": sum(len(row) for row in expected)}
    assert len(split) == prepared.report["rows"]["train"] == len(texts)


def test_rows_that_were_cut_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    words = [1, 5, 6, 7, 8, 200]
    train = jsonl(tmp_path / "train.jsonl", [{"text": "good " * count, "label": 0} for count in words])
    test = jsonl(tmp_path / "test.jsonl", [{"text": "good " * 6, "label": 0}])
    prepared = prepare(recipe(train, test=test, max_length=8), tokenizer)  # 6 words and 2 special tokens
    assert prepared.report["truncated"] == {"train": 3, "test": 0}
    assert prepared.splits["train"].lengths.tolist() == [3, 7, 8, 8, 8, 8]


def test_rows_that_a_slow_tokenizer_cut_are_counted(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    words = ["abc", "abcdefg", "abcdefgh", "abcdefghijkl"]  # a byte a token, and </s>
    train = jsonl(tmp_path / "train.jsonl", [{"text": word, "label": 0} for word in words])
    prepared = prepare(recipe(train, max_length=8), ByT5Tokenizer())
    assert prepared.report["truncated"] == {"train": 2}
    assert prepared.splits["train"].lengths.tolist() == [4, 8, 8, 8]


def test_pairs_have_the_tokenizers_token_types(tmp_path: Path, tokenizer: Any) -> None:
    pairs = [("a short one", "b"), ("", "c d"), ("e", ""), ("good " * 9, "bad " * 5), ("good " * 3, "bad " * 2)]
    train = jsonl(tmp_path / "train.jsonl", [{"text": a, "other": b, "label": 0} for a, b in pairs])
    prepared = prepare(recipe(train, text_pair_column="other", max_length=8), tokenizer)
    split = prepared.splits["train"]
    expected = tokenizer([a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=8)
    assert split.input_ids.tolist() == [token for row in expected["input_ids"] for token in row]
    assert split.token_type_ids is not None
    assert split.token_type_ids.dtype == np.uint8
    assert split.token_type_ids.tolist() == [token for row in expected["token_type_ids"] for token in row]
    assert prepared.report["truncated"] == {"train": 1}


@pytest.mark.parametrize(("pair", "least"), [(None, 3), ("other", 4)])
def test_max_length_has_to_leave_room_for_text(tmp_path: Path, tokenizer: Any, pair: str | None, least: int) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"text": "good", "other": "bad", "label": 0}])
    prepared = prepare(recipe(train, text_pair_column=pair, max_length=least), tokenizer)
    assert prepared.splits["train"].lengths.tolist() == [least]
    assert refusal(recipe(train, text_pair_column=pair, max_length=least - 1), tokenizer) == (
        f"data.max_length = {least - 1}: leaves no room for text; {least - 1} are special tokens"
    )


def test_an_empty_text_still_has_a_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "good": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")
    train = jsonl(tmp_path / "train.jsonl", [{"text": text, "label": 0} for text in ("good good", "", "good")])
    split = prepare(recipe(train), bare).splits["train"]
    assert (split.input_ids.tolist(), split.lengths.tolist()) == ([2, 2, 1, 2], [2, 1, 1])


def test_text_is_kept_only_where_it_is_augmented(tmp_path: Path, tokenizer: Any) -> None:
    train, validation = labelled(tmp_path, [0, 1]), labelled(tmp_path, [0, 1], "validation")
    assert prepare(recipe(train, validation=validation), tokenizer).splits["train"].texts is None
    steps = [{"kind": "word_dropout"}]
    splits = prepare(recipe(train, validation=validation, augmentation=steps), tokenizer).splits
    assert splits["train"].texts["text"][:] == ["text 0", "text 1"]
    assert splits["validation"].texts is None


# ---------------------------------------------------------------- the cache


def built() -> set[str]:
    return {path.parent.name for path in cache_folder().glob("*/report.json")}


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return labelled(tmp_path, [0, 1] * 10)


def test_the_second_time_nothing_is_built(train: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(recipe(train), tokenizer)
    monkeypatch.setattr(data_module, "_build", lambda *_: pytest.fail("built again"))
    again = prepare(recipe(train), tokenizer)
    assert again.report == first.report
    assert again.splits["train"].input_ids.tolist() == first.splits["train"].input_ids.tolist()
    assert isinstance(again.splits["train"].input_ids, np.memmap)


def test_what_does_not_change_the_arrays_does_not_change_their_key(train: Path, tmp_path: Path, tokenizer: Any) -> None:
    prepare(recipe(train), tokenizer)
    os.utime(train, (1, 1))
    prepare(recipe(train), tokenizer)
    (tmp_path / "moved").mkdir()
    prepare(recipe(train.rename(tmp_path / "moved" / "t.jsonl")), tokenizer)
    train = tmp_path / "moved" / "t.jsonl"
    prepare(recipe(train, seed=1), tokenizer)
    tokenizer(["another call"], padding="max_length", truncation=True, max_length=5)
    prepare(recipe(train), tokenizer)
    assert len(built()) == 1
    for probability in (0.1, 0.2):
        prepare(recipe(train, augmentation=[{"kind": "random_swap", "probability": probability}]), tokenizer)
    assert len(built()) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 7},
        {"cleaning": ["strip_html"]},
        {"text_column": "label", "label_column": "text"},
        {"train": {"limit": 19}},
        {"train": {"where": {"label": 1}}},
        {"validation": "train"},
        {"validation_fraction": 0.5},
        {"model": {"label_names": ["a", "b"]}},
        {"model": {"num_labels": 3}},
        {"task": "regression"},
    ],
)
def test_what_changes_the_arrays_changes_their_key(train: Path, tokenizer: Any, changed: dict[str, Any]) -> None:
    source: Any = {"path": str(train), **changed.get("train", {})}
    others = {key: train if key == "validation" else value for key, value in changed.items() if key != "train"}
    prepare(recipe(train), tokenizer)
    prepare(recipe(source, **others), tokenizer)
    assert len(built()) == 2


def test_the_seed_counts_where_it_splits(train: Path, tokenizer: Any) -> None:
    for seed in (0, 1):
        prepare(recipe(train, seed=seed, validation_fraction=0.5), tokenizer)
    assert len(built()) == 2


def test_changed_content_is_seen_though_time_and_size_stay(train: Path, tokenizer: Any) -> None:
    before = train.stat()
    prepare(recipe(train), tokenizer)
    train.write_text(train.read_text().replace("text 0", "text X"))
    os.utime(train, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert train.stat().st_size == before.st_size
    prepared = prepare(recipe(train), tokenizer)
    assert texts_of(prepared, "train", tokenizer)[:2] == ["text x", "text 1"]
    assert len(built()) == 2


def test_another_tokenizer_has_another_key(train: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer, ByT5Tokenizer

    prepare(recipe(train), tokenizer)
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    prepare(recipe(train), other)
    assert len(built()) == 1
    ends = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="[MASK]")  # of the same tokens
    prepare(recipe(train), ends)
    assert len(built()) == 2
    other.add_tokens(["text"])
    prepare(recipe(train), other)
    left = AutoTokenizer.from_pretrained(tokenizer.name_or_path, truncation_side="left")
    prepare(recipe(train), left)
    prepare(recipe(train), ByT5Tokenizer())
    prepare(recipe(train), ByT5Tokenizer(extra_ids=0))
    assert len(built()) == 6


def test_a_half_built_folder_is_built_anew(train: Path, tokenizer: Any) -> None:
    first = prepare(recipe(train), tokenizer)
    (folder,) = (path.parent for path in cache_folder().glob("*/report.json"))
    (folder / "report.json").unlink()
    (folder / "train" / "input_ids.npy").write_bytes(b"torn")
    left = folder.with_name(f"{folder.name}.abc.building")
    (left / "train").mkdir(parents=True)
    again = prepare(recipe(train), tokenizer)
    assert again.report == first.report
    assert again.splits["train"].lengths.tolist() == first.splits["train"].lengths.tolist()
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_where_files_cannot_be_locked_the_faster_of_two_builds_is_kept(
    train: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fleetune.train import cache, data

    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    build, times = data._build, []

    def overtaken(*arguments: Any) -> None:
        times.append(1)
        if len(times) == 1:
            prepare(recipe(train), tokenizer)
        build(*arguments)

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    monkeypatch.setattr(data, "_build", overtaken)
    prepared = prepare(recipe(train), tokenizer)
    assert len(times) == 2
    assert texts_of(prepared, "train", tokenizer)[:2] == ["text 0", "text 1"]
    assert [path for path in cache_folder().iterdir() if path.is_dir()] == [
        path.parent for path in cache_folder().glob("*/report.json")
    ]


def test_a_build_that_fails_leaves_nothing_to_be_taken_for_whole(tmp_path: Path, train: Path, tokenizer: Any) -> None:
    bad = labelled(tmp_path, [0, None], "validation")
    for _ in range(2):
        assert "row 1 of validation (counted from 0) has no label" in refusal(recipe(train, validation=bad), tokenizer)
    assert built() == set()


PREPARE = """
import json, os, pathlib, sys, time
from transformers import AutoTokenizer
from fleetune.recipe import parse_recipe
from fleetune.train import data
recipe, tokenizer = parse_recipe(sys.argv[1], "test"), AutoTokenizer.from_pretrained(sys.argv[2])
folder, build = pathlib.Path(sys.argv[3]), data._build
def slow_build(*arguments):
    (folder / f"building-{os.getpid()}").touch()
    time.sleep(1)
    build(*arguments)
data._build = slow_build
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
print(data.prepare(recipe, tokenizer).splits["train"].input_ids.sum())
"""


def test_of_two_processes_at_once_one_builds(tmp_path: Path, train: Path, tokenizer: Any) -> None:
    arguments = [recipe(train).model_dump_json(), tokenizer.name_or_path, str(tmp_path)]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("launcher", "kernels"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    while len(list(tmp_path.glob("ready-*"))) < 2 and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    sums = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sums == [str(prepare(recipe(train), tokenizer).splits["train"].input_ids.sum())] * 2
    assert len(list(tmp_path.glob("building-*"))) == 1


def test_a_file_that_goes_away_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "gone.jsonl"
    assert (
        refusal(recipe(path), tokenizer)
        == f"data.train.path = {str(path)!r}: cannot be read: No such file or directory"
    )


def test_a_hub_data_set_is_cached_by_its_fingerprint(
    tmp_path: Path, train: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reviews").mkdir()
    train.rename(tmp_path / "reviews" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        prepared = prepare(recipe("reviews"), tokenizer)
    assert (prepared.report["rows"], len(built())) == ({"train": 20}, 1)
    assert "data.train.path = 'no-such/data': cannot be read: " in refusal(recipe("no-such/data"), tokenizer)


# ---------------------------------------------------------------- real data


def test_no_row_of_sst2_is_lost_to_its_quotes(sst2: Prepared, shared_data: Path, tokenizer: Any) -> None:
    assert sst2.report["rows"] == {"train": 67349, "validation": 872, "test": 1821}
    assert sst2.label_names == ["0", "1"]
    assert sst2.report["truncated"] == {"train": 0, "validation": 0, "test": 0}
    for name, file in (("train", "train.tsv"), ("validation", "validation.tsv"), ("test", "test_labeled.tsv")):
        lines = (shared_data / "sst2" / file).read_text(encoding="utf-8").split("\n")[1:-1]
        texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
        assert sst2.splits[name].labels.tolist() == [int(label) for label in labels]
        tokens = tokenizer(list(texts[:2000]))["input_ids"]
        assert sst2.splits[name].lengths[:2000].tolist() == [len(row) for row in tokens]
        assert sst2.splits[name].input_ids[: sum(map(len, tokens))].tolist() == [i for row in tokens for i in row]


def test_stsb_has_pairs_and_scores(shared_data: Path, tokenizer: Any) -> None:
    folder = shared_data / "stsb"
    wanted = recipe(
        folder / "train.tsv",
        task="regression",
        validation=folder / "validation.tsv",
        test=folder / "test.tsv",
        text_column="sentence1",
        text_pair_column="sentence2",
        label_column="score",
    )
    prepared = prepare(wanted, tokenizer)
    assert prepared.report["rows"] == {"train": 5749, "validation": 1500, "test": 1379}
    for split in prepared.splits.values():
        assert split.labels.min() >= 0
        assert split.labels.max() == 5
        assert split.token_type_ids is not None
        assert set(np.unique(split.token_type_ids)) == {0, 1}
