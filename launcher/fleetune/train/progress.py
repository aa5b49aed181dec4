"""Where training stands, and what follows from it: the best checkpoint, early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    evaluations_without_better: int = 0

    def judge(self, metrics: dict[str, float], recipe: Recipe) -> None:
        """Takes an evaluation at this step into account, by the recipe's metric."""
        name = best_metric_of(recipe)
        sign = -1.0 if name in LOWER_IS_BETTER else 1.0
        best = self.best_metrics.get(name)
        gain = math.inf if best is None else sign * (metrics[name] - best)
        self.last_metrics = metrics
        if math.isfinite(metrics[name]) and gain > recipe.evaluation.early_stopping_threshold:
            self.best_step, self.best_metrics, self.evaluations_without_better = self.step, metrics, 0
        else:
            self.evaluations_without_better += 1

    def stops_early(self, recipe: Recipe) -> bool:
        patience = recipe.evaluation.early_stopping_patience
        return patience is not None and self.evaluations_without_better >= patience
