"""AdamW's parameter groups and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from fleetune.schema import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay for matrices; none for biases and norms, by name and by module, since ZeRO-3's shards have no shape."""
    undecayed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name.endswith("bias") or "norm" in type(module).__name__.lower()
    }
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if name in undecayed else decay).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """torch's fused AdamW, on GPUs and on CPUs (offload included): nothing is compiled at the first step."""
    return torch.optim.AdamW(
        parameter_groups(model, training.weight_decay),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )


def learning_rate(training: Training, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0. Warm-up is linear from 0; linear and cosine end at 0."""
    warmup = training.warmup_steps if training.warmup_steps is not None else round(training.warmup_ratio * total_steps)
    if step < warmup:
        return training.learning_rate * step / warmup
    if training.lr_scheduler_type == "constant":
        return training.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = 1.0 - progress if training.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return training.learning_rate * max(0.0, factor)
