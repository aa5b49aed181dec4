"""The DeepSpeed engine: its config, and one optimizer step with penalties and clipping under every ZeRO stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fleetune.batch import Batch
from fleetune.schema import Recipe
from fleetune.train import distributed, zero
from fleetune.train.memory import BUCKET
from fleetune.train.objectives import Penalty
from fleetune.train.optim import build_optimizer


def deepspeed_config(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """DeepSpeed's settings; the loop owns the window (`managed_gradient_accumulation: false`) and all scaling."""
    stage, training = recipe.deepspeed.zero_stage, recipe.training
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": stage == 2 and torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if recipe.deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if recipe.deepspeed.offload_param != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "gradient_clipping": training.max_grad_norm if stage else 0.0,  # stage 0 clips in `_take_step`
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW serves offloaded shards too
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if training.fp16:
        config["fp16"] = {"enabled": True}
    elif keeps_bf16_weights(recipe):
        config["bf16"] = {"enabled": True}
        if stage != 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def keeps_bf16_weights(recipe: Recipe) -> bool:
    """bf16 weights with fp32 masters in the optimizer's shards; stage 0 has none: autocast over fp32 weights."""
    return recipe.training.bf16 and recipe.deepspeed.zero_stage > 0


def weights_dtype(recipe: Recipe) -> torch.dtype:
    if recipe.training.fp16:
        return torch.float16
    return torch.bfloat16 if keeps_bf16_weights(recipe) else torch.float32


def start_engine(model: nn.Module, recipe: Recipe, config: dict[str, Any], penalties: list[Penalty]) -> Any:
    """The DeepSpeed engine around the model; `engine.penalty_values` are the last step's, summed over ranks."""
    optimizer = build_optimizer(model, recipe.training)
    trained = sum(zero.numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
    # DeepSpeed sets aside as much memory as this says, whatever the model needs.
    config["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, trained)
    engine, *_ = zero.import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
    engine.penalties, engine.penalty_values = penalties, {}
    if any(p.dtype == torch.float64 for p in model.parameters()):
        _reduce_in_fp64(engine)
    if engine.dp_world_size == 1 and recipe.deepspeed.zero_stage == 0:
        engine.enable_backward_allreduce = False  # with nobody to reduce with, it would only copy the gradients twice
    take_model_step = engine._take_model_step

    def take_step(lr_kwargs: Any) -> None:
        """Runs after the gradients are reduced and before they are clipped."""
        _complete_gradient(engine)
        if recipe.deepspeed.zero_stage == 0 and not recipe.training.fp16:
            parameters = [p for p in engine.module.parameters() if p.grad is not None]
            limit = recipe.training.max_grad_norm or float("inf")
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        take_model_step(lr_kwargs)

    engine._take_model_step = take_step
    return engine


def gradient_norm(engine: Any) -> float:
    """Of the last step, over all parameters and ranks, before clipping, penalties included."""
    return float(engine.get_global_grad_norm() or 0.0)


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _reduce_in_fp64(engine: Any) -> None:
    """DeepSpeed's reduction without ZeRO can, but no config says so, and its accelerators do not list the type."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    listed = accelerator.supported_dtypes()
    if torch.float64 not in listed:  # twice in the list would reduce twice
        accelerator.supported_dtypes = lambda: [*listed, torch.float64]
    engine.communication_data_type = torch.float64


@torch.no_grad()
def whole_gradient(engine: Any, is_main: bool) -> dict[str, torch.Tensor]:
    """The window's gradient in place of an optimizer step: reduced, with its penalties, before clipping.

    Every trainable parameter by name, in full, on CPU, on the main rank alone; a collective, one parameter at a time.
    It stays in the engine, which is of no use for another window.
    """
    whole: dict[str, torch.Tensor] = {}

    def gather(lr_kwargs: Any) -> None:
        _complete_gradient(engine)
        for shard in _shards(engine):
            full = shard.gradient
            if engine.zero_optimization_stage():
                full = torch.zeros(shard.shape.numel(), dtype=torch.float32, device=engine.device)
                part = full[shard.start : shard.start + shard.gradient.numel()]
                part.copy_(shard.gradient.flatten()[: part.numel()])  # without ZeRO-3's padding
                distributed.sum_over_ranks(full)
            if is_main:
                whole[shard.name] = full.detach().reshape(shard.shape).cpu().clone()

    take_step = engine._take_model_step
    engine._take_model_step = gather
    try:
        engine.step()
    finally:
        engine._take_model_step = take_step
    return whole


@torch.no_grad()
def _complete_gradient(engine: Any) -> None:
    """What the reduction over ranks leaves to do: zeros where no loss reached, and the penalties."""
    if engine.zero_optimization_stage() == 0:
        # Every reduction fills these in; one rank alone has none, and its gradient must be that of many.
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    if engine.penalties:
        engine.penalty_values = _add_penalties(engine, engine.penalties)


def _add_penalties(engine: Any, penalties: list[Penalty]) -> dict[str, float]:
    """Adds each penalty's gradient to the reduced gradients, shard by shard, and returns the penalties' values."""
    values = torch.zeros(len(penalties), dtype=torch.float64, device=engine.device)
    for shard in _shards(engine):
        chosen = [(i, penalty) for i, penalty in enumerate(penalties) if penalty.matches(shard.name)]
        for i, penalty in chosen:
            values[i] += penalty.value(shard.values).to(values)
            shard.gradient.add_(penalty.gradient(shard.values).to(shard.gradient).reshape(shard.gradient.shape))
        if chosen:
            shard.write_back()
    if engine.zero_optimization_stage():
        distributed.sum_over_ranks(values)
    return {penalty.name: float(value) for penalty, value in zip(penalties, values, strict=True)}


@dataclass(frozen=True)
class _Shard:
    """What this rank owns of a trainable parameter: all of it without ZeRO, perhaps nothing with it."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int  # in the flattened parameter
    values: torch.Tensor  # fp32; fp64 for a model in fp64
    gradient: torch.Tensor  # reduced
    write_back: Callable[[], None] = lambda: None  # where `gradient` may be a copy


def _shards(engine: Any) -> Iterator[_Shard]:
    """One for each trainable parameter, in the same order on every rank."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = zero.shape(parameter)
        if stage == 0:
            yield _Shard(name, shape, 0, parameter.detach(), parameter.grad)
        elif stage == 3:
            # Every rank holds a shard of equal size; the last one's is padded with zeros, which a penalty ignores.
            gradient = optimizer.get_local_fp32_grad_for_param(parameter)
            yield _Shard(
                name,
                shape,
                engine.global_rank * gradient.numel(),
                optimizer.get_local_fp32_param(parameter),
                gradient,
                functools.partial(optimizer.set_local_grad_for_param, gradient, parameter),
            )
        elif parameter._hp_mapping is None:  # this rank owns nothing of it
            nothing = parameter.new_empty(0)
            yield _Shard(name, shape, 0, nothing, nothing)
        else:
            mapping = parameter._hp_mapping
            gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            address = mapping.lp_fragment_address
            if gradient.numel() != address.numel:  # the whole parameter's gradient, of which a part is ours
                gradient = gradient.flatten().narrow(0, address.start, address.numel)
            yield _Shard(name, shape, address.start, mapping.get_hp_fragment(), gradient)
