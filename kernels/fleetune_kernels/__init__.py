"""Losses for fine-tuning. On torch and triton alone; usable without Fleetune."""

from fleetune_kernels.distillation import distillation_loss
from fleetune_kernels.labels import check_labels
from fleetune_kernels.linear_cross_entropy import linear_cross_entropy
from fleetune_kernels.linear_distillation import linear_distillation_loss
from fleetune_kernels.mmd import coral, jmmd, lmmd, mmd
from fleetune_kernels.reference import Distilled, Stats, supervised_weight
from fleetune_kernels.softmax_cross_entropy import cross_entropy
from fleetune_kernels.topk_distillation import topk_distillation_loss

__all__ = [
    "Distilled",
    "Stats",
    "check_labels",
    "coral",
    "cross_entropy",
    "distillation_loss",
    "jmmd",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "lmmd",
    "mmd",
    "supervised_weight",
    "topk_distillation_loss",
]
