"""A layer's MLP over slices of the sequence, one after another: its wide features are never there for all tokens.

Each slice keeps its input alone and is computed again in the backward pass, so that one slice's features are held at a
time there too (Arctic Long Sequence Training, arXiv 2506.13996). An MLP looks at each token by itself: nothing else
changes, and every rank runs it equally often, as ZeRO-3 must.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fleetune.schema import Recipe


def tiles_of(recipe: Recipe, config: Any) -> int:
    """As many as the recipe says; auto: of about as many tokens as the model is wide. The same on every rank."""
    wanted = recipe.model.mlp_tiles or 1
    if wanted != "auto":
        return wanted
    return math.ceil(recipe.data.max_length / (recipe.training.sequence_parallel_size * int(config.hidden_size)))


def mlps_of(model: nn.Module) -> list[nn.Module]:
    """One of each layer. Raises ValueError where the model has none by that name, or it takes more than its input."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    kind = getattr(model.config, "model_type", None)
    if not found:
        raise ValueError(f"model.mlp_tiles: the layers of a {kind} model have no module `mlp`; leave it out")
    needed = [p for p in inspect.signature(found[0].forward).parameters.values() if p.default is p.empty]
    if len(needed) > 1:
        raise ValueError(f"model.mlp_tiles: the MLP of a {kind} model takes more than its input; leave it out")
    return found


def tile_mlps(model: nn.Module, tiles: int) -> None:
    """Makes the model's MLPs work so. Raises ValueError where it has none."""
    for mlp in mlps_of(model):
        mlp.forward = functools.partial(_tiled, mlp.forward, tiles)


def _tiled(plain: Callable[[torch.Tensor], torch.Tensor], tiles: int, hidden_states: torch.Tensor) -> torch.Tensor:
    """(..., L, D) -> (..., L, D). Without gradients, as when generating, all at once."""
    if tiles == 1 or not torch.is_grad_enabled():
        return plain(hidden_states)
    slices = hidden_states.tensor_split(tiles, dim=-2)  # of a short sequence some are empty
    done: list[torch.Tensor] = [checkpoint(plain, one, use_reentrant=False) for one in slices]
    return torch.cat(done, dim=-2)
