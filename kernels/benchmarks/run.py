"""Every op against its peers, in turn in one process: time, memory, and the error of the gradients.

    python kernels/benchmarks/run.py --device cpu [--only NAME] [--rounds 5] [--again]
    python kernels/benchmarks/run.py --device cuda
    python kernels/benchmarks/run.py --device cpu --table      # of what is recorded

Loss and gradients together. Time is the median of the rounds; memory is the height of what is allocated beyond the
inputs and the returned gradients; the error is that of all gradients together against eager PyTorch in fp64. Cases that
are recorded in `results/` are not run again. The peers (liger-kernel, cut-cross-entropy, quack-kernels, pykeops) are
measured where they are installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[2] / "launcher" / "benchmarks"))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "kernels"))
import record
from allocation import peak_bytes
from cases import Case, Inputs, Side, as_double, for_device
from exactness import relative_error

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "pykeops", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, Any]:
    inputs = case.inputs(device)
    leaves = {name: tensor.requires_grad_(name in case.wanted) for name, tensor in inputs.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, side in case.sides.items():
        try:
            gradients(side, leaves, case.wanted)  # compiles, and warms up
            found[name] = {"memory_mb": memory(side, leaves, case.wanted, device), "seconds": []}
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    for _ in range(rounds):
        for name, figures in found.items():
            if "failed" not in figures:
                figures["seconds"].append(seconds(case.sides[name], leaves, case.wanted, device))
    if case.eager_runs and (truth := exact(case, inputs)) is not None:
        for name, figures in found.items():
            if "failed" not in figures:
                ours = torch.cat([g.flatten() for g in gradients(case.sides[name], leaves, case.wanted)])
                figures["gradient_error"] = relative_error(ours, truth)
    return {"op": case.op, "shape": case.shape, "dtype": str(inputs[case.wanted[0]].dtype), "sides": found}


def exact(case: Case, inputs: Inputs) -> torch.Tensor | None:
    """All gradients together, of eager PyTorch in fp64; None where a GPU has no room for them."""
    try:
        found = gradients(case.sides["eager"], _leaves(as_double(inputs), case.wanted), case.wanted)
        return torch.cat([gradient.flatten() for gradient in found])
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def gradients(side: Side, leaves: Inputs, wanted: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(side(leaves), [leaves[name] for name in wanted])


def seconds(side: Side, leaves: Inputs, wanted: tuple[str, ...], device: torch.device) -> float:
    _settle(device)
    start = time.perf_counter()
    gradients(side, leaves, wanted)
    _settle(device)
    return time.perf_counter() - start


def memory(side: Side, leaves: Inputs, wanted: tuple[str, ...], device: torch.device) -> float:
    """MB beyond the inputs and the returned gradients."""
    returned = sum(leaves[name].numel() * leaves[name].element_size() for name in wanted)
    call: Callable[[], Any] = lambda: gradients(side, leaves, wanted)  # noqa: E731
    if device.type == "cpu":
        return (peak_bytes(call) - returned) / 1e6
    _settle(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before - returned) / 1e6


def _leaves(inputs: Inputs, wanted: tuple[str, ...]) -> Inputs:
    return {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(device: str) -> None:
    shown = Table("op", "shape", "side", "ms", "time to eager", "memory MB", "memory to eager", "gradient error")
    for path in sorted((RESULTS / device).glob("*.json")):
        case = record.read(path.stem, path.parent)
        assert case
        eager = case["sides"].get("eager", {})
        for name, figures in case["sides"].items():
            if "failed" in figures:
                shown.add_row(case["op"], case["shape"], name, figures["failed"][:60])
                continue
            median = statistics.median(figures["seconds"])
            to_eager = [
                f"{median / statistics.median(eager['seconds']):.2f}" if "seconds" in eager else "",
                f"{figures['memory_mb'] / eager['memory_mb']:.3f}" if "seconds" in eager else "",
            ]
            error = f"{figures['gradient_error']:.1e}" if "gradient_error" in figures else ""
            cells = (f"{1000 * median:.1f}", to_eager[0], f"{figures['memory_mb']:.0f}", to_eager[1], error)
            shown.add_row(case["op"], case["shape"], name, *cells)
    Console(width=150).print(shown)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments.add_argument("--only", default="", help="cases whose name holds this")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--again", action="store_true", help="what is recorded too")
    arguments.add_argument(
        "--slow-peers", action="store_true", help="KeOps at every size on a CPU, where it takes minutes a call"
    )
    arguments.add_argument("--table", action="store_true", help="of what is recorded")
    given = arguments.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch sees no GPU here")
    folder, cases = RESULTS / given.device, for_device(given.device, given.slow_peers)
    chosen = [case for case in cases if given.only in case.name]
    if not chosen:
        raise SystemExit(f"--only {given.only}: no such case; there are {', '.join(c.name for c in cases)}")
    for case in [] if given.table else chosen:
        if not given.again and record.read(case.name, folder) is not None:
            print(f"{case.name} is recorded; --again measures it anew")
            continue
        print(f"{case.name} ...", flush=True)
        figures = measure(case, torch.device(given.device), given.rounds)
        command = f"python kernels/benchmarks/run.py --device {given.device} --only {case.name} --rounds {given.rounds}"
        record.write(case.name, command, figures, folder, PACKAGES)
    table(given.device)


if __name__ == "__main__":
    main()
