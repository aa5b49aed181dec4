"""Whether labels are classes."""

from __future__ import annotations

import torch

from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import integers, readable


@checked
def check_labels(labels: torch.Tensor, vocab_size: int, ignore_index: int = -100) -> None:
    """Waits for the device.

    Args:
        labels: (...), integers: classes, or `ignore_index` where a row has none.
        vocab_size: the number of classes.
        ignore_index: the label of a row that has none.

    Raises:
        ValueError: a label that is neither a class nor ignore_index, with its value.
    """
    labels = integers("labels", labels)
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))]
    if wrong.numel():
        found, last = int(wrong.flatten()[0]), vocab_size - 1
        raise ValueError(f"labels: {found} is no class; should be 0 to {last}, or {ignore_index} to ignore the row")


def check_classes(labels: torch.Tensor | None, vocab_size: int, ignore_index: int) -> None:
    """Where looking does not wait for a device."""
    if labels is not None and readable(labels):
        check_labels(labels, vocab_size, ignore_index)
