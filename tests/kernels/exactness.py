"""How an error is judged: against an fp64 truth, no worse than eager PyTorch in the same dtype plus a tolerance."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Relative norms. An absolute bound would let a zeroed gradient pass: its entries are at most 1/N.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|, or |found| where the truth is zero; infinite where found is not finite."""
    found, truth = found.detach().to(truth.device, torch.float64), truth.detach().double()
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return float("inf")
    norm = truth.norm().item()
    return float((found - truth).norm().item() / (norm if norm > 0 else 1.0))


def assert_no_worse(
    found: Mapping[str, torch.Tensor | None],
    eager: Mapping[str, torch.Tensor | None],
    truth: Mapping[str, torch.Tensor | None],
    dtype: torch.dtype,
    cancelling: Mapping[str, float] | None = None,
) -> None:
    """Each of loss and gradients, by name: the kernel's error at most eager's plus the tolerance of the dtype, and plus
    what rounding comes to where it is the small difference of large terms."""
    assert found.keys() == eager.keys() == truth.keys()
    worse = []
    for name, exact in truth.items():
        ours, theirs = found[name], eager[name]
        if exact is None:
            assert ours is None, f"{name}: a gradient that nobody asked for"
            continue
        assert ours is not None, f"{name}: no gradient"
        assert theirs is not None
        error, allowed = relative_error(ours, exact), relative_error(theirs, exact) + TOLERANCE[dtype]
        allowed += (cancelling or {}).get(name, 0.0)
        assert allowed < float("inf"), f"{name}: eager's own is not finite: nothing to compare with"
        if not error <= allowed:
            worse.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    assert not worse, "; ".join(worse)
