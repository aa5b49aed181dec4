"""How a stored teacher's tokens are written: a few classes of each, and their log-probabilities.

Classes ascend, so that their differences are small numbers, and these are Rice codes: each is cut into `low` bits as
they are, and the rest in unary (that many zeros and a one). Of k among V classes a difference is V / k on average, and
takes about log2(V / k) + 1.6 bits. Log-probabilities are fixed-point numbers of 14 bits in steps of 1/512, at least
-32: nearer than float16 is below -4. With k = 128 of 128,256 classes a token takes at most 420 bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

STEP, DEPTH = 512, 14  # of log-probabilities: 1 / STEP, and bits
MOST = 2**DEPTH - 1


def encode_ids(ids: Ints) -> bytes:
    """(N, k), in each row none below the one before. The first byte says how many low bits there are."""
    gaps = np.diff(ids, axis=1, prepend=0)
    assert gaps.min(initial=0) >= 0
    low = max(0, int(np.log2(max(1.0, float(gaps.mean()) * np.log(2))))) if gaps.size else 0
    rest = (gaps >> low).ravel()
    ends = np.cumsum(rest + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=np.uint8)
    unary[ends] = 1
    return bytes([low]) + _packed(gaps.ravel(), low).tobytes() + np.packbits(unary).tobytes()


def decode_ids(code: bytes, count: int, k: int) -> Ints:
    """(count, k)"""
    low, size = code[0], count * k
    parts = np.frombuffer(code, dtype=np.uint8, offset=1)
    whole = -(-size * low // 8)
    gaps = _unpacked(parts[:whole], size, low)
    ends = np.flatnonzero(np.unpackbits(parts[whole:]))[:size]
    gaps += np.diff(ends, prepend=-1) - 1 << low
    return np.cumsum(gaps.reshape(count, k), axis=1)


def encode_log_probs(log_probs: Floats) -> bytes:
    """Any shape; an empty place is -inf, and stands as the lowest number."""
    steps = np.rint(np.clip(-log_probs, 0.0, MOST / STEP) * STEP)
    steps = np.where(np.isneginf(log_probs), MOST, np.minimum(steps, MOST - 1))
    return _packed(steps.astype(np.int64).ravel()).tobytes()


def decode_log_probs(code: bytes, count: int, k: int) -> Floats:
    """(count, k)"""
    steps = _unpacked(np.frombuffer(code, dtype=np.uint8), count * k)
    found = np.where(steps == MOST, -np.inf, -steps / STEP)
    return found.astype(np.float32).reshape(count, k)


def _packed(values: Ints, depth: int = DEPTH) -> Bits:
    """The lowest bits of each, end to end, the highest of them first."""
    shifts = np.arange(depth - 1, -1, -1)
    return np.packbits(((values[:, None] >> shifts) & 1).astype(np.uint8))


def _unpacked(packed: Bits, size: int, depth: int = DEPTH) -> Ints:
    bits = np.unpackbits(packed, count=size * depth).reshape(size, depth)
    return bits.astype(np.int64) @ (1 << np.arange(depth - 1, -1, -1))
