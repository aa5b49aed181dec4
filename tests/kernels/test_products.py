"""Matrix products of the CPU, by whichever library: the same to rounding, in any layout that the kernels have."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fleetune_kernels import products
from fleetune_kernels.products import makes_its_own, product

fast = pytest.mark.skipif(not products._has_fast_onednn(), reason="PyTorch has no faster library on this CPU")


def factors(rows: int, inner: int, columns: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    turned_a, turned_b = a.t().contiguous().t(), b.t().contiguous().t()
    return {"plain": (a, b), "turned a": (turned_a, b), "turned b": (a, turned_b), "both": (turned_a, turned_b)}[layout]


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", ["plain", "turned a", "turned b", "both"])
@pytest.mark.parametrize("shape", [(300, 386, 1024), (1024, 1024, 400), (3, 5, 7)], ids=str)
def test_products_are_as_exact_as_pytorchs(shape: tuple[int, int, int], layout: str, biased: bool) -> None:
    a, b = factors(*shape, layout)
    bias = torch.randn(shape[2]) if biased else None
    truth = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    plain = a @ b if bias is None else torch.addmm(bias, a, b)
    mine, theirs = ((found.double() - truth).norm() / truth.norm() for found in (product(a, b, bias), plain))
    assert mine <= 2 * theirs + 1e-7
    assert torch.equal(product(a, b, bias), product(a, b, bias))


@fast
def test_the_faster_library_takes_what_is_large_and_without_gaps() -> None:
    a, b = factors(512, 384, 512, "plain")
    assert makes_its_own(a, b)
    assert makes_its_own(a, b.t().contiguous().t())
    assert not makes_its_own(torch.zeros(512, 400)[:, :384], b)
    assert not makes_its_own(a[:2], b)
    assert not makes_its_own(a.double(), b.double())
    assert not makes_its_own(a.bfloat16(), b.bfloat16())


def test_where_there_is_none_the_result_stands_where_it_is_wanted() -> None:
    a, b = factors(512, 384, 512, "plain")
    out = torch.empty(512, 512)
    with mock.patch.object(products, "_has_fast_onednn", return_value=False):
        assert product(a, b, out=out) is out
    torch.testing.assert_close(out, a @ b)
