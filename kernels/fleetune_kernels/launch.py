"""Launch settings of the Triton kernels, one small table for each architecture; nothing is tuned while training runs.

`python kernels/benchmarks/tune.py` finds them on the GPU it runs on and prints the lines for this file.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    block: tuple[int, ...]  # the kernel's block sizes, in the order that it names them
    num_warps: int
    num_stages: int = 2


# Kernel, then architecture; "" serves every other one.
TABLE: dict[str, dict[str, Launch]] = {
    "cross_entropy": {
        "": Launch((4096,), 8),
        "sm_80": Launch((8192,), 32),
        "sm_90": Launch((16384,), 32),
        "sm_100": Launch((8192,), 32),
    },
    # With label smoothing, class weights, a soft cap or the figures by row: more sums by lane, so smaller blocks.
    "cross_entropy_options": {
        "": Launch((4096,), 8),
        "sm_80": Launch((4096,), 16),
        "sm_90": Launch((4096,), 16),
        "sm_100": Launch((4096,), 16),
    },
    "distillation": {"": Launch((4096,), 32), "sm_100": Launch((2048,), 32), "gfx942": Launch((4096,), 16)},
    "softmaxes": {"": Launch((2048,), 16)},
    "scale": {"": Launch((4096,), 8)},
    # By the block that the features fill; blocks of rows and of columns.
    "mmd_sweep_half_64": {
        "": Launch((128, 64), 8),
        "sm_100": Launch((64, 64), 8),
        "gfx942": Launch((64, 64), 4),
    },
    "mmd_sweep_half_128": {
        "": Launch((128, 64), 8),
        "sm_80": Launch((64, 128), 8),
        "sm_100": Launch((64, 64), 8),
        "gfx942": Launch((64, 32), 4),
    },
    "mmd_sweep_half_256": {
        "": Launch((64, 64), 8),
        "sm_90": Launch((64, 32), 8),
        "gfx942": Launch((32, 32), 4),
    },
    "mmd_sweep_fp32_64": {
        "": Launch((32, 32), 4),
        "sm_100": Launch((64, 32), 8),
    },
    "mmd_sweep_fp32_128": {
        "": Launch((16, 32), 4),
        "gfx942": Launch((64, 32), 4),
    },
    "mmd_slopes": {"": Launch((8, 256), 4)},
}


def settings(kernel: str, device: torch.device) -> Launch:
    """The settings for a kernel on a device; on a CPU (the interpreter) those of an unknown GPU."""
    return for_architecture(kernel, architecture(device))


def for_architecture(kernel: str, architecture: str) -> Launch:
    by_architecture = TABLE[kernel]
    return by_architecture.get(architecture, by_architecture[""])


def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx9") else name.split(":")[0]  # they share its waves of 64 lanes
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def programs(rows: int, device: torch.device) -> int:
    """One for each multiprocessor, so that the rows in flight fit the L2 cache."""
    if device.type != "cuda":
        return min(rows, 4)
    return min(rows, torch.cuda.get_device_properties(device).multi_processor_count)


def on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A kernel is launched on the current device: within it that is the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
