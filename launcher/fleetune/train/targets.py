"""Which rows of the target go with those of the source.

Every epoch gives each source row a partner from the target: a global batch then has as many rows of both, and where it
is cut, each piece has. The partners are drawn pass by pass over the target's rows, each pass in a fresh order that is
a function of the seed and the pass alone; where an epoch begins in them follows from its number, so that a checkpoint
need not hold it. The shorter side begins anew when it is through.
"""

from __future__ import annotations

import numpy as np

from fleetune.schema import Recipe, target_splits
from fleetune.train.data import Prepared, Split
from fleetune.train.sources import Ints

OF_TARGETS = 0x7A26E7  # sets the draw apart from others of the same seed


def target_split(recipe: Recipe, data: Prepared) -> Split | None:
    """The target sets as one, in the order of their names; None where there are none."""
    splits = [data.splits[name] for name in target_splits(recipe)]
    if len(splits) < 2:
        return splits[0] if splits else None
    starts = np.cumsum([0, *(split.offsets[-1] for split in splits)])
    offsets = [split.offsets[:-1] + start for split, start in zip(splits, starts, strict=False)]
    types = [split.token_type_ids for split in splits if split.token_type_ids is not None]
    texts = [split.texts for split in splits if split.texts is not None]
    if texts:
        import datasets

        texts = [datasets.concatenate_datasets(texts)]
    return Split(
        np.concatenate([split.input_ids for split in splits]),
        np.concatenate([*offsets, starts[-1:]]),
        np.concatenate(types) if types else None,
        None,
        None,
        np.concatenate([split.index for split in splits]),
        texts[0] if texts else None,
    )


def partners(
    source_lengths: Ints,  # (n,)
    target_lengths: Ints,  # (m,)
    seed: int,
    epoch: int,
    group_by_length: bool,
) -> Ints:  # (n,) each source row's row of the target
    """Those of an epoch, of like length where batches are of like length: neither padding nor length then parts them.

    What the epoch draws of a pass is sorted by length and goes to as many of the source's rows, chosen at random, in
    the order of theirs; among rows of one length the draw decides. Pass by pass, since a row's draws of several passes,
    sorted together, would be neighbours and meet in one batch.
    """
    count, rows = len(source_lengths), len(target_lengths)
    drawn = draw(rows, epoch * count, count, seed)
    if not group_by_length:
        return drawn
    found = np.empty_like(drawn)
    order = np.random.default_rng(np.random.SeedSequence([seed, epoch, OF_TARGETS])).permutation(count)
    ends = np.arange(rows - epoch * count % rows, count, rows)  # of the passes
    for mine, others in zip(np.split(order, ends), np.split(drawn, ends), strict=True):
        sorted_by_length = mine[np.argsort(source_lengths[mine], kind="stable")]
        found[sorted_by_length] = others[np.argsort(target_lengths[others], kind="stable")]
    return found


def draw(rows: int, start: int, count: int, seed: int) -> Ints:
    """The draws number `start` to `start + count` from passes over so many rows."""
    first, last = start // rows, (start + count - 1) // rows
    passes = [
        np.random.default_rng(np.random.SeedSequence([seed, number, OF_TARGETS])).permutation(rows)
        for number in range(first, last + 1)
    ]
    begin = start - first * rows
    return np.concatenate(passes)[begin : begin + count]
