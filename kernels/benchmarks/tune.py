"""Finds the launch settings of `fleetune_kernels/launch.py` on the GPU it runs on, and prints their lines.

    python kernels/benchmarks/tune.py [--only cross_entropy] [--rounds 20]

For each kernel every candidate is put into the table in turn and the op is timed on its case of `run.py --device cuda`;
settings that spill are left out. Nothing is tuned while training runs: the lines go into the table by hand. Of
`cross_entropy_options` and `scale`, which no case launches, there is no search.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from itertools import product

import torch
from cases import Case, Inputs, for_device
from cases import mmd as mmd_case
from compiled import TARGETS, compile_variant, variants

from fleetune_kernels import launch
from fleetune_kernels.launch import Launch


@dataclass(frozen=True)
class Search:
    """A kernel of the table, the op whose case times it, and what to try."""

    kernel: str
    op: str
    blocks: tuple[tuple[int, ...], ...]
    num_warps: tuple[int, ...] = (4, 8, 16, 32)
    num_stages: tuple[int, ...] = (2,)


ROWS = ((1024,), (2048,), (4096,), (8192,), (16384,), (32768,))
TILES = tuple(product((16, 32, 64, 128), (32, 64, 128)))
SEARCHES = (
    Search("cross_entropy", "cross_entropy", ROWS),
    Search("distillation", "distillation_loss", ROWS),
    Search("softmaxes", "topk_distillation_loss", ROWS),
    Search("mmd_slopes", "mmd", tuple(product((4, 8, 16), (128, 256, 512))), (4, 8)),
)
# What no case of `run.py` launches: MMD's sweep, by the dtype and the width of the features.
SWEEPS = tuple((f"mmd_sweep_{kind}_{width}", kind, width) for kind in ("half", "fp32") for width in (64, 128, 256))


def microseconds(case: Case, leaves: Inputs, rounds: int) -> float:
    """The median of loss and gradients together, by the GPU's own clock."""
    times: list[float] = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        torch.autograd.grad(case.sides["fleetune"](leaves), [leaves[name] for name in case.wanted])
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def spills(kernel: str, architecture: str) -> bool:
    """Of the variants that are launched with this entry of the table; of an architecture not listed, as sm_80."""
    target = architecture if architecture in TARGETS else "sm_80"
    launch.TABLE[kernel][target] = launch.for_architecture(kernel, architecture)
    return any(compile_variant(variant, target).spilled for variant in variants(target) if variant.settings == kernel)


def sweep_case(kind: str, width: int) -> Case:
    return mmd_case(8192, width, torch.float32 if kind == "fp32" else torch.bfloat16, eager_runs=False)


def search(what: Search, case: Case, architecture: str, rounds: int) -> None:
    leaves = {name: t.requires_grad_(name in case.wanted) for name, t in case.inputs(torch.device("cuda")).items()}
    found: list[tuple[float, Launch]] = []
    for block, num_warps, num_stages in product(what.blocks, what.num_warps, what.num_stages):
        candidate = Launch(block, num_warps, num_stages)
        launch.TABLE[what.kernel][architecture] = candidate
        if spills(what.kernel, architecture):
            continue
        microseconds(case, leaves, 3)  # compiles
        found.append((microseconds(case, leaves, rounds), candidate))
        print(f"  {candidate}: {found[-1][0]:.0f} µs", flush=True)
    if not found:
        print(f"{what.kernel}: every candidate spills")
        return
    best, candidate = min(found, key=lambda pair: pair[0])
    print(f'{what.kernel}: "{architecture}": {candidate},  # {case.shape}: {best:.0f} µs')


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--only", default="", help="kernels whose name holds this")
    arguments.add_argument("--rounds", type=int, default=20)
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune.py needs the GPU that it finds settings for")
    for what in SEARCHES:
        if given.only in what.kernel:
            case = next(case for case in for_device("cuda") if case.op == what.op)
            search(what, case, launch.architecture(torch.device("cuda")), given.rounds)
    for kernel, kind, width in SWEEPS:
        if given.only in kernel and kernel in launch.TABLE:
            what = Search(kernel, "mmd", TILES, (4, 8))
            search(what, sweep_case(kind, width), launch.architecture(torch.device("cuda")), given.rounds)


if __name__ == "__main__":
    main()
