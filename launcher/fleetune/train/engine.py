"""The DeepSpeed engine: its config, and one optimizer step with penalties and clipping under every ZeRO stage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fleetune.schema import Batch, Recipe
from fleetune.train import distributed
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
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # The shared-memory all-reduce serves inference alone, and building it takes a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, recipe.training), config=config)
    engine.penalty_values = {}
    if engine.dp_world_size == 1 and recipe.deepspeed.zero_stage == 0:
        engine.enable_backward_allreduce = False  # with nobody to reduce with, it would only copy the gradients twice
    take_model_step = engine._take_model_step

    def take_step(lr_kwargs: Any) -> None:
        """Runs after the gradients are reduced and before they are clipped."""
        if penalties:
            engine.penalty_values = _add_penalties(engine, penalties)
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


@torch.no_grad()
def _add_penalties(engine: Any, penalties: list[Penalty]) -> dict[str, float]:
    """Adds each penalty's gradient to the reduced gradients, shard by shard, and returns the penalties' values."""
    values = torch.zeros(len(penalties), dtype=torch.float64, device=engine.device)
    replicated = engine.zero_optimization_stage() == 0
    for name, value, gradient, write_back in _shards(engine):
        chosen = [(i, penalty) for i, penalty in enumerate(penalties) if penalty.matches(name)]
        for i, penalty in chosen:
            values[i] += penalty.value(value).to(values)
            gradient.add_(penalty.gradient(value).to(gradient.dtype).reshape(gradient.shape))
        if chosen:
            write_back()
    if not replicated:
        distributed.sum_over_ranks(values)
    return {penalty.name: float(value) for penalty, value in zip(penalties, values, strict=True)}


def _shards(engine: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, Any]]:
    """(name, fp32 values, reduced gradient, write back) of what this rank owns of each trainable parameter."""
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            if parameter.grad is not None:
                yield name, parameter.detach(), parameter.grad, lambda: None
        elif stage == 3:
            optimizer = engine.optimizer
            gradient = optimizer.get_local_fp32_grad_for_param(parameter)
            # Every rank holds a shard of equal size; the last one's is padded with zeros, which a penalty ignores.
            yield (
                name,
                optimizer.get_local_fp32_param(parameter),
                gradient,
                functools.partial(optimizer.set_local_grad_for_param, gradient, parameter),
            )
        elif parameter._hp_mapping is not None:  # None where this rank owns nothing of it
            mapping = parameter._hp_mapping
            gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            address = mapping.lp_fragment_address
            if gradient.numel() != address.numel:  # the whole parameter's gradient, of which a part is ours
                gradient = gradient.flatten().narrow(0, address.start, address.numel)
            yield name, mapping.get_hp_fragment(), gradient, lambda: None
