"""The quickstart's data: made again to the byte, balanced, and as noisy and as contrary as its README says."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

FOLDER = Path(__file__).parents[1] / "recipes" / "quickstart"
SPLITS = ("train", "validation", "test")
SIZES = {"train": 3000, "validation": 500, "test": 800}
DUPLICATES = {"train": 28, "validation": 4, "test": 4}
EMPTY = {"train": 12, "validation": 4, "test": 4}
TRAIN_ROWS_IN_TEST = 16
NEGATION = re.compile(
    r"\b(not|never|no|nobody|nothing|none|cannot|hardly|anything but|far from)\b|n't\b", re.IGNORECASE
)
CONTRAST = re.compile(
    r"\b(although|though|despite|yet|but|however|while|even if|even so|still|for all)\b", re.IGNORECASE
)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "make_reviews.py"))


@pytest.fixture(scope="module")
def rows() -> dict[str, Rows]:
    texts = {split: (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in texts.items()}


def share(rows: Rows, *patterns: re.Pattern[str]) -> float:
    return sum(any(pattern.search(row["text"]) for pattern in patterns) for row in rows) / len(rows)


def test_the_generator_makes_the_committed_files_again(generator: dict[str, Any], tmp_path: Path) -> None:
    generator["main"](["--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{split}.jsonl" for split in SPLITS)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes(), split


@pytest.mark.parametrize("split", SPLITS)
def test_size_fields_and_balance(rows: dict[str, Rows], split: str) -> None:
    assert len(rows[split]) == SIZES[split]
    assert all(set(row) == {"text", "label", "domain"} and isinstance(row["text"], str) for row in rows[split])
    for field, values in (("label", {0, 1}), ("domain", {"kitchen", "headphones"})):
        counts = Counter(row[field] for row in rows[split])
        assert set(counts) == values
        assert all(abs(count / len(rows[split]) - 0.5) <= 0.05 for count in counts.values())


@pytest.mark.parametrize("split", SPLITS)
def test_negation_and_contrast_are_common_under_both_labels(rows: dict[str, Rows], split: str) -> None:
    for label in (0, 1):
        labelled = [row for row in rows[split] if row["label"] == label]
        assert share(labelled, NEGATION) > 0.35
        assert share(labelled, CONTRAST) > 0.2
        assert share(labelled, NEGATION, CONTRAST) > 0.45


def test_lengths_vary(rows: dict[str, Rows]) -> None:
    texts = [row["text"].replace("<br />", " ") for row in rows["train"] if row["text"]]
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[0] >= 4
    assert lengths[len(lengths) // 10] <= 12
    assert lengths[-len(lengths) // 10] >= 28
    assert lengths[-1] <= 45


@pytest.mark.parametrize("split", SPLITS)
def test_empty_and_duplicate_rows(rows: dict[str, Rows], split: str) -> None:
    texts = [row["text"] for row in rows[split]]
    assert texts.count("") == EMPTY[split]
    filled = [text for text in texts if text]
    assert len(filled) - len(set(filled)) == DUPLICATES[split]
    labels = {text: {row["label"] for row in rows[split] if row["text"] == text} for text in set(filled)}
    assert all(len(given) == 1 for given in labels.values())


def test_rows_shared_between_splits(rows: dict[str, Rows]) -> None:
    texts = {split: {row["text"] for row in rows[split]} - {""} for split in SPLITS}
    assert len(texts["train"] & texts["test"]) == TRAIN_ROWS_IN_TEST
    assert not texts["validation"] & (texts["train"] | texts["test"])


@pytest.mark.parametrize("split", SPLITS)
def test_noise_in_the_text(generator: dict[str, Any], rows: dict[str, Rows], split: str) -> None:
    for noise in (r"<br />", r"&amp;", r"\w  \w"):
        assert 0.01 < share(rows[split], re.compile(noise)) < 0.15, noise
    for case in (str.islower, str.isupper):
        assert any(case(row["text"]) for row in rows[split])
    words_of = generator["words_of"]
    known = {
        word for alternatives in generator["GRAMMAR"].values() for one in alternatives for word in words_of(one[0])
    }
    known |= {word for forms in generator["AGREEMENT"].values() for form in forms for word in words_of(form)}
    known |= {"an", "br", "amp", *(f"{word}s" for word in known)}
    unknown = sum(any("'" not in word and word not in known for word in words_of(row["text"])) for row in rows[split])
    assert 0.03 < unknown / len(rows[split]) < 0.15


def test_a_tenth_of_the_vocabulary_is_held_out_of_train(generator: dict[str, Any], rows: dict[str, Rows]) -> None:
    words = {split: {word for row in rows[split] for word in generator["words_of"](row["text"])} for split in SPLITS}
    held_out = generator["held_out_words"]()
    grammar = {
        word for group in generator["GRAMMAR"].values() for one in group for word in generator["words_of"](one[0])
    }
    assert 0.08 < len(held_out) / len(grammar) < 0.14
    assert not held_out & words["train"]
    assert len(held_out & (words["validation"] | words["test"])) > 0.85 * len(held_out)


def test_a_bag_of_words_helps_but_does_not_do(rows: dict[str, Rows]) -> None:
    counter = CountVectorizer()
    train = counter.fit_transform([row["text"] for row in rows["train"]])
    model = LogisticRegression(max_iter=2000).fit(train, [row["label"] for row in rows["train"]])
    test = counter.transform([row["text"] for row in rows["test"]])
    assert 0.75 < model.score(test, [row["label"] for row in rows["test"]]) < 0.88
