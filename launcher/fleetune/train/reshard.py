"""A checkpoint of other ranks or another ZeRO stage, read into this run's engine. No copy of it is made in between.

DeepSpeed loads what as many ranks of the same stage have saved. Its files, in three forms:

whole (stage 0)         mp_rank_00_model_states.pt: weights by name; AdamW's state by the parameter's number
flat (stages 1, 2)      zero_pp_rank_N_..._optim_states.pt: a group's parameters end to end, cut into equal parts, each
                        rank's with AdamW's state; frozen ones and buffers by name in mp_rank_00_model_states.pt
by parameter (stage 3)  zero_pp_rank_N_..._optim_states.pt: each parameter cut into equal parts, a rank's end to end;
                        frozen ones, cut alike, and buffers in zero_pp_rank_N_..._model_states.pt

All are mapped into memory, and each rank copies the ranges that its own shards are made of, whoever owned them: fp32
weights and AdamW's means, exactly. Beside the engine that takes no memory, and no shard is read twice over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from fleetune.train import signals, zero
from fleetune.train.optim import parameter_groups

WEIGHT, STATES = "weight", ("exp_avg", "exp_avg_sq")
_TYPES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]  # stand in the files; no other is unpickled


def is_native(engine: Any, folder: Path, world_size: int) -> bool:
    """Whether DeepSpeed itself loads these files on so many ranks."""
    form = ("whole", "flat", "flat", "by parameter")[engine.zero_optimization_stage()]
    return form == "whole" == _form(folder) or (form, world_size) == (_form(folder), len(_of_ranks(folder, "optim")))


def _form(folder: Path) -> str:
    if not (folder / "mp_rank_00_model_states.pt").exists():
        return "by parameter"
    return "flat" if _of_ranks(folder, "optim") else "whole"


def _of_ranks(folder: Path, kind: str) -> list[Path]:
    """The ranks' files of a kind, in rank order; bf16 runs have a word before the name."""
    paths = folder.glob(f"*zero_pp_rank_*_{kind}_states.pt")
    return sorted(paths, key=lambda path: int(path.name.partition("zero_pp_rank_")[2].partition("_")[0]))


# ---------------------------------------------------------------- what is stored


@dataclass(frozen=True)
class Piece:
    """What one file holds of a flattened parameter, from `start` on."""

    start: int
    values: dict[str, torch.Tensor]  # flat and of one length: the weight, and AdamW's state of what is trained

    @property
    def end(self) -> int:
        return self.start + self.values[WEIGHT].numel()


