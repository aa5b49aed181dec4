"""Counts and sizes as they are read, with one decimal. Nothing here imports torch."""

from __future__ import annotations


def count(number: float) -> str:
    """22.7M, 263.2K, 7."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.99995 * size:  # so that 999,960 is 1.0M, and not 1000.0K
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def volume(size: float) -> str:
    """Of bytes: 45.4 MB, 12.3 KB."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if size >= 0.99995 * least:
            return f"{size / least:.1f} {unit}"
    return f"{size / 1e3:.1f} KB"
