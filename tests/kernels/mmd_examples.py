"""Features of two sides for MMD and its kin, and how their losses are judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from exactness import assert_no_worse
from examples import DEVICE

Found = dict[str, torch.Tensor | None]
WEIGHTS = {
    "source_weights": torch.linspace(0.1, 2, 64, device=DEVICE),
    "target_weights": torch.linspace(3, 0.5, 64, device=DEVICE),
}


def features(rows: int, dimension: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shifted = torch.randn(rows, dimension, generator=generator, dtype=torch.float64) + 0.3 * seed
    return shifted.to(DEVICE, dtype).requires_grad_()


def gradients(loss: torch.Tensor, **inputs: torch.Tensor) -> Found:
    """Loss and gradients, by name."""
    wanted = {name: one for name, one in inputs.items() if one.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss, **dict.fromkeys(inputs), **dict(zip(wanted, found, strict=True))}


def judge(loss: Callable[..., torch.Tensor], oracle: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> None:
    """The loss's errors are at most the oracle's in the same dtype, beyond the tolerance."""
    exact = {name: one.detach().double().requires_grad_(one.requires_grad) for name, one in inputs.items()}
    found, eager, truth = (
        gradients(call(*values.values()), **values)
        for call, values in ((loss, inputs), (oracle, inputs), (oracle, exact))
    )
    assert_no_worse(found, eager, truth, next(iter(inputs.values())).dtype)


def cut(options: dict[str, Any], n: int, m: int) -> dict[str, Any]:
    """The options with as many weights as there are rows."""
    rows = {"source_weights": n, "target_weights": m}
    return {name: value[: rows[name]] if name in rows else value for name, value in options.items()}
