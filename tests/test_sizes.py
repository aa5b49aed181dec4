"""Counts and sizes as they are read."""

from __future__ import annotations

import pytest

from fleetune.sizes import count, volume


@pytest.mark.parametrize(
    ("number", "read"),
    [(7, "7"), (263_200, "263.2K"), (999_960, "1.0M"), (22_713_216, "22.7M"), (999_960_000, "1.0B"), (7e10, "70.0B")],
)
def test_counts(number: float, read: str) -> None:
    assert count(number) == read


@pytest.mark.parametrize(
    ("size", "read"), [(12_300, "12.3 KB"), (999_999, "1.0 MB"), (45.4e6, "45.4 MB"), (1.2e10, "12.0 GB")]
)
def test_volumes(size: float, read: str) -> None:
    assert volume(size) == read
