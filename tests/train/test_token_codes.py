"""What is stored of a teacher's tokens comes back, and takes the room that it is said to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.train.token_codes import STEP, decode_ids, decode_log_probs, encode_ids, encode_log_probs


@given(st.integers(0, 40), st.integers(1, 16), st.integers(16, 300_000), st.integers(0, 2**32 - 1))
def test_classes_come_back(count: int, k: int, vocabulary: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = np.sort(random.integers(0, vocabulary, (count, k)), axis=1)
    assert np.array_equal(decode_ids(encode_ids(ids), count, k), ids)


def test_log_probabilities_come_back_to_half_a_step() -> None:
    values = -np.abs(np.random.default_rng(0).normal(0.0, 8.0, (200, 7))).astype(np.float32)
    values[0, 0], values[1, 1], values[2, 2] = -np.inf, 0.0, -1000.0
    found = decode_log_probs(encode_log_probs(values), 200, 7)
    near = values > -31.9
    assert np.abs(found[near] - values[near]).max() <= 0.5 / STEP + 1e-6
    assert np.isneginf(found[0, 0])
    assert found[1, 1] == 0.0
    assert -32.0 < found[2, 2] < -31.9


@pytest.mark.parametrize(("vocabulary", "k", "most"), [(128_256, 128, 420), (32_000, 64, 200), (512, 64, 160)])
def test_a_token_takes_no_more_room_than_is_said(vocabulary: int, k: int, most: int) -> None:
    """Classes without a pattern are the worst case; a real teacher's are mostly frequent ones, with low numbers."""
    random = np.random.default_rng(0)
    ids = np.sort(np.stack([random.choice(vocabulary, k, replace=False) for _ in range(100)]), axis=1)
    log_probs = -np.abs(random.normal(0.0, 8.0, ids.shape)).astype(np.float32)
    assert (len(encode_ids(ids)) + len(encode_log_probs(log_probs))) / 100 <= most
