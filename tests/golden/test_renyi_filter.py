"""The Renyi filter's numbers against numerical integration, closed forms and dp-accounting's own conversion."""

from __future__ import annotations

import math

import mpmath
import pytest
from dp_accounting.rdp import rdp_privacy_accountant as library
from scipy import optimize

from fl_app.privacy import renyi_filter
from fl_app.privacy.accountants import pld, rdp
from fl_app.privacy.renyi_filter import RenyiFilter
from fl_app.types import DpReceipt, Exponential, Gaussian, PoissonGaussian

PAIRS = [(0.1, 1e-5), (1.0, 1e-5), (2.0, 1e-5), (8.0, 1e-5), (8.0, 1e-3), (20.0, 1e-8)]


def poisson(noise: float, rate: float, steps: int) -> DpReceipt:
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
    return DpReceipt(event=event, unit="record")


def gaussian(noise: float, count: int = 1) -> DpReceipt:
    return DpReceipt(event=Gaussian(noise_multiplier=noise, clip_norm=1.0, count=count), unit="record")


@pytest.mark.parametrize(("epsilon", "delta"), PAIRS)
def test_the_budget_is_the_library_s_conversion_backwards(epsilon: float, delta: float) -> None:
    made = renyi_filter.fix(epsilon=epsilon, delta=delta)
    back, _ = library.compute_epsilon([made.order], [made.budget], delta)
    assert back == pytest.approx(epsilon, rel=1e-12)
    # the twin: the older conversion, epsilon = R + ln(1/delta) / (order - 1), would give another budget
    older = epsilon - math.log(1 / delta) / (made.order - 1)
    assert older < made.budget * (1 - 1e-3)
    assert library.compute_epsilon([made.order], [made.budget * 1.001], delta)[0] > epsilon


@pytest.mark.parametrize(("epsilon", "delta"), PAIRS)
def test_the_order_is_the_least_that_suits_gaussians(epsilon: float, delta: float) -> None:
    """The least order at which a Gaussian needs at most 1 / sqrt(0.85) of the noise that it needs at the best order."""

    def least_noise(order: int) -> float:
        def over(noise: float) -> float:
            return library.compute_epsilon([order], [order / (2 * noise**2)], delta)[0] - epsilon

        # so little noise is over the budget at every order, so much at none that could be the best
        return float(optimize.brentq(over, 1e-2, 1e4)) if over(1e4) < 0 else math.inf

    made = renyi_filter.fix(epsilon=epsilon, delta=delta)
    needed = {order: least_noise(order) for order in range(2, 2 * made.order + 2)}
    allowed = min(needed.values()) / math.sqrt(0.85)
    assert needed[made.order] <= allowed * (1 + 1e-6)
    assert all(needed[order] > allowed for order in needed if order < made.order)
    # the twin: the best order itself, or the closed form of the older conversion, is another one, and a higher one
    length = math.log(1 / delta)
    rho = (math.sqrt(length + epsilon) - math.sqrt(length)) ** 2
    assert made.order <= min(needed, key=lambda order: needed[order]) <= 2 + math.sqrt(length / rho)


def test_few_orders_are_written_out() -> None:
    orders = {
        epsilon: renyi_filter.fix(epsilon=epsilon, delta=1e-5).order for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0, 50.0)
    }
    assert orders == {0.5: 24, 1.0: 14, 2.0: 8, 4.0: 5, 8.0: 3, 50.0: 2}


