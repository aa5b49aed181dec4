"""The sums of `pairwise` for one layer on a GPU: the gradient's row sums formed as in flash attention.

Up to 256 features (128 in fp32) one kernel does all: a program keeps a block of rows, walks over the columns, and
holds the sums in registers. More would not fit: row chunks by cuBLAS, whose products one kernel turns into slopes.
Nothing is halved by symmetry, since programs would have to add to each other's rows.

fp32 features are centred first and multiplied as three TF32 products (ieee on AMD); bf16 and fp16 features are
multiplied as they are, and summed in fp32. A slope is rounded to their type once, and its row sum is taken of the
rounded, so that sum_j g_ij (x_j - x_i) cancels as it should.

Memory: a copy of the features, source and target together; beyond 256 features also the products of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fleetune_kernels.launch import on, settings
from fleetune_kernels.pairwise import Pairs

WIDEST_SWEEP = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # three TF32 products take more registers
CHUNK_BYTES = 64 * 2**20  # of products
SPLITS = 8  # programs that share a row of a chunk
LOG2_E = 1.4426950408889634


@triton.jit
def _gaussians(exponents, FACTOR: tl.constexpr, NUM_KERNELS: tl.constexpr):
    """sum_q e_q, and sum_q r_q e_q / r_last, of e_q = 2^(r_q t)."""
    power = tl.exp2(exponents)
    kernel = power
    slope = power * (FACTOR ** (1 - NUM_KERNELS))
    for q in tl.static_range(1, NUM_KERNELS):
        power = power * power if FACTOR == 2.0 else tl.exp2(exponents * (FACTOR**q))
        kernel += power
        slope += power * (FACTOR ** (q + 1 - NUM_KERNELS))
    return kernel, slope


@triton.jit
def _exponents(products, row_norms, column_norms, scale, columns, diagonal):
    """-c d² in powers of 2, never positive, and exactly 0 between a row and itself.

    Not by tl.minimum, which on a GPU takes the 0 of a nan and a 0: a nan must stay one, and end a training run.
    """
    exponents = scale * (2.0 * products - row_norms[:, None] - column_norms[None, :])
    is_zero = (columns[None, :] == diagonal[:, None]) | (exponents > 0.0)
    return tl.where(is_zero, 0.0, exponents)


@triton.jit
def _column(columns, count, split, side, norms, weights, same, UNBIASED: tl.constexpr):
    """Norms, and weights as the rows of a side see them; 0 beyond the last column."""
    inside = columns < count
    norm = tl.load(norms + columns, mask=inside, other=0.0)
    weight = tl.load(weights + columns, mask=inside, other=0.0)
    if UNBIASED:
        weight = tl.where((columns >= split) == (side == 1), weight * tl.load(same + side), weight)
    return norm, weight


@triton.jit
def sweep_kernel(
    rows,  # (n + m, D), own
    columns,  # (N, D)
    row_norms,  # (n + m,)
    column_norms,  # (N,)
    weights,  # (N,), divided by the largest
    same,  # (2,): the coefficient of pairs of one side
    row_scales,  # (n + m,): what a row's gradient is multiplied by
    scale,  # scalar: c / ln 2
    source_gradient,  # (n, D), result
    target_gradient,  # (m, D), result
    kernel_sums,  # (n + m,), result
    source_rows,
    target_rows,
    column_count,
    column_split,  # columns of the source
    source_offset,
    target_offset,
    dimension,
    FACTOR: tl.constexpr,
    NUM_KERNELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    WANT_SOURCE: tl.constexpr,
    WANT_TARGET: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter multiplies no bf16
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    source_blocks = tl.cdiv(source_rows, BLOCK_M)
    side = (tl.program_id(0) >= source_blocks).to(tl.int32)
    local = (tl.program_id(0) - side * source_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = local < tl.where(side == 1, target_rows, source_rows)
    row = side * source_rows + local
    diagonal = local + tl.where(side == 1, column_split + target_offset, source_offset)
    d = tl.arange(0, BLOCK_D)
    row_mask = inside[:, None] & (d[None, :] < dimension)
    x = tl.load(rows + row.to(tl.int64)[:, None] * dimension + d[None, :], mask=row_mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    norm = tl.load(row_norms + row, mask=inside, other=0.0)
    factor = tl.load(scale)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sums = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, column_count, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        column_mask = (column < column_count)[:, None] & (d[None, :] < dimension)
        y = tl.load(columns + column.to(tl.int64)[:, None] * dimension + d[None, :], mask=column_mask, other=0.0)
        if UPCAST:
            y = y.to(tl.float32)
        column_norm, weight = _column(column, column_count, column_split, side, column_norms, weights, same, UNBIASED)
        products = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        exponents = _exponents(products, norm, column_norm, factor, column, diagonal)
        kernel, slope = _gaussians(exponents, FACTOR, NUM_KERNELS)
        total += tl.sum(kernel * weight[None, :], 1)
        if WANT_SOURCE or WANT_TARGET:
            slope = tl.where(column[None, :] == diagonal[:, None], 0.0, slope * weight[None, :]).to(y.dtype)
            row_sums += tl.sum(slope.to(tl.float32), 1)
            sums = tl.dot(slope, y, sums, input_precision=PRECISION)
    tl.store(kernel_sums + row, total, mask=inside)
    if WANT_SOURCE or WANT_TARGET:
        gradient = (sums - x.to(tl.float32) * row_sums[:, None]) * tl.load(row_scales + row, mask=inside)[:, None]
        place = local.to(tl.int64)[:, None] * dimension + d[None, :]
        if WANT_SOURCE:
            tl.store(source_gradient + place, gradient, mask=row_mask & (side == 0))
        if WANT_TARGET:
            tl.store(target_gradient + place, gradient, mask=row_mask & (side == 1))


@triton.jit
def slopes_kernel(
    products,  # (B, N), fp32: rows of one side against all columns
    slopes,  # (B, N), result; the products themselves for fp32
    row_norms,  # (B,)
    column_norms,  # (N,)
    weights,  # (N,), divided by the largest
    same,  # (2,)
    scale,  # scalar: c / ln 2
    kernel_sums,  # (B, splits), result
    row_sums,  # (B, splits), result
    row_count,
    column_count,
    column_split,
    side,
    diagonal_offset,  # the column that is the first row itself
    width,  # columns of a program
    FACTOR: tl.constexpr,
    NUM_KERNELS: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < row_count
    norm = tl.load(row_norms + row, mask=inside, other=0.0)
    diagonal = row + diagonal_offset
    factor = tl.load(scale)
    total = tl.zeros((BLOCK_M,), tl.float32)
    slope_total = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.program_id(1) * width
    for start in range(first, tl.minimum(first + width, column_count), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (column < column_count)[None, :]
        place = row.to(tl.int64)[:, None] * column_count + column[None, :]
        column_norm, weight = _column(column, column_count, column_split, side, column_norms, weights, same, UNBIASED)
        product = tl.load(products + place, mask=mask, other=0.0)
        exponents = _exponents(product, norm, column_norm, factor, column, diagonal)
        kernel, slope = _gaussians(exponents, FACTOR, NUM_KERNELS)
        total += tl.sum(kernel * weight[None, :], 1)
        slope = tl.where(column[None, :] == diagonal[:, None], 0.0, slope * weight[None, :])
        slope = slope.to(slopes.dtype.element_ty)
        slope_total += tl.sum(slope.to(tl.float32), 1)
        tl.store(slopes + place, slope, mask=mask)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(kernel_sums + place, total, mask=inside)
    tl.store(row_sums + place, slope_total, mask=inside)


# ---------------------------------------------------------------- what launches them


@dataclass(frozen=True)
class _Inputs:
    rows: torch.Tensor  # (n + m, D), own
    columns: torch.Tensor  # (N, D)
    row_norms: torch.Tensor  # (n + m,)
    column_norms: torch.Tensor  # (N,)
    weights: torch.Tensor  # (N,), divided by the largest
    row_scales: torch.Tensor  # (n + m,)
    scale: torch.Tensor  # scalar
    gradients: list[torch.Tensor]


def sweep(pairs: Pairs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `tiles.sweep`, for one layer with one weight a row."""
    columns, column_norms = _features(pairs, pairs.columns)
    rows, row_norms = (columns, column_norms) if pairs.symmetric else _features(pairs, pairs.rows)
    row_weights, weights = (torch.cat([w[:, 0] for w in side]) for side in (pairs.row_weights, pairs.column_weights))
    largest = weights.abs().max()  # slopes of fp16 must not underflow
    scale = pairs.centred[0].scale
    gradients = [
        one.new_empty(one.shape if wanted else (0, 0), dtype=torch.float32)
        for one, wanted in zip(pairs.rows, pairs.wanted, strict=True)
    ]
    row_scales = 4 * pairs.ratios[-1] * scale * largest * row_weights
    inputs = _Inputs(rows, columns, row_norms, column_norms, weights / largest, row_scales, scale * LOG2_E, gradients)
    kernel_sums = (_by_sweep if rows.shape[1] <= WIDEST_SWEEP[rows.dtype] else _by_chunks)(pairs, inputs)
    return largest * torch.dot(row_weights.double(), kernel_sums.double()), gradients


