"""The kernel of `fleetune_kernels.mmd`, as blocks of its matrix, for what asks more of it than the distance.

k(x, y) = sum_q exp(-|x - y|² / (2 sigma_q²)), sigma_q² = 2^(q - 2) · bandwidth, q = 0 .. 4; the bandwidth is the mean
of |x_i - x_j|² over all i != j of the rows that the kernel is made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_KERNELS = 5


@dataclass(frozen=True)
class GaussianKernel:
    centre: torch.Tensor  # (D,): taken off, it changes no distance and keeps the digits
    scale: torch.Tensor  # scalar: 1 / (2 sigma²) of the widest

    @classmethod
    def of(cls, rows: torch.Tensor) -> GaussianKernel:  # (N, D)
        centre = rows.mean(0)
        squares = (rows - centre).square().sum()
        bandwidth = (2 * squares / (len(rows) - 1)).clamp(min=1e-12)  # of all pairs, in closed form
        return cls(centre, 1 / (2 * 2.0 ** (NUM_KERNELS // 2) * bandwidth))

    def __call__(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:  # (R, D), (C, D) -> (R, C)
        rows, columns = rows - self.centre, columns - self.centre
        exponents = torch.addmm(rows.square().sum(1)[:, None], rows, columns.t(), beta=-1, alpha=2)
        exponents.sub_(columns.square().sum(1)).clamp_(max=0)
        each = exponents.mul_(self.scale).exp_()  # the widest; every next is the square of the one before
        total = each.clone()
        for _ in range(NUM_KERNELS - 1):
            total += each.square_()
        return total
