"""Where training stands, and what follows from it: the best checkpoint, early stopping."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fleetune.schema import LOWER_IS_BETTER, Recipe, best_metric_of


@dataclass
class Progress:
    """Stored in every checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    position: int = 0  # global batches of the epoch done
    examples: int = 0
    tokens: int = 0  # without padding
    train_seconds: float = 0.0  # in steps alone: no evaluation, no saving
    order: str = ""  # a hash of all rows so far, in their order
    logged_step: int = 0
    evaluated_step: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluations_without_better: int = 0
    # As all ranks agreed on at the last save, for `save_steps: auto`; None where nothing was measured yet.
    save_seconds: float | None = None  # training stood still
    step_seconds: float | None = None

    def count(self, rows: npt.NDArray[np.int64], examples: int, tokens: int, seconds: float) -> None:
        """Takes one optimizer step over these rows of the training data into account."""
        self.step += 1
        self.position += 1
        self.examples += examples
        self.tokens += tokens
        self.train_seconds += seconds
        self.order = hashlib.blake2b(self.order.encode() + rows.tobytes(), digest_size=8).hexdigest()

    def judge(self, metrics: dict[str, float], recipe: Recipe) -> None:
        """Takes an evaluation at this step into account, by the recipe's metric."""
        name = best_metric_of(recipe)
        sign = -1.0 if name in LOWER_IS_BETTER else 1.0
        best = self.best_metrics.get(name)
        gain = math.inf if best is None else sign * (metrics[name] - best)
        self.last_metrics, self.evaluated_step = metrics, self.step
        if math.isfinite(metrics[name]) and gain > recipe.evaluation.early_stopping_threshold:
            self.best_step, self.best_metrics, self.evaluations_without_better = self.step, metrics, 0
        else:
            self.evaluations_without_better += 1

    def stops_early(self, recipe: Recipe) -> bool:
        patience = recipe.evaluation.early_stopping_patience
        return patience is not None and self.evaluations_without_better >= patience