@pytest.mark.parametrize(("noise", "rate", "order"), [(0.8, 0.01, 4), (1.2, 0.05, 10), (3.0, 0.5, 18)])
def test_one_step_against_integration(noise: float, rate: float, order: int) -> None:
    """ln E_P[(dQ/dP)^order] / (order - 1), both ways; removing a unit is the larger, and what is charged."""
    with mpmath.workdps(30):
        shift = 1 / mpmath.mpf(noise)

        def ratio(x: mpmath.mpf) -> mpmath.mpf:
            return 1 - rate + rate * mpmath.exp(shift * x - shift**2 / 2)

        pieces = mpmath.linspace(-15, float(order * shift) + 15, 40)
        removed = mpmath.quad(lambda x: mpmath.npdf(x) * ratio(x) ** order, pieces)
        added = mpmath.quad(lambda x: mpmath.npdf(x) * ratio(x) ** (1 - order), pieces)
        exact, reversed_ = (float(mpmath.log(one) / (order - 1)) for one in (removed, added))
    found = RenyiFilter(epsilon=8.0, delta=1e-5, order=order).spent([poisson(noise, rate, 7)])
    assert found == pytest.approx(7 * exact, rel=1e-9)
    assert reversed_ < exact
    assert found != pytest.approx(7 * reversed_, rel=1e-3)  # the twin: the other direction would be under-charged


def test_gaussians_and_exponentials_in_closed_form() -> None:
    one = RenyiFilter(epsilon=8.0, delta=1e-5, order=4)
    assert one.spent([gaussian(3.0, 5)]) == pytest.approx(5 * 4 / (2 * 9), rel=1e-12)
    lie = 1 / (1 + math.exp(0.3))
    exact = math.log((1 - lie) ** 4 * lie**-3 + lie**4 * (1 - lie) ** -3) / 3
    draws = DpReceipt(event=Exponential(epsilon=0.3, count=6), unit="record")
    assert one.spent([draws]) == pytest.approx(6 * exact, rel=1e-9)
    assert one.spent([gaussian(3.0, 5), draws]) == pytest.approx(5 * 4 / 18 + 6 * exact, rel=1e-9)


@pytest.mark.parametrize(
    "receipts",
    [
        [poisson(1.2, 0.05, 60)],
        [poisson(1.2, 0.05, 600)],
        [poisson(0.8, 0.01, 3000), gaussian(4.0)],
        [gaussian(2.0)],
        [DpReceipt(event=Exponential(epsilon=0.2, count=20), unit="record"), poisson(3.0, 0.1, 20)],
    ],
)
@pytest.mark.parametrize(("epsilon", "delta"), PAIRS)
def test_an_equivalent_is_never_below_pld_nor_the_best_order(
    receipts: list[DpReceipt], epsilon: float, delta: float
) -> None:
    """So a server that recomputes by PLD never finds a filter's site below the truth."""
    one = renyi_filter.fix(epsilon=epsilon, delta=delta)
    found = one.epsilon_equivalent(receipts)
    assert found >= pld.epsilon(receipts, delta)
    # dp-accounting's default orders hold whole numbers up to 64, tenths below 11
    assert one.order > 64 or found >= rdp.epsilon(receipts, delta) - 1e-9


def test_what_the_filter_costs_beside_pld() -> None:
    """The table of `renyi_filter`: the price of looking, which a change of the order or the conversion would move."""
    for epsilon, rate, steps, plain, filtered in (
        (2.0, 0.05, 60, 1.189, 1.287),
        (2.0, 0.05, 600, 2.602, 2.902),
        (8.0, 0.05, 600, 1.019, 1.094),
        (2.0, 0.01, 60, 0.714, 0.905),
    ):
        one = renyi_filter.fix(epsilon=epsilon, delta=1e-5)
        by_pld = optimize.brentq(
            lambda s, e=epsilon, q=rate, n=steps: pld.epsilon([poisson(s, q, n)], 1e-5) - e, 0.5, 9, xtol=1e-3
        )
        by_filter = optimize.brentq(
            lambda s, f=one, q=rate, n=steps: f.spent([poisson(s, q, n)]) - f.budget, 0.5, 9, xtol=1e-3
        )
        assert by_pld == pytest.approx(plain, rel=2e-3)
        assert by_filter == pytest.approx(filtered, rel=2e-3)
