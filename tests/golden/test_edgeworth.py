"""The Edgeworth estimate against numbers that are not ours, and the reason why it certifies nothing.

Sources: the research notes' table (EW-Tune's formulas beside dp-accounting's PLD), cumulants by mpmath's adaptive
quadrature at 30 digits, the exact Gaussian, and PLD.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from fl_app.privacy.accountants import edgeworth, pld
from fl_app.privacy.accountants.edgeworth import Terms, cumulants
from fl_app.types import DpReceipt, Gaussian, PoissonGaussian

DELTA = 1e-5
TABLE = [  # noise multiplier, sample rate, steps, PLD, no term, one term (E1), two terms (E2)
    (1.2, 0.05, 60, 1.964, 1.703, 1.881, 2.000),
    (1.2, 0.05, 600, 5.952, 5.894, 6.225, 6.243),
    (2.6, 0.05, 600, 2.001, 2.059, 2.046, 2.011),
    (0.8, 0.01, 3000, 5.242, 5.024, 5.385, 5.468),
]


def poisson(noise: float, rate: float, steps: int) -> DpReceipt:
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
    return DpReceipt(event=event, unit="record")


def gaussian(noise: float, count: int = 1) -> DpReceipt:
    return DpReceipt(event=Gaussian(noise_multiplier=noise, clip_norm=1.0, count=count), unit="record")


@pytest.mark.parametrize(("noise", "rate", "steps", "_pld", "none", "one", "two"), TABLE)
def test_the_notes_table(
    noise: float, rate: float, steps: int, _pld: float, none: float, one: float, two: float
) -> None:
    receipts = [poisson(noise, rate, steps)]
    assert edgeworth.epsilon(receipts, DELTA, terms=0) == pytest.approx(none, abs=1e-3)
    assert edgeworth.epsilon(receipts, DELTA, terms=1) == pytest.approx(one, abs=1e-3)
    assert edgeworth.epsilon(receipts, DELTA, terms=2) == pytest.approx(two, abs=1e-3)
    assert edgeworth.epsilon(receipts, DELTA) == edgeworth.epsilon(receipts, DELTA, terms=2)  # E2 is what is returned


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "terms"),
    [
        (1.2, 0.05, 60, 0),  # the central limit theorem: 1.703 of 1.964
        (0.8, 0.01, 3000, 0),
        (1.2, 0.05, 60, 1),  # one term: 1.881 of 1.964
        (1.0, 0.05, 20, 2),  # two terms: 1.609 of 1.985
        (0.6, 0.01, 50, 2),  # two terms: 1.559 of 3.354, less than half
    ],
)
def test_every_order_under_reports_somewhere(noise: float, rate: float, steps: int, terms: Terms) -> None:
    """Why it is no certificate: PLD rounds up by 1e-3 at most here, so what lies further below lies below the truth."""
    receipts = [poisson(noise, rate, steps)]
    assert edgeworth.epsilon(receipts, DELTA, terms=terms) < pld.epsilon(receipts, DELTA) - 0.05


def test_many_steps_are_estimated_well_and_few_are_not() -> None:
    def off(noise: float, steps: int) -> float:
        receipts = [poisson(noise, 0.05, steps)]
        return abs(edgeworth.epsilon(receipts, DELTA) / pld.epsilon(receipts, DELTA) - 1)

    assert off(2.6, 600) < 0.01
    assert off(2.6, 5000) < 0.01
    assert off(1.0, 20) > 0.15  # the twin: the same bar fails where the tail is not reached


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0, 7.0])
def test_gaussians_are_exact(noise: float) -> None:
    for receipts in ([gaussian(noise)], [gaussian(3 * noise, 4), gaussian(3 * noise, 5)], [poisson(noise, 1.0, 1)]):
        exact = pld.epsilon([gaussian(noise)], DELTA)
        for terms in (0, 1, 2):
            assert edgeworth.epsilon(receipts, DELTA, terms=terms) == pytest.approx(exact, rel=1e-3, abs=1e-5)


def _mpmath_cumulants(noise: float, rate: float, *, present: bool) -> list[float]:
    with mpmath.workdps(30):
        shift, rate_ = 1 / mpmath.mpf(noise), mpmath.mpf(rate)

        def density(x: mpmath.mpf) -> mpmath.mpf:
            without = mpmath.npdf(x)
            return (1 - rate_) * without + rate_ * mpmath.npdf(x, shift) if present else without

        def loss(x: mpmath.mpf) -> mpmath.mpf:
            return mpmath.log(1 - rate_ + rate_ * mpmath.exp(shift * x - shift**2 / 2))

        pieces = mpmath.linspace(-14, float(shift) + 14, 30)
        mean = mpmath.quad(lambda x: density(x) * loss(x), pieces)
        second, third, fourth = (
            mpmath.quad(lambda x, power=power: density(x) * (loss(x) - mean) ** power, pieces) for power in (2, 3, 4)
        )
        return [float(value) for value in (mean, second, third, fourth - 3 * second**2)]


@pytest.mark.parametrize(("noise", "rate"), [(1.2, 0.05), (0.3, 0.01), (4.0, 0.5)])
def test_cumulants_against_adaptive_quadrature(noise: float, rate: float) -> None:
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=3, clip_norm=1.0)
    found = cumulants(event)
    for present, ours in ((True, found.present), (False, found.absent)):
        exact = 3 * np.array(_mpmath_cumulants(noise, rate, present=present))
        np.testing.assert_allclose(ours, exact, rtol=1e-8)
        # the twin: moments about zero, a common slip, are not cumulants
        assert not np.allclose(ours[1] + ours[0] ** 2, exact[1], rtol=1e-8)


def test_mixed_mechanisms_add_their_cumulants() -> None:
    """Two halves of a schedule are the whole; and a mix costs more than each part and less than the sum."""
    halves = [poisson(1.2, 0.05, 300), poisson(1.2, 0.05, 300)]
    assert edgeworth.epsilon(halves, DELTA) == edgeworth.epsilon([poisson(1.2, 0.05, 600)], DELTA)
    parts = [poisson(1.2, 0.05, 600), poisson(2.0, 0.02, 900), gaussian(3.0)]
    total = edgeworth.epsilon(parts, DELTA)
    singles = [edgeworth.epsilon([part], DELTA) for part in parts]
    assert max(singles) < total < sum(singles)
    assert total == pytest.approx(pld.epsilon(parts, DELTA), rel=0.06)
    assert math.sqrt(sum(one**2 for one in singles)) != pytest.approx(total, rel=0.01)  # squares do not just add


def test_adding_a_unit_counts_as_well() -> None:
    """Where the reversed pair is the larger: with one term at 60 steps, 1.881 against 1.876 for removing."""
    event = PoissonGaussian(noise_multiplier=1.2, sample_rate=0.05, steps=60, clip_norm=1.0)
    pair = cumulants(event)
    removed = edgeworth._last_crossing(pair.present, pair.absent, DELTA, 1)
    assert removed < edgeworth.epsilon([poisson(1.2, 0.05, 60)], DELTA, terms=1) - 0.004
