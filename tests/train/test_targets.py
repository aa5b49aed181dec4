"""Which target rows go with the source's: the same number, pass by pass, of like length, whatever the cut."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fleetune.batch import Batch
from fleetune.train.batches import cut_slots, cut_window
from fleetune.train.targets import draw, partners

LENGTHS = np.random.default_rng(0)
SOURCE, TARGET = LENGTHS.integers(2, 60, 50), LENGTHS.integers(2, 60, 23)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("source", "target"), [(SOURCE, TARGET), (TARGET, SOURCE)], ids=["short", "long"])
def test_every_target_row_comes_equally_often(source: np.ndarray, target: np.ndarray, grouped: bool) -> None:  # type: ignore[type-arg]
    epochs = [partners(source, target, 7, epoch, grouped) for epoch in range(len(target))]
    counts = Counter(int(row) for epoch in epochs for row in epoch)
    assert {len(epoch) for epoch in epochs} == {len(source)}
    assert set(counts.values()) == {len(source)}  # that many whole passes
    assert len(counts) == len(target)


def test_a_pass_has_a_fresh_order_and_an_epoch_begins_where_the_one_before_ended() -> None:
    whole = draw(23, 0, 230, seed=3)
    passes = whole.reshape(10, 23)
    assert all(sorted(one) == list(range(23)) for one in passes)
    assert len({tuple(one) for one in passes}) == 10
    for start, count in ((0, 50), (50, 50), (46, 1), (45, 2), (22, 1), (100, 50)):
        assert np.array_equal(draw(23, start, count, seed=3), whole[start : start + count])
    assert not np.array_equal(draw(23, 0, 23, seed=4), passes[0])


def test_partners_are_of_like_length_where_batches_are() -> None:
    found = partners(TARGET, SOURCE, 0, 0, True)
    order = np.lexsort((SOURCE[found], TARGET))  # among rows of one length the draw decides
    assert (np.diff(SOURCE[found][order]) >= 0).all()


def test_a_target_row_that_comes_several_times_in_an_epoch_comes_in_several_batches() -> None:
    source, target = (LENGTHS.lognormal(4.0, 0.6, rows).astype(np.int64) for rows in (1600, 200))
    by_length = partners(source, target, 0, 0, True)[np.argsort(source, kind="stable")]
    distinct = [len(set(batch.tolist())) for batch in by_length.reshape(-1, 32)]
    assert np.mean(distinct) > 16  # of 32; sorted over all passes together it is 4 to 8
    assert np.corrcoef(target[by_length], np.sort(source))[0, 1] > 0.9


def test_the_slots_of_all_ranks_are_the_pieces_that_each_takes() -> None:
    rows = np.arange(21)
    for world_size, accumulation in ((1, 4), (2, 2), (4, 1)):
        batch = Batch(32, world_size, accumulation, 8)
        slots = cut_slots(rows, batch)
        for rank in range(world_size):
            own = cut_window(rows, batch, rank)
            assert all(np.array_equal(slot[rank], piece) for slot, piece in zip(slots, own, strict=True))
        assert np.array_equal(np.concatenate([piece for slot in slots for piece in slot]), rows)
