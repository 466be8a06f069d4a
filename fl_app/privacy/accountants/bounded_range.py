"""The worst pair of an exponential mechanism, in closed form: two logistic distributions, `span` apart.

Let the log-ratios log P(y) / Q(y) of one draw lie in an interval of length h, [a, a + h], wherever a is. For any set of
outcomes with p = P(S) and q = Q(S): p / q <= e^(a + h) and (1 - p) / (1 - q) >= e^a, hence

    logit(p) <= logit(q) + h

and that curve of (q, p) is the trade-off between Logistic(0, 1) and Logistic(h, 1). So (Blackwell) each draw is a
post-processing of one draw from that pair, and composing the pair bounds draws that are chosen adaptively. The pair is
symmetric, so removing and adding a unit cost the same.

    delta(e) = e^e (e^((h - e) / 2) - 1)^2 / (e^h - 1)    for |e| < h
    KL       = h coth(h / 2) - 2                          (h^2 / 6 for small h)

For comparison: h^2 / 8 is the zCDP of the mechanism, an upper bound on its Renyi curve that no single pair attains at
all orders; the binary pair of an h-DP mechanism has a KL of h^2 / 2.

Source: delta(e) is the bound of Dong, Durfee & Rogers 2020 (arXiv 1909.13830) for one bounded-range mechanism; ours
differs in reading it as one pair of distributions and composing that pair. zCDP: Cesar & Rogers 2021 (2004.07223).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from fl_app.errors import LedgerRefusal

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

MOST = 30.0
"""Of one draw: epsilon is then near it, far above any budget, and exp(span) loses the digits that delta is made of."""

FINE = 16
"""A span shorter than this many grid steps is too coarse on the grid: see `loss`."""

PROBIT_PER_LOGIT = math.sqrt(2 * math.pi) / 4
"""The steepest slope of probit(p) over logit(p), at p = 1/2: a draw of span h is h * this Gaussian-DP."""


def delta(span: float, epsilon: float) -> float:
    """Return the hockey-stick divergence of the pair at `epsilon`, which may be negative."""
    if epsilon >= span:
        return 0.0
    if epsilon <= -span:
        return -math.expm1(epsilon)
    return math.exp(epsilon) * math.expm1((span - epsilon) / 2) ** 2 / math.expm1(span)


def divergence(span: float) -> float:
    """Return the KL divergence of the pair, in nats."""
    if span < 1e-2:  # noqa: PLR2004 - the difference below loses all digits; the next term is -span^4 / 360
        return span**2 / 6
    return span / math.tanh(span / 2) - 2


def loss(span: float, count: int, grid: float) -> PrivacyLossDistribution:
    """Return the privacy loss of `count` draws on the grid, never less than it is.

    A span of few grid steps would be rounded up a lot at every draw; its draws are composed as Gaussians instead, which
    are exact for any count and cost 8.6 % more epsilon (the slope above, over sqrt(1 / 3)).
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    if span > MOST:
        raise LedgerRefusal(f"span {span:g} is beyond {MOST:g}: such a draw is no private one")
    if span < FINE * grid:
        noise = 1 / (PROBIT_PER_LOGIT * span * math.sqrt(count))
        return pld.from_gaussian_mechanism(noise, value_discretization_interval=grid)
    return _one(span, grid).self_compose(count)


@functools.lru_cache(maxsize=64)
def _one(span: float, grid: float) -> PrivacyLossDistribution:
    """Return the loss of one draw, connecting the dots of `delta` at multiples of the grid."""
    import numpy as np
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld

    most = math.ceil(span / grid)
    steps = np.arange(-most, most + 1)
    deltas = np.array([min(1.0, delta(span, float(step) * grid)) for step in steps])  # beyond 1 by rounding
    deltas[0], deltas[-1] = -math.expm1(-most * grid), 0.0
    pmf = pld_pmf.create_pmf_pessimistic_connect_dots(grid, steps, deltas)
    return pld.PrivacyLossDistribution(pmf)
