"""Counts and sizes as they are read, with three digits. Nothing here imports torch."""

from __future__ import annotations


def count(number: float) -> str:
    """22.7M, 263.2K, 7."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def volume(size: float) -> str:
    """Of bytes: 45.4 MB, 12.3 KB."""
    for unit, least in (("GB", 1e9), ("MB", 1e6)):
        if size >= least:
            return f"{size / least:.1f} {unit}"
    return f"{size / 1e3:.1f} KB"
