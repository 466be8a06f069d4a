"""Epsilons against numbers that are not ours.

Sources: the tables of the project's research notes (dp-accounting at another grid, Opacus; DP-SGD settings of
federated learning and of KnowledgeSG), the analytic Gaussian formula (Balle & Wang 2018, theorem 8), numerical
integration of the subsampled Gaussian's own densities, and the exact composition of randomised response.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from fl_app.privacy.accountants import pld, prv, rdp
from fl_app.types import DpReceipt, Exponential, Gaussian, PoissonGaussian

POISSON = [  # noise multiplier, sample rate, steps, delta, epsilon
    (0.6, 0.01, 50, 1e-5, 3.354),
    (1.0, 0.01, 200, 1e-5, 0.913),
    (1.0, 0.05, 200, 1e-5, 4.766),
    (2.0, 0.05, 1000, 1e-5, 3.700),
    (1.0, 0.1, 1000, 1e-5, 25.20),
    (1.0, 0.05, 600, 1e-5, 8.289),
    (1.2, 0.05, 60, 1e-5, 1.964),
    (1.2, 0.05, 600, 1e-5, 5.952),
    (2.6, 0.05, 600, 1e-5, 2.001),
    (0.8, 0.01, 3000, 1e-5, 5.242),
    (1.194, 0.05, 600, 1e-5, 6.005),  # ten rounds of 60 steps
    (0.289, 0.01, 1000, 1 / 500, 54.8),  # KnowledgeSG's published setting, read as DP-SGD
]
GAUSSIAN = [(0.5, 9.997), (1.0, 4.377), (2.0, 1.993)]
RENYI = [  # noise multiplier, sample rate, steps, epsilon by RDP at 1e-5
    (0.6, 0.01, 50, 4.336),
    (1.0, 0.01, 200, 1.340),
    (1.0, 0.05, 200, 5.368),
    (2.0, 0.05, 1000, 4.024),
    (1.194, 0.05, 600, 6.578),
    (1.0, 0.05, 600, 9.12),
]


def poisson(noise: float, rate: float, steps: int) -> DpReceipt:
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
    return DpReceipt(event=event, unit="record")


def gaussian(noise: float, count: int = 1) -> DpReceipt:
    return DpReceipt(event=Gaussian(noise_multiplier=noise, clip_norm=1.0, count=count), unit="record")


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "expected"), POISSON)
def test_pld_of_dp_sgd(noise: float, rate: float, steps: int, delta: float, expected: float) -> None:
    assert pld.epsilon([poisson(noise, rate, steps)], delta) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize(("noise", "rate", "steps", "expected"), RENYI)
def test_rdp_of_dp_sgd(noise: float, rate: float, steps: int, expected: float) -> None:
    assert rdp.epsilon([poisson(noise, rate, steps)], 1e-5) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "_expected"), POISSON[:-1])
def test_three_accountants_agree(noise: float, rate: float, steps: int, delta: float, _expected: float) -> None:
    ours = pld.epsilon([poisson(noise, rate, steps)], delta)
    assert prv.epsilon([poisson(noise, rate, steps)], delta) == pytest.approx(ours, rel=0.02)
    assert ours < rdp.epsilon([poisson(noise, rate, steps)], delta) < 2 * ours


@pytest.mark.parametrize(("noise", "expected"), GAUSSIAN)
def test_one_gaussian(noise: float, expected: float) -> None:
    assert pld.epsilon([gaussian(noise)], 1e-5) == pytest.approx(expected, abs=1e-3)
    assert prv.epsilon([gaussian(noise)], 1e-5) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("noise", [0.4, 1.0, 3.7, 12.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_gaussian_against_the_analytic_formula(noise: float, delta: float) -> None:
    def delta_at(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)) - delta

    exact = optimize.brentq(delta_at, 0.0, 60.0) if delta_at(0.0) > 0 else 0.0
    found = pld.epsilon([gaussian(noise)], delta)
    assert exact - 1e-9 <= found <= exact * 1.001 + 1e-4
    # nine Gaussians at three times the noise are that same Gaussian
    assert pld.epsilon([gaussian(3 * noise, 4), gaussian(3 * noise, 5)], delta) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.05), (1.0, 0.2), (2.0, 0.5)])
def test_one_sampled_step_against_integration(noise: float, rate: float) -> None:
    """Hockey-stick divergence of the mixture (1 - q) N(0, s^2) + q N(1, s^2) from N(0, s^2), both ways."""
    x = np.linspace(-12 * noise, 1 + 12 * noise, 200_001)
    without = stats.norm.pdf(x, 0, noise)
    with_one = (1 - rate) * without + rate * stats.norm.pdf(x, 1, noise)

    def delta_at(epsilon: float) -> float:
        removed = integrate.trapezoid(np.maximum(with_one - math.exp(epsilon) * without, 0), x)
        added = integrate.trapezoid(np.maximum(without - math.exp(epsilon) * with_one, 0), x)
        return float(max(removed, added)) - 1e-5

    exact = optimize.brentq(delta_at, 0.01, 15)
    assert exact - 1e-6 <= pld.epsilon([poisson(noise, rate, 1)], 1e-5) <= exact + 2e-3


@pytest.mark.parametrize(("epsilon", "count"), [(1.0, 1), (0.1, 100), (0.5, 20)])
def test_exponential_is_never_below_the_optimal_composition(epsilon: float, count: int) -> None:
    """Exact: the worst `count` epsilon-DP draws release i of `count` lies, i binomial (arXiv 1311.0776)."""
    lie = 1 / (1 + math.exp(epsilon))

    def delta_at(total: float) -> float:
        lies = stats.binom.pmf(np.arange(count + 1), count, lie)
        return float(np.maximum(lies - math.exp(total) * lies[::-1], 0).sum())

    exact = optimize.brentq(lambda x: delta_at(x) - 1e-5, 0, count * epsilon)
    receipt = DpReceipt(event=Exponential(epsilon=epsilon, count=count), unit="record")
    found = pld.epsilon([receipt], 1e-5)
    assert exact - 1e-9 <= found <= exact + count * pld.GRID + 1e-6  # each draw is rounded up to the grid
    assert rdp.epsilon([receipt], 1e-5) >= exact
    # what LaplaceDpEvent would have said of one draw lies below the truth; see fl_app.privacy.events
    assert (1 - math.exp(-epsilon / 2)) < math.tanh(epsilon / 2)


def test_ten_rounds_are_one_of_ten_times_the_steps() -> None:
    rounds = [poisson(1.194, 0.05, 60)] * 10
    assert pld.epsilon(rounds, 1e-5) == pld.epsilon([poisson(1.194, 0.05, 600)], 1e-5)


def test_mixed_mechanisms_cost_more_than_each_and_less_than_their_sum() -> None:
    parts = [poisson(1.0, 0.05, 60), gaussian(3.0), DpReceipt(event=Exponential(epsilon=0.2, count=5), unit="record")]
    total = pld.epsilon(parts, 1e-5)
    singles = [pld.epsilon([part], 1e-5) for part in parts]
    assert max(singles) < total < sum(singles)
    assert total < rdp.epsilon(parts, 1e-5) < 1.5 * total
