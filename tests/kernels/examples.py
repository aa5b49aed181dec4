"""The options of cross-entropy that every form of it is tried with, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "soft cap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "class weights": {"weight": True},
    "token weights": {"token_weights": True},
    "all of them": {
        "label_smoothing": 0.2,
        "z_loss": 1e-3,
        "softcap": 8.0,
        "logit_scale": 1.5,
        "weight": True,
        "token_weights": True,
    },
}


def example(*shape: int, seed: int = 0, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (*shape) in fp64 and labels (*shape[:-1]), a share of them -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < ignored] = -100
    return logits.to(DEVICE), labels.to(DEVICE)


def filled(options: dict[str, Any], labels: torch.Tensor, classes: int) -> dict[str, Any]:
    """The options with real weights where they say True."""
    generator = torch.Generator().manual_seed(1)
    options = dict(options)
    if options.get("weight"):
        options["weight"] = torch.rand(classes, generator=generator).to(DEVICE)
    if options.get("token_weights"):
        options["token_weights"] = (2 * torch.rand(labels.shape, generator=generator)).to(DEVICE)
    return options