def _features(pairs: Pairs, sides: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' rows together, centred where that rounds nothing, and their squared norms in fp32."""
    centre = pairs.centred[0].centre
    pooled = torch.cat([side - centre for side in sides] if sides[0].dtype == torch.float32 else list(sides))
    return pooled, torch.linalg.vector_norm(pooled, dim=1, dtype=torch.float32).square()


def _options(pairs: Pairs) -> dict[str, Any]:
    ratio = max(pairs.factor, 1 / pairs.factor)
    return {"FACTOR": ratio, "NUM_KERNELS": pairs.num_kernels, "UNBIASED": pairs.unbiased}


def sweep_name(dimension: int, dtype: torch.dtype) -> tuple[str, int]:
    """The kernel's entry in `launch.TABLE`, and the block that the features fill."""
    block = max(16, triton.next_power_of_2(dimension))
    kind = "fp32" if dtype == torch.float32 else "half"
    return f"mmd_sweep_{kind}_{max(64, block)}", block


def _by_sweep(pairs: Pairs, inputs: _Inputs) -> torch.Tensor:
    """Fills the gradients; gives sum_j omega_ij k_ij / a_i of each row, over the largest weight."""
    dimension, counts = inputs.rows.shape[1], [len(side) for side in pairs.rows]
    name, block_d = sweep_name(dimension, inputs.rows.dtype)
    launch = settings(name, inputs.rows.device)
    kernel_sums = torch.empty_like(inputs.row_norms)
    with on(inputs.rows):
        sweep_kernel[(sum(triton.cdiv(count, launch.block[0]) for count in counts),)](
            inputs.rows,
            inputs.columns,
            inputs.row_norms,
            inputs.column_norms,
            inputs.weights,
            pairs.same_side,
            inputs.row_scales,
            inputs.scale,
            *inputs.gradients,
            kernel_sums,
            *counts,
            len(inputs.columns),
            len(pairs.columns[0]),
            *pairs.offsets,
            dimension,
            **_options(pairs),
            WANT_SOURCE=pairs.wanted[0],
            WANT_TARGET=pairs.wanted[1],
            UPCAST=not inputs.rows.is_cuda,
            PRECISION="ieee" if torch.version.hip else "tf32x3",
            BLOCK_M=launch.block[0],
            BLOCK_N=launch.block[1],
            BLOCK_D=block_d,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return kernel_sums


def _by_chunks(pairs: Pairs, inputs: _Inputs) -> torch.Tensor:
    """The same, by row chunks whose products take CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (4 * len(inputs.columns)))
    step = step // 16 * 16 or step
    kernel_sums, first = torch.empty_like(inputs.row_norms), 0
    for side, (count, gradient) in enumerate(zip(map(len, pairs.rows), inputs.gradients, strict=True)):
        for start in range(0, count, step):
            span = slice(first + start, first + min(start + step, count))
            products = _matmul(inputs.rows[span], inputs.columns.t())
            slopes = (
                products if inputs.rows.dtype == torch.float32 else torch.empty_like(products, dtype=inputs.rows.dtype)
            )
            column = start + pairs.offsets[side] + side * len(pairs.columns[0])
            kernel_sums[span], row_sums = _slopes(pairs, inputs, products, slopes, span, side, column)
            if gradient.numel():
                out = gradient[start : start + len(products)]
                out.copy_(_matmul(slopes, inputs.columns))
                out.addcmul_(inputs.rows[span], row_sums[:, None], value=-1)
                out.mul_(inputs.row_scales[span, None])
        first += count
    return kernel_sums


def _slopes(
    pairs: Pairs,
    inputs: _Inputs,
    products: torch.Tensor,
    slopes: torch.Tensor,
    span: slice,
    side: int,
    column: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills the slopes of a chunk; gives the weighted sums over columns of its kernels and of its slopes."""
    launch = settings("mmd_slopes", products.device)
    block_m, block_n = launch.block
    rows, columns = products.shape
    splits = min(SPLITS, triton.cdiv(columns, block_n))
    width = triton.cdiv(triton.cdiv(columns, splits), block_n) * block_n
    sums = products.new_zeros(2, rows, splits)
    with on(products):
        slopes_kernel[(triton.cdiv(rows, block_m), splits)](
            products,
            slopes,
            inputs.row_norms[span],
            inputs.column_norms,
            inputs.weights,
            pairs.same_side,
            inputs.scale,
            *sums,
            rows,
            columns,
            len(pairs.columns[0]),
            side,
            column,
            width,
            **_options(pairs),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return sums[0].sum(1), sums[1].sum(1)


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In fp32, whatever is multiplied."""
    if left.dtype == torch.float32:
        return torch.mm(left, right)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())
