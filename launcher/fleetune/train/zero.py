"""ZeRO-3's partitioned parameters: building a model in shards, and gathering it whole. No-ops without ZeRO-3."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from fleetune.schema import TeacherDeepSpeed


def import_deepspeed() -> Any:
    """DeepSpeed, quiet; what starts it first sets this for the whole process, and on ZeRO-3 that is the model."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # The shared-memory all-reduce serves inference alone, and building it takes a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


@functools.cache
def _import_muon_uncompiled() -> None:
    """DeepSpeed imports its Muon optimizer to see that ours is none, and Muon wraps three functions in torch.compile.

    That alone imports the whole compiler, 2 s of every rank's start; without the wrapping nobody notices.
    """

    def unchanged(function: Any = None, **_: Any) -> Any:
        return function if function is not None else unchanged

    compile_ = torch.compile
    torch.compile = unchanged  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compile_


class _Zero3Config:
    """What Transformers asks of a DeepSpeed config; its own class for this requires accelerate."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True


@contextlib.contextmanager
def partitioned(config: dict[str, Any]) -> Iterator[None]:
    """Within it, Transformers makes every module in shards and loads weights shard by shard."""
    if config["zero_optimization"]["stage"] != 3:
        yield
        return
    import_deepspeed()
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    held = _Zero3Config(config)  # Transformers keeps a weak reference
    set_hf_deepspeed_config(held)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def inference_config(settings: TeacherDeepSpeed, dtype: torch.dtype, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for a model that is only run."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_param != "none":
        zero["offload_param"] = {"device": settings.offload_param, "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
    }


def inference_engine(model: nn.Module, config: dict[str, Any]) -> Any:
    """The model with its parameters cut over the ranks, gathered layer by layer while it runs."""
    engine, *_ = import_deepspeed().initialize(model=model, config=config)
    engine.eval()
    return engine


def is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter; of one in 4 bits how many weights it stands for."""
    quantized = getattr(parameter, "quant_state", None)
    count = parameter.numel() if quantized is None else quantized.shape.numel()
    return int(getattr(parameter, "ds_numel", count))


def shape(parameter: torch.Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it, on every rank; a collective on ZeRO-3."""
    if not hasattr(tensor, "ds_id"):
        return tensor.detach().clone()
    with import_deepspeed().zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone()


@contextlib.contextmanager
def gathered(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Within it the parameters are whole, to be read; a collective on ZeRO-3."""
    cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    with import_deepspeed().zero.GatheredParameters(cut) if cut else contextlib.nullcontext():
        yield


def partition_like(other: Any, parameters: list[nn.Parameter]) -> None:
    """Cuts whole parameters over the ranks as another one is, from the main rank's values; a collective on ZeRO-3."""
    if is_partitioned(other):
        other.convert_to_zero_parameters(param_list=parameters)


def gathered_state_dict(
    model: nn.Module, is_main: bool, names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The whole state, or that of these names, on CPU, on the main rank alone.

    A collective on ZeRO-3, one parameter in full at a time.
    """
    state: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if names is not None and name not in names:
            continue
        parameter = parameters.get(name)
        if parameter is not None and is_partitioned(parameter):
            with import_deepspeed().zero.GatheredParameters([parameter]):
                if is_main:
                    state[name] = parameter.detach().cpu().clone()
        elif is_main:
            state[name] = tensor.detach().cpu().clone()
    return state
