"""The judge of the kernels must see what is wrong."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_no_worse

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (torch.zeros_like, "gradient: error 1.00e"),
        (lambda right: -right, "gradient: error 2.00e"),
        (lambda right: right * float("nan"), "gradient: error inf"),
        (lambda right: right[:-1], "gradient: error inf"),
        (lambda right: None, "gradient: no gradient"),
    ],
    ids=["zero", "sign", "nan", "shape", "none"],
)
def test_a_wrong_gradient_is_seen_however_small(planted, message: str, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    right = torch.linspace(-1e-4, 1e-4, 1000).to(dtype)
    assert_no_worse({"gradient": right}, {"gradient": right}, {"gradient": right.double()}, dtype)
    with pytest.raises(AssertionError, match=message):
        assert_no_worse({"gradient": planted(right)}, {"gradient": right}, {"gradient": right.double()}, dtype)


def test_a_gradient_that_nobody_asked_for_is_seen() -> None:
    with pytest.raises(AssertionError, match="gradient: a gradient that nobody asked for"):
        assert_no_worse({"gradient": torch.ones(1)}, {"gradient": None}, {"gradient": None}, torch.float32)
