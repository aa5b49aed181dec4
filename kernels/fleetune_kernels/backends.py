"""Which implementation runs, and what every op says to wrong arguments."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Asked once: the compiler of PyTorch 2.11 can trace neither.
HAS_TRITON = importlib.util.find_spec("triton") is not None
AUTOCAST_DEVICES = tuple(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))


def choose(backend: str, tensor: torch.Tensor) -> str:
    """`triton` for a tensor on a GPU, `torch` elsewhere, where `auto` is asked for.

    `triton` also runs on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before the first import).

    Raises:
        ValueError: an unknown backend, or triton where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}; should be one of {', '.join(BACKENDS)}")
    able = tensor.dtype in KERNEL_DTYPES and HAS_TRITON
    if backend == "auto":
        return "triton" if able and tensor.is_cuda else "torch"
    if backend == "triton":
        if tensor.dtype not in KERNEL_DTYPES:
            raise ValueError(f"backend: triton takes float32, bfloat16 or float16, not {tensor.dtype}; use torch")
        if not able:
            raise ValueError("backend: triton is not installed; use torch")
        if not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(f"backend: triton needs a GPU, the tensor is on {tensor.device}; use auto or torch")
    return backend


def one_of(name: str, value: str, legal: Sequence[str]) -> None:
    if value not in legal:
        raise ValueError(f"{name}: {value!r}; should be one of {', '.join(legal)}")


def same_shape(name: str, tensor: torch.Tensor | None, shape: Sequence[int], one_for: str) -> None:
    if tensor is not None and tensor.shape != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; should be {tuple(shape)}, one for each {one_for}")


def same_rows(name: str, tensor: torch.Tensor, last: str, like: torch.Tensor, of: str) -> None:
    """The shape is that of `like`, the argument `of`, but for the last axis, which is called `last`."""
    if tensor.shape[:-1] != like.shape[:-1] or tensor.ndim != like.ndim:
        should = f"({', '.join([*map(str, like.shape[:-1]), last])})"
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; should be {should}, the rows of {of}")


def floating(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: {tensor.dtype}; should be floating-point")


def same_device(tensor: torch.Tensor, of: str, **others: torch.Tensor | None) -> None:
    """Every tensor of `others`, by name, lies where `tensor`, the argument `of`, does."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise ValueError(f"{name}: on {other.device}; {of} is on {tensor.device}")


def scalar(name: str, tensor: object, like: torch.Tensor) -> torch.Tensor:
    """A number, or a tensor of one element, detached: as a 0-dim one where `like` lies. One from a CPU waits for it."""
    if isinstance(tensor, int | float) and not isinstance(tensor, bool):
        if not tensor >= 0:
            raise ValueError(f"{name}: {tensor!r}; should be 0 or more")
        return torch.full((), float(tensor), dtype=torch.float64, device=like.device)
    if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
        raise ValueError(f"{name}: {tensor!r}; should be a number, or a tensor with one element")
    return tensor.detach().reshape(()).to(like.device)


def integers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Labels or ids; unsigned ones as int64, where an ignore_index below 0 does not wrap round."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: {tensor.dtype}; should be integers")
    return tensor if tensor.dtype.is_signed else tensor.long()


def readable(tensor: torch.Tensor) -> bool:
    """Whether its values may be looked at: on a GPU that would wait for it, and traced and fake tensors have none."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def full_precision(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Losses are computed in fp32 under autocast too."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST_DEVICES else nullcontext()


def as_autocast(*tensors: torch.Tensor | None) -> list[Any]:
    """What a linear layer takes under autocast: all in its dtype. As they are where it is off, or for fp64."""
    first = next((tensor for tensor in tensors if tensor is not None), None)
    if first is None or first.device.type not in AUTOCAST_DEVICES:
        return list(tensors)
    if not torch.is_autocast_enabled(first.device.type) or first.dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def once(name: str) -> None:
    """What every backward says first: the gradients are formed by hand, so nothing can be differentiated through them.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice (create_graph=True); use backend='reference'")
