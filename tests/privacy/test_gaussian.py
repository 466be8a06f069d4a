"""The Gaussian mechanism on a lattice: what rounding costs is paid for, and low bits say nothing.

The twins release what a textbook would, sum + noise in floating point, and the same attack tells neighbours apart.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fl_app.errors import LedgerRefusal
from fl_app.privacy import noise
from fl_app.privacy.gaussian import SLACK, lattice_step, release, usable_clip
from fl_app.privacy.noise import SecureNoise, SimulatedNoise


class NoNoise:
    simulated = True

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        raise NotImplementedError


def rounded(total: np.ndarray, clip: float) -> np.ndarray:
    """Return what the release makes of a sum without noise."""
    (found,) = release([total], clip_norm=clip, noise_multiplier=1.0, noise=NoNoise())
    return found


def seeded(seed: int) -> SimulatedNoise:
    return SimulatedNoise(np.random.default_rng(seed))


clips = st.floats(1e-6, 1e6)
dimensions = st.integers(1, 5000)


@given(clip=clips, dimension=dimensions)
def test_the_step_is_the_largest_power_of_two_that_the_slack_pays_for(clip: float, dimension: int) -> None:
    step = lattice_step(clip, dimension)
    assert math.frexp(step)[0] == 0.5  # a power of two
    assert step * math.sqrt(dimension) <= clip * SLACK / 2 < 2 * step * math.sqrt(dimension) * (1 + 1e-12)
    assert usable_clip(clip) == clip * (1 - 2**-13)


@given(seed=st.integers(0, 2**32), clip=clips, sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_every_release_is_a_multiple_of_the_public_step(seed: int, clip: float, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    totals = [rng.normal(0, clip * 10, (size, 3)) for size in sizes]
    before = [total.copy() for total in totals]
    found = release(totals, clip_norm=clip, noise_multiplier=0.7, noise=seeded(seed))
    step = lattice_step(clip, 3 * sum(sizes))
    for total, old, new in zip(totals, before, found, strict=True):
        assert new.dtype == np.float64
        assert new.shape == total.shape
        assert np.array_equal(total, old)
        assert np.array_equal(new / step, np.rint(new / step))
        assert (np.abs(rounded(total, clip) - total) <= lattice_step(clip, total.size) / 2).all()


def apart(dimension: int, distance: float, clip: float, *, against: bool, seed: int = 0) -> tuple[Any, Any]:
    """Return two sums at this distance; `against` puts every coordinate where rounding moves them further apart."""
    rng = np.random.default_rng(seed)
    if not against:
        first = rng.normal(0, clip * 5, dimension)
        direction = rng.normal(size=dimension)
        return first, first + direction * (distance / np.linalg.norm(direction))
    step = lattice_step(clip, dimension)
    first = np.full(dimension, step * (0.5 - 1e-6))  # rounds down, and its neighbour up
    return first, first + distance / math.sqrt(dimension)


@given(seed=st.integers(0, 2**32), clip=clips, dimension=dimensions, share=st.floats(0, 1), against=st.booleans())
@settings(max_examples=300)
def test_rounding_leaves_neighbours_within_the_clip(
    seed: int, clip: float, dimension: int, share: float, against: bool
) -> None:
    first, second = apart(dimension, usable_clip(clip) * share, clip, against=against, seed=seed)
    assert np.linalg.norm(rounded(first, clip) - rounded(second, clip)) <= clip


def test_without_the_slack_rounding_exceeds_the_clip() -> None:
    """The twin: neighbours exactly one clip norm apart, each coordinate a whisker over a whole number of steps."""
    clip, dimension = 1.0, 4096
    step = lattice_step(clip, dimension)
    distance = (math.floor(clip / math.sqrt(dimension) / step) * step + 2e-6 * step) * math.sqrt(dimension)
    first, second = apart(dimension, distance, clip, against=True)
    moved = float(np.linalg.norm(rounded(first, clip) - rounded(second, clip)))
    assert moved > distance * (1 + 2**-16)
    first, second = apart(dimension, usable_clip(distance), clip, against=True)
    assert np.linalg.norm(rounded(first, clip) - rounded(second, clip)) <= clip


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_is_never_released(bad: float) -> None:
    totals = [np.zeros(3), np.array([0.0, bad])]
    with pytest.raises(LedgerRefusal, match="not finite"):
        release(totals, clip_norm=1.0, noise_multiplier=1.0, noise=seeded(0))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier"])
def test_no_noise_is_no_release(name: str, value: float) -> None:
    options = {"clip_norm": 1.0, "noise_multiplier": 1.0, name: value}
    with pytest.raises(LedgerRefusal, match="must be positive"):
        release([np.zeros(3)], **options, noise=seeded(0))


@pytest.mark.parametrize("factor", [1.0, 0.97, 1.03])
def test_the_scale_is_that_of_the_receipt(factor: float) -> None:
    """400,000 coordinates: 1 % is nine standard errors; 3 % off is caught, both ways."""
    totals = [np.full(200_000, 3.0), np.full((2, 100_000), -5.0)]
    found = release(totals, clip_norm=0.5, noise_multiplier=1.5 * factor, noise=seeded(1))
    ratios = [(new - total).std() / (1.5 * 0.5) for new, total in zip(found, totals, strict=True)]
    assert all(abs(ratio - 1) < 0.01 for ratio in ratios) == (factor == 1.0)


# --- the sampler's own arithmetic


def test_box_muller_is_right_to_fifty_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against 50 digits, from the same 64-bit words. Relative to the radius r, and where r is small (a word near 2^64,
    whose float64 has fewer bits below 1) within 2^-50 / r: of the standard deviation, never more than 2^-24."""
    import mpmath

    corners = [0.0, 1.0, 2.0**11, 2.0**32, 2.0**61, 2.0**62, 2.0**63, 3 * 2.0**62, 2.0**64 - 2.0**12, 2.0**64]
    drawn = np.random.default_rng(0).integers(0, 2**64, 800, dtype=np.uint64).astype(np.float64)
    first = np.array([a for a in corners for _ in corners] + drawn[:400].tolist())
    second = np.array(corners * len(corners) + drawn[400:].tolist())

    class Words:
        def words(self, count: int) -> np.ndarray:
            assert count == 2 * first.size
            return np.concatenate([first, second])

    monkeypatch.setattr(noise, "_Keystream", Words)
    found = SecureNoise().normal((2, first.size))
    mpmath.mp.dps = 50
    worst = 0.0
    for column, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        uniform = (mpmath.mpf(a) + mpmath.mpf("0.5")) / mpmath.mpf(2) ** 64
        radius = mpmath.sqrt(-2 * mpmath.log(uniform)) if uniform < 1 else mpmath.mpf(0)
        angle = 2 * mpmath.pi * mpmath.mpf(b) / mpmath.mpf(2) ** 64
        allowed = max(float(radius), min(1 / max(float(radius), 1e-300), 2.0**26)) * 2.0**-50
        for value, true in ((found[0, column], mpmath.cos(angle)), (found[1, column], mpmath.sin(angle))):
            worst = max(worst, abs(float(mpmath.mpf(float(value)) - radius * true)) / allowed)
    assert 0.01 < worst <= 1.0  # and the twin: single precision is a thousand times over
    assert np.abs(found.astype(np.float32) - found).max() > 1000 * 2.0**-50


