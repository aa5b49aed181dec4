"""How much memory a call takes at its height: by PyTorch's own record of what it allocated and freed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes beyond what was alive before, at the height of the call; its result counts too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = call()
    del kept
    height = now = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            height = max(height, now)
    return height
