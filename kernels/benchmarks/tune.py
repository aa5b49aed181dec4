"""Finds the launch settings of `fleetune_kernels/launch.py` on the GPU it runs on, and prints their lines.

    python kernels/benchmarks/tune.py [--only cross_entropy] [--rounds 20]

For each kernel every candidate is put into the table in turn and the op is timed on its case of `run.py --device cuda`;
settings that spill are left out. Nothing is tuned while training runs: the lines go into the table by hand.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from itertools import product

import torch
from cases import Case, Inputs, for_device
from compiled import compile_variant, variants

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


SEARCHES = (Search("cross_entropy", "cross_entropy", ((2048,), (4096,), (8192,), (16384,), (32768,))),)


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
    """Of the variants that are launched with this entry of the table."""
    return any(
        compile_variant(variant, architecture).spilled
        for variant in variants(architecture)
        if variant.name.split()[0] == kernel
    )


def search(what: Search, architecture: str, rounds: int) -> None:
    case = next(case for case in for_device("cuda") if case.op == what.op)
    leaves = {name: t.requires_grad_(name in case.wanted) for name, t in case.inputs(torch.device("cuda")).items()}
    before = launch.for_architecture(what.kernel, architecture)
    found: list[tuple[float, Launch]] = []
    for block, num_warps, num_stages in product(what.blocks, what.num_warps, what.num_stages):
        candidate = Launch(block, num_warps, num_stages)
        launch.TABLE[what.kernel][architecture] = candidate
        if spills(what.kernel, architecture):
            continue
        microseconds(case, leaves, 3)  # compiles
        found.append((microseconds(case, leaves, rounds), candidate))
        print(f"  {candidate}: {found[-1][0]:.0f} µs", flush=True)
    launch.TABLE[what.kernel][architecture] = before
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
            search(what, launch.architecture(torch.device("cuda")), given.rounds)


if __name__ == "__main__":
    main()
