"""Losses for fine-tuning. On torch and triton alone; usable without Fleetune."""

from fleetune_kernels.reference import cross_entropy, supervised_weight

__all__ = ["cross_entropy", "supervised_weight"]
