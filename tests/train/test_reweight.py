"""Weights for source rows, where the true ratio of densities is known, and the programme that one method solves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fleetune.train.gaussian_kernel import GaussianKernel
from fleetune.train.reweight import (
    Floats,
    Weights,
    clip_to_mean_one,
    domain_classifier_weights,
    effective_sample_size,
    kernel_mean_matching_weights,
    minimise_in_box,
    project_on_box,
)

METHODS = (domain_classifier_weights, kernel_mean_matching_weights)
SHIFT = 1.0  # of the first feature's mean; the ratio of N(SHIFT, 1) to N(0, 1) is exp(SHIFT x - SHIFT² / 2)


def gaussians(n: int, m: int, features: int = 3, shift: float = SHIFT, seed: int = 0) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    source, target = random.normal(size=(n, features)), random.normal(size=(m, features))
    target[:, 0] += shift
    return source, target


# ---------------------------------------------------------------- both methods


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("rows", [(1000, 1000), (1200, 400), (400, 1200)], ids=str)
def test_the_weights_follow_the_true_ratio_whatever_the_sides_sizes(
    method: Callable[..., Weights], rows: tuple[int, int]
) -> None:
    source, target = gaussians(*rows)
    found = method(source, target, clip=20.0).values
    truth = np.exp(SHIFT * source[:, 0] - SHIFT**2 / 2)
    assert found.mean() == pytest.approx(1.0)
    assert (found >= 0).all()
    assert np.corrcoef(found, truth)[0, 1] > 0.85
    weighted = (found[:, None] * source).mean(0)
    assert weighted[0] == pytest.approx(target[:, 0].mean(), abs=0.2)
    assert weighted[1:] == pytest.approx(target[:, 1:].mean(0), abs=0.2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_without_a_shift_no_row_matters_more(method: Callable[..., Weights]) -> None:
    source, target = gaussians(800, 800, shift=0.0)
    found = method(source, target)
    assert found.clipped == 0
    assert found.effective_sample_size > 0.7 * 800


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_far_target_leaves_few_rows_and_none_above_the_clip(method: Callable[..., Weights]) -> None:
    near, far = (method(*gaussians(400, 400, shift=shift), clip=5.0) for shift in (0.5, 3.0))
    assert far.effective_sample_size < near.effective_sample_size
    assert far.values.max() <= 5.0
    assert far.clipped == (far.values > 4.999).sum() > 10
    assert far.values.mean() == pytest.approx(1.0)


def test_the_odds_of_a_row_come_from_fits_without_it() -> None:
    """More features than rows: a fit that has seen a row knows its side, and would give all of them no weight."""
    random = np.random.default_rng(0)
    source, target = random.normal(size=(2, 60, 300))
    assert domain_classifier_weights(source, target).effective_sample_size > 0.5 * 60


def test_the_folds_are_the_seeds() -> None:
    source, target = gaussians(100, 100)
    first, again, other = (domain_classifier_weights(source, target, seed=seed).values for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_matching_brings_the_kernel_means_together() -> None:
    source, target = gaussians(700, 700)
    found = kernel_mean_matching_weights(source, target).values

    def distance(weights: Floats) -> float:
        pooled = torch.from_numpy(np.concatenate([source, target]))
        signed = torch.from_numpy(np.concatenate([weights / weights.sum(), np.full(700, -1 / 700)]))
        return float(signed @ GaussianKernel.of(pooled)(pooled, pooled) @ signed)

    true_ratio = np.exp(SHIFT * source[:, 0])
    assert distance(found) < 0.05 * distance(np.ones(700))
    assert distance(found) < distance(true_ratio)  # which does not know of this sample


def test_without_the_ridge_the_weights_follow_the_noise() -> None:
    source, target = gaussians(300, 300)
    truth = np.exp(SHIFT * source[:, 0])
    plain, ridged = (kernel_mean_matching_weights(source, target, ridge=ridge) for ridge in (0.0, None))
    assert plain.effective_sample_size < 0.7 * ridged.effective_sample_size
    assert np.corrcoef(plain.values, truth)[0, 1] < np.corrcoef(ridged.values, truth)[0, 1] - 0.1


# ---------------------------------------------------------------- the programme


def test_the_solution_is_that_of_a_general_solver() -> None:
    random = np.random.default_rng(1)
    root = random.normal(size=(30, 40))
    matrix, linear = root.T @ root / 40, random.normal(size=40)  # singular
    for highest in (1.5, 3.0, 10.0):
        ours = minimise_in_box(torch.from_numpy(matrix), torch.from_numpy(linear), highest).numpy()

        def value(w: Floats) -> float:
            return float(w @ matrix @ w / 2 - linear @ w)

        theirs = minimize(
            value,
            np.ones(40),
            jac=lambda w: matrix @ w - linear,
            bounds=[(0, highest)] * 40,
            constraints=[{"type": "eq", "fun": lambda w: w.mean() - 1}],
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-14},
        )
        assert theirs.success
        assert value(ours) == pytest.approx(theirs.fun, abs=1e-6)
        assert ours.min() >= 0
        assert ours.max() <= highest
        assert ours.mean() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("highest", [3.0, 1.2])
@pytest.mark.parametrize("shift", [-4.0, 0.0, 1.0, 5.0])
def test_a_projection_is_the_nearest_point(highest: float, shift: float) -> None:
    """By its own inequality: (p - x)·(y - x) <= 0 for every point y that is allowed."""
    random = np.random.default_rng(2)
    point = torch.from_numpy(3 * random.normal(size=50) + shift)
    found = project_on_box(point, highest)
    assert float(found.mean()) == pytest.approx(1, abs=1e-12)
    for _ in range(100):
        other = project_on_box(torch.from_numpy(5 * random.normal(size=50)), highest)
        assert float(torch.dot(point - found, other - found)) <= 1e-9
    assert torch.allclose(project_on_box(found, highest), found)


# ---------------------------------------------------------------- clipping


def test_clipping_keeps_the_mean_and_what_is_below_in_proportion() -> None:
    weights = np.random.default_rng(3).lognormal(sigma=2.0, size=1000)
    found = clip_to_mean_one(weights, 4.0)
    assert found.values.mean() == pytest.approx(1.0)
    assert found.values.max() <= 4.0
    below = found.values < 4.0 * (1 - 1e-9)
    assert found.clipped == (~below).sum() > 0
    assert np.ptp(found.values[below] / weights[below]) == pytest.approx(0, abs=1e-9)
    assert weights[~below].min() > weights[below].max()


@pytest.mark.parametrize("spread", [10.0, 30.0])
def test_the_mean_is_1_however_far_apart_the_weights_are(spread: float) -> None:
    weights = np.exp(np.random.default_rng(4).normal(scale=spread, size=1700) - 3 * spread)
    assert clip_to_mean_one(weights, 1.5).values.mean() == pytest.approx(1.0)


def test_nothing_is_cut_where_nothing_is_too_large() -> None:
    weights = np.array([1.0, 2.0, 3.0, 0.0])
    found = clip_to_mean_one(weights, 2.5)
    assert found.values == pytest.approx(weights / 1.5)
    assert found.clipped == 0


def test_the_effective_sample_size() -> None:
    assert effective_sample_size(np.ones(7)) == pytest.approx(7)
    assert effective_sample_size(np.array([2.0, 2.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_sample_size(np.array([1.0, 0.0, 0.0])) == pytest.approx(1)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, t: clip_to_mean_one(np.ones(3), 1.0), r"clip: 1.0; should be above 1"),
        (lambda s, t: clip_to_mean_one(np.array([1.0, 0, 0, 0]), 2.0), r"clip: 2.0; only 1 of 4 rows have a weight"),
        (lambda s, t: domain_classifier_weights(s, t, folds=1), r"1 folds of 6 rows, of the smaller side"),
        (lambda s, t: domain_classifier_weights(s, t, folds=9), r"9 folds of 6 rows, of the smaller side"),
        (lambda s, t: domain_classifier_weights(s, t[:, :1]), r"target: 1 features; should be the source's 3"),
        (lambda s, t: kernel_mean_matching_weights(s[:1], t), r"source: shape \(1, 3\); should be \(rows, features\)"),
        (lambda s, t: kernel_mean_matching_weights(s * np.inf, t), r"source: has features that are not finite"),
        (lambda s, t: kernel_mean_matching_weights(s, t, clip=0.5), r"clip: 0.5; should be above 1"),
        (lambda s, t: kernel_mean_matching_weights(s, t, ridge=-1.0), r"ridge: -1.0; should be at least 0"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[Floats, Floats], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(*gaussians(8, 6))
