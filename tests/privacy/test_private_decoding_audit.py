"""What an attacker sees of a two-token toy: never more than the epsilon that was paid, and far more of a broken twin.

Two neighbouring buckets, the one with a record that says "0" and means it, the other without. Each is decoded many
times; the attacker counts an event chosen beforehand. Clopper-Pearson bounds on its two chances (99.95 % each) give a
lower bound on epsilon that is wrong once in a thousand, and must not exceed what was announced.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from clients.learners import AnyLearner, invisible_ink, private_prediction
from fl_app import private_decoding as pd
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Callable

TRIALS = 20_000
TAIL = 5e-4
COMMON: dict[str, Any] = {"buckets_per_code": 1, "expected_units": 1.0}
PUBLIC = np.zeros(2, np.float32)
WITH, WITHOUT = np.array([[50.0, -50.0]], np.float32), np.zeros((0, 2), np.float32)


def section(**options: Any) -> Any:
    return TypeAdapter(AnyLearner).validate_python({**COMMON, **options})


def amin(span: float) -> private_prediction.Pen:
    made = section(kind="private_prediction", tokens_per_bucket=1_000_000, clip_norm=span, temperature=2.0)
    return private_prediction.Pen(section=made, span=span, vocabulary=2, row_weight=1.0)


def ink(span: float) -> invisible_ink.Pen:
    made = section(kind="invisible_ink", max_new_tokens=4096, texts_per_bucket=100, top_k=2)
    return invisible_ink.Pen(section=made, span=span, row_weight=1.0)


def texts(pen: Any, rows: np.ndarray, length: int, seed: str) -> np.ndarray:
    """Return how many tokens "1" each of many texts of `length` tokens holds; every token has the same scores."""
    noise = SimulatedNoise(stream(0, "audit", seed))
    pen.begin(PUBLIC)
    pen.add(rows)
    return np.array([pen.draw(noise) for _ in range(TRIALS * length)]).reshape(TRIALS, length).sum(axis=1)


def least_epsilon(inside: np.ndarray, outside: np.ndarray, delta: float) -> float:
    """Return the lower bound on epsilon from an event's hits where it is likely and where it is not."""
    hits, false_hits = int(inside.sum()), int(outside.sum())
    low = stats.beta.ppf(TAIL, hits, TRIALS - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - TAIL, false_hits + 1, TRIALS - false_hits)
    return math.log((low - delta) / high) if low > delta else 0.0


def epsilon_of(span: float, length: int, delta: float) -> float:
    """Return the epsilon announced: the span itself for one token, the tight zCDP conversion for more."""
    if length == 1:
        return span
    low, high = 0.0, length * span
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pd.zcdp_delta(length * span**2 / 8, middle) > delta else (low, middle)
    return high


def attack(make: Callable[[], Any], length: int, delta: float, name: str) -> float:
    """Return the better of two events: all tokens are "1" (the record would not have it), or none is."""
    there, gone = texts(make(), WITH, length, f"{name} with"), texts(make(), WITHOUT, length, f"{name} without")
    return max(least_epsilon(gone == length, there == length, delta), least_epsilon(there == 0, gone == 0, delta))


@pytest.mark.parametrize(("length", "span", "delta"), [(1, 2.0, 0.0), (4, 0.8, 1e-3)])
@pytest.mark.parametrize("make", [amin, ink])
def test_nobody_learns_more_than_was_paid_for(
    make: Callable[[float], Any], length: int, span: float, delta: float
) -> None:
    found = attack(lambda: make(span), length, delta, f"{make.__name__} {length}")
    paid = epsilon_of(span, length, delta)
    assert 0.3 * paid < found <= paid


@pytest.mark.parametrize(("length", "span", "delta"), [(1, 2.0, 0.0), (4, 0.8, 1e-3)])
def test_a_pen_that_forgets_its_clip_is_caught(
    length: int, span: float, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pd, "clip_scores", lambda scores, bound: scores * np.float32(0.2))
    found = attack(lambda: amin(span), length, delta, f"broken {length}")
    assert found > epsilon_of(span, length, delta)


def test_a_pen_that_divides_by_the_rows_there_are_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected 8 units, one there: the mean over what is there is eight times as loud as what was paid for."""
    made = section(
        kind="private_prediction", tokens_per_bucket=1_000_000, clip_norm=8.0, temperature=2.0, expected_units=8.0
    )
    span = pd.token_span(8.0, 8.0, 2.0)

    def pen(weight: float) -> private_prediction.Pen:
        return private_prediction.Pen(section=made, span=span, vocabulary=2, row_weight=weight)

    assert attack(lambda: pen(1.0), 1, 0.0, "expected") <= span
    assert attack(lambda: pen(8.0), 1, 0.0, "there are") > span


# --- the drafter: whether a token is private is seen as well

AGREES = np.array([[-50.0, 50.0]], np.float32)
ASKED = np.array([-50.0, 50.0], np.float32)
"""Public scores that say "1". The record says so too: with it the distance is 0, without any row it is 1."""


def first_fires(rows: np.ndarray, seed: str, *, loudness: float = 1.0) -> np.ndarray:
    """Return, for many fresh runs of the sparse vector with noise 1 and threshold 1, whether the first token fired."""
    made = section(kind="private_prediction", tokens_per_bucket=1, threshold=1.0, threshold_noise=loudness)
    noise = SimulatedNoise(stream(0, "drafter", seed))
    fired = np.empty(TRIALS, bool)
    for trial in range(TRIALS):
        pen = private_prediction.Pen(section=made, span=1.0, vocabulary=2, row_weight=1.0)
        pen.begin(ASKED)
        pen.add(rows)
        fired[trial] = pen._disagrees(ASKED, noise)
    return fired


def chance(gap: float, query: float, threshold: float) -> float:
    """Return P(query * L1 - threshold * L2 >= gap) for Laplace L1 and L2, by integration over L2."""
    grid = np.linspace(-30, 30, 120_001)
    return float(np.trapezoid(stats.laplace.pdf(grid) * stats.laplace.sf((gap + threshold * grid) / query), grid))


def test_the_sparse_vector_fires_as_often_as_its_noise_says_and_tells_no_more_than_was_paid() -> None:
    """Threshold noise 1, distance noise 2, sensitivity 1: epsilon 2."""
    there, gone = first_fires(AGREES, "with"), first_fires(WITHOUT, "without")
    for fired, gap in ((there, 1.0), (gone, 0.0)):
        assert stats.binomtest(int(fired.sum()), TRIALS, chance(gap, 2, 1)).pvalue > 1e-4
    wrong = [chance(1.0, query, threshold) for query, threshold in ((2, 1.3), (2, 1e-6), (1e-6, 1))]
    assert all(stats.binomtest(int(there.sum()), TRIALS, one).pvalue < 1e-4 for one in wrong)
    found = max(least_epsilon(gone, there, 0.0), least_epsilon(~there, ~gone, 0.0))
    assert 0 < found <= pd.threshold_epsilon(1.0, 1.0) == 2


def test_a_sparse_vector_with_too_little_noise_is_caught() -> None:
    """A tenth of the noise that was paid for."""
    there, gone = (first_fires(rows, f"quiet {len(rows)}", loudness=0.1) for rows in (AGREES, WITHOUT))
    assert least_epsilon(gone, there, 0.0) > pd.threshold_epsilon(1.0, 1.0)
