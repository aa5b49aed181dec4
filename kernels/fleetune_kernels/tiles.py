"""The sums of `pairwise` in plain PyTorch, one tile of pairs after the other; no matrix of all pairs ever lives.

Every pass over a tile counts, so each works in place on tiles that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fleetune_kernels.pairwise import Pairs
from fleetune_kernels.products import product

TILE = 1024  # rows and columns of a tile: the two of one layer take 8 MB in fp32, which a CPU's last cache holds
GPU_TILE = 4096


@dataclass(frozen=True)
class Block:
    """Some rows of one side, of every layer."""

    side: int
    start: int
    stop: int
    features: list[torch.Tensor]  # by layer (B, at least D_l + 2): [z, 1, -c |z|², 0, ...]

    @property
    def span(self) -> slice:
        return slice(self.start, self.stop)


def sweep(pairs: Pairs, tile: int | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of the own rows, a scalar in fp64, and the gradients of those that want one (empty for the others)."""
    work = _Sweep(pairs, tile or (GPU_TILE if pairs.rows[0].is_cuda else TILE))
    for side in (0, 1):
        for start in range(0, len(pairs.rows[side]), work.tile):
            rows = work.block(work.own, side, start, len(pairs.rows[side]), pairs.offsets[side])
            work.turn_left(rows)
            for columns in work.columns(rows):
                work.add_tile(rows, columns)
            work.finish(rows)
    return work.loss, work.gradients


