"""Changes to a model before it trains: so far, freezing."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from torch import nn


def freeze(model: nn.Module, patterns: list[str]) -> int:
    """Freezes the parameters whose dotted names match; returns how many. Raises ValueError for an idle pattern."""
    names = [name for name, _ in model.named_parameters()]
    for index, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.3)
            raise ValueError(
                f"model.freeze.{index} = {pattern!r}: no parameter has such a name"
                + (f"; there is `{near[0]}`" if near else "")
            )
    frozen = 0
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            frozen += 1
    if frozen == len(names):
        raise ValueError(f"model.freeze = {patterns}: freezes every parameter; nothing would train")
    return frozen


def value_projections(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("attention.self.value")]
