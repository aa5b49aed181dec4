"""What MMD and its kin refuse, and how they say so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fleetune_kernels import coral, jmmd, lmmd, mmd

S, T = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(S[0], T), r"source: shape \(3,\); should be \(rows, features\)"),
        (lambda: mmd(S, T[None]), r"target: shape \(1, 5, 3\); should be \(rows, features\)"),
        (lambda: mmd(S[:, :2], T), r"target: 3 features; the source has 2"),
        (lambda: mmd(S.long(), T), r"source: torch.int64; should be floating-point"),
        (lambda: mmd(S, T.bfloat16()), r"target: torch.bfloat16 on cpu; the source is torch.float32 on cpu"),
        (lambda: mmd(S, T.to("meta")), r"target: torch.float32 on meta; the source is torch.float32 on cpu"),
        (lambda: mmd(S[:0], T), r"source: 0 rows; the biased estimator needs at least 1"),
        (lambda: mmd(S, T[:1], estimator="unbiased"), r"target: 1 rows; the unbiased estimator needs at least 2"),
        (lambda: mmd(S[:1], T, estimator="linear"), r"source: 1 rows; the linear estimator needs at least 2"),
        (lambda: mmd(S, T, estimator="mean"), r"estimator: 'mean'; should be one of biased, unbiased, linear"),
        (lambda: mmd(S, T, backend="cuda"), r"backend: 'cuda'; should be one of"),
        (
            lambda: mmd(S.double(), T.double(), backend="triton"),
            r"backend: triton takes .* not torch.float64; use torch",
        ),
        (lambda: mmd(S, T, num_kernels=0), r"num_kernels: 0; should be a whole number of at least 1"),
        (lambda: mmd(S, T, factor=0.0), r"factor: 0.0; should be a finite number above 0"),
        (lambda: mmd(S, T, factor=math.inf), r"factor: inf; should be a finite number above 0"),
        (lambda: mmd(S, T, bandwidth=-1.0), r"bandwidth: -1.0; should be a finite number above 0"),
        (lambda: mmd(S, T, bandwidth=torch.ones(2)), r"bandwidth: shape \(2,\) on cpu; should be one number, on cpu"),
        (lambda: mmd(S, T, source_weights=torch.ones(5)), r"source_weights: shape \(5,\); should be \(4,\)"),
        (
            lambda: mmd(S, T, source_weights=torch.zeros(4)),
            r"source_weights: should be finite numbers of 0 or more, with",
        ),
        (lambda: mmd(S, T, target_weights=torch.arange(5) - 1.0), r"target_weights: should be finite numbers of 0 or"),
        (lambda: jmmd([S], [T], target_weights=torch.full((5,), math.nan)), r"target_weights: should be finite"),
        (
            lambda: mmd(S, T, target_weights=torch.eye(5)[0], estimator="unbiased"),
            r"target_weights: should be finite numbers of 0 or more, with at least 2 above 0",
        ),
        (
            lambda: mmd(S, T, source_weights=torch.zeros(4), backend="reference"),
            r"source_weights: should be finite numbers of 0 or more, with at least 1 above 0",
        ),
        (
            lambda: mmd(S, T, estimator="linear", target_weights=torch.ones(5)),
            r"target_weights: given to the linear estimator; should be None, or take biased or unbiased",
        ),
        (lambda: mmd(S, T, target_weights=torch.ones(5, device="meta")), r"target_weights: on meta; source is on cpu"),
        (lambda: mmd(S, T, sizes=[(4, 5)]), r"sizes: given without a group; should be None, or give the group too"),
        (lambda: jmmd([S], [T, T]), r"target_layers: 2 layers, source_layers 1; should be equal"),
        (lambda: jmmd([], []), r"target_layers: 0 layers, source_layers 0"),
        (lambda: jmmd([S, S[:3]], [T, T]), r"source_layers\[1\]: 3 rows; should be 4 as in the first layer"),
        (lambda: jmmd([S], [T], bandwidth=[1.0, 2.0]), r"bandwidth: \[1.0, 2.0\]; should be one for each of 1 layers"),
        (lambda: jmmd([S], [T], bandwidth=[0.0]), r"bandwidth\[0\]: 0.0; should be a finite number above 0"),
        (
            lambda: lmmd(S, T, torch.zeros(4), torch.ones(5, 2)),
            r"source_labels: torch.float32 of shape \(4,\); should be integers of shape \(4,\)",
        ),
        (
            lambda: lmmd(S, T, torch.zeros(4, dtype=torch.int64), torch.ones(4, 2)),
            r"target_probs: shape \(4, 2\); should be \(5, classes\)",
        ),
        (
            lambda: lmmd(S, T, torch.zeros(4, dtype=torch.int64), torch.full((5, 2), -0.5)),
            r"target_probs: should be numbers of 0 or more",
        ),
        (lambda: coral(S, T, backend="cuda"), r"backend: 'cuda'; should be one of auto, triton, torch, reference"),
        (lambda: coral(S[:1], T), r"source: 1 rows; coral needs at least 2"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
