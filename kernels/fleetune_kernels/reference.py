"""The mathematics in plain PyTorch: the specification that every kernel is held to."""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy(
    logits: torch.Tensor,  # (..., V)
    labels: torch.Tensor,  # (...), integer classes or ignore_index
    *,
    weight: torch.Tensor | None = None,  # (V,)
    token_weights: torch.Tensor | None = None,  # (...)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: torch.Tensor | None = None,  # scalar
) -> torch.Tensor:
    """Softmax cross-entropy, in fp32 whatever the logits are (fp64 stays fp64).

    With u_i = token_weights and w = weight, as in `torch.nn.functional.cross_entropy` with both of them 1:
    sum: sum_i u_i CE_i, where CE_i carries its class weights; mean: that over num_items, or over sum_i u_i w[y_i]
    where num_items is not given. Nothing supervised gives 0, with zero gradients.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels: shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}")
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(f"token_weights: shape {tuple(token_weights.shape)}, labels have {tuple(labels.shape)}")
    if weight is not None and weight.shape != logits.shape[-1:]:
        raise ValueError(f"weight: shape {tuple(weight.shape)}, logits have {logits.shape[-1]} classes")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: {reduction!r}; should be none, mean or sum")
    scores = logits if logits.dtype == torch.float64 else logits.float()
    weight = None if weight is None else weight.to(scores.dtype)
    losses = functional.cross_entropy(
        scores.reshape(-1, scores.shape[-1]),
        labels.reshape(-1).long(),
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    losses = losses.reshape(labels.shape)
    if token_weights is not None:
        losses = losses * token_weights.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if num_items is None:
        num_items = supervised_weight(labels, weight=weight, token_weights=token_weights, ignore_index=ignore_index)
    return losses.sum() / num_items.to(losses.dtype).clamp(min=torch.finfo(losses.dtype).tiny)


def supervised_weight(
    labels: torch.Tensor,  # (...)
    *,
    weight: torch.Tensor | None = None,  # (V,)
    token_weights: torch.Tensor | None = None,  # (...)
    ignore_index: int = -100,
) -> torch.Tensor:
    """The divisor of the mean: sum_i u_i w[y_i] over supervised labels, as an fp64 scalar: any cut sums to the same."""
    kept = labels != ignore_index
    total = kept.double()
    if token_weights is not None:
        total = total * token_weights
    if weight is not None:
        total = total * weight[labels.masked_fill(~kept, 0).long()]
    return total.sum()
