"""The certificate: privacy loss distributions, composed numerically with pessimistic rounding.

Every epsilon that we print as a guarantee comes from here. Each mechanism's privacy loss is put on a fixed grid so
that the discrete distribution dominates the true one ("connect the dots"), convolved by FFT, and read at delta.

Out of scope: schedules chosen adaptively from earlier results (federated-methods-and-dp.md 3.4).
Source: dp_accounting.pld (Doroshenko et al. 2022, arXiv 2207.04380). Ours differs in composing a randomised response
as the bounding pair of what is only known to be epsilon-DP (see `fl_app.privacy.events`), in giving the exponential
mechanism a pair of its own (`bounded_range`), in merging equal mechanisms first, and
in refusing to convolve what is far beyond any budget.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from typing import TYPE_CHECKING, TypeAlias

from fl_app.errors import LedgerRefusal
from fl_app.privacy.accountants import bounded_range
from fl_app.privacy.events import check_delta, merged, to_dp_event
from fl_app.types import BoundedRange, Exponential, Gaussian, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    import dp_accounting
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    from fl_app.types import DpReceipt, MechanismEvent

    Loss: TypeAlias = PrivacyLossDistribution | None

GRID = 1e-3
"""Step of the privacy-loss grid. As tight as 1e-4 to three decimals and ten times faster (performance.md 4)."""

MAX_DIVERGENCE = 1000.0
"""Upper bound on the summed KL divergence that we still convolve; beyond it epsilon is reported as infinite.

Epsilon exceeds the mean privacy loss here, so such a receipt is far outside any budget; infinity never under-reports,
and a receipt from elsewhere cannot make us convolve gigabytes. Not studied: any value well above 100 would do."""

MIN_NOISE = 0.1
"""Smallest noise multiplier that we still put on the grid: one Gaussian at 0.1 alone costs epsilon 92 at 1e-5."""


def epsilon(receipts: Sequence[DpReceipt] | None, delta: float) -> float:
    """Return the epsilon of everything the receipts released, at `delta`, under add-or-remove of one unit.

    | receipts                                | epsilon |
    | none at all, `[]`                       | 0.0     |
    | `None`, or any without noise            | inf     |
    | far beyond any budget (MAX_DIVERGENCE)  | inf     |

    Guarantee: never below the true epsilon, up to float64 rounding of the convolution.
    Raises: LedgerRefusal for a delta outside (0, 1), an unknown event, or receipts of different units or relations.
    """
    check_delta(delta)
    if receipts is None:
        return math.inf
    return read(compose(receipts), delta) if merged(receipts) else 0.0


def compose(receipts: Sequence[DpReceipt]) -> Loss:
    """Return the privacy loss of all receipts on the grid, or None when it is infinite.

    Raises: LedgerRefusal as `epsilon`.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    together = merged(receipts)
    if not all(_noisy(receipt.event) for receipt in together):
        return None
    if not math.fsum(_divergence(receipt.event) for receipt in together) <= MAX_DIVERGENCE:
        return None
    total = pld.identity(value_discretization_interval=GRID)
    for receipt in together:
        event = receipt.event
        if isinstance(event, BoundedRange):  # dp-accounting has no such event: PLD would refuse its zCDP
            total = total.compose(bounded_range.loss(event.span, event.count, GRID))
        else:
            total = total.compose(_loss(to_dp_event(receipt)))
    return total


def join(past: Loss, new: Loss) -> Loss:
    """Return the privacy loss of both, or None when either is infinite."""
    return None if past is None or new is None else past.compose(new)


def read(loss: Loss, delta: float) -> float:
    """Return the epsilon of a privacy loss at `delta`."""
    return math.inf if loss is None else max(0.0, float(loss.get_epsilon_for_delta(delta)))


def label() -> str:
    """Return the name that stands beside every printed epsilon, e.g. 'PLD (dp-accounting 0.6.0, grid 0.001)'."""
    return f"PLD (dp-accounting {importlib.metadata.version('dp-accounting')}, grid {GRID:g})"


@functools.lru_cache(maxsize=64)
def _loss(event: dp_accounting.DpEvent) -> PrivacyLossDistribution:
    """Return the loss of one composed event; kept for the next question: it is a function of public values."""
    import dp_accounting as dp
    from dp_accounting.pld import privacy_loss_distribution as pld

    match event:
        case dp.SelfComposedDpEvent(event=dp.PoissonSampledDpEvent(event=dp.GaussianDpEvent() as gaussian) as sampled):
            return pld.from_gaussian_mechanism(
                gaussian.noise_multiplier,
                value_discretization_interval=GRID,
                sampling_prob=sampled.sampling_probability,
            ).self_compose(event.count)
        case dp.SelfComposedDpEvent(event=dp.GaussianDpEvent() as gaussian):
            # n Gaussians are exactly one with noise smaller by sqrt(n): no convolution, no rounding n times.
            scale = gaussian.noise_multiplier / math.sqrt(event.count)
            return pld.from_gaussian_mechanism(scale, value_discretization_interval=GRID)
        case dp.SelfComposedDpEvent(event=dp.RandomizedResponseDpEvent() as response):
            # Rounded up to the grid, draw by draw: at most GRID per draw too much, 1.7 % for 100 draws of 0.1.
            return pld.from_randomized_response(
                response.noise_parameter,
                response.num_buckets,
                value_discretization_interval=GRID,
                neighboring_relation=dp.NeighboringRelation.REPLACE_ONE,
            ).self_compose(event.count)
        case _:
            raise LedgerRefusal(f"PLD has no loss for {event}; known events are listed in fl_app.privacy.events")


def _noisy(event: MechanismEvent) -> bool:
    if isinstance(event, BoundedRange):
        return event.span <= bounded_range.MOST
    return isinstance(event, Exponential) or event.noise_multiplier >= MIN_NOISE


def _divergence(event: MechanismEvent) -> float:
    """Bound the KL divergence of an event: the smaller of convexity, q / (2 s^2), and chi-square, q^2 (e^(1/s^2) - 1).

    A draw that is epsilon-DP: epsilon * tanh(epsilon / 2), the exact divergence of its randomised response.
    """
    match event:
        case PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps):
            exponent = noise**-2
            chi_square = rate**2 * math.expm1(exponent) if exponent < 500 else math.inf  # noqa: PLR2004
            return steps * min(rate * exponent / 2, chi_square)
        case Gaussian(noise_multiplier=noise, count=count):
            return count / (2 * noise**2)
        case Exponential(epsilon=value, count=count):
            return count * value * math.tanh(value / 2)
        case BoundedRange(span=span, count=count):
            return count * bounded_range.divergence(span)
