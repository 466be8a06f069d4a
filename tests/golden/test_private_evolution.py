"""What T rounds of votes cost, against the published table and the exact formula of a Gaussian.

Source: specs `synthesis-and-distillation.md` 5.1: Aug-PE's noise for ten rounds at delta = 1 / (N ln N); Balle & Wang
2018 (1805.06530), theorem 8, for the formula.
"""

from __future__ import annotations

import math

import pytest
from scipy import optimize, stats

from clients.learners.pe_votes import PeVotes
from clients.stages import PublicConstants
from fl_app.privacy.accountants import pld
from fl_app.types import DpReceipt, Gaussian

ROUNDS = 10
TABLE = [  # rows of the corpus, epsilon, noise multiplier
    *((1_940_000, 1, 15.34), (1_940_000, 2, 8.03), (1_940_000, 4, 4.24)),  # Yelp, 1.94 million
    *((8_396, 1, 11.60), (8_396, 2, 6.22), (8_396, 4, 3.38)),  # OpenReview
    *((75_316, 1, 13.26), (75_316, 2, 7.01), (75_316, 4, 3.75)),  # PubMed
]
CONSTANTS = PublicConstants(sample_rate=0.5, expected_batch=4, max_tokens=24, max_rows_per_unit=1, unit="record")


def exact_epsilon(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian of sensitivity mu and noise 1, from theorem 8."""

    def spent(epsilon: float) -> float:
        tail = stats.norm.logcdf(-epsilon / mu - mu / 2)
        return float(stats.norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon + tail)) - delta

    return float(optimize.brentq(spent, 0, 60, xtol=1e-10))


def _delta(rows: int) -> float:
    return 1 / (rows * math.log(rows))


def _receipts(noise: float, rounds: int) -> list[DpReceipt]:
    learner = PeVotes.model_validate({"kind": "pe_votes", "embedder": {"kind": "local"}}).build(1)
    return [receipt for _ in range(rounds) for receipt in learner.announce(CONSTANTS, noise)]


@pytest.mark.parametrize(("rows", "epsilon", "noise"), TABLE)
def test_ten_rounds_at_the_published_noise_cost_the_published_epsilon(rows: int, epsilon: float, noise: float) -> None:
    """Within 0.6 %: the table has two decimals, and the size of Yelp is known to three digits."""
    assert pld.epsilon(_receipts(noise, ROUNDS), _delta(rows)) == pytest.approx(epsilon, rel=6e-3)


@pytest.mark.parametrize("rounds", [1, 4, 10, 25])
@pytest.mark.parametrize("noise", [2.0, 6.22])
def test_rounds_compose_to_mu_of_the_root_of_their_number(rounds: int, noise: float) -> None:
    delta = 1e-5

    found = pld.epsilon(_receipts(noise, rounds), delta)

    exact = exact_epsilon(math.sqrt(rounds) / noise, delta)
    assert exact - 1e-9 <= found <= exact + 3e-3
    if rounds > 1:  # the twin: adding up as if noise were shared over the rounds is far below the truth
        assert exact_epsilon(1 / noise, delta) < 0.8 * exact


def test_many_bins_cost_no_more_than_one() -> None:
    """The receipt has no field for the number of bins: it is one Gaussian of sensitivity one."""
    assert {receipt.event for receipt in _receipts(3.0, 2)} == {Gaussian(noise_multiplier=3.0, clip_norm=1.0, count=1)}
