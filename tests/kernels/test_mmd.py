"""MMD, joint and by class, and CORAL: errors against the reference in fp64 are no worse than the reference's own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from exactness import assert_no_worse
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fleetune_kernels import coral, jmmd, lmmd, mmd
from fleetune_kernels import reference_mmd as reference
from fleetune_kernels.pairwise import Pairs
from fleetune_kernels.tiles import sweep

Found = dict[str, torch.Tensor | None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(32, 32, 16), (37, 21, 19), (12, 17, 264)]  # n, m, D: aligned, ragged, and too wide for one kernel
WEIGHTS = {"source_weights": torch.linspace(0.1, 2, 64), "target_weights": torch.linspace(3, 0.5, 64)}


def features(rows: int, dimension: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shifted = torch.randn(rows, dimension, generator=generator, dtype=torch.float64) + 0.3 * seed
    return shifted.to(dtype).requires_grad_()


def gradients(loss: torch.Tensor, **inputs: torch.Tensor) -> Found:
    """Loss and gradients, by name."""
    wanted = {name: one for name, one in inputs.items() if one.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss, **dict.fromkeys(inputs), **dict(zip(wanted, found, strict=True))}


def judge(loss: Callable[..., torch.Tensor], oracle: Callable[..., torch.Tensor], **inputs: torch.Tensor) -> None:
    """The loss's errors are at most the oracle's in the same dtype, beyond the tolerance."""
    exact = {name: one.detach().double().requires_grad_(one.requires_grad) for name, one in inputs.items()}
    found, eager, truth = (
        gradients(call(*values.values()), **values)
        for call, values in ((loss, inputs), (oracle, inputs), (oracle, exact))
    )
    assert_no_worse(found, eager, truth, next(iter(inputs.values())).dtype)


def cut(options: dict[str, Any], n: int, m: int) -> dict[str, Any]:
    """The options with as many weights as there are rows."""
    rows = {"source_weights": n, "target_weights": m}
    return {name: value[: rows[name]] if name in rows else value for name, value in options.items()}


# ---------------------------------------------------------------- MMD


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "unbiased"},
        {"estimator": "linear"},
        {**WEIGHTS},
        {**WEIGHTS, "estimator": "unbiased", "bandwidth": 20.0},
        {"factor": 3.0, "num_kernels": 4, "estimator": "unbiased"},
        {"factor": 0.5, "num_kernels": 2, "bandwidth": torch.tensor([8.0])},
        {"num_kernels": 1, "bandwidth": 30.0},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mmd_is_as_exact_as_eager(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    n, m, dimension = shape
    options = cut(options, n, m)
    judge(
        lambda source, target: mmd(source, target, backend=backend, **options),
        lambda source, target: reference.mmd(source, target, **options),
        source=features(n, dimension, dtype),
        target=features(m, dimension, dtype, seed=1),
    )


@pytest.mark.parametrize("options", [{}, {"estimator": "unbiased", **WEIGHTS}, {"estimator": "linear"}], ids=str)
def test_fp64_stays_fp64(options: dict[str, Any]) -> None:
    options = cut(options, 20, 31)
    judge(
        lambda source, target: mmd(source, target, **options),
        lambda source, target: reference.mmd(source, target, **options),
        source=features(20, 5, torch.float64),
        target=features(31, 5, torch.float64, seed=1),
    )


@examples(max_examples=10, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 40),
    m=st.integers(2, 40),
    dimension=st.integers(1, 40),
    num_kernels=st.integers(1, 6),
    factor=st.sampled_from([2.0, 1.5, 0.7]),
    estimator=st.sampled_from(["biased", "unbiased"]),
    tile=st.sampled_from([1, 3, 16, 1024]),
    weighted=st.booleans(),
)
def test_any_shape_in_tiles_of_any_size(
    n: int, m: int, dimension: int, num_kernels: int, factor: float, estimator: str, tile: int, weighted: bool
) -> None:
    source, target = features(n, dimension), features(m, dimension, seed=1)
    options: dict[str, Any] = {"num_kernels": num_kernels, "factor": factor, "estimator": estimator}
    options |= cut(WEIGHTS, n, m) if weighted else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleetune_kernels.tiles.TILE", tile)
        judge(
            lambda source, target: mmd(source, target, **options),
            lambda source, target: reference.mmd(source, target, **options),
            source=source,
            target=target,
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["source", "target"])
def test_no_gradient_for_what_does_not_require_it(backend: str, wanted: str) -> None:
    inputs = {"source": features(9, 4), "target": features(12, 4, seed=1)}
    for name, one in inputs.items():
        one.requires_grad_(name == wanted)
    judge(lambda source, target: mmd(source, target, backend=backend), reference.mmd, **inputs)
    with torch.no_grad():
        assert not mmd(**inputs, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_features_need_not_be_contiguous(backend: str) -> None:
    source, target = features(4, 30).t(), features(9, 8, seed=1)[:, ::2]
    assert not source.is_contiguous()
    judge(lambda source, target: mmd(source, target, backend=backend), reference.mmd, source=source, target=target)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_equal_features_are_no_distance_apart(backend: str, value: float) -> None:
    source, target = (torch.full((rows, 3), value, requires_grad=True) for rows in (11, 6))
    found = gradients(mmd(source, target, backend=backend), source=source, target=target)
    assert all(torch.allclose(one, torch.zeros(()), atol=1e-6) for one in found.values() if one is not None)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 3e4])
def test_extreme_features_stay_finite(backend: str, dtype: torch.dtype, scale: float) -> None:
    source, target = (
        (features(20, 8, torch.float32, seed).detach().clamp(-2, 2) * scale).to(dtype).requires_grad_()
        for seed in (0, 1)
    )
    far = (mmd(source, target, backend=backend), mmd(source, target, bandwidth=1e-9, backend=backend))
    for loss in far:
        assert all(one is not None and one.isfinite().all() for one in gradients(loss, s=source, t=target).values())


def test_a_second_backward_pass_gives_the_same_again() -> None:
    source, target = features(7, 3), features(5, 3, seed=1)
    loss = mmd(source, target)
    first, second = (torch.autograd.grad(loss, source, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad(-3 * mmd(source, target), source)
    torch.testing.assert_close(scaled, -3 * first)


def test_nothing_is_differentiated_twice_but_the_reference() -> None:
    source, target = features(7, 3), features(5, 3, seed=1)
    with pytest.raises(RuntimeError, match=r"mmd cannot be differentiated twice .* use backend='reference'"):
        torch.autograd.grad(mmd(source, target), source, create_graph=True)
    (once,) = torch.autograd.grad(mmd(source, target, backend="reference"), source, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), source)
    assert twice.abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"estimator": "unbiased"}, {"estimator": "linear"}], ids=str)
def test_the_references_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    sides = features(5, 2, torch.float64), features(6, 2, torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda s, t: reference.mmd(s, t, bandwidth=2.0, **options), sides)


def test_the_definition_by_hand() -> None:
    """One Gaussian, two rows against one."""
    source, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
    k = [torch.exp(torch.tensor(-(d**2) / (2 * 2.0))) for d in range(4)]
    within, across = (2 * k[0] + 2 * k[1]) / 4, (k[3] + k[2]) / 2
    for backend in ("torch", "triton", "reference"):
        found = mmd(source, target, num_kernels=1, bandwidth=2.0, backend=backend)
        torch.testing.assert_close(found, within + k[0] - 2 * across)


# ---------------------------------------------------------------- several layers, classes, covariances


@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "unbiased", **WEIGHTS}, {"estimator": "linear"}, {"bandwidth": [3.0, 9.0], "factor": 3.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jmmd_is_as_exact_as_eager(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = cut(options, 18, 25)
    judge(
        lambda s, s2, t, t2: jmmd([s, s2], [t, t2], **options),
        lambda s, s2, t, t2: reference.jmmd([s, s2], [t, t2], **options),
        source=features(18, 12, dtype),
        source_2=features(18, 3, dtype, seed=2),
        target=features(25, 12, dtype, seed=1),
        target_2=features(25, 3, dtype, seed=3),
    )


def test_jmmd_with_a_layer_that_wants_no_gradient() -> None:
    inputs = {
        "s": features(6, 4),
        "s2": features(6, 2, seed=2),
        "t": features(5, 4, seed=1),
        "t2": features(5, 2, seed=3),
    }
    inputs["s2"].requires_grad_(False)
    inputs["t"].requires_grad_(False)
    judge(lambda s, s2, t, t2: jmmd([s, s2], [t, t2]), lambda s, s2, t, t2: reference.jmmd([s, s2], [t, t2]), **inputs)


LABELS = torch.tensor([0, 1, 1, 4, -100, 4, 0, 1, 9])
PROBS = torch.randn(14, 6, generator=torch.Generator().manual_seed(5)).softmax(1)


@pytest.mark.parametrize("options", [{}, {"bandwidth": 7.0, "num_kernels": 2, "factor": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lmmd_is_as_exact_as_eager(dtype: torch.dtype, options: dict[str, Any]) -> None:
    probs = PROBS.clone()
    probs[:, 1] = 0  # a class of the source alone, as 2, 3 and 5 are of the target
    judge(
        lambda source, target: lmmd(source, target, LABELS, probs, **options),
        lambda source, target: reference.lmmd(source, target, LABELS, probs.to(source.dtype), **options),
        source=features(9, 10, dtype),
        target=features(14, 10, dtype, seed=1),
    )


def test_lmmd_of_one_class_is_mmd() -> None:
    source, target = features(9, 4), features(14, 4, seed=1)
    one = lmmd(source, target, torch.zeros(9, dtype=torch.int64), torch.ones(14, 1))
    torch.testing.assert_close(one, mmd(source, target))


def test_lmmd_without_a_class_in_common_is_0() -> None:
    source, target = features(9, 4), features(14, 4, seed=1)
    found = gradients(lmmd(source, target, torch.full((9,), -1), PROBS), source=source, target=target)
    assert all(one is not None and one.abs().max() == 0 for one in found.values())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dimension", [1, 12])
def test_coral_is_as_exact_as_eager(dtype: torch.dtype, dimension: int) -> None:
    source, target = features(30, dimension, dtype), features(21, dimension, dtype, seed=1)
    judge(coral, reference.coral, source=source, target=target)


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
    return Pairs(sides, sides, weights, weights, [0, 0], None, [True, True], 5, 2.0, unbiased, uniform=False)


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


def test_gradients_are_scaled_where_they_lie() -> None:
    source, target = features(300, 50), features(200, 50, seed=1)
    loss = mmd(source, target)
    with Allocations() as seen:
        found = torch.autograd.grad(loss, (source, target))
    assert seen.peak < 100
    assert [one.shape for one in found] == [source.shape, target.shape]


@pytest.mark.parametrize("backend", ["torch", "triton"])
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
    yield mmd(source, target, estimator="unbiased", **weights, bandwidth=2.0)
    yield jmmd([source, source[:, :2]], [target, target[:, 2:]])
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
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(list(losses(source, target)), plain, rtol=0, atol=0)
