"""A language model's head: losses within its own forward pass, from hidden states and weight, without the logits.

Only there does ZeRO-3 have the whole weight, which is often the token embeddings' too. So the model's forward takes
`compute`: what is to be made of the head in place of the logits, and that is what it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fleetune.schema import Recipe, RecipeError
from fleetune.train.lora import trained_whole

PROBE = 8  # tokens
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}  # relative to the largest logit; of half precisions 0.05


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale (hidden_states weightᵀ + bias)), softcap(x) = c tanh(x / c)."""

    hidden_states: torch.Tensor  # (B, L, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def logits(self) -> torch.Tensor:
        """(B, L, V), where they are small enough to be held."""
        plain = nn.functional.linear(self.hidden_states, self.weight, self.bias) * self.logit_scale
        return plain if self.softcap is None else torch.tanh(plain / self.softcap) * self.softcap


def fuse_head(model: Any) -> None:
    """Gives the language model's forward pass `compute`: (its head, its decoder's outputs) -> what it returns."""
    head, plain = trained_whole(model.get_output_embeddings()), model.forward
    plain_head = head.forward
    scale, softcap = logit_terms(model.config)

    def at_head(hidden_states: torch.Tensor, compute: Callable[[Head], Any] | None = None) -> Any:
        if compute is None:
            return plain_head(hidden_states)
        return compute(Head(hidden_states, head.weight, getattr(head, "bias", None), scale, softcap))

    @functools.wraps(plain)  # Transformers looks at its signature when it generates
    def forward(*inputs: Any, compute: Callable[[Head, Any], Any] | None = None, **keywords: Any) -> Any:
        if compute is None:
            return plain(*inputs, **keywords)
        outputs = model.get_decoder()(*inputs, **keywords)
        return head(outputs.last_hidden_state, lambda found: compute(found, outputs))

    head.forward, model.forward = at_head, forward
    model.has_fused_head = True


def has_fused_head(module: nn.Module) -> bool:
    return bool(getattr(module, "has_fused_head", False))


def logit_terms(config: Any) -> tuple[float, float | None]:
    """What the families do to a head's output: Cohere multiplies, Granite divides, Gemma caps."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


@torch.no_grad()
def apart(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:  # scalar
    """The largest difference, relative to the largest logit."""
    return (logits - truth).abs().max() / truth.abs().max().clamp(min=1e-30)


def check_head(forward: Callable[..., Any], recipe: Recipe, config: Any, device: torch.device) -> None:
    """That the model makes its logits as `Head` says: a family may do more to them. A collective on ZeRO-3.

    Raises RecipeError where the logits differ.
    """
    ids = torch.arange(PROBE, device=device)[None] % config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = forward(**inputs).logits
    fused = forward(**inputs, compute=lambda head, _: head.logits())
    difference = float(apart(fused, plain))
    if not difference <= CLOSE.get(plain.dtype, 0.05):
        raise RecipeError(
            f"kernels = {recipe.kernels!r}: a {config.model_type} model makes its logits in a way of its own (they are "
            f"off by {difference:.1e} of the largest); use kernels: reference, which takes them from the model"
        )
