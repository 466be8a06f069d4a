"""An ESTIMATE of epsilon by Edgeworth expansion: a cross-check for planning, never a certificate.

It can under-report, and does: expansions are right in the middle of a distribution, delta lives in its tail. At delta
1e-5 (spec 2.3; the first row measured here): what the sum of privacy losses says with 0, 1 and 2 correction terms.

| steps, q, noise | PLD   | 0 (CLT) | 1 (E1) | 2 (E2) |
| 50, .01, .6     | 3.354 | 1.150   | 1.386  | 1.559  |
| 60, .05, 1.2    | 1.964 | 1.703   | 1.881  | 2.000  |
| 600, .05, 1.2   | 5.952 | 5.894   | 6.225  | 6.243  |
| 600, .05, 2.6   | 2.001 | 2.059   | 2.046  | 2.011  |
| 3000, .01, .8   | 5.242 | 5.024   | 5.385  | 5.468  |

How. With P = N(0, 1), Q = (1 - q) N(0, 1) + q N(1/s, 1) and the loss L = log Q/P of one step, removing a unit costs
delta(eps) = [1 - F_Q(eps)] - e^eps [1 - F_P(eps)], adding one F_P(-eps) - e^eps F_Q(-eps), F being the distribution
of the summed loss. Cumulants of independent losses add up, also of different mechanisms, and F follows from four:

    F(x) = Phi(z) - phi(z) [l3/6 He2(z) + l4/24 He3(z) + l3^2/72 He5(z)]     z = (x - K1) / sqrt(K2)
    l3 = K3 / K2^1.5, l4 = K4 / K2^2

A sum of Gaussians has K3 = K4 = 0: there F, and so epsilon, is exact.

Out of scope: exponential draws. Their loss takes two values, and on a lattice the expansion misses a jump that does not
shrink with the tail; they are refused. The interval of the paper, whose error terms are multiplied by e^eps.
Source: EW-Tune (Behnia et al. 2022, arXiv 2210.15042, section III) after Wang et al. 2022 (arXiv 2206.04236). Ours
differs in mixing mechanisms by adding cumulants, and in reading the last crossing of delta where there are several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from fl_app.errors import LedgerRefusal
from fl_app.privacy.events import check_delta, merged
from fl_app.types import BoundedRange, Exponential, Gaussian, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from fl_app.types import DpReceipt

    Floats: TypeAlias = npt.NDArray[np.float64]

Terms: TypeAlias = Literal[0, 1, 2]

MIN_NOISE = 0.1
"""Below it the answer is infinity, as in the certificate: one Gaussian at 0.1 alone costs epsilon 92 at 1e-5."""

MAX_MEAN = 1000.0
"""Mean loss beyond which the answer is infinity: epsilon exceeds it. As the certificate's MAX_DIVERGENCE."""

STEP = 0.02
"""Step of the integration grid, times min(1, noise). The integrand is analytic in a strip of width pi * noise, so the
trapezoid rule is off by about exp(-2 pi^2 / STEP): nothing, in float64."""

TAIL = 13.0
"""Standard deviations integrated on either side; beyond them lies 1e-38."""

LOOKS = 4000
"""Points at which delta is compared before the last crossing is found exactly."""

MAX_EXPONENT = 600.0
"""Where e^eps is cut off, so that a strange receipt cannot overflow: only what lies far beyond any delta is cut."""

BEYOND = 80.0
"""How small e^-BEYOND both terms of delta must be where the search ends: far below any delta."""


def epsilon(receipts: Sequence[DpReceipt] | None, delta: float, *, terms: Terms = 2) -> float:
    """Return an estimate of epsilon at `delta`, the larger of removing and adding a unit; `[]` is 0, no noise is inf.

    `terms`: 0 the central limit theorem, 1 the first Edgeworth term (skewness; "E1"), 2 also the second (kurtosis and
    squared skewness; "E2", what is returned unless asked otherwise). Exact, up to rounding, when all are Gaussians.

    Guarantee: none. It may lie below the true epsilon; see the table above.
    Raises: LedgerRefusal for a delta outside (0, 1), an exponential draw, an unknown event, or receipts of different
    units or relations.
    """
    check_delta(delta)
    if receipts is None:
        return math.inf
    together = merged(receipts)
    for name in sorted({type(r.event).__name__ for r in together if isinstance(r.event, Exponential | BoundedRange)}):
        raise LedgerRefusal(f"the Edgeworth estimate does not know {name}; ask the PLD or the RDP accountant")
    pairs: list[LossCumulants] = []
    for receipt in together:
        event = receipt.event
        assert not isinstance(event, Exponential | BoundedRange)
        if event.noise_multiplier < MIN_NOISE:
            return math.inf
        pairs.append(cumulants(event))
    if not pairs:
        return 0.0

    import numpy as np

    present = np.sum([pair.present for pair in pairs], axis=0)
    absent = np.sum([pair.absent for pair in pairs], axis=0)
    if max(present[0], -absent[0]) > MAX_MEAN:
        return math.inf
    if not min(present[1], absent[1]) > 0:
        return 0.0  # a sample rate so small that no loss is left in float64
    # P(L > eps) under one and e^eps P(L > eps) under the other; adding a unit is the same with the loss turned round.
    turned = np.array([-1.0, 1.0, -1.0, 1.0])
    return max(
        _last_crossing(present, absent, delta, terms),
        _last_crossing(absent * turned, present * turned, delta, terms),
    )