class _Sweep:
    """The buffers, and the sums so far."""

    def __init__(self, pairs: Pairs, tile: int) -> None:
        self.pairs = pairs
        self.tile = tile = min(tile, max(map(len, pairs.columns)))
        like, area = pairs.centred[0].centre, tile**2
        widths = [centred.centre.numel() for centred in pairs.centred]
        self.left, self.own, self.right = ([_padded(like, tile, width + 2) for width in widths] for _ in range(3))
        self.weighted = like.new_empty(max(buffer.numel() for buffer in self.own))
        self.products, self.power = like.new_empty(area), like.new_empty(0 if pairs.factor == 2 else area)
        self.slopes = [like.new_empty(area) for _ in widths]
        several = pairs.weighted_by_class or len(widths) > 1
        self.kernels = [like.new_empty(area) for _ in widths] if several else []  # their sum is enough for one layer
        self.ones = like.new_ones(tile)
        self.loss = torch.zeros((), dtype=torch.float64, device=like.device)
        # Of each of the rows, sum_j omega_ij g_ij z_j, which becomes the gradient, and sum_j omega_ij g_ij.
        self.gradients = [
            like.new_zeros(rows.shape if wanted else (0, 0))
            for rows, wanted in zip(pairs.rows, pairs.wanted, strict=True)
        ]
        self.row_sums = [like.new_zeros(len(gradient)) for gradient in self.gradients]

    def block(self, buffers: list[torch.Tensor], side: int, start: int, rows: int, offset: int = 0) -> Block:
        """Rows of own features where buffers are `own`, else of the columns; `offset` is where those start."""
        features = self.pairs.rows if buffers is self.own else self.pairs.columns
        stop = min(start + self.tile, rows)
        filled = [buffer[: stop - start] for buffer in buffers]
        for layer, (out, centred) in enumerate(zip(filled, self.pairs.centred, strict=True)):
            width = len(centred.centre)
            torch.sub(features[2 * layer + side][start:stop], centred.centre, out=out[:, :width])
            out[:, width] = 1.0
            torch.mul(centred.norms[side][offset + start : offset + stop], -centred.scale, out=out[:, width + 1])
        return Block(side, start, stop, filled)

    def turn_left(self, rows: Block) -> None:
        """[2c z, -c |z|², 1] of the rows."""
        for left, features, centred in zip(self.left, rows.features, self.pairs.centred, strict=True):
            left, width = left[: len(features)], len(centred.centre)
            torch.mul(features[:, :width], 2 * centred.scale, out=left[:, :width])
            left[:, width], left[:, width + 1] = features[:, width + 1], 1.0

    def columns(self, rows: Block) -> Iterator[Block]:
        """All columns; by symmetry those from the rows on."""
        symmetric = self.pairs.symmetric
        for side in range(rows.side if symmetric else 0, 2):
            count, own_side = len(self.pairs.columns[side]), symmetric and side == rows.side
            for start in range(rows.start if own_side else 0, count, self.tile):
                yield rows if own_side and start == rows.start else self.block(self.right, side, start, count)

    def add_tile(self, rows: Block, columns: Block) -> None:
        """What the tile's pairs give: to the loss, to the rows' sums and, by symmetry, to the columns'."""
        twice = self.pairs.symmetric and rows is not columns
        kernel_sums, slopes = self.evaluate(rows, columns)
        part = torch.dot(self.weights(rows, None).double(), kernel_sums.double())
        self.loss += 2 * part if twice else part
        for layer, slope in enumerate(slopes):
            self.add_slope(layer, slope, rows, columns)
            if twice:
                self.add_slope(layer, slope.t(), columns, rows)

    def evaluate(self, rows: Block, columns: Block) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """sum_j omega_ij k_ij / a_i of a tile's rows, and each layer's tile of g, with omega where classes weigh."""
        shape, weights = (len(rows.features[0]), len(columns.features[0])), self.weights(columns, rows.side)
        slopes, kernels = ([_tile(buffer, shape) for buffer in buffers] for buffers in (self.slopes, self.kernels))
        for layer, slope in enumerate(slopes):
            exponents = self.exponents(layer, rows, columns)
            power = exponents if self.pairs.factor == 2 else _tile(self.power, shape)
            if kernels:
                _gaussians_and_sum(exponents, power, slope, kernels[layer], self.pairs.ratios)
            else:
                sums = _gaussians(exponents, power, slope, weights, self.pairs.ratios)
            _zero_diagonal(slope, rows, columns, self.pairs)  # no slope from a row to itself
        if not kernels:
            return sums, slopes
        for layer, slope in enumerate(slopes):
            for other in (*kernels[:layer], *kernels[layer + 1 :]):
                slope.mul_(other)
        for kernel in kernels[1:]:
            kernels[0].mul_(kernel)
        if self.pairs.weighted_by_class:
            omega = _tile(self.products, shape)
            torch.mm(
                self.pairs.row_weights[rows.side][rows.span],
                self.pairs.column_weights[columns.side][columns.span].t(),
                out=omega,
            )
            for tile in (kernels[0], *slopes):
                tile.mul_(omega)
        return torch.mv(kernels[0], weights), slopes

    def exponents(self, layer: int, rows: Block, columns: Block) -> torch.Tensor:
        """A tile of -c d², never positive, and exactly 0 between a row and itself."""
        left, right = self.left[layer][: len(rows.features[layer])], columns.features[layer]
        tile = _tile(self.products, (len(left), len(right)))
        tile = product(left, right.t(), out=tile).clamp_(max=0)
        _zero_diagonal(tile, rows, columns, self.pairs)
        return tile

    def add_slope(self, layer: int, slope: torch.Tensor, to: Block, of: Block) -> None:
        """Adds sum_j omega_ij g_ij [z_j, 1] over the rows j of one block to the rows i of the other."""
        index = 2 * layer + to.side
        if not self.pairs.wanted[index]:
            return
        features, alpha = of.features[layer], 1.0
        if self.pairs.uniform:  # no pass over the features
            alpha = self.pairs.uniform_weight(of.side, to.side)
        elif not self.pairs.weighted_by_class:
            weights = self.weights(of, to.side)
            features = torch.mul(features, weights[:, None], out=_tile(self.weighted, features.shape))
        found, width = product(slope, features), self.gradients[index].shape[1]
        self.gradients[index][to.span].add_(found[:, :width], alpha=alpha)
        self.row_sums[index][to.span].add_(found[:, width], alpha=alpha)

    def weights(self, of: Block, seen_from: int | None) -> torch.Tensor:
        """(B,): a_j as the rows of a side weight it, a_i itself for None; 1 where the tile has its weights already."""
        if self.pairs.weighted_by_class:
            return self.ones[: len(of.features[0])]
        if seen_from is None:
            return self.pairs.row_weights[of.side][of.span, 0]
        weights = self.pairs.column_weights[of.side][of.span, 0]
        return weights * self.pairs.same_side[of.side] if self.pairs.unbiased and seen_from == of.side else weights

    def finish(self, rows: Block) -> None:
        """The gradient of rows whose sums are complete: 4 c a_i (sum_j omega_ij g_ij z_j - z_i sum_j omega_ij g_ij)."""
        for layer, centred in enumerate(self.pairs.centred):
            index = 2 * layer + rows.side
            if self.pairs.wanted[index]:
                gradient, row_sums = self.gradients[index][rows.span], self.row_sums[index][rows.span]
                gradient.addcmul_(rows.features[layer][:, : gradient.shape[1]], row_sums[:, None], value=-1)
                gradient.mul_((4 * centred.scale * self.weights(rows, None))[:, None])


