"""How fast training goes: the clock of a step's parts, rates, memory, and the line that shows them."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from fleetune.train.distributed import World
from fleetune.train.progress import Progress

# Dense bf16 peaks of the data sheets, in FLOP/s; the first name that occurs in the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
    "A10": 125e12,
    "L4": 121e12,
}


class Meter:
    """Seconds of each part of a step and rates since the last reading.

    On a GPU the parts are those of the host, which runs ahead of the device; only the whole step is exact there.
    """

    def __init__(self, progress: Progress, parameters: int, world: World) -> None:
        self.parameters, self.world = parameters, world
        self.parts: dict[str, float] = {}
        self.last = (progress.step, progress.examples, progress.tokens, progress.train_seconds)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start

    def read(self, progress: Progress) -> dict[str, float]:
        """Figures of the steps since the last reading, as they are logged."""
        now = (progress.step, progress.examples, progress.tokens, progress.train_seconds)
        steps, examples, tokens, seconds = (a - b for a, b in zip(now, self.last, strict=True))
        values = {
            "train/samples_per_second": examples / seconds,
            "train/tokens_per_second": tokens / seconds,
            "train/memory_mb": peak_memory_mb(self.world),
            "time/whole_step": seconds / steps,
            **{f"time/{name}": spent / steps for name, spent in self.parts.items()},
        }
        if (peak := peak_flops(self.world)) is not None:
            # 6 FLOP a parameter and token, forward and backward (Kaplan et al., arXiv 2001.08361)
            values["train/mfu"] = 6.0 * self.parameters * tokens / seconds / (peak * self.world.world_size)
        self.parts, self.last = {}, now
        return values


def peak_flops(world: World) -> float | None:
    """Of this device in bf16; None where it is not known."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)


def peak_memory_mb(world: World) -> float:
    """The most that this rank held so far: allocated on its GPU, or resident in its process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def available_memory() -> int:
    """Bytes that this machine, and the cgroup this process runs in, can still give."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").split("0::/")[1].split("\n")[0]
        for folder in (path := Path("/sys/fs/cgroup") / group, *path.parents[: len(path.parents) - 3]):
            limit = (folder / "memory.max").read_text(encoding="ascii").strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text(encoding="ascii"))
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
                cached = int(statistics["inactive_file"])  # of files just written, say; it is given back when asked for
                available = min(available, int(limit) - used + cached)
    return available


def step_line(step: int, total: int, values: dict[str, float], losses: dict[str, float]) -> str:
    parts = f" = {' + '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}" if len(losses) > 1 else ""
    return (
        f"step  {step}/{total}  loss {values['train/loss']:.4f}{parts}  lr {values['train/learning_rate']:.3g}  "
        f"grad norm {values['train/grad_norm']:.3f}  {values['train/samples_per_second']:.1f} samples/s  "
        f"{values['train/memory_mb']:.0f} MB"
    )


def figures(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