def label() -> str:
    """Return the name that stands beside this number, which says that it is none to rely on."""
    return "Edgeworth ESTIMATE, second order (EW-Tune); can under-report, no certificate"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossCumulants:
    """The first four cumulants of an event's privacy loss log Q/P: with the unit (Q) and without it (P).

    Shapes: both (4,) float64.
    """

    present: Floats
    absent: Floats


def cumulants(event: PoissonGaussian | Gaussian) -> LossCumulants:
    """Return the cumulants of all steps of one event: closed form for Gaussians, else numerical integration."""
    import numpy as np

    noise = event.noise_multiplier
    if isinstance(event, Gaussian) or event.sample_rate == 1:
        count = event.count if isinstance(event, Gaussian) else event.steps
        half = count / (2 * noise**2)
        return LossCumulants(present=np.array([half, 2 * half, 0.0, 0.0]), absent=np.array([-half, 2 * half, 0.0, 0.0]))
    rate, shift, step = event.sample_rate, 1 / noise, STEP * min(1.0, noise)
    x = np.arange(-TAIL, shift + TAIL + step, step)
    loss = np.log1p(rate * np.expm1(shift * x - shift**2 / 2))
    without = np.exp(-(x**2) / 2) * step / math.sqrt(2 * math.pi)
    with_one = (1 - rate) * without + rate * np.exp(-((x - shift) ** 2) / 2) * step / math.sqrt(2 * math.pi)
    return LossCumulants(
        present=event.steps * _cumulants(loss, with_one), absent=event.steps * _cumulants(loss, without)
    )


def _cumulants(loss: Floats, weights: Floats) -> Floats:
    """Return mean, variance, third and fourth cumulant of `loss` under `weights`, from moments about the mean."""
    import numpy as np

    mean = float(np.dot(weights, loss))
    second, third, fourth = (float(np.dot(weights, (loss - mean) ** power)) for power in (2, 3, 4))
    return np.array([mean, second, third, fourth - 3 * second**2])


def _last_crossing(above: Floats, below: Floats, delta: float, terms: Terms) -> float:
    """Return the largest eps >= 0 with P_above(L > eps) - e^eps P_below(L > eps) = delta; 0 when it is never so large.

    An expansion is no distribution, so its delta may cross more than once (few steps, odd shapes): the last one counts.
    """
    import numpy as np
    from scipy import optimize

    def excess(eps: Floats) -> Floats:
        return _scaled_tail(eps, above, terms, 0.0) - _scaled_tail(eps, below, terms, 1.0) - delta

    def excess_at(eps: float) -> float:
        return float(excess(np.array(eps)))

    looks = np.linspace(0.0, max(_search_end(above), _search_end(below)), LOOKS)
    positive = np.flatnonzero(excess(looks) > 0)
    if not positive.size:
        return 0.0
    last = int(positive[-1])
    if last + 1 == LOOKS:
        return math.inf
    return optimize.toms748(excess_at, float(looks[last]), float(looks[last + 1]), xtol=1e-12)  # pyright: ignore[reportReturnType]


def _scaled_tail(eps: Floats, of: Floats, terms: Terms, power: float) -> Floats:
    """Return e^(power * eps) [1 - F(eps)], F being the expansion with these cumulants; no overflow on the way."""
    import numpy as np
    from scipy import special

    mean, variance, third, fourth = of
    z = (eps - mean) / math.sqrt(variance)
    skew, kurtosis = third / variance**1.5, fourth / variance**2
    correction = np.zeros_like(z)
    if terms >= 1:
        correction = correction + skew / 6 * (z**2 - 1)
    if terms == 2:  # noqa: PLR2004 - the second term
        correction = correction + kurtosis / 24 * (z**3 - 3 * z) + skew**2 / 72 * (z**5 - 10 * z**3 + 15 * z)
    density = np.exp(np.minimum(power * eps - z**2 / 2, MAX_EXPONENT)) / math.sqrt(2 * math.pi)
    return np.exp(np.minimum(power * eps + special.log_ndtr(-z), MAX_EXPONENT)) + density * correction


def _search_end(of: Floats) -> float:
    """Return an eps beyond which e^eps phi(z) < e^-BEYOND: the root of (eps - K1)^2 = 2 K2 (eps + BEYOND)."""
    mean, variance = float(of[0]), float(of[1])
    return mean + variance + math.sqrt(variance**2 + 2 * variance * max(mean + BEYOND, 0.0))