# --- what the low bits say


def fine_grained(values: np.ndarray, grid: float) -> np.ndarray:
    """Whether values in (0, 1/4) are no multiples of `grid`, which no float sum with 1 can then have been."""
    near = values[(values > 0) & (values < 0.25)].astype(np.float64)
    return near / grid != np.rint(near / grid)


@pytest.mark.parametrize(("dtype", "grid"), [(np.float64, 2.0**-53), (np.float32, 2.0**-24)])
def test_sum_plus_noise_in_floating_point_gives_neighbours_away(dtype: Any, grid: float) -> None:
    """The twin of the next test. 0 or 1 plus normal noise: an output near 0 that is no multiple of 1's spacing (below
    it) was not made from 1. One such output and epsilon is infinite."""
    draws = SecureNoise().normal((200_000,)).astype(dtype)
    from_zero, from_one = fine_grained(dtype(0) + draws, grid), fine_grained(dtype(1) + draws, grid)
    assert from_zero.mean() > 0.5
    assert not from_one.any()


def test_a_release_on_the_lattice_does_not() -> None:
    """Same sums, same attack: nothing is excluded, and the low bits of both are distributed alike."""
    clip = 1 / (1 - SLACK)
    outputs = [
        release([np.full(200_000, total)], clip_norm=clip, noise_multiplier=1.0, noise=SecureNoise())[0]
        for total in (0.0, 1.0 / math.sqrt(200_000))
    ]
    for grid in (2.0**-53, 2.0**-24, lattice_step(clip, 200_000)):
        assert not any(fine_grained(values, grid).any() for values in outputs)
    step = lattice_step(clip, 200_000)
    low_bits = [np.bincount((values / step).astype(np.int64) & 63, minlength=64) for values in outputs]
    assert stats.chi2_contingency(np.array(low_bits)).pvalue > 1e-9
