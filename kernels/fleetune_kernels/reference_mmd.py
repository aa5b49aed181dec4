"""MMD and its kin in plain PyTorch, over matrices of all pairs: the specification of `mmd.py`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch


def mmd(
    source: torch.Tensor,  # (n, D)
    target: torch.Tensor,  # (m, D)
    *,
    num_kernels: int = 5,
    factor: float = 2.0,
    bandwidth: float | torch.Tensor | None = None,
    detach_bandwidth: bool = True,
    estimator: str = "biased",
    source_weights: torch.Tensor | None = None,  # (n,)
    target_weights: torch.Tensor | None = None,  # (m,)
) -> torch.Tensor:
    """Multi-kernel MMD² as in `fleetune_kernels.mmd`, over matrices of all pairs, in fp32 (fp64 stays fp64)."""
    return jmmd(
        [source],
        [target],
        num_kernels=num_kernels,
        factor=factor,
        bandwidth=[bandwidth],
        detach_bandwidth=detach_bandwidth,
        estimator=estimator,
        source_weights=source_weights,
        target_weights=target_weights,
    )


def jmmd(
    source_layers: Sequence[torch.Tensor],  # each (n, D_l)
    target_layers: Sequence[torch.Tensor],  # each (m, D_l)
    *,
    num_kernels: int = 5,
    factor: float = 2.0,
    bandwidth: Sequence[float | torch.Tensor | None] | None = None,
    detach_bandwidth: bool = True,
    estimator: str = "biased",
    source_weights: torch.Tensor | None = None,  # (n,)
    target_weights: torch.Tensor | None = None,  # (m,)
) -> torch.Tensor:
    """Joint MMD²: the kernel is the product of the layers' kernels."""
    kernel = _joint_kernel(source_layers, target_layers, num_kernels, factor, bandwidth, detach_bandwidth)
    n, m = len(source_layers[0]), len(target_layers[0])
    same, other, cross = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    if estimator == "linear":
        even, odd = slice(0, min(n, m) // 2 * 2, 2), slice(1, min(n, m) // 2 * 2, 2)
        pairs = [same[even, odd], other[even, odd], -cross[even, odd], -cross[odd, even]]
        return torch.stack([part.diagonal() for part in pairs]).sum(0).mean()
    p, q = _normalised(source_weights, n, kernel), _normalised(target_weights, m, kernel)
    within_source, within_target = p @ same @ p, q @ other @ q
    if estimator == "unbiased":
        within_source = (within_source - p.square() @ same.diagonal()) / (1 - p @ p)
        within_target = (within_target - q.square() @ other.diagonal()) / (1 - q @ q)
    return within_source + within_target - 2 * (p @ cross @ q)


def lmmd(
    source: torch.Tensor,  # (n, D)
    target: torch.Tensor,  # (m, D)
    source_labels: torch.Tensor,  # (n,), integer classes
    target_probs: torch.Tensor,  # (m, C)
    *,
    num_kernels: int = 5,
    factor: float = 2.0,
    bandwidth: float | torch.Tensor | None = None,
    detach_bandwidth: bool = True,
) -> torch.Tensor:
    """Local MMD²: the mean of every class's own MMD², over the classes present on both sides."""
    kernel = _joint_kernel([source], [target], num_kernels, factor, [bandwidth], detach_bandwidth)
    target_probs = target_probs.detach().to(kernel.dtype)
    one_hot = (source_labels[:, None] == torch.arange(target_probs.shape[1], device=source.device)).to(kernel.dtype)
    present = [c for c in range(target_probs.shape[1]) if one_hot[:, c].sum() > 0 and target_probs[:, c].sum() > 0]
    total = 0 * kernel.sum()
    for c in present:
        signed = torch.cat([one_hot[:, c] / one_hot[:, c].sum(), -target_probs[:, c] / target_probs[:, c].sum()])
        total = total + signed @ kernel @ signed
    return total / max(len(present), 1)


def coral(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # (n, D), (m, D)
    """|C_s - C_t|²_F / (4 D²) with the unbiased covariances, in fp32 (fp64 stays fp64)."""
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    dimension = source.shape[1]
    covariances = [side.to(dtype).t().cov().reshape(dimension, dimension) for side in (source, target)]
    return (covariances[0] - covariances[1]).square().sum() / (4 * dimension**2)


def _joint_kernel(
    source_layers: Sequence[torch.Tensor],
    target_layers: Sequence[torch.Tensor],
    num_kernels: int,
    factor: float,
    bandwidths: Sequence[float | torch.Tensor | None] | None,
    detach_bandwidth: bool,
) -> torch.Tensor:
    """(N, N) over the rows of source, then target: the product over layers of sum_q exp(-d² / (2 sigma_q²))."""
    dtype = torch.float64 if source_layers[0].dtype == torch.float64 else torch.float32
    kernels: list[torch.Tensor] = []
    for layer, (source, target) in enumerate(zip(source_layers, target_layers, strict=True)):
        pooled = torch.cat([source, target]).to(dtype)
        pooled = pooled - pooled.detach().mean(0)  # distances stay, cancellation goes
        norms = pooled.square().sum(1)
        distances = (norms[:, None] + norms - 2 * pooled @ pooled.t()).clamp(min=0)
        bandwidth = None if bandwidths is None else bandwidths[layer]
        if bandwidth is None:
            squares = norms.detach() if detach_bandwidth else norms
            bandwidth = (2 * squares.sum() / (len(pooled) - 1)).clamp(min=1e-12)
        variances = [factor ** (q - num_kernels // 2) * bandwidth for q in range(num_kernels)]
        kernels.append(functools.reduce(operator.add, [torch.exp(distances / (-2 * v)) for v in variances]))
    return functools.reduce(operator.mul, kernels)


def _normalised(weights: torch.Tensor | None, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Detached, with sum 1."""
    weights = like.new_ones(rows) if weights is None else weights.detach().to(like.dtype)
    return weights / weights.sum()
