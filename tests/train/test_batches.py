"""Batches: every row once an epoch, the same global batches however they are cut, and rows as padded tensors."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.batch import Batch
from fleetune.data_section import Augmentation
from fleetune.train.batches import (
    Augmenter,
    augment_text,
    collate,
    compose_epoch,
    cut_window,
    evaluation_batches,
)
from fleetune.train.data import Prepared, Split
from fleetune.train.sources import Ints

some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=400).map(np.array)


def many_lengths(rows: int = 20_000) -> Ints:
    return np.random.default_rng(0).lognormal(3.0, 0.8, rows).astype(np.int64).clip(2, 128)


def padding_share(lengths: Ints, batches: list[Ints]) -> float:
    padded = sum(int(lengths[rows].max()) * len(rows) for rows in batches)
    return 1.0 - int(lengths.sum()) / padded


# ---------------------------------------------------------------- an epoch's global batches


@given(lengths=some_lengths, size=st.integers(1, 50), seed=st.integers(0, 2**32 - 1), grouped=st.booleans())
def test_every_row_is_there_once_and_only_the_last_batch_is_short(
    lengths: Ints, size: int, seed: int, grouped: bool
) -> None:
    batches = compose_epoch(lengths, size, seed, 0, group_by_length=grouped)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert [len(rows) for rows in batches[:-1]] == [size] * (len(batches) - 1)
    assert len(batches) == -(-len(lengths) // size)


@given(lengths=some_lengths, size=st.integers(1, 50))
def test_within_a_batch_rows_ascend_in_length(lengths: Ints, size: int) -> None:
    assert all((np.diff(lengths[rows]) >= 0).all() for rows in compose_epoch(lengths, size, 0, 0))


def as_lists(batches: list[Ints]) -> list[list[int]]:
    return [rows.tolist() for rows in batches]


def test_an_epoch_follows_from_seed_and_number_alone() -> None:
    lengths = many_lengths(1000)
    first = as_lists(compose_epoch(lengths, 32, 1, 2))
    np.random.seed(5)
    assert as_lists(compose_epoch(lengths.copy(), 32, 1, 2)) == first
    assert as_lists(compose_epoch(lengths, 32, 1, 3)) != first
    assert as_lists(compose_epoch(lengths, 32, 2, 2)) != first
    assert as_lists(compose_epoch(lengths, 32, 2, 1)) != first


def test_rows_meet_others_in_the_next_epoch() -> None:
    lengths = many_lengths()

    def partners(epoch: int) -> set[tuple[int, int]]:
        batches = compose_epoch(lengths, 32, 0, epoch)
        return {(min(a, b), max(a, b)) for rows in as_lists(batches) for a, b in pairwise(rows)}

    assert len(partners(0) & partners(1)) < 0.02 * len(lengths)


def test_like_lengths_come_together() -> None:
    lengths = many_lengths()
    assert padding_share(lengths, compose_epoch(lengths, 32, 0, 0)) < 0.05
    assert padding_share(lengths, compose_epoch(lengths, 32, 0, 0, group_by_length=False)) > 0.4


def test_hardly_any_of_sst2_is_padding(sst2: Prepared) -> None:
    lengths = sst2.splits["train"].lengths
    for size in (16, 32, 128):
        assert padding_share(lengths, compose_epoch(lengths, size, 0, 0)) < 0.03


@pytest.mark.parametrize("epoch", range(3))
def test_lengths_have_no_trend_over_the_epoch(epoch: int) -> None:
    lengths = many_lengths()
    means = np.array([lengths[rows].mean() for rows in compose_epoch(lengths, 16, 0, epoch)[:-1]])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 4 / np.sqrt(len(means))
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 4 / np.sqrt(len(means))  # nor from one batch to the next


# ---------------------------------------------------------------- a window's micro-batches


@given(
    world_size=st.integers(1, 8), accumulation=st.integers(1, 5), micro=st.integers(1, 8), share=st.floats(0.001, 1.0)
)
def test_ranks_and_steps_together_have_the_batch(world_size: int, accumulation: int, micro: int, share: float) -> None:
    batch = Batch(world_size * accumulation * micro, world_size, accumulation, micro)
    rows = np.arange(max(1, round(share * batch.global_batch_size))) + 7
    windows = [cut_window(rows, batch, rank) for rank in range(world_size)]
    steps = {len(window) for window in windows}
    assert len(steps) == 1  # every rank runs every collective
    assert steps.pop() <= accumulation
    pieces = [window[step] for step in range(len(windows[0])) for window in windows]
    assert np.concatenate(pieces).tolist() == rows.tolist()  # in order: neighbours in length go through together
    sizes = {len(piece) for piece in pieces}
    assert max(sizes) <= micro
    assert max(sizes) - min(sizes) <= 1
    if len(rows) == batch.global_batch_size:
        assert (len(windows[0]), sizes) == (accumulation, {micro})


def test_in_a_short_window_some_ranks_have_nothing() -> None:
    windows = [cut_window(np.arange(3), Batch(16, 4, 2, 2), rank) for rank in range(4)]
    assert [[piece.tolist() for piece in window] for window in windows] == [[[0]], [[1]], [[2]], [[]]]


def test_ranks_that_share_sequences_read_the_same_rows() -> None:
    alone, shared = Batch(8, 2, 2, 2), Batch(8, 4, 2, 2, sequence_parallel_size=2)
    for rank in range(4):
        windows = [cut_window(np.arange(7), batch, one) for batch, one in ((alone, rank // 2), (shared, rank))]
        assert [piece.tolist() for piece in windows[0]] == [piece.tolist() for piece in windows[1]]


# ---------------------------------------------------------------- rows as tensors


def make_split(lengths: list[int], pairs: bool = False, weights: list[float] | None = None, **more: Any) -> Split:
    """Row i's tokens are 100 * i + 1, 100 * i + 2 and so on; its label is i, its number in the source 10 * i."""
    count = len(lengths)
    tokens = [100 * i + 1 + k for i, length in enumerate(lengths) for k in range(length)]
    types = [int(k >= length // 2) for length in lengths for k in range(length)]
    values = {
        "input_ids": np.array(tokens, dtype=np.int32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "token_type_ids": np.array(types, dtype=np.uint8) if pairs else None,
        "labels": np.arange(count),
        "weights": np.array(weights, dtype=np.float32) if weights else None,
        "index": 10 * np.arange(count),
        "texts": None,
    }
    return Split(**{**values, **more})


def test_rows_are_padded_to_the_longest() -> None:
    micro = collate(make_split([2, 3, 1]), np.array([2, 0]), pad_token_id=9)
    assert {name: value.tolist() for name, value in micro.inputs.items()} == {
        "input_ids": [[201, 9], [1, 2]],
        "attention_mask": [[1, 0], [1, 1]],
    }
    assert all(value.dtype == torch.int64 for value in micro.inputs.values())
    assert (micro.labels.tolist(), micro.weights.tolist(), micro.rows.tolist()) == ([2, 0], [1.0, 1.0], [20, 0])
    assert (micro.labels.dtype, micro.weights.dtype) == (torch.int64, torch.float32)
    assert (micro.tokens, micro.examples) == (3, 2)


def test_pairs_have_token_types_and_padding_is_of_type_0() -> None:
    micro = collate(make_split([4, 2], pairs=True), np.array([0, 1]), pad_token_id=0)
    assert micro.inputs["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 3), (2, 4), (8, 8)])
def test_the_width_may_be_a_multiple(multiple: int, width: int) -> None:
    micro = collate(make_split([3, 1], pairs=True), np.array([0, 1]), 0, pad_to_multiple_of=multiple)
    assert {value.shape for value in micro.inputs.values()} == {(2, width)}
    assert (micro.inputs["attention_mask"].sum(), micro.tokens) == (4, 4)


def test_weights_and_values_go_with_their_rows() -> None:
    split = make_split([1, 1, 1], weights=[0.5, 0.0, 2.0], labels=np.array([0.5, 1.5, 2.5], dtype=np.float32))
    micro = collate(split, np.array([2, 1]), 0)
    assert (micro.weights.tolist(), micro.labels.tolist()) == ([2.0, 0.0], [2.5, 1.5])
    assert micro.labels.dtype == torch.float32


@pytest.mark.parametrize("weights", [None, [2.0, 3.0]])
def test_no_rows_make_one_filler_row_of_weight_0(weights: list[float] | None) -> None:
    micro = collate(make_split([2, 3], pairs=True, weights=weights), np.array([], dtype=np.int64), 0)
    assert micro.weights.tolist() == [0.0]
    assert (micro.tokens, micro.examples) == (0, 0)
    assert {value.shape for value in micro.inputs.values()} == {(1, 2)}


def test_tensors_are_copies_of_arrays_that_are_read_only() -> None:
    split = make_split([2, 3], weights=[1.0, 1.0])
    for array in (split.input_ids, split.labels, split.weights):
        array.setflags(write=False)  # type: ignore[union-attr]
    micro = collate(split, np.array([0, 1]), 0).to(torch.device("cpu"))
    for tensor in (*micro.inputs.values(), micro.labels, micro.weights):
        tensor.zero_()
    assert split.input_ids.tolist() == [1, 2, 101, 102, 103]
    assert split.weights is not None
    assert split.weights.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------- augmentation

ALL_KINDS = ("word_dropout", "random_swap", "random_deletion")


def steps(*kinds: str, probability: float = 0.5) -> list[Augmentation]:
    return [Augmentation.model_validate({"kind": kind, "probability": probability}) for kind in kinds]


def augmented(text: str, *kinds: str, probability: float = 0.5, seed: int = 0) -> list[str]:
    return augment_text(text, steps(*kinds, probability=probability), "[MASK]", np.random.default_rng(seed)).split()


@settings(max_examples=300)
@given(
    words=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12),
    kind=st.sampled_from(ALL_KINDS),
    probability=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_what_a_step_does_to_words(words: list[str], kind: str, probability: float, seed: int) -> None:
    found = augmented(" ".join(words), kind, probability=probability, seed=seed)
    if kind == "word_dropout":  # in place, and one word stays
        assert len(found) == len(words)
        assert all(new in (old, "[MASK]") for old, new in zip(words, found, strict=True))
        assert found.count("[MASK]") < len(words)
    elif kind == "random_swap":  # the same words
        assert Counter(found) == Counter(words)
    else:  # the rest in order, and one word stays
        remaining = iter(words)
        assert found
        assert all(word in remaining for word in found)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_each_word_is_hit_with_the_probability(kind: str, probability: float) -> None:
    words = [f"w{i}" for i in range(20_000)]
    found = augmented(" ".join(words), kind, probability=probability)
    if kind == "random_deletion":
        assert len(found) / len(words) == pytest.approx(1 - probability, abs=0.02)
    elif kind == "word_dropout":
        assert found.count("[MASK]") / len(words) == pytest.approx(probability, abs=0.02)
    else:  # a word moves where it is hit, or is the place that another one is swapped with
        moved = sum(a != b for a, b in zip(words, found, strict=True)) / len(words)
        assert probability < moved < 2 * probability


def test_an_empty_text_stays_empty_and_one_word_stays() -> None:
    for kind in ALL_KINDS:
        assert augmented("", kind, probability=0.99) == []
        assert augmented("  \n", kind, probability=0.99) == []
        assert augmented("word", kind, probability=0.99) == ["word"]


def test_steps_follow_each_other() -> None:
    found = augmented("a b c d e f g h", "random_deletion", "word_dropout")
    assert 0 < found.count("[MASK]") < len(found) < 8


TEXTS = ["the film was good and the plot was not", "a", "", "never " * 60, "the film was good and the plot was not"]


def augmenter(tokenizer: Any, *kinds: str, seed: int = 0, epoch: int = 0, max_length: int = 16) -> Augmenter:
    texts = datasets.Dataset.from_dict({"text": TEXTS})
    return Augmenter(texts, steps(*kinds), tokenizer, max_length, seed, epoch)


def test_a_row_is_augmented_alike_wherever_it_is_cut(tokenizer: Any) -> None:
    whole = augmenter(tokenizer, *ALL_KINDS)(np.arange(5))
    for rows in ([0], [4, 0], [2, 3, 1], [3, 3]):
        assert augmenter(tokenizer, *ALL_KINDS)(np.array(rows)) == [whole[row] for row in rows]


def test_augmentation_is_drawn_from_seed_epoch_and_row(tokenizer: Any) -> None:
    rows = np.arange(5)
    first = augmenter(tokenizer, "word_dropout", seed=1, epoch=2)(rows)
    assert augmenter(tokenizer, "word_dropout", seed=1, epoch=2)(rows) == first
    assert augmenter(tokenizer, "word_dropout", seed=1, epoch=3)(rows) != first
    assert augmenter(tokenizer, "word_dropout", seed=2, epoch=1)(rows) != first
    assert first[0] != first[4]  # the same text in another row


def test_augmented_rows_have_the_tokenizers_mask_and_are_cut_at_max_length(tokenizer: Any) -> None:
    split = make_split([11, 3, 2, 16, 11], texts=datasets.Dataset.from_dict({"text": TEXTS}))
    micro = collate(split, np.arange(5), tokenizer.pad_token_id, augment=augmenter(tokenizer, "word_dropout"))
    ids, mask = micro.inputs["input_ids"], micro.inputs["attention_mask"]
    assert ids.shape == (5, 16)
    assert mask.sum(1).tolist() == [11, 3, 2, 16, 11]
    assert micro.tokens == mask.sum()
    assert (ids == tokenizer.mask_token_id).sum() > 5
    assert ids[2, :2].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    plain = collate(split, np.arange(5), tokenizer.pad_token_id)
    assert plain.inputs["input_ids"][0, :11].tolist() == split.input_ids[:11].tolist()


def test_deletion_makes_batches_narrower_than_they_were_composed(tokenizer: Any) -> None:
    split = make_split([11, 3, 2, 16, 11], texts=datasets.Dataset.from_dict({"text": TEXTS}))
    micro = collate(split, np.array([0, 4]), 0, augment=augmenter(tokenizer, "random_deletion"))
    assert micro.inputs["input_ids"].shape[1] == micro.inputs["attention_mask"].sum(1).max() < 11
    assert micro.labels.tolist() == [0, 4]


def test_a_filler_row_is_one_when_augmented_too(tokenizer: Any) -> None:
    split = make_split([11, 3, 2, 16, 11], texts=datasets.Dataset.from_dict({"text": TEXTS}))
    micro = collate(split, np.array([], dtype=np.int64), 0, augment=augmenter(tokenizer, "word_dropout"))
    assert (micro.weights.tolist(), micro.tokens, micro.examples) == ([0.0], 0, 0)


# ---------------------------------------------------------------- evaluation


@given(lengths=some_lengths, size=st.integers(1, 40), world_size=st.integers(1, 8))
def test_evaluation_has_every_row_once_and_as_many_batches_on_every_rank(
    lengths: Ints, size: int, world_size: int
) -> None:
    ranks = [list(evaluation_batches(lengths, size, world_size, rank)) for rank in range(world_size)]
    assert sorted(row for batches in ranks for rows in batches for row in rows) == list(range(len(lengths)))
    assert {len(batches) for batches in ranks} == {-(-len(lengths) // size // world_size)}
    assert max(len(rows) for batches in ranks for rows in batches) <= size


def test_evaluation_puts_like_lengths_together_the_longest_first() -> None:
    lengths = many_lengths()
    order = np.concatenate(list(evaluation_batches(lengths, 64, 1, 0)))
    assert (np.diff(lengths[order]) <= 0).all()  # what does not fit in memory fails at once
    assert padding_share(lengths, list(evaluation_batches(lengths, 64, 1, 0))) < 0.01
