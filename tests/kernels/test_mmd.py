"""MMD, joint and by class, and CORAL: errors against the reference in fp64 are no worse than the reference's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from examples import BACKENDS, DEVICE, DTYPES
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mmd_examples import WEIGHTS, cut, features, gradients, judge

from fleetune_kernels import coral, jmmd, lmmd, mmd
from fleetune_kernels import reference_mmd as reference

THROUGH = {"detach_bandwidth": False}
SHAPES = [(32, 32, 16), (37, 21, 19), (12, 17, 264)]  # n, m, D: aligned, ragged, and too wide for one kernel


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
        {"factor": 0.5, "num_kernels": 2, "bandwidth": torch.tensor([8.0], device=DEVICE)},
        {"num_kernels": 1, "bandwidth": 30.0},
        {**THROUGH},
        {**THROUGH, **WEIGHTS, "estimator": "unbiased", "factor": 0.5},
        {**THROUGH, "estimator": "linear"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_no_number_makes_the_loss_none(bad: float, backend: str) -> None:
    """Such that a training run stops: it is not the 0 of two sides that do not differ."""
    source, target = features(9, 8, torch.float32).detach(), features(7, 8, torch.float32, seed=1).detach()
    source[3, 2] = bad
    probabilities = torch.full((7, 3), 1 / 3, device=DEVICE)
    labels = torch.arange(9, device=DEVICE) % 3
    assert mmd(source, target, backend=backend).isnan()
    assert mmd(source, target, backend=backend, bandwidth=2.0, estimator="unbiased").isnan()
    assert jmmd([source, target[:1].expand(9, 8)], [target, target], backend=backend).isnan()
    assert lmmd(source, target, labels, probabilities, backend=backend).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dimension", [64, 128, 256, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_size_is_exact_on_a_gpu(backend: str, dtype: torch.dtype, dimension: int, estimator: str) -> None:
    judge(
        lambda source, target: mmd(source, target, estimator=estimator, backend=backend),
        lambda source, target: reference.mmd(source, target, estimator=estimator),
        source=features(1000, dimension, dtype),
        target=features(777, dimension, dtype, seed=1),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dimension", [64, 1024])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_gpu_is_never_waited_for(backend: str, dimension: int) -> None:
    source, target = features(300, dimension, torch.bfloat16), features(200, dimension, torch.bfloat16, seed=1)
    mmd(source, target, backend=backend).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mmd(source, target, backend=backend, estimator="unbiased", source_weights=source[:, 0].square()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["source", "target"])
def test_no_gradient_for_what_does_not_require_it(backend: str, wanted: str) -> None:
    inputs = {"source": features(9, 4), "target": features(12, 4, seed=1)}
    for name, one in inputs.items():
        one.requires_grad_(name == wanted)
    judge(lambda source, target: mmd(source, target, backend=backend), reference.mmd, **inputs)
    with torch.no_grad():
        assert not mmd(**inputs, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_need_not_be_contiguous(backend: str) -> None:
    source, target = features(4, 30).t(), features(9, 8, seed=1)[:, ::2]
    assert not source.is_contiguous()
    judge(lambda source, target: mmd(source, target, backend=backend), reference.mmd, source=source, target=target)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_equal_features_are_no_distance_apart(backend: str, value: float) -> None:
    source, target = (torch.full((rows, 3), value, requires_grad=True, device=DEVICE) for rows in (11, 6))
    found = gradients(mmd(source, target, backend=backend), source=source, target=target)
    assert all(
        torch.allclose(one, torch.zeros((), device=DEVICE), atol=1e-6) for one in found.values() if one is not None
    )


@pytest.mark.parametrize("backend", BACKENDS)
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
    assert torch.autograd.gradcheck(lambda s, t: reference.mmd(s, t, **THROUGH, **options), sides)


@pytest.mark.parametrize("backend", BACKENDS)
def test_through_the_bandwidth_nothing_draws_all_features_together(backend: str) -> None:
    """The loss is the same for all multiples of the features, so its gradient has no part along them."""
    source, target = features(9, 4, seed=2), features(7, 4)
    centre = torch.cat([source, target]).detach().mean(0)

    def along(**options: Any) -> float:
        found = torch.autograd.grad(mmd(source, target, backend=backend, **options), (source, target))
        sides = zip(found, (source.detach(), target.detach()), strict=True)
        return sum(float((gradient * (rows - centre)).sum()) for gradient, rows in sides)

    assert along(**THROUGH) == pytest.approx(0.0, abs=1e-6)
    assert along() > 0.05
    assert along(bandwidth=2.0, **THROUGH) == along(bandwidth=2.0) != 0.0


@pytest.mark.parametrize("estimator", ["biased", "linear"])
def test_through_the_bandwidth_rows_that_are_equal_have_no_gradient(estimator: str) -> None:
    source, target = (torch.full((rows, 3), 0.1, requires_grad=True, device=DEVICE) for rows in (8, 6))
    loss = mmd(source, target, estimator=estimator, **THROUGH)
    found = gradients(loss, s=source, t=target).values()
    assert all(one is not None and one.abs().max() < 1e-6 for one in found)  # and none is no number


def test_the_definition_by_hand() -> None:
    """One Gaussian, two rows against one."""
    source, target = torch.tensor([[0.0], [1.0]], device=DEVICE), torch.tensor([[3.0]], device=DEVICE)
    k = [torch.exp(torch.tensor(-(d**2) / (2 * 2.0))) for d in range(4)]
    within, across = (2 * k[0] + 2 * k[1]) / 4, (k[3] + k[2]) / 2
    for backend in ("torch", "triton", "reference"):
        found = mmd(source, target, num_kernels=1, bandwidth=2.0, backend=backend)
        torch.testing.assert_close(found, within + k[0] - 2 * across)


# ---------------------------------------------------------------- several layers, classes, covariances


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "unbiased", **WEIGHTS},
        {"estimator": "linear"},
        {"bandwidth": [3.0, 9.0], "factor": 3.0},
        {**THROUGH},
        {**THROUGH, "estimator": "linear"},
        {**THROUGH, "bandwidth": [None, 0.8]},
        {**THROUGH, "bandwidth": [9.0, None], "estimator": "linear"},
    ],
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


@pytest.mark.parametrize("options", [{}, THROUGH], ids=str)
def test_jmmd_with_a_layer_that_wants_no_gradient(options: dict[str, Any]) -> None:
    inputs = {
        "s": features(6, 4),
        "s2": features(6, 2, seed=2),
        "t": features(5, 4, seed=1),
        "t2": features(5, 2, seed=3),
    }
    inputs["s2"].requires_grad_(False)
    inputs["t"].requires_grad_(False)
    judge(
        lambda s, s2, t, t2: jmmd([s, s2], [t, t2], **options),
        lambda s, s2, t, t2: reference.jmmd([s, s2], [t, t2], **options),
        **inputs,
    )


LABELS = torch.tensor([0, 1, 1, 4, -100, 4, 0, 1, 9], device=DEVICE)
PROBS = torch.randn(14, 6, generator=torch.Generator().manual_seed(5)).softmax(1).to(DEVICE)


@pytest.mark.parametrize("options", [{}, {"bandwidth": 7.0, "num_kernels": 2, "factor": 3.0}, THROUGH], ids=str)
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
    one = lmmd(source, target, torch.zeros(9, dtype=torch.int64, device=DEVICE), torch.ones(14, 1, device=DEVICE))
    torch.testing.assert_close(one, mmd(source, target))


def test_lmmd_without_a_class_in_common_is_0() -> None:
    source, target = features(9, 4), features(14, 4, seed=1)
    found = gradients(lmmd(source, target, torch.full((9,), -1, device=DEVICE), PROBS), source=source, target=target)
    assert all(one is not None and one.abs().max() == 0 for one in found.values())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dimension", [1, 12])
def test_coral_is_as_exact_as_eager(dtype: torch.dtype, dimension: int) -> None:
    source, target = features(30, dimension, dtype), features(21, dimension, dtype, seed=1)
    judge(coral, reference.coral, source=source, target=target)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS, "reference"])
def test_coral_takes_every_backend(backend: str) -> None:
    source, target = features(30, 12), features(21, 12, seed=1)
    found, expected = (
        gradients(loss, source=source, target=target)
        for loss in (coral(source, target, backend=backend), reference.coral(source, target))
    )
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one)
