"""Packing: several examples in one sequence of max_length, so that hardly any padding is left.

Best fit, longest first: each example goes where it leaves the least room. Who stands with whom is drawn by the seed and
the epoch alone; how many packs there are depends on the lengths alone.
"""

from __future__ import annotations

import numpy as np

from fleetune.train.sources import Ints


def pack(lengths: Ints, max_length: int, seed: int, epoch: int) -> list[Ints]:
    """The rows of each pack, every row exactly once; no row is longer than max_length."""
    random = np.random.default_rng(np.random.SeedSequence([seed, epoch, 0xBF]))
    order = random.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length)]  # the packs that have just so much room left
    rooms = 0  # bit r says that `with_room[r]` has one
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(packs)
            packs.append([])
        packs[number].append(row)
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return [np.asarray(rows, dtype=np.int64) for rows in packs]
