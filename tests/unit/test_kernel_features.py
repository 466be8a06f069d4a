"""Random Fourier features: unit norm, the right kernel in the mean, and the error that the formula says."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.kernel_features import Kernel, densities, kernel_features, noise_std, pair_std

KERNELS = get_args(Kernel)
SEEDS = 400


def _unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = rng.normal(size=(count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _true(kernel: str, x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """The kernel from its definition."""
    gap = x.astype(np.float64) - y
    if kernel == "gaussian":
        return math.exp(-float(gap @ gap) / (2 * bandwidth**2))
    return math.exp(-float(np.abs(gap).sum()) / bandwidth)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(0, 6),
    width=st.integers(1, 20),
    pairs=st.integers(1, 40),
    bandwidth=st.floats(0.01, 100),
    kernel=st.sampled_from(KERNELS),
    scale=st.floats(0.1, 50),
)
def test_every_text_weighs_one(
    seed: int, count: int, width: int, pairs: int, bandwidth: float, kernel: Kernel, scale: float
) -> None:
    rows = (scale * np.random.default_rng(seed).normal(size=(count, width))).astype(np.float32)

    features = kernel_features(rows, 2 * pairs, bandwidth, seed, kernel=kernel)

    assert features.shape == (count, 2 * pairs)
    assert features.dtype == np.float32
    assert np.linalg.norm(features.astype(np.float64), axis=1) == pytest.approx(np.ones(count), abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mean_and_spread_over_seeds_are_those_of_the_formula(kernel: Kernel) -> None:
    """400 seeds: the mean is the kernel within 4 standard errors, and the spread within its own 4 (1 / sqrt(800))."""
    rng = np.random.default_rng(3)
    rows, dim = _unit(rng, 2, 5), 64
    for bandwidth in (0.8, 3.0):
        true = _true(kernel, rows[0], rows[1], bandwidth)
        found = []
        for seed in range(SEEDS):
            z = kernel_features(rows, dim, bandwidth, seed, kernel=kernel).astype(np.float64)
            found.append(float(z[0] @ z[1]))
        said = pair_std(true, dim, kernel=kernel)
        assert abs(np.mean(found) - true) < 4 * said / math.sqrt(SEEDS)
        assert np.std(found) == pytest.approx(said, rel=4 / math.sqrt(2 * SEEDS))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_other_kernel_would_fail_the_test_above(kernel: Kernel) -> None:
    rng = np.random.default_rng(3)
    rows, dim, bandwidth = _unit(rng, 2, 5), 64, 3.0
    other = next(one for one in KERNELS if one != kernel)
    true = _true(other, rows[0], rows[1], bandwidth)
    found = [
        float(np.prod(kernel_features(rows, dim, bandwidth, seed, kernel=kernel).astype(np.float64), axis=0).sum())
        for seed in range(SEEDS)
    ]

    assert abs(np.mean(found) - true) > 4 * pair_std(true, dim, kernel=other) / math.sqrt(SEEDS)


def test_a_text_is_nearest_to_itself_and_its_estimate_is_exact() -> None:
    rows = _unit(np.random.default_rng(0), 3, 8)
    z = kernel_features(rows, 128, 0.5, 7)

    assert pair_std(1.0, 128) == pair_std(1.0, 128, kernel="laplacian") == 0
    assert densities(z, z[1])[1] == pytest.approx(1, abs=1e-6)


def test_the_seed_is_all_that_the_two_sides_need() -> None:
    rows = _unit(np.random.default_rng(0), 4, 6)

    one, same = kernel_features(rows, 32, 0.5, 11), kernel_features(rows[:2], 32, 0.5, 11)

    assert np.array_equal(one[:2], same)
    assert not np.array_equal(one, kernel_features(rows, 32, 0.5, 12))


def test_a_density_is_the_sum_over_the_private_texts() -> None:
    """60 texts, wide features: within n * pair_std of the sum computed from the definition."""
    rng = np.random.default_rng(5)
    private, drafts = _unit(rng, 60, 4), _unit(rng, 10, 4)
    dim, bandwidth = 4096, 0.7
    total = kernel_features(private, dim, bandwidth, 1).sum(axis=0)

    found = densities(kernel_features(drafts, dim, bandwidth, 1), total)

    true = np.array([sum(_true("gaussian", x, y, bandwidth) for x in private) for y in drafts])
    assert np.abs(found - true).max() < 4 * 60 * pair_std(0.0, dim)
    assert list(np.argsort(-found)[:3]) == list(np.argsort(-true)[:3])


def test_the_noise_of_a_density_is_what_the_formula_says() -> None:
    rng = np.random.default_rng(6)
    z = kernel_features(_unit(rng, 1, 4), 50, 0.5, 1)
    sums = rng.normal(0, 2.5 * 0.5, (4000, 3, 50)).sum(axis=1)

    found = np.array([densities(z, one.astype(np.float32))[0] for one in sums])

    assert found.std() == pytest.approx(noise_std(2.5, 0.5, sites=3), rel=4 / math.sqrt(8000))
    assert noise_std(2.5, 0.5) == 1.25


@pytest.mark.parametrize(("dim", "bandwidth"), [(0, 1.0), (3, 1.0), (-2, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_features_that_cannot_be_are_refused(dim: int, bandwidth: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        kernel_features(np.zeros((1, 2), np.float32), dim, bandwidth, 0)