def _gaussians(
    exponents: torch.Tensor,  # (B, B), t
    power: torch.Tensor,  # (B, B), for one e_q; the exponents themselves where it is the square of the one before
    slope: torch.Tensor,  # (B, B), result
    weights: torch.Tensor,  # (B,)
    ratios: Sequence[float],
) -> torch.Tensor:  # (B,)
    """slope = sum_q r_q e_q, of e_q = exp(r_q t), and sum_q e_q weighted and summed over the columns.

    That sum needs no tile: with R = r_last it is slope / R + sum_q (1 - r_q / R) e_q, whose last term is 0.
    """
    term = torch.exp(exponents, out=slope)
    sums = slope.new_zeros(len(slope))
    for before, ratio in pairwise(ratios):
        sums.addmv_(term, weights, alpha=1 - before / ratios[-1])
        if power is exponents and ratio == ratios[-1]:
            slope.addcmul_(term, term, value=ratio)
        else:
            term = _next(term, exponents, power, ratio)
            slope.add_(term, alpha=ratio)
    return sums.addmv_(slope, weights, alpha=1 / ratios[-1])


def _gaussians_and_sum(
    exponents: torch.Tensor, power: torch.Tensor, slope: torch.Tensor, kernel: torch.Tensor, ratios: Sequence[float]
) -> None:
    """The same, where the sum is needed for each pair: kernel = sum_q e_q."""
    term = torch.exp(exponents, out=kernel)
    slope.copy_(kernel)
    for ratio in ratios[1:]:
        term = _next(term, exponents, power, ratio)
        slope.add_(term, alpha=ratio)
        kernel.add_(term)


def _next(term: torch.Tensor, exponents: torch.Tensor, power: torch.Tensor, ratio: float) -> torch.Tensor:
    if power is exponents:  # a factor of 2 apart: one exponential serves all
        return torch.mul(term, term, out=power)
    return torch.mul(exponents, ratio, out=power).exp_()


def _zero_diagonal(tile: torch.Tensor, rows: Block, columns: Block, pairs: Pairs) -> None:
    """Where a row meets itself, if it does in this tile."""
    offset = pairs.offsets[rows.side] + rows.start - columns.start
    if rows.side == columns.side and -tile.shape[0] < offset < tile.shape[1]:
        tile.diagonal(offset).zero_()


def _padded(like: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Zeros behind the width, so that rows are whole cache lines without gaps, as matrix products want them."""
    return like.new_zeros(rows, math.ceil(width / 16) * 16)


def _tile(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer[: math.prod(shape)].view(shape)
