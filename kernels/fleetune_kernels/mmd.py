"""Distances between two sets of features: maximum mean discrepancy, joint and by class, and CORAL.

MMD² = sum_ij a_i a_j k(x_i, x_j) over all rows of source (a = w, normalised to sum 1) and target (a = -w), with
k = sum_q exp(-|x - y|² / (2 sigma_q²)), sigma_q² = factor^(q - K // 2) · bandwidth, q = 0 .. K - 1.

Gradient: dL/dx_i = 4 a_i sum_j a_j k'(d²_ij) (x_i - x_j), formed in the forward pass, tile by tile (see `pairwise`);
the backward pass multiplies by the incoming scalar. Memory: the gradients (through the bandwidth twice, in the
backward pass) and some tiles, never a matrix of all pairs.
The bandwidth is by default the mean of |x_i - x_j|² over all i != j of both sides: closed form. It is a constant to the
gradient, as in the published code, or not (`detach_bandwidth=False`). As a constant it draws all features together,
which is for nothing: the bandwidth follows, the loss stays as it was, and its gradient grows as the features shrink,
until that of other losses is nothing beside it. Through the bandwidth the gradient is the other one without its part
along the centred features z, since the loss is the same for all multiples of them:
g_i - z_i (sum_j z_j · g_j) / sum_j |z_j|², of which the second part is formed in the backward pass.

On a GPU the matrix products of fp32 features are PyTorch's, and follow its setting of TF32
(`torch.backends.cuda.matmul`, off by default): a distance then comes of features with 10 bits. `mmd` of up to 128
features in Triton does not; its products are three of TF32 (ieee on AMD), whatever the setting.

Several ranks: `group` is a process group and `sizes` a list of (source rows, target rows), one entry a rank. The loss
is that of all ranks' rows, on every rank; each rank's features get their exact share of its gradient, without
communication in the backward pass. Where data parallelism averages gradients, multiply the loss by the world size.

Source: Gretton et al. 2012 (MMD), Long et al. 2015 and 2017 (several kernels, joint), Zhu et al. 2020 (by class), Sun
and Saenko 2016 (CORAL); the fused form was written here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fleetune_kernels import reference_mmd as reference
from fleetune_kernels.arguments import checked
from fleetune_kernels.backends import floating, one_of, readable, same_device
from fleetune_kernels.gathering import Sizes
from fleetune_kernels.two_sides import Bandwidth, TwoSides

ESTIMATORS = ("biased", "unbiased", "linear")


@checked
def mmd(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    num_kernels: int = 5,
    factor: float = 2.0,
    bandwidth: Bandwidth | None = None,
    detach_bandwidth: bool = True,
    estimator: str = "biased",
    source_weights: torch.Tensor | None = None,
    target_weights: torch.Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    sizes: Sizes | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """MMD² between two sets of features, a scalar in fp32 (fp64 stays fp64), with gradients for both.

    estimator: biased (V-statistic), unbiased (U-statistic, divided by 1 - sum w² on each side) or linear (disjoint
    consecutive pairs of the first min(n, m) rows of each side, less one where that is odd; O(n), no weights). Of sides
    that are unequal, linear compares no more of the longer one, whose rest counts in the bandwidth alone.

    Args:
        source: (n, D), floating-point.
        target: (m, D), in the same dtype.
        num_kernels: K, how many Gaussians the kernel sums.
        factor: between the variances of one Gaussian and the next; a finite number above 0.
        bandwidth: a finite number above 0, or a tensor of one; by default the mean of d² over the pairs.
        detach_bandwidth: whether that mean is a constant to the gradient.
        estimator: biased, unbiased or linear.
        source_weights: (n,), 0 or more, not all 0; normalised to sum 1.
        target_weights: (m,), likewise.
        group: the process group whose ranks' rows all count.
        sizes: (source rows, target rows) of each rank of the group.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or too few rows for the estimator. On a CPU
            also weights that are negative, or less than one (unbiased: two) above 0; on a GPU, where looking would
            wait for it, they give nan or a number without meaning.
    """
    problem = TwoSides({"source": source}, {"target": target}, num_kernels, factor, group, sizes, backend)
    problem.take_bandwidths({"bandwidth": bandwidth}, detach_bandwidth)
    return _joint(problem, estimator, source_weights, target_weights)


@checked
def jmmd(
    source_layers: Sequence[torch.Tensor],
    target_layers: Sequence[torch.Tensor],
    *,
    num_kernels: int = 5,
    factor: float = 2.0,
    bandwidth: Sequence[Bandwidth | None] | None = None,
    detach_bandwidth: bool = True,
    estimator: str = "biased",
    source_weights: torch.Tensor | None = None,
    target_weights: torch.Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    sizes: Sizes | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Joint MMD²: as `mmd`, with the product of the layers' kernels for kernel, each with its own bandwidth.

    The backend `triton` runs the plain PyTorch tiles for several layers.

    Args:
        source_layers: each (n, D_l), floating-point.
        target_layers: each (m, D_l), in the same order and dtype.
        num_kernels: K, how many Gaussians the kernel of each layer sums.
        factor: between the variances of one Gaussian and the next; a finite number above 0.
        bandwidth: one for each layer, as in `mmd`; None for one that takes its mean distance.
        detach_bandwidth: as in `mmd`.
        estimator: biased, unbiased or linear.
        source_weights: (n,), 0 or more, not all 0; normalised to sum 1.
        target_weights: (m,), likewise.
        group: the process group whose ranks' rows all count.
        sizes: (source rows, target rows) of each rank of the group.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: as `mmd`, or layers that differ in number or rows.
    """
    if not source_layers or len(source_layers) != len(target_layers):
        raise ValueError(
            f"target_layers: {len(target_layers)} layers, source_layers {len(source_layers)}; should be equal"
        )
    sources, targets = (
        {f"{name}[{index}]": layer for index, layer in enumerate(layers)}
        for name, layers in (("source_layers", source_layers), ("target_layers", target_layers))
    )
    problem = TwoSides(sources, targets, num_kernels, factor, group, sizes, backend)
    layers = len(source_layers)
    if bandwidth is not None and (isinstance(bandwidth, float | int) or len(bandwidth) != layers):
        raise ValueError(f"bandwidth: {bandwidth!r}; should be one for each of {layers} layers")
    given = {f"bandwidth[{i}]": one for i, one in enumerate([None] * layers if bandwidth is None else bandwidth)}
    problem.take_bandwidths(given, detach_bandwidth)
    return _joint(problem, estimator, source_weights, target_weights)


