"""Sums of Gaussian kernels over all pairs of rows, with their gradient formed in the forward pass, tile by tile.

With z the features after centring (which changes no distance), c = 1 / (2 sigma²) of the widest Gaussian,
e_ij = exp(-c d²_ij), the others its powers r_q, k = sum_q e^r_q and g = sum_q r_q e^r_q, the loss and its gradient are

    L = sum_ij omega_ij k_ij        dL/dz_i = 4 c sum_j omega_ij g_ij (z_j - z_i)

where omega_ij = sum_c u_ic u_jc with signed weights u (positive for source, negative for target). The unbiased
estimator multiplies pairs of one side by 1 / (1 - sum w²) and leaves the diagonal out. Several layers multiply:
k = prod_l k_l, and g_l takes the other layers' k. One matrix product gives a tile of exponents,

    [2c z_i, -c |z_i|², 1] · [z_j, 1, -c |z_j|²] = -c d²_ij

and two more the sums over j, and over i where rows and columns are the same and only half of the tiles is computed.

Memory beyond the results: the tiles, a few of tile x tile, whatever the number of rows. Source: written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fleetune_kernels.backends import once

CHUNK_BYTES = 16 * 2**20  # of features centred at a time
LEAST_DISTANCE = 1e-12  # the mean of the squared ones


@dataclass(frozen=True)
class Pairs:
    """What is summed: own rows against all columns. Features of source and target alternate: s_0, t_0, s_1, t_1, ..."""

    rows: Sequence[torch.Tensor]  # (n, D_l) and (m, D_l)
    columns: Sequence[torch.Tensor]  # the same tensors, or those of all ranks
    row_weights: Sequence[torch.Tensor]  # (n, C) and (m, C): positive for source, negative for target
    column_weights: Sequence[torch.Tensor]
    offsets: Sequence[int]  # where own rows stand among the columns, by side
    bandwidths: torch.Tensor  # (L,)
    means: Sequence[bool]  # (L,): the layer's own mean distance in place of its bandwidth
    wanted: Sequence[bool]  # a gradient, of each of the rows
    num_kernels: int
    factor: float
    unbiased: bool
    uniform: bool  # all weights of a side are equal

    @property
    def layers(self) -> int:
        return len(self.rows) // 2

    @property
    def symmetric(self) -> bool:
        return self.rows is self.columns

    @property
    def weighted_by_class(self) -> bool:
        return self.row_weights[0].shape[1] > 1

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.rows[0].dtype == torch.float64 else torch.float32

    @cached_property
    def ratios(self) -> list[float]:
        """Of the exponents, from the widest Gaussian to the narrowest."""
        return [max(self.factor, 1 / self.factor) ** q for q in range(self.num_kernels)]

    @cached_property
    def same_side(self) -> torch.Tensor:
        """(2,): the coefficient of pairs of two sources, and of two targets."""
        if not self.unbiased:
            return self.column_weights[0].new_ones(2)
        return torch.stack([1 / (1 - side.square().sum()) for side in self.column_weights])

    def uniform_weight(self, side: int, seen_from: int) -> float:
        """That of every row of a side, to rows of either, where nobody gave weights: known to the host."""
        rows = len(self.columns[side])
        same_side = 1 / (1 - 1 / rows) if self.unbiased and side == seen_from else 1.0
        return (-same_side if side else same_side) / rows

    @cached_property
    def centred(self) -> list[Centred]:
        """Of each layer."""
        return [self._centre(layer) for layer in range(self.layers)]

    def _centre(self, layer: int) -> Centred:
        centre, norms = centre_of(self.columns[2 * layer : 2 * layer + 2], self.dtype)
        bandwidth = mean_distance(norms) if self.means[layer] else self.bandwidths[layer].to(self.dtype)
        return Centred(centre, norms, 1 / (2 * widest(self.num_kernels, self.factor) * bandwidth))


@dataclass(frozen=True)
class Centred:
    """One layer's columns."""

    centre: torch.Tensor  # (D,)
    norms: list[torch.Tensor]  # |z|², of source and of target
    scale: torch.Tensor  # scalar: c


def centre_of(
    sides: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # (D,), [(n,), (m,)]
    """The mean of all rows of both sides, and each row's squared distance from it."""
    shift = sides[0][0].to(dtype)  # rows that are all equal are then exactly 0
    total = torch.zeros_like(shift)
    for side in sides:
        for span in _spans(side):
            total += (side[span] - shift).sum(0)
    centre = shift + total / sum(map(len, sides))
    norms = [centre.new_empty(len(side)) for side in sides]
    for side, out in zip(sides, norms, strict=True):
        for span in _spans(side):
            torch.sum((side[span] - centre).square_(), 1, out=out[span])
    return centre, norms


def mean_distance(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of |z_i - z_j|² over i != j, or LEAST_DISTANCE: of centred rows 2N sum |z|² / (N (N - 1))."""
    squares = torch.stack([side.sum(dtype=torch.float64) for side in norms]).sum()
    return (2 * squares / (sum(map(len, norms)) - 1)).clamp(min=LEAST_DISTANCE).to(norms[0].dtype)


def sum_along(side: torch.Tensor, centre: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """sum_i (x_i - centre) · g_i, in fp64."""
    found = [((side[span] - centre) * gradient[span]).sum(dtype=torch.float64) for span in _spans(side)]
    return torch.stack(found).sum() if found else centre.new_zeros((), dtype=torch.float64)


class Along(torch.autograd.Function):
    """0 of the rows (n, D), with the gradient share · (x_i - centre), which is formed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, side: torch.Tensor, centre: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(side, centre, share)
        return torch.zeros_like(share)

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        once("mmd")
        side, centre, share = ctx.saved_tensors
        factor, gradient = (scale * share).to(centre.dtype), torch.empty_like(side)
        for span in _spans(side):
            gradient[span] = (side[span] - centre) * factor
        return gradient, None, None


def widest(num_kernels: int, factor: float) -> float:
    """The largest sigma_q², of a bandwidth of 1."""
    return max(factor ** (q - num_kernels // 2) for q in range(num_kernels))


def _spans(side: torch.Tensor) -> list[slice]:
    """Of rows, few enough that a copy of them is small."""
    step = max(1, CHUNK_BYTES // (8 * max(1, side.shape[1])))
    return [slice(start, start + step) for start in range(0, len(side), step)]
