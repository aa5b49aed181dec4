"""Changes to a model before it trains: its layers, its vocabulary, what is drawn anew, what is frozen.

A model is changed by building its successor: the same class from the changed config, without memory (on the meta
device), into which the old parameters move. So whatever a family's modules take from the config and from their place
among the layers (indices for the cache, masks by kind of layer, tied heads) is right by construction.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from fleetune.model_section import Model
from fleetune.train import zero


@dataclass(frozen=True)
class Family:
    """Where things stand in a kind of model."""

    layers: str
    """The list of layers, in the model without its head."""
    value: str
    """In a layer, the linear map to attention's values."""


_BERT = Family("encoder.layer", "attention.self.value")
_LLAMA = Family("layers", "self_attn.v_proj")
FAMILIES = {  # by the config's model_type
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    "distilbert": Family("transformer.layer", "attention.v_lin"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
}


def _family(model: nn.Module) -> Family:
    kind = getattr(model.config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(f"the layers of a {kind} model are not known; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers, first to last. Raises ValueError for a family that is not known."""
    base: Any = model.base_model
    layers = base.get_submodule(_family(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def value_projections(model: nn.Module) -> list[nn.Module]:
    """Each layer's linear map to attention's values. Raises ValueError for a family that is not known."""
    found: list[Any] = [layer.get_submodule(_family(model).value) for layer in layers_of(model)]
    assert all(isinstance(getattr(module, "base_layer", module), nn.Linear) for module in found)  # as LoRA wraps it
    return found


# ---------------------------------------------------------------- which layers


def plan_layers(wanted: Model, count: int) -> list[int | None]:
    """The layers after the change: each one's number among the model's `count`, None for a fresh one.

    Raises ValueError for a number that the model does not have.
    """
    plan: list[int | None] = [*_kept(wanted, count)]
    for index, insertion in sorted(enumerate(wanted.insert_layers), key=lambda pair: pair[1].at):
        key = f"model.insert_layers.{index}"
        if insertion.copy_of is not None:
            _check_number(f"{key}.copy_of", insertion.copy_of, count)
        if insertion.at > len(plan):
            raise ValueError(f"{key}.at = {insertion.at}: leaves a gap; {len(plan)} is the first place that is free")
        plan.insert(insertion.at, insertion.copy_of)
    return plan


def _kept(wanted: Model, count: int) -> list[int]:
    keep = wanted.keep_layers
    if isinstance(keep, dict):
        ((how, number),) = keep.items()
        if how == "every":
            return list(range(0, count, number))
        if number > count:
            raise ValueError(f"model.keep_layers.{how} = {number}: the model has {count} layers")
        return list(range(number)) if how == "first" else list(range(count - number, count))
    for key, numbers in (("keep_layers", keep or []), ("drop_layers", wanted.drop_layers)):
        for index, number in enumerate(numbers):
            _check_number(f"model.{key}.{index}", number, count)
    kept = [number for number in keep or range(count) if number not in wanted.drop_layers]
    if not kept:
        raise ValueError(f"model.drop_layers = {wanted.drop_layers}: drops every layer")
    return kept


def _check_number(key: str, number: int, count: int) -> None:
    if number >= count:
        raise ValueError(f"{key} = {number}: there is no such layer; the model has layers 0 to {count - 1}")


def _changed_config(config: Any, plan: list[int | None], rows: int | None) -> Any:
    """A copy for the layers in `plan` and `rows` of token embeddings."""
    config = copy.deepcopy(config)
    if rows is not None:
        config.vocab_size = rows
    kinds = getattr(config, "layer_types", None)
    if plan and kinds is not None:
        # A fresh layer is of the kind of the one below it; at the bottom, of the one above.
        below = [next((n for n in reversed(plan[: i + 1]) if n is not None), None) for i in range(len(plan))]
        lowest = next(n for n in plan if n is not None)
        config.layer_types = [kinds[lowest if number is None else number] for number in below]
    if plan:
        config.num_hidden_layers = len(plan)
    return config


# ---------------------------------------------------------------- the successor


def operate(model: nn.Module, wanted: Model, seed: int, head_config: Any = None) -> nn.Module:
    """The model that `wanted` describes, but for freezing, with the weights of this one, which is used up.

    With `head_config`, whose number of labels may differ, the head is fresh. Raises ValueError for a layer or a
    parameter that is not there, and for a family whose layers are not known. A collective on ZeRO-3.
    """
    plan: list[int | None] = []
    if wanted.keep_layers is not None or wanted.drop_layers or wanted.insert_layers:
        try:
            plan = plan_layers(wanted, len(layers_of(model)))
        except ValueError as error:
            raise ValueError(_with_key(wanted, str(error))) from None
    if not (plan or wanted.reset or wanted.resize_embeddings or head_config is not None):
        return model
    config = _changed_config(model.config, plan, wanted.resize_embeddings)
    if head_config is not None:
        config.id2label, config.label2id = head_config.id2label, head_config.label2id
    with torch.device("meta"):
        successor: nn.Module = type(model)(config)
    origins = _origins(model, successor, plan)
    names = [name for name, _ in successor.named_parameters()]
    reset = {name for name in names if _matches(name, _legal("reset", wanted.reset, names))}
    if head_config is not None:
        reset |= {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    _move(model, successor, origins, reset, seed)
    if hasattr(model, "generation_config"):
        successor.generation_config = model.generation_config
    return successor.train(model.training)


def _with_key(wanted: Model, message: str) -> str:
    """Names the key that asks for layers, where it is not its number that is wrong."""
    if message.startswith("model."):
        return message
    key = next(key for key in ("keep_layers", "drop_layers", "insert_layers") if getattr(wanted, key))
    value = wanted.model_dump(include={key})[key]
    return f"model.{key} = {value}: {message}"


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers; those that are tied under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _origins(model: nn.Module, successor: nn.Module, plan: list[int | None]) -> dict[str, str | None]:
    """For each tensor of the successor the name that it has in the model; None in a fresh layer."""
    names = list(_tensors(successor))
    if not plan:
        return {name: name for name in names}
    layers = layers_of(successor)
    prefix = next(name for name, module in successor.named_modules() if module is layers) + "."
    origins: dict[str, str | None] = {name: name for name in names}
    for name in names:
        if name.startswith(prefix):
            place, _, rest = name.removeprefix(prefix).partition(".")
            number = plan[int(place)]
            origins[name] = None if number is None else f"{prefix}{number}.{rest}"
    return origins


@torch.no_grad()
def _move(
    model: nn.Module, successor: nn.Module, origins: dict[str, str | None], reset: Collection[str], seed: int
) -> None:
    """Gives each of the successor's tensors its value: the old one, moved or copied, or one that is drawn."""
    old, first = _tensors(model), next(model.parameters())
    device = torch.device("meta" if first.is_meta else "cpu")
    tied: dict[int, list[str]] = {}
    new = _tensors(successor)
    for name, tensor in new.items():
        tied.setdefault(id(tensor), []).append(name)

    drawn: dict[str, torch.Tensor] = {}  # by the first of its names
    for name, *others in tied.values():
        origin = origins[name]
        if origin is None or name in reset or zero.shape(old[origin]) != new[name].shape:
            dtype = first.dtype if isinstance(new[name], nn.Parameter) else new[name].dtype
            empty = torch.empty(new[name].shape, dtype=dtype, device=device)
            drawn[name] = _put(successor, (name, *others), empty)
    _draw(successor, seed)

    moved: set[str] = set()
    made = []
    for name, *others in tied.values():
        origin = origins[name]
        if name in drawn:
            if origin is not None and name not in reset:  # of another length: the rows that were there stay
                rows = min(len(drawn[name]), zero.shape(old[origin])[0])
                drawn[name][:rows] = zero.whole(old[origin])[:rows]
            made.append(drawn[name])
        elif origin in moved:
            assert origin is not None
            made.append(_put(successor, (name, *others), zero.whole(old[origin])))
        else:
            assert origin is not None
            _put(successor, (name, *others), old[origin])
            moved.add(origin)
    zero.partition_like(first, [tensor for tensor in made if isinstance(tensor, nn.Parameter)])


def _put(model: nn.Module, names: Iterable[str], tensor: torch.Tensor) -> torch.Tensor:
    """Sets a parameter or a buffer under all its names, a plain tensor as what stood there; returns what is set."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._parameters:
            tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor
    return tensor


def _draw(model: nn.Module, seed: int) -> None:
    """The model's own initialisation of what has memory: on the meta device it does nothing.

    It has a generator's state of its own, because on ZeRO-3 the ranks have drawn differently by now.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence([seed], spawn_key=(1,)).generate_state(1)[0]))
        initialize: Any = model.initialize_weights
        initialize()


# ---------------------------------------------------------------- by name


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _legal(key: str, patterns: list[str], names: list[str]) -> list[str]:
    """The patterns; raises ValueError for one that matches nothing."""
    for index, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.3)
            raise ValueError(
                f"model.{key}.{index} = {pattern!r}: no parameter has such a name"
                + (f"; there is `{near[0]}`" if near else "")
            )
    return patterns


def freeze(model: nn.Module, patterns: list[str]) -> int:
    """Freezes the parameters whose dotted names match; returns how many. Raises ValueError for an idle pattern."""
    names = [name for name, _ in model.named_parameters()]
    _legal("freeze", patterns, names)
    frozen = 0
    for name, parameter in model.named_parameters():
        if _matches(name, patterns):
            parameter.requires_grad_(False)
            frozen += 1
    if frozen == len(names):
        raise ValueError(f"model.freeze = {patterns}: freezes every parameter; nothing would train")
    return frozen
