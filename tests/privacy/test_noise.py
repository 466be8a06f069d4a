"""Noise: right scale, right law, no seed, no repetition; and each check catches a sampler that is 3 % off.

The production source cannot be seeded, so bounds stand at six standard errors or more: no chance failure.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats

from fl_app import seeds
from fl_app.errors import LedgerRefusal
from fl_app.privacy import noise
from fl_app.privacy.noise import NoiseSource, SecureNoise, SimulatedNoise

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT = 400_000
UNITS = 2_000_000
RATE = 0.2


def simulated() -> SimulatedNoise:
    return SimulatedNoise(seeds.stream(7, "noise", "site-0", 1))


SOURCES = pytest.mark.parametrize("make", [SecureNoise, simulated], ids=["secure", "simulated"])


def check_scale(values: np.ndarray, scale: float) -> None:
    """Standard deviation within 1 % (9 standard errors at this count), mean within 8 standard errors."""
    assert abs(values.std() / scale - 1) < 0.01
    assert abs(values.mean()) < 8 * scale / math.sqrt(values.size)


def check_law(values: np.ndarray, scale: float) -> None:
    assert stats.kstest(values / scale, "norm").pvalue > 1e-9


def check_independence(values: np.ndarray) -> None:
    """Neighbours, and the two halves that share radii, are uncorrelated in value and in square."""
    half = values.size // 2
    for left, right in ((values[:-1], values[1:]), (values[:half], values[half:])):
        for power in (1, 2):
            correlation = np.corrcoef(left**power, right**power)[0, 1]
            assert abs(correlation) < 7 / math.sqrt(left.size)


def check_sampling(drawn: np.ndarray, count: int, rate: float) -> None:
    """Eight standard errors of the binomial, over all units and over each quarter of them."""
    assert np.all(np.diff(drawn) > 0)
    for low in range(0, count, count // 4):
        part = np.count_nonzero((drawn >= low) & (drawn < low + count // 4))
        expected = rate * (count // 4)
        assert abs(part - expected) < 8 * math.sqrt(expected * (1 - rate))


@SOURCES
def test_normals_have_the_right_scale_and_law(make: Callable[[], NoiseSource]) -> None:
    values = make().normal((COUNT // 100, 100))
    assert values.dtype == np.float64
    assert values.shape == (COUNT // 100, 100)
    flat = values.ravel().astype(np.float64)
    check_scale(flat, 1.0)
    check_law(flat, 1.0)
    check_independence(flat)


@SOURCES
@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_three_percent_off_is_caught(make: Callable[[], NoiseSource], factor: float) -> None:
    values = make().normal((COUNT,)).astype(np.float64) * factor
    with pytest.raises(AssertionError):
        check_scale(values, 1.0)
    with pytest.raises(AssertionError):
        check_law(values, 1.0)


def test_reused_noise_is_caught() -> None:
    half = SecureNoise().normal((COUNT // 2,)).astype(np.float64)
    with pytest.raises(AssertionError):
        check_independence(np.concatenate([half, half]))


@SOURCES
def test_sampling_draws_each_unit_with_its_rate(make: Callable[[], NoiseSource]) -> None:
    drawn = make().poisson_sample(UNITS, RATE)
    assert drawn.dtype == np.int64
    check_sampling(drawn, UNITS, RATE)
    member = np.zeros(UNITS)
    member[drawn] = 1
    assert abs(np.corrcoef(member[:-1], member[1:])[0, 1]) < 7 / math.sqrt(UNITS)


@SOURCES
def test_a_rate_three_percent_off_is_caught(make: Callable[[], NoiseSource]) -> None:
    drawn = make().poisson_sample(UNITS, RATE * 1.03)
    with pytest.raises(AssertionError):
        check_sampling(drawn, UNITS, RATE)


@SOURCES
def test_edges(make: Callable[[], NoiseSource]) -> None:
    source = make()
    assert source.poisson_sample(0, 0.5).shape == (0,)
    assert source.poisson_sample(9, 0.0).size == 0
    assert source.poisson_sample(9, 1.0).tolist() == list(range(9))
    assert source.poisson_sample(0, 0.5).dtype == np.int64
    assert source.normal((0, 3)).shape == (0, 3)
    assert source.normal((3,)).shape == (3,)
    assert source.normal(()).shape == ()
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(LedgerRefusal):
            source.poisson_sample(3, rate)
    with pytest.raises(LedgerRefusal):
        source.poisson_sample(-1, 0.5)


LAWS = {"uniform": stats.uniform(), "gumbel": stats.gumbel_r(), "laplace": stats.laplace()}


@SOURCES
@pytest.mark.parametrize("name", LAWS)
def test_uniforms_gumbels_and_laplaces_have_their_law(make: Callable[[], NoiseSource], name: str) -> None:
    values = getattr(make(), name)((COUNT // 100, 100))
    assert values.dtype == np.float64
    assert values.shape == (COUNT // 100, 100)
    flat = values.ravel()
    assert stats.kstest(flat, LAWS[name].cdf).pvalue > 1e-9
    assert stats.kstest(0.97 * flat, LAWS[name].cdf).pvalue < 1e-9  # the twin: three per cent off is caught
    assert abs(np.corrcoef(flat[:-1], flat[1:])[0, 1]) < 7 / math.sqrt(flat.size)


@SOURCES
def test_draws_are_bounded_and_finite(make: Callable[[], NoiseSource]) -> None:
    source = make()
    uniform = source.uniform((COUNT,))
    assert 0 < uniform.min() < 1e-4
    assert uniform.max() <= 1
    gumbel = source.gumbel((COUNT,))
    assert -3.7 < gumbel.min() < -2
    assert 8 < gumbel.max() < 45.1
    assert source.laplace(()).shape == ()
    assert source.uniform((0, 2)).shape == (0, 2)


def test_the_ends_of_a_uniform_make_no_infinity() -> None:
    """Words 0 and 2^64 - 1, which chance does not bring: a long tail on the right, none that is infinite."""
    ends = np.array([0.5 * 2.0**-64, 1.0])
    assert noise._gumbel(ends) == pytest.approx([65 * math.log(2), -math.log(53 * math.log(2))])
    assert np.isfinite(noise._laplace(np.array([ends, ends[::-1]]))).all()


@SOURCES
def test_a_race_of_gumbels_is_a_draw_from_softmax(make: Callable[[], NoiseSource]) -> None:
    scores = np.array([2.0, 1.0, 0.0, -1.0])
    counts = np.bincount((scores + make().gumbel((COUNT, 4))).argmax(axis=1), minlength=4)
    weights = np.exp(scores)
    assert stats.chisquare(counts, COUNT * weights / weights.sum()).pvalue > 1e-9
    cold = np.exp(1.03 * scores)
    assert stats.chisquare(counts, COUNT * cold / cold.sum()).pvalue < 1e-9


def test_no_seed_reaches_the_production_source() -> None:
    assert not inspect.signature(SecureNoise).parameters
    drawn: list[bytes] = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the point of the test
        drawn.append(SecureNoise().normal((8,)).tobytes())
    assert drawn[0] != drawn[1]
    assert SecureNoise().simulated is False


def test_simulation_repeats_and_says_so() -> None:
    assert simulated().normal((50,)).tobytes() == simulated().normal((50,)).tobytes()
    assert simulated().poisson_sample(500, 0.3).tolist() == simulated().poisson_sample(500, 0.3).tolist()
    assert simulated().simulated is True


def test_a_fork_does_not_repeat_the_stream() -> None:
    source = SecureNoise()
    source.normal((4,))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.normal((4,)).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    ours, theirs = source.normal((4,)).tobytes(), os.read(read, 16)
    os.close(read)
    os.close(write)
    assert len(theirs) == 16
    assert ours != theirs


def test_threads_never_share_a_stream() -> None:
    source = SecureNoise()
    drawn: list[bytes] = []
    threads = [threading.Thread(target=lambda: drawn.append(source.normal((64,)).tobytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 8
