"""What a plain word, number, tag or alias means in a recipe, and what is refused, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.schema import RecipeError
from fleetune.strict_yaml import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *(("5e-5", 5e-5), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("+1.5e+2", 150.0)),
        *(("12", 12), ("-3", -3), ("010", 10), ("0o10", 8), ("0x1F", 31), ("1_000", "1_000"), ("12:30", "12:30")),
        *(("true", True), ("False", False), ("no", "no"), ("on", "on"), ("y", "y"), ("Off", "Off")),
        *(("null", None), ("~", None), ("", None), ("'null'", "null"), ('"5e-5"', "5e-5")),
        *(("2026-01-31", "2026-01-31"), ("=", "="), ("1e5x", "1e5x"), ("0b1", "0b1"), ("e5", "e5")),
        *(("!!str 5", "5"), ("!!int '5'", 5), ("!!float 5", 5.0), ("!!bool 'true'", True)),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(written: str, meant: Any) -> None:
    value = parse_yaml(f"key: {written}", "here")["key"]
    assert value == meant
    assert type(value) is type(meant)


@pytest.mark.parametrize("word", ["no", "on", "y", "off"])
def test_a_key_may_be_a_word_that_yaml_1_1_takes_for_a_boolean(word: str) -> None:
    assert parse_yaml(f"{word}: 1", "here") == {word: 1}


def test_a_whole_number_as_a_key_is_its_text() -> None:
    assert parse_yaml("{0: a, -12: b, '3': c}", "here") == {"0": "a", "-12": "b", "3": "c"}
    assert parse_yaml("a: &k 1\nb: {*k : 3}\n", "here") == {"a": 1, "b": {"1": 3}}  # the value stays a number


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("training:\n  seed: 1\n  seed: 2\n", ":3:3", "training.seed: this key stands here twice"),
        ("a:\n- {b: 1}\n- {c: 1, c: 2}\n", ":3:10", "a.1.c: this key stands here twice"),
        ("0x10: x\n", ":1:1", "0x10: a key should be text: write it in quotes"),
        ('1: x\n"1": y\n', ":2:1", "1: this key stands here twice"),
        ("a: {true: x}\n", ":1:5", "a.true: a key should be text: write it in quotes"),
        ("? [1, 2]\n: x\n", ":1:3", "a key should be text"),
        ("? !!int [1]\n: x\n", ":1:3", "a key should be text"),
        ("? !!str [1]\n: x\n", ":1:3", "a key should be text"),
        ("a: [1, 2\n", ":2:1", "expected ',' or ']'"),
        ("a: b: c\n", ":1:5", "mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", ":2:1", r"found character '\t'"),
        ("a: *b\n", ":1:4", "found undefined alias 'b'"),
        ("a: 1\n---\nb: 2\n", ":2:1", "but found another document"),
        ("a: &b {c: *b}\n", ":1:4", "a.c: an alias of something that it stands in"),
        ("a: !!int x\n", ":1:4", "this is no whole number"),
        ("a: !!float x\n", ":1:4", "this is no number"),
        ("a: !!bool maybe\n", ":1:4", "this is neither true nor false"),
        ("a: !!map [1]\n", ":1:4", "expected a mapping"),
        (f"a: {'9' * 5000}\n", ":1:4", "this is no whole number"),
        ("a: \x00\n", "", "unacceptable character #x0000"),
        ("a: " + "[" * 1500, "", "nested too deeply"),
    ],
)
def test_text_that_is_no_yaml_is_refused_with_its_line_and_column(text: str, place: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "file.yaml")
    assert str(caught.value).startswith(f"file.yaml{place}: not valid YAML: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        *("!!python/object/apply:os.system [touch marker]", "!!python/object/new:os.system ['touch marker']"),
        *("!!python/tuple [1]", "!!python/name:os.system ''", "!!set {a}", "!!omap [a: 1]", "!!binary aGk=", "!own 1"),
        *("!!timestamp 2026-01-31", "!!pairs [a: 1]"),
    ],
)
def test_a_tag_makes_no_object_and_runs_no_code(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="could not determine a constructor for the tag"):
        parse_yaml(f"a: {tag}", "file.yaml")
    assert not (tmp_path / "marker").exists()


def test_aliases_that_multiply_are_refused_before_they_fill_the_memory() -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for before, here in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{here}: &{here} [{', '.join([f'*{before}'] * 10)}]")
    with pytest.raises(RecipeError, match="e: its aliases make more than 100000 values"):
        parse_yaml("\n".join(lines), "file.yaml")


# ---------------------------------------------------------------- writing

WORDS = st.text(max_size=12) | st.sampled_from(
    ["1e5", "5e-5", "no", "on", "null", "~", "0o17", "0x1f", "1_000", "12:30", "2026-01-31", "true", ".inf", "<<", "="]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=10)


@settings(max_examples=300, deadline=None)
@given(value=VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    again = parse_yaml(dump_yaml({"key": value}), "here")["key"]
    assert repr(again) == repr(value)  # 1, 1.0 and True are equal, and so are 0.0 and -0.0


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_a_reader_of_yaml_1_1_reads_the_same(value: Any) -> None:
    assert repr(yaml.safe_load(dump_yaml({"key": value}))["key"]) == repr(value)
