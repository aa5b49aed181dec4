"""Ranks that hold unequal parts of the rows, against one process that holds them all.

As a program, so that it forks before any thread runs; each rank asserts, and the program fails where one does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing import start_processes

from fleetune_kernels import coral, jmmd, lmmd, mmd

SIZES = {
    1: [(11, 14)],
    2: [(7, 3), (4, 11)],
    4: [(3, 5), (0, 6), (7, 1), (1, 2)],
}  # source and target rows of each rank
Loss = Callable[..., torch.Tensor]


def losses(backend: str) -> dict[str, Loss]:
    """Each takes two layers of both sides, weights, labels and probabilities, and the group."""
    options: dict[str, Any] = {"backend": backend}
    return {
        "biased": lambda s, t, *_, **group: mmd(s, t, **options, **group),
        "unbiased": lambda s, t, s2, t2, w, *_, **group: mmd(
            s, t, estimator="unbiased", source_weights=w, bandwidth=9.0, **options, **group
        ),
        "linear": lambda s, t, *_, **group: mmd(s, t, estimator="linear", **options, **group),
        "jmmd": lambda s, t, s2, t2, *_, **group: jmmd([s, s2], [t, t2], estimator="unbiased", **options, **group),
        "lmmd": lambda s, t, s2, t2, w, labels, probs, **group: lmmd(s, t, labels, probs, **options, **group),
        "through": lambda s, t, *_, **group: mmd(s, t, detach_bandwidth=False, **options, **group),
        "jmmd through": lambda s, t, s2, t2, *_, **group: jmmd(
            [s, s2], [t, t2], detach_bandwidth=False, **options, **group
        ),
        "linear through": lambda s, t, *_, **group: mmd(
            s, t, estimator="linear", detach_bandwidth=False, **options, **group
        ),
        "coral": lambda s, t, *_, **group: coral(s, t, **options, **group),
    }


def everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """All rows; source and target alternate, as in the sizes."""
    generator = torch.Generator().manual_seed(0)
    n, m = SIZES[1][0]
    whole = [torch.randn(rows, width, generator=generator, dtype=dtype) for width in (6, 2) for rows in (n, m)]
    weights, labels = torch.rand(n, generator=generator, dtype=dtype), torch.arange(n) % 3
    return [*whole, weights, labels, torch.rand(m, 4, generator=generator, dtype=dtype)]


def work(rank: int, world_size: int, port: int) -> None:
    """What each rank does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    sizes = SIZES[world_size]
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32), ("reference", torch.float64)):
        for name, loss in losses(backend).items():
            if backend == "triton" and (world_size != 2 or name not in ("biased", "unbiased")):
                continue  # the interpreter takes its time
            check(f"{backend} {name} on {world_size}", loss, everything(dtype), rank, sizes)
    check_refusals(sizes)
    distributed.destroy_process_group()


def check(what: str, loss: Loss, whole: list[torch.Tensor], rank: int, sizes: list[tuple[int, int]]) -> None:
    starts = [sum(size[side] for size in sizes[:rank]) for side in (0, 1)]
    sides = [0, 1, 0, 1, 0, 0, 1]
    spans = [slice(starts[side], starts[side] + sizes[rank][side]) for side in sides]
    own = [one[span].clone() for one, span in zip(whole, spans, strict=True)]
    for tensors in (whole, own):
        for one in tensors[:4]:
            one.requires_grad_()
    expected, found = loss(*whole), loss(*own, group=distributed.group.WORLD, sizes=sizes)
    tolerance = {"rtol": 1e-10, "atol": 1e-14} if whole[0].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, msg=lambda text: f"{what}: loss: {text}", **tolerance)
    gradients = torch.autograd.grad(expected, whole[:4], allow_unused=True)
    for index, right in enumerate(torch.autograd.grad(found, own[:4], allow_unused=True)):
        complete = gradients[index]
        assert (right is None) == (complete is None), what
        if right is not None and complete is not None:
            text = f"{what}: gradient {index}"
            torch.testing.assert_close(
                right, complete[spans[index]], msg=lambda more, text=text: text + more, **tolerance
            )


def check_refusals(sizes: list[tuple[int, int]]) -> None:
    side = torch.zeros(2, 3)
    for wrong in (None, [*sizes, (2, 2)], [(2, 3)] * len(sizes)):
        with pytest.raises(ValueError, match="sizes: "):
            mmd(side, side, group=distributed.group.WORLD, sizes=wrong)


def main() -> None:
    torch.set_num_threads(1)  # threads do not live through a fork
    for backend in ("torch", "triton"):  # imports what is imported at first use, once for all ranks
        losses(backend)["biased"](*everything(torch.float32))
    for world_size in SIZES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start_processes(work, (world_size, port), nprocs=world_size, start_method="fork")


if __name__ == "__main__":
    main()
