"""Losses for fine-tuning. On torch and triton alone; usable without Fleetune."""

from fleetune_kernels.mmd import coral, jmmd, lmmd, mmd
from fleetune_kernels.reference import cross_entropy, supervised_weight

__all__ = ["coral", "cross_entropy", "jmmd", "lmmd", "mmd", "supervised_weight"]
