"""Predictions over all ranks with nothing counted twice, and the metrics of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fleetune.schema import Recipe, metrics_of
from fleetune.train import signals
from fleetune.train.alignment import Outputs
from fleetune.train.batches import MicroBatch, collate, evaluation_batches
from fleetune.train.data import Split
from fleetune.train.distributed import World, any_rank, gather_objects, sum_over_ranks
from fleetune.train.objectives import negative_log_likelihood
from fleetune.train.sources import Ints

Floats = npt.NDArray[np.float64]
# inputs, and what is to be made of the model's outputs, which is what comes back
Forward = Callable[[dict[str, torch.Tensor], Callable[[Outputs], torch.Tensor]], torch.Tensor]


def predict(forward: Forward, split: Split, batch_size: int, pad_token_id: int, world: World) -> Floats:
    """Logits of every row of the split: see rows_of.  -> (rows, C)"""
    return rows_of(forward, _logits, split, batch_size, pad_token_id, world)


def rows_of(
    forward: Forward,
    compute: Callable[[MicroBatch, Outputs], torch.Tensor],  # -> (B, D)
    split: Split,
    batch_size: int,
    pad_token_id: int,
    world: World,
) -> Floats:  # (rows, D)
    """What `compute` makes of the outputs for every row of the split, in the split's order, on every rank.

    Raises:
        Stopped: on every rank, when one of them is asked to stop.
    """
    pieces: list[tuple[Any, npt.NDArray[np.float32]]] = []
    for rows, batch in _batches(split, batch_size, pad_token_id, world):
        values = forward(batch.inputs, functools.partial(compute, batch))
        if len(rows):  # a filler batch only keeps the collectives in step
            pieces.append((rows, values.float().cpu().numpy()))
    gathered = [piece for rank in gather_objects(pieces, world) for piece in rank]
    order = np.concatenate([rows for rows, _ in gathered])
    predicted = np.concatenate([values for _, values in gathered]).astype(np.float64)
    assert len(np.unique(order)) == len(split) == len(order)
    result = np.empty_like(predicted)
    result[order] = predicted
    return result


def _batches(split: Split, batch_size: int, pad_token_id: int, world: World) -> Iterator[tuple[Ints, MicroBatch]]:
    """This rank's, without gradients. Raises Stopped on every rank, when one of them is asked to stop."""
    with torch.no_grad():
        for rows in evaluation_batches(split.lengths, batch_size, world.world_size, world.rank):
            signals.beat("evaluation")
            if any_rank([signals.stop_requested()], world)[0]:
                raise signals.Stopped
            yield rows, collate(split, rows, pad_token_id).to(world.device)
    signals.beat("evaluation")


def _logits(_: MicroBatch, outputs: Outputs) -> torch.Tensor:
    assert outputs.logits is not None
    return outputs.logits


def perplexity(forward: Forward, split: Split, recipe: Recipe, pad_token_id: int, world: World) -> dict[str, float]:
    """Of the split's supervised tokens, each once and each as much: their mean loss, and its exponential."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for _, batch in _batches(split, recipe.evaluation.per_device_eval_batch_size, pad_token_id, world):
        sums[0] += forward(
            batch.inputs, functools.partial(negative_log_likelihood, batch=batch, kernels=recipe.kernels)
        )
        assert batch.supervised is not None
        sums[1] += len(batch.supervised)
    total, tokens = sum_over_ranks(sums).tolist()
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def compute_metrics(recipe: Recipe, logits: Floats, labels: npt.NDArray[Any]) -> dict[str, float]:
    """The recipe's metrics and the plain loss (cross-entropy or MSE, unweighted). A correlation of constants is NaN."""
    from scipy.special import log_softmax
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if recipe.task == "classification":
        chosen = logits.argmax(-1)
        loss = float(-log_softmax(logits, axis=-1)[np.arange(len(labels)), labels].mean())
        average = "binary" if logits.shape[-1] == 2 else "macro"
        compute: dict[str, Callable[[], float]] = {
            "accuracy": lambda: accuracy_score(labels, chosen),
            "f1": lambda: f1_score(labels, chosen, average=average, zero_division=0.0),
            "matthews": lambda: matthews_corrcoef(labels, chosen),
        }
    else:
        values = logits[:, 0]
        loss = float(np.mean((values - labels) ** 2))
        defined = len(labels) > 1 and np.ptp(values) > 0 and np.ptp(labels) > 0
        compute = {
            "pearson": lambda: pearsonr(values, labels)[0] if defined else np.nan,
            "spearman": lambda: spearmanr(values, labels)[0] if defined else np.nan,
            "mse": lambda: loss,
        }
    return {"loss": loss, **{name: float(compute[name]()) for name in metrics_of(recipe) if name != "loss"}}


def evaluate(
    forward: Forward,
    split: Split,
    recipe: Recipe,
    pad_token_id: int,
    world: World,
    domains: Mapping[str, slice] = MappingProxyType({}),
) -> dict[str, float]:
    """The metrics of all rows, and those of each domain's as NAME/METRIC."""
    if recipe.task == "causal_lm":
        return perplexity(forward, split, recipe, pad_token_id, world)
    logits = predict(forward, split, recipe.evaluation.per_device_eval_batch_size, pad_token_id, world)
    labels = np.asarray(split.labels)
    metrics = compute_metrics(recipe, logits, labels)
    for name, rows in domains.items():
        of_domain = compute_metrics(recipe, logits[rows], labels[rows])
        metrics |= {f"{name}/{metric}": value for metric, value in of_domain.items()}
    return metrics