class Stored:
    """A checkpoint's parameters and buffers by name, in whichever files they lie."""

    def __init__(self, folder: Path, order: list[str]) -> None:
        """`order` names the trained parameters as the optimizer numbers them."""
        self.folder = folder
        self.pieces: dict[str, list[Piece]] = {}
        self.step: torch.Tensor | None = None  # AdamW's; none before the first
        self.loss_scaler: Any = None
        form, models = _form(folder), [_open(path) for path in _of_ranks(folder, "model")]
        if form != "by parameter":
            models = [_open(folder / "mp_rank_00_model_states.pt")]
        shards = [_open(path)["optimizer_state_dict"] for path in _of_ranks(folder, "optim")]
        if form == "whole":
            self._add_whole(models[0], order)
        elif form == "flat":
            self._add_flat(models[0], shards)
        else:
            self._add_by_parameter(models, shards)
        if shards:
            self.loss_scaler = shards[0]["loss_scaler"]

    def copy(self, name: str, key: str, start: int, into: torch.Tensor) -> None:
        """Into a flat tensor, from `start` of the flattened parameter on; beyond the parameter's end it stays."""
        for piece in self.pieces[name]:
            first, last = max(start, piece.start), min(start + into.numel(), piece.end)
            if first < last:
                into[first - start : last - start].copy_(piece.values[key][first - piece.start : last - piece.start])

    def numel(self, name: str) -> int:
        """How many values there are, in pieces without a gap from the start on."""
        end = 0
        for piece in self.pieces.get(name, ()):
            if piece.start != end:
                break
            end = piece.end
        return end

    def _add(self, name: str, values: dict[str, torch.Tensor], numel: int | None = None) -> None:
        """The next piece of a parameter; of `numel` values in all, without what it is padded with."""
        pieces = self.pieces.setdefault(name, [])
        start = pieces[-1].end if pieces else 0
        most = None if numel is None else max(0, numel - start)
        pieces.append(Piece(start, {key: value.detach().reshape(-1)[:most] for key, value in values.items()}))

    def _states(self, state: dict[Any, Any], number: int) -> dict[str, torch.Tensor]:
        found = state.get(number, {})
        if found:
            self.step = found["step"]
        return {key: found[key] for key in STATES if key in found}

    def _add_whole(self, model: dict[str, Any], order: list[str]) -> None:
        state, numbers = model["optimizer"]["state"], {name: number for number, name in enumerate(order)}
        for name, value in model["module"].items():
            self._add(name, {WEIGHT: value, **self._states(state, numbers.get(name, -1))})

    def _add_flat(self, model: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            state = shard["base_optimizer_state"]["state"]
            for group, places in enumerate(shard["param_slice_mappings"]):
                flat = {WEIGHT: shard["single_partition_of_fp32_groups"][group], **self._states(state, group)}
                for name, at in places.items():
                    self._add(name, {key: values[at.start : at.start + at.numel] for key, values in flat.items()})
        for name, value in model["module"].items():
            if name not in self.pieces:
                self._add(name, {WEIGHT: value})

    def _add_by_parameter(self, models: list[dict[str, Any]], shards: list[dict[str, Any]]) -> None:
        for model, shard in zip(models, shards, strict=True):
            state = shard["optimizer_state_dict"]["state"]
            for group, shapes in enumerate(model["param_shapes"]):
                flat, at = {WEIGHT: shard["fp32_flat_groups"][group], **self._states(state, group)}, 0
                for name, shape in shapes.items():
                    part = -(-shape.numel() // len(shards))
                    values = {key: values[at : at + part] for key, values in flat.items()}
                    self._add(name, values, shape.numel())
                    at += part
            for name, fragment in (model["frozen_param_fragments"] or {}).items():
                self._add(name, {WEIGHT: fragment}, model["frozen_param_shapes"][name].numel())
        for name in models[0]["buffer_names"]:
            self._add(name, {WEIGHT: models[0]["module"][name]})


def _open(path: Path) -> dict[str, Any]:
    signals.beat("load")
    with torch.serialization.safe_globals(_TYPES):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- into the engine


@dataclass(frozen=True)
class _Place:
    """Where this rank keeps a range of a flattened parameter, from `start` on."""

    name: str
    start: int
    values: dict[str, torch.Tensor]  # flat views: writing to them writes to the engine


@torch.no_grad()
def load(engine: Any, folder: Path) -> None:
    """Weights, AdamW's state and loss scale. A collective.

    Raises:
        ValueError: what is stored is not of this model.
    """
    module, stage = engine.module, engine.zero_optimization_stage()
    stored = Stored(folder, _optimizers_order(module))
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad and name not in stored.pieces}
    for name, parameter in module.named_parameters():
        if name not in frozen and stored.numel(name) != zero.numel(parameter):
            raise ValueError(f"{folder}: has {stored.numel(name)} values of {name}, not {zero.numel(parameter)}")
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # no parameter stays gathered, with its old values
    places = (_whole_places, _flat_places, _flat_places, _places_by_parameter)[stage]
    for place in places(engine, stored.step):
        signals.beat("load")
        for key, values in place.values.items() if place.name not in frozen else ():
            stored.copy(place.name, key, place.start, values)
    for name, buffer in module.named_buffers():
        if name in stored.pieces:
            stored.copy(name, WEIGHT, 0, buffer.view(-1))
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        engine.optimizer.checkpoint_event_epilogue()
    if engine.fp16_enabled():
        assert stored.loss_scaler is not None  # no recipe has fp16 without ZeRO
        engine.optimizer.loss_scaler = stored.loss_scaler


def _optimizers_order(module: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups: list[dict[str, Any]] = parameter_groups(module, 0.0)
    return [names[parameter] for group in groups for parameter in group["params"]]


def _whole_places(engine: Any, step: torch.Tensor | None) -> Iterator[_Place]:
    for name, parameter in engine.module.named_parameters():
        states = _states_of(engine.optimizer, parameter, step) if parameter.requires_grad else {}
        values = {WEIGHT: parameter, **states}
        yield _Place(name, 0, {key: value.detach().view(-1) for key, value in values.items()})


def _flat_places(engine: Any, step: torch.Tensor | None) -> Iterator[_Place]:
    """Of the weights that the model computes with, the frozen ones alone: the others follow from the fp32 shards."""
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield _Place(name, 0, {WEIGHT: parameter.detach().view(-1)})
    for flat in optimizer.single_partition_of_fp32_groups:
        _states_of(optimizer.optimizer, flat, step)  # also where this rank's part is padding alone
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping if parameter.requires_grad else None
        if mapping is not None:
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            at, values = mapping.hp_fragment_address, {WEIGHT: flat, **_states_of(optimizer.optimizer, flat, step)}
            views = {key: value.detach().narrow(0, at.start, at.numel) for key, value in values.items()}
            yield _Place(name, mapping.lp_fragment_address.start, views)


def _places_by_parameter(engine: Any, step: torch.Tensor | None) -> Iterator[_Place]:
    """The weights that the model computes with, and for what is trained the fp32 shards."""
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        start = engine.global_rank * parameter.ds_tensor.numel()
        yield _Place(name, start, {WEIGHT: parameter.ds_tensor.detach()})
        if parameter.requires_grad:
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            values = {WEIGHT: flat, **_states_of(optimizer.optimizer, flat, step)}
            yield _Place(name, start, {key: value.detach().narrow(0, offset, numel) for key, value in values.items()})


def _states_of(optimizer: Any, parameter: torch.Tensor, step: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter or flat shard; made where there was no step yet, as AdamW would."""
    if step is None:
        return {}
    state = optimizer.state[parameter]
    for key in STATES:
        if key not in state:
            state[key] = torch.zeros_like(parameter)
    state["step"] = step.detach().to(parameter.device, copy=True)
    return {key: state[key] for key in STATES}
