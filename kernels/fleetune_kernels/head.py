"""The walk over a language model's head in chunks of rows: logits, what a loss turns them into, and the GEMMs back.

For each chunk of rows: logits = x Wᵀ + b by one GEMM, into a buffer that all chunks share or, one after the other, into
their own; the loss turns them into their gradient in place; then dx = g W, dW += gᵀ x and db += sum g. dW and db are
accumulated in fp32 (fp64 for fp64). No N x V matrix is ever alive: memory is one chunk, dx in the input's dtype, and dW
in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fleetune_kernels.backends import full_precision
from fleetune_kernels.products import makes_its_own, product

# A chunk is large enough for the GEMMs to be efficient, and small enough for the memory: rows, then bytes.
CHUNK_ROWS = 4096
CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 2**29}


@dataclass(frozen=True)
class Wanted:
    """Which gradients to form."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class Gradients:
    """Of the sum of the losses; empty (0,) where not wanted."""

    hidden: torch.Tensor  # (N, D), in the dtype of the hidden states; 0 in the rows left out
    weight: torch.Tensor  # (V, D), fp32
    bias: torch.Tensor  # (V,), fp32


def chunk_rows(width: int, like: torch.Tensor) -> int:
    cap = CHUNK_BYTES.get(like.device.type, CHUNK_BYTES["cuda"])
    rows = min(CHUNK_ROWS, cap // (width * like.element_size()))
    return max(1, rows if rows < 128 else rows - rows % 128)  # whole tiles for the GEMMs


def walk(
    hidden: torch.Tensor,  # (N, D)
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
    rows: torch.Tensor | None,  # (R,): the rows that count; None: all
    vocab_size: int,  # rows of the weight that count
    wanted: Wanted,
    turn: Callable[[torch.Tensor, slice], None],
) -> Gradients:
    """Calls `turn(logits (r, vocab_size), at)` for each chunk `at` of the rows that count.

    Where any gradient is wanted, `turn` leaves the gradient in the place of the logits.
    """
    count = len(hidden) if rows is None else len(rows)
    gradients = _empty(hidden, weight, bias, wanted, complete=rows is None)
    weight = weight[:vocab_size]
    bias = None if bias is None else bias[:vocab_size]
    step = chunk_rows(vocab_size, hidden)
    shared: torch.Tensor | None = None
    with full_precision(hidden):
        for start in range(0, count, step):
            at = slice(start, min(start + step, count))
            x = hidden[at] if rows is None else hidden.index_select(0, rows[at])
            if shared is None and not makes_its_own(x, weight.T):
                shared = hidden.new_empty(len(x), vocab_size)  # the first chunk is the largest
            logits = product(x, weight.T, bias, out=None if shared is None else shared[: len(x)])
            turn(logits, at)
            if wanted.hidden and rows is None:
                into = gradients.hidden[at]
                if (found := product(logits, weight, out=into)) is not into:
                    into.copy_(found)
            elif wanted.hidden:
                gradients.hidden.index_copy_(0, rows[at], product(logits, weight))  # type: ignore[index]
            if wanted.weight:
                _add_product(gradients.weight[:vocab_size], logits.T, x)
            if wanted.bias:
                gradients.bias[:vocab_size].add_(logits.sum(0, dtype=gradients.bias.dtype))
            del logits  # before the next chunk has its own
    return gradients


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor in one pass, rounded once: a factor of no dimension would be rounded to the dtype first."""
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: Wanted, complete: bool
) -> Gradients:
    wide = accumulator(hidden.dtype)
    of_hidden = hidden.new_empty(0)
    if wanted.hidden:
        shape = hidden.shape
        of_hidden = hidden.new_empty(shape) if complete else hidden.new_zeros(shape)
    return Gradients(
        of_hidden,
        weight.new_zeros(weight.shape if wanted.weight else (0,), dtype=wide),
        weight.new_zeros(bias.shape if wanted.bias and bias is not None else (0,), dtype=wide),
    )


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, accumulated in the dtype of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)  # a CPU has no GEMM of two dtypes; the sum over the chunks is in fp32 at least
