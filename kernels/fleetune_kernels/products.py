"""Matrix products, on a CPU by the faster of the two libraries that PyTorch brings.

`torch.mm` in fp32 is MKL's, which takes AVX2 on CPUs of AMD that have AVX-512; oneDNN takes AVX-512, and half the
time. It is reached by the operator that `torch.compile` makes of linear layers. Each rounds as the other does, in
another order.
"""

from __future__ import annotations

import functools

import torch

LEAST = 2**24  # multiplications, below which starting oneDNN costs more than it saves


def makes_its_own(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `product` has no use for `out`: oneDNN returns a tensor of its own."""
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _has_fast_onednn():
        return False
    return (
        len(a) > 1
        and len(a) * b.numel() >= LEAST
        and all(one.is_contiguous() or one.t().is_contiguous() for one in (a, b))
    )


def product(
    a: torch.Tensor,  # (M, K)
    b: torch.Tensor,  # (K, N)
    bias: torch.Tensor | None = None,  # (N,)
    out: torch.Tensor | None = None,  # (M, N), where it may be written
) -> torch.Tensor:  # (M, N)
    """a b + bias. Rows or columns must be without gaps for the faster library, whose copies of others are slow."""
    if makes_its_own(a, b):
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return found
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


@functools.cache
def _has_fast_onednn() -> bool:
    """The operator is private to PyTorch and may go."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return is_there and torch.backends.cpu.get_cpu_capability() == "AVX512"