@checked
def lmmd(
    source: torch.Tensor,
    target: torch.Tensor,
    source_labels: torch.Tensor,
    target_probs: torch.Tensor,
    *,
    num_kernels: int = 5,
    factor: float = 2.0,
    bandwidth: Bandwidth | None = None,
    detach_bandwidth: bool = True,
    group: torch.distributed.ProcessGroup | None = None,
    sizes: Sizes | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Local MMD²: the mean of each class's own biased MMD², over the classes that are present on both sides.

    Row i weighs w_i^c = y_ic / sum_j y_jc in class c, with y the one-hot labels of the source, the (detached)
    probabilities of the target. A class absent on one side says nothing of a difference and is left out, as in the
    paper's code; with none left the loss is 0. Source rows with a label outside 0 .. C - 1 belong to no class.

    The backend `triton` runs the plain PyTorch tiles.

    Args:
        source: (n, D), floating-point.
        target: (m, D), in the same dtype.
        source_labels: (n,), integer classes.
        target_probs: (m, C), 0 or more: the probabilities of the classes.
        num_kernels: K, how many Gaussians the kernel sums.
        factor: between the variances of one Gaussian and the next; a finite number above 0.
        bandwidth: a finite number above 0, or a tensor of one; by default the mean of d² over the pairs.
        detach_bandwidth: as in `mmd`.
        group: the process group whose ranks' rows all count.
        sizes: (source rows, target rows) of each rank of the group.
        backend: auto, triton, torch or reference.

    Raises:
        ValueError: as `mmd`; on a CPU also negative probabilities.
    """
    problem = TwoSides({"source": source}, {"target": target}, num_kernels, factor, group, sizes, backend)
    problem.need_rows(1, "lmmd")
    problem.take_bandwidths({"bandwidth": bandwidth}, detach_bandwidth)
    if source_labels.shape != source.shape[:1] or source_labels.is_floating_point():
        raise ValueError(
            f"source_labels: {source_labels.dtype} of shape {tuple(source_labels.shape)}; "
            f"should be integers of shape ({len(source)},)"
        )
    if target_probs.ndim != 2 or len(target_probs) != len(target):
        raise ValueError(f"target_probs: shape {tuple(target_probs.shape)}; should be ({len(target)}, classes)")
    floating("target_probs", target_probs)
    same_device(source, "source", source_labels=source_labels, target_probs=target_probs)
    with problem.full_precision():
        labels, probs = problem.gather(source_labels, 0), problem.gather(target_probs, 1).to(problem.dtype)
        if readable(probs) and bool((probs < 0).any()):  # what is no number comes out as such
            raise ValueError("target_probs: should be numbers of 0 or more")
        if problem.chosen == "reference":
            options = problem.kernel_options(layer=0)
            source, target = problem.everyone(0)[0], problem.everyone(1)[0]
            return reference.lmmd(source, target, labels, probs, **options)
        return problem.over_pairs(_class_weights(labels, probs), unbiased=False, uniform=False)


@checked
def coral(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    group: torch.distributed.ProcessGroup | None = None,
    sizes: Sizes | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """|C_s - C_t|²_F / (4 D²) of the unbiased covariances, a scalar in fp32 (fp64 stays fp64).

    Memory: O(D²), and a copy of the rows. Ranks sum their shares of the covariances: features do not travel,
    but for the backend `reference`.

    Args:
        source: (n, D), floating-point.
        target: (m, D), in the same dtype.
        group: the process group whose ranks' rows all count.
        sizes: (source rows, target rows) of each rank of the group.
        backend: as in `mmd`; reference is the formula, and all others the same products of PyTorch.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or fewer than 2 rows on a side.
    """
    problem = TwoSides({"source": source}, {"target": target}, 1, 2.0, group, sizes, backend)
    problem.need_rows(2, "coral")
    with problem.full_precision():
        if problem.chosen == "reference":
            return reference.coral(problem.everyone(0)[0], problem.everyone(1)[0])
        difference = problem.covariance(0) - problem.covariance(1)
        return difference.square().sum() / (4 * source.shape[1] ** 2)


# ---------------------------------------------------------------- what the losses share


def _joint(
    problem: TwoSides, estimator: str, source_weights: torch.Tensor | None, target_weights: torch.Tensor | None
) -> torch.Tensor:
    one_of("estimator", estimator, ESTIMATORS)
    given = {"source_weights": source_weights, "target_weights": target_weights}
    for side, (name, weights) in enumerate(given.items()):
        rows = problem.own_rows[side]
        if weights is not None and weights.shape != (rows,):
            raise ValueError(f"{name}: shape {tuple(weights.shape)}; should be ({rows},)")
        if weights is not None and estimator == "linear":
            raise ValueError(f"{name}: given to the linear estimator; should be None, or take biased or unbiased")
    same_device(problem.sides[0][0], "source", **given)
    least = 1 if estimator == "biased" else 2
    problem.need_rows(least, f"the {estimator} estimator")
    with problem.full_precision():
        if problem.chosen == "reference":
            options = problem.kernel_options() | {"estimator": estimator}
            if estimator != "linear":
                options |= {
                    name: problem.weights(weights, side, least) for side, (name, weights) in enumerate(given.items())
                }
            return reference.jmmd(problem.everyone(0), problem.everyone(1), **options)
        if estimator == "linear":
            return problem.linear()
        signed = [
            problem.weights(source_weights, 0, least)[:, None],
            -problem.weights(target_weights, 1, least)[:, None],
        ]
        uniform = source_weights is None and target_weights is None
        return problem.over_pairs(signed, unbiased=estimator == "unbiased", uniform=uniform)


def _class_weights(labels: torch.Tensor, probs: torch.Tensor) -> list[torch.Tensor]:  # (n,), (m, C) -> (n, C), (m, C)
    """Signed, with the mean over classes in them: omega_ij = sum_c u_ic u_jc."""
    classes = torch.arange(probs.shape[1], device=labels.device)
    sides = [(labels[:, None] == classes).to(probs.dtype), probs.detach()]
    totals = [side.sum(0) for side in sides]
    present = ((totals[0] > 0) & (totals[1] > 0)).to(probs.dtype)
    share = present * present.sum().clamp(min=1).rsqrt()
    tiny = torch.finfo(probs.dtype).tiny
    source, target = (side * (share / of.clamp(min=tiny)) for side, of in zip(sides, totals, strict=True))
    return [source, -target]
