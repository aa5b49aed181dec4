"""What MMD and its kin promise beside their values: memory, compilation, and a host that never waits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from examples import BACKENDS, DEVICE
from mmd_examples import features, gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fleetune_kernels import coral, jmmd, lmmd, mmd, pairwise
from fleetune_kernels import reference_mmd as reference
from fleetune_kernels.pairwise import Pairs
from fleetune_kernels.tiles import sweep

# ---------------------------------------------------------------- memory, compilation, the host


class Allocations(TorchDispatchMode):
    """The most bytes alive at once of what is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self.known | given:
                self.take(one.untyped_storage())
        return result

    def take(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size:
            self.known.add(address)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, address, size)

    def drop(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.alive -= size


def pairs_of(source: torch.Tensor, target: torch.Tensor, unbiased: bool = False) -> Pairs:
    sides = [source.detach(), target.detach()]
    weights = [
        torch.full_like(side[:, :1], sign / len(side), dtype=torch.float32)
        for side, sign in zip(sides, (1, -1), strict=True)
    ]
    none = torch.ones(1, device=source.device)
    return Pairs(sides, sides, weights, weights, [0, 0], none, [True], [True, True], 5, 2.0, unbiased, uniform=False)


@pytest.mark.skipif(DEVICE != "cpu", reason="the storages of a CPU are counted")
def test_no_matrix_of_all_pairs_lives() -> None:
    source, target, tile = features(250, 6), features(150, 6, seed=1), 50
    pairs = pairs_of(source, target)
    with Allocations() as seen:
        _, found = sweep(pairs, tile)
    results = sum(one.nbytes for one in found)
    assert results == 4 * (source.numel() + target.numel())
    assert results < seen.peak < results + 4 * (4 * tile**2 + 10 * 400)
    with Allocations() as seen:
        reference.mmd(source, target)
    assert seen.peak > 8 * 4 * 400**2


@pytest.mark.skipif(DEVICE != "cpu", reason="the storages of a CPU are counted")
def test_gradients_are_scaled_where_they_lie() -> None:
    source, target = features(300, 50), features(200, 50, seed=1)
    loss = mmd(source, target)
    with Allocations() as seen:
        found = torch.autograd.grad(loss, (source, target))
    assert seen.peak < 100
    assert [one.shape for one in found] == [source.shape, target.shape]


@pytest.mark.skipif(DEVICE != "cpu", reason="the storages of a CPU are counted")
def test_through_the_bandwidth_it_takes_a_second_gradient_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "CHUNK_BYTES", 2**14)
    source, target = features(600, 50), features(400, 50, seed=1)
    gradient = 4 * (source.numel() + target.numel())
    with Allocations() as forward:
        loss = mmd(source, target, detach_bandwidth=False)
    with Allocations() as backward:
        torch.autograd.grad(loss, (source, target))
    assert gradient < forward.peak < 1.2 * gradient + 4 * 4 * 512**2  # and the tiles
    assert backward.peak < 2.2 * gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dimension", [8, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits_for_the_device(
    backend: str, dimension: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values, so that whatever asks for one fails."""
    from fleetune_kernels.triton import mmd as kernels

    launched: list[str] = []
    for name in ("sweep_kernel", "slopes_kernel"):
        monkeypatch.setattr(kernels, name, Launched(name, launched))
    with FakeTensorMode():
        source, target = (torch.empty(rows, dimension, dtype=dtype) for rows in (9, 13))
        _, found = (kernels.sweep if backend == "triton" else sweep)(pairs_of(source, target, unbiased=True))
        assert [one.shape for one in found] == [source.shape, target.shape]
    assert set(launched) == ({"sweep_kernel" if dimension == 8 else "slopes_kernel"} if backend == "triton" else set())


class Launched:
    """Stands for a kernel, and writes down that it was launched."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launched.append(self.name)


def losses(source: torch.Tensor, target: torch.Tensor) -> Iterator[torch.Tensor]:
    """One of each kind."""
    labels, probs = torch.arange(len(source), device=source.device) % 3, torch.ones_like(target[:, :3])
    weights = {"source_weights": source[:, 0].square(), "target_weights": target[:, 0].square()}
    for estimator in ("biased", "unbiased", "linear"):
        yield mmd(source, target, estimator=estimator)
        yield mmd(source, target, estimator=estimator, detach_bandwidth=False)
    yield mmd(source, target, estimator="unbiased", **weights, bandwidth=2.0)
    yield jmmd([source, source[:, :2]], [target, target[:, 2:]])
    yield jmmd([source, source[:, :2]], [target, target[:, 2:]], bandwidth=[None, 1.0], detach_bandwidth=False)
    yield lmmd(source, target, labels, probs)
    yield coral(source, target)


def test_losses_and_their_gradients_are_made_without_a_look_at_values() -> None:
    with FakeTensorMode():
        source, target = (torch.empty(rows, 4, requires_grad=True) for rows in (9, 13))
        for loss in losses(source, target):
            found = torch.autograd.grad(loss, (source, target))
            assert (loss.shape, loss.dtype, *(one.shape for one in found)) == (
                (),
                torch.float32,
                source.shape,
                target.shape,
            )


def test_a_compiled_model_takes_them_whole() -> None:
    source, target = features(9, 4), features(13, 4, seed=1)

    def total(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(losses(2 * source, target))).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(call(source, target), source=source, target=target) for call in (compiled, total))
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one)


def test_autocast_changes_nothing() -> None:
    source, target = features(9, 4), features(13, 4, seed=1)
    plain = list(losses(source, target))
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.testing.assert_close(list(losses(source, target)), plain, rtol=0, atol=0)
