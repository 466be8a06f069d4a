"""Clips hold whatever the scores are, sums are exact, one record moves them as announced, and prices are the paper's.

The checks of sensitivity are functions, so that a wrong rule can be shown to fail them: the distance in InvisibleInk's
re-implementation of Amin et al. moves ten times as far as it is charged for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize, stats

from fl_app import private_decoding as pd
from fl_app.errors import NotFinite
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Callable

SCORES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(2, 7)),
    elements=st.floats(-40, 40, width=32),
)
ANY_SCORES = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.floats(width=32, allow_subnormal=False)
)
BOUNDS = st.floats(0.01, 30)
S, C = 127.0, 10.0
ROUNDED = 1 + 1e-12
"""What the division of an exact sum may round; `SLACK` pays for it."""


def noise(seed: int = 0) -> SimulatedNoise:
    return SimulatedNoise(stream(seed, "decoding"))


# --- clips


@settings(deadline=None)
@given(SCORES, BOUNDS)
def test_the_best_score_becomes_the_bound_and_none_is_below(scores: np.ndarray, bound: float) -> None:
    clipped = pd.clip_scores(scores, bound)
    top = math.floor(bound / pd.grain(bound)) * pd.grain(bound)
    assert (clipped.max(axis=1) == np.float32(top)).all()
    assert float(top) == float(np.float32(top)) <= bound
    assert clipped.min() >= -top
    assert (np.mod(clipped.astype(np.float64), pd.grain(bound)) == 0).all()


def test_at_bound_ten_the_best_is_exactly_ten() -> None:
    clipped = pd.clip_scores(np.array([[3.0, -16.9, -17.5, 3.0], [1.0, 1.5, 0.0, -90.0]], np.float32), 10.0)
    assert clipped.tolist() == [[10.0, pytest.approx(-9.9, abs=1e-5), -10.0, 10.0], [9.5, 10.0, 8.5, -10.0]]


@settings(deadline=None)
@given(SCORES, st.integers(-64, 64))
def test_a_constant_on_all_scores_changes_nothing(scores: np.ndarray, shift: int) -> None:
    coarse = np.round(scores * 256) / 256  # so that the shift itself rounds nothing
    assert (pd.clip_scores(coarse, C) == pd.clip_scores(coarse + np.float32(shift), C)).all()


@settings(deadline=None)
@given(SCORES)
def test_scores_within_twice_the_bound_lose_nothing(scores: np.ndarray) -> None:
    scores /= 4  # a range of 20 = 2 C at most
    clipped = pd.clip_scores(scores, C).astype(np.float64)
    lost = scores.astype(np.float64) - scores.max(axis=1, keepdims=True) + C - clipped
    assert np.abs(lost).max() < 2e-6


@settings(deadline=None)
@given(ANY_SCORES, BOUNDS)
def test_whatever_a_row_holds_its_contribution_is_bounded(scores: np.ndarray, bound: float) -> None:
    """NaN, infinities and overflow included: an error that a row causes would tell of the row."""
    for clipped in (pd.clip_scores(scores, bound), pd.clip_differences(scores, np.zeros(scores.shape[1]), bound)):
        assert (np.abs(clipped.astype(np.float64)) <= bound).all()
    total = pd.probability_sum(scores)
    assert np.isfinite(total).all()
    assert total.sum() <= len(scores) * (1 + 1e-12)


def test_a_row_without_numbers_is_the_worst_everywhere_and_says_nothing_of_probabilities() -> None:
    bad = np.array([[np.nan, 1.0], [np.inf, 0.0]], np.float32)
    assert pd.clip_scores(bad, 2.0).tolist() == [[-2.0, -2.0], [-2.0, -2.0]]
    assert pd.probability_sum(bad).tolist() == [0.0, 0.0]
    assert pd.clip_differences(bad[:1], np.zeros(2, np.float32), 2.0).tolist() == [[0.0, 0.0]]


@settings(deadline=None)
@given(SCORES, BOUNDS, st.integers(-64, 64))
def test_differences_are_bounded_and_blind_to_an_offset(scores: np.ndarray, bound: float, shift: int) -> None:
    coarse = np.round(scores * 256) / 256
    public = np.zeros(scores.shape[1], np.float32)
    clipped = pd.clip_differences(coarse, public, bound)
    assert (np.abs(clipped.astype(np.float64)) <= bound).all()
    assert (clipped == pd.clip_differences(coarse + np.float32(shift), public, bound)).all()


def test_an_offset_ruins_the_plain_clip_and_not_the_recentred_one() -> None:
    """Private scores 5 above the public ones throughout: without recentring every difference is cut to C = 1."""
    rng = stream(0, "offset")
    public = rng.normal(0, 2, 50).astype(np.float32)
    wanted = public + rng.normal(0, 0.2, 50).astype(np.float32)
    plain = public + np.clip(wanted + 5 - public, -1, 1)
    ours = public + pd.clip_differences(wanted[None] + 5, public, 1.0)[0]

    def far(scores: np.ndarray) -> float:
        return float(np.abs(pd.softmax(scores) - pd.softmax(wanted)).sum() / 2)

    assert far(plain) == pytest.approx(far(public), rel=1e-6)
    assert far(ours) < far(public) / 100


def test_without_private_prompts_the_public_scores_stand() -> None:
    public = np.array([1.0, 2.0, 0.5], np.float32)
    nobody = np.zeros((0, 3), np.float32)
    total = pd.summed(pd.clip_differences(nobody, public, 0.5))
    assert total.tolist() == [0.0, 0.0, 0.0]
    assert (public + total / 7).tolist() == public.tolist()


# --- sums


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_sums_of_parts_are_the_whole_sum_to_the_bit_in_any_order(seed: int, cut: int) -> None:
    rng = stream(seed, "sites")
    scores = rng.normal(0, 8, (41, 23)).astype(np.float32)
    public = rng.normal(0, 8, 23).astype(np.float32)
    order = rng.permutation(41)
    for rule in (
        lambda rows: pd.summed(pd.clip_scores(rows, 9.7)),
        lambda rows: pd.summed(pd.clip_differences(rows, public, 0.3)),
        pd.probability_sum,
    ):
        whole = rule(scores)
        assert (rule(scores[:cut]) + rule(scores[cut:]) == whole).all()
        assert (rule(scores[order]) == whole).all()


def test_plain_float_sums_would_differ() -> None:
    """The twin: the same rows without the grain give other bits in another order."""
    rows = stream(3, "plain").normal(0, 3, (60, 200)).astype(np.float32).astype(np.float64) * 1.1
    rows = rows - rows.max(axis=1, keepdims=True)
    assert (np.add.reduce(rows) != np.add.reduce(rows[::-1])).any()


# --- what one record moves


def moves(rule: Callable[[np.ndarray], np.ndarray], *, sizes: tuple[int, ...] = (0, 1, 60, 127, 200)) -> float:
    """Return how far one more row moves an aggregate (largest coordinate), over random and adversarial rows."""
    rng = stream(0, "rows")
    worst = 0.0
    for size in sizes:
        for kind in range(12):
            spread = (0.01, 3.0, 60.0)[kind % 3]
            rows = rng.normal(0, spread, (size + 1, 6)).astype(np.float32)
            if kind >= 6:  # all alike, and a newcomer who says the opposite
                rows[:-1] = np.array([0, 0, -60, -60, -60, -60], np.float32)
                rows[-1] = np.array([-60, 60, -60, -60, -60, -60], np.float32)
            worst = max(worst, float(np.abs(rule(rows) - rule(rows[:-1])).max()))
    return worst


def test_a_record_moves_each_score_by_the_bound_over_the_expected_number() -> None:
    found = moves(lambda rows: pd.summed(pd.clip_scores(rows, C)) / S)
    assert found == pytest.approx(C / S)
    assert found <= C / S * ROUNDED


def test_a_mean_over_the_rows_there_are_moves_further() -> None:
    """The twin: dividing by how many there are, where few are, breaks the bound."""
    assert moves(lambda rows: pd.summed(pd.clip_scores(rows, C)) / max(len(rows), 1)) > 10 * C / S


def test_a_record_moves_a_difference_by_the_bound_over_the_expected_number() -> None:
    public = np.array([1.0, 0.0, -1.0, 0.0, 2.0, 0.5], np.float32)
    found = moves(lambda rows: pd.summed(pd.clip_differences(rows, public, 0.6)) / 7)
    assert found <= 0.6 / 7 * ROUNDED
    assert found == pytest.approx(0.6 / 7)


PUBLIC = np.array([0.0, 0.0, -60, -60, -60, -60], np.float32)


def ours(rows: np.ndarray) -> np.ndarray:
    return np.array([pd.distance(pd.probability_sum(rows), PUBLIC, S)])


def theirs(rows: np.ndarray) -> np.ndarray:
    """The distance of the softmax of the mean of clipped scores: charged 1 / s, and it is not so."""
    return np.array([np.abs(pd.softmax(pd.summed(pd.clip_scores(rows, C)) / S) - pd.softmax(PUBLIC)).sum()])


def test_a_record_moves_the_distance_by_one_over_the_expected_number() -> None:
    found = moves(ours)
    assert found <= 1 / S * ROUNDED
    assert found > 0.99 / S


def test_the_other_distance_moves_further_than_it_is_charged_for() -> None:
    assert moves(theirs, sizes=(0, 1, 127)) > 9 / S


def test_the_distance_by_hand() -> None:
    """Two of an expected four: (1/4)(p1 + p2) = (3/8, 1/8); the public half and half is 1/8 + 3/8 away."""
    rows = np.log(np.array([[0.75, 0.25], [0.75, 0.25]])).astype(np.float32)
    assert pd.distance(pd.probability_sum(rows), np.zeros(2, np.float32), 4) == pytest.approx(0.5)


# --- the mechanism


def divergence(left: np.ndarray, right: np.ndarray, order: float) -> float:
    return math.log(float((left**order * right ** (1 - order)).sum())) / (order - 1)


def ratio(rows: np.ndarray, order: float, *, temperature: float = 2.0, expected: float = 8.0) -> float:
    """Return the Renyi divergence that the last row makes, as a share of what zCDP allows; the worse direction."""
    with_it, without = (
        pd.softmax(pd.summed(pd.clip_scores(part, C)) / (expected * temperature)) for part in (rows, rows[:-1])
    )
    allowed = order * pd.zcdp_of_token(pd.token_span(C, expected, temperature))
    return max(divergence(with_it, without, order), divergence(without, with_it, order)) / allowed


def test_renyi_divergence_stays_within_the_announced_span() -> None:
    rng = stream(0, "renyi")
    worst = 0.0
    for _ in range(2000):
        rows = rng.normal(0, float(rng.choice([1, 5, 40])), (int(rng.integers(1, 12)), int(rng.integers(2, 30))))
        worst = max(worst, ratio(rows.astype(np.float32), float(rng.choice([1.01, 1.5, 2, 8, 64]))))
    assert 0.5 < worst <= 1


def test_two_tokens_reach_it() -> None:
    """One record moves the two scores in opposite directions from a tie: the zCDP of a draw is not overstated."""
    rows = np.array([[40.0, -40.0]], np.float32)
    assert 0.99 <= ratio(rows, 1.001, expected=200.0) <= 1


def test_replacing_a_record_moves_twice_as_far() -> None:
    """The twin, and why the relation is add-or-remove: replaced, the same token costs four times as much."""
    kept, other = np.array([[40.0, -40.0]], np.float32), np.array([[-40.0, 40.0]], np.float32)
    left, right = (pd.softmax(pd.summed(pd.clip_scores(rows, C)) / 400.0) for rows in (kept, other))
    share = divergence(left, right, 1.001) / (1.001 * pd.zcdp_of_token(pd.token_span(C, 200.0, 2.0)))
    assert share == pytest.approx(4.0, rel=0.02)


def test_draws_follow_softmax() -> None:
    scores = np.array([1.5, 0.3, 0.0, -0.7, -3.0])
    for source in (noise(), SecureNoise()):
        counts = np.bincount([pd.draw(scores, source) for _ in range(20_000)], minlength=5)
        assert stats.chisquare(counts, 20_000 * pd.softmax(scores)).pvalue > 1e-6
        assert stats.chisquare(counts, 20_000 * pd.softmax(1.1 * scores)).pvalue < 1e-6


# --- the public mask


def test_the_mask_is_the_best_and_what_lies_within_the_margin() -> None:
    public = np.array([0.0, 5.0, 3.0, 2.9, 4.0, 2.0], np.float32)
    assert pd.public_mask(public, 3).tolist() == [1, 2, 4]
    assert pd.public_mask(public, 3, margin=0.2).tolist() == [1, 2, 3, 4]
    assert pd.public_mask(public, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert pd.public_mask(public, 9).tolist() == [0, 1, 2, 3, 4, 5]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.05, 2))
def test_no_token_outside_the_mask_is_among_the_private_best(seed: int, top: int, bound: float) -> None:
    """With margin 2 C / B the private top k lies within; B rows at most, each difference within the bound."""
    rng = stream(seed, "top-k")
    public = rng.normal(0, 2, 30).astype(np.float32)
    rows = (public + rng.normal(0, 3, (4, 30))).astype(np.float32)
    private = public + pd.summed(pd.clip_differences(rows, public, bound)) / 4
    inside = set(pd.public_mask(public, top, margin=2 * bound).tolist())
    assert set(np.argsort(-private)[:top].tolist()) <= inside


def test_public_scores_without_numbers_are_refused() -> None:
    for scores in (np.array([np.nan, 0.0], np.float32), np.array([np.inf, 0.0], np.float32)):
        with pytest.raises(NotFinite):
            pd.public_mask(scores, 1)
        with pytest.raises(NotFinite):
            pd.softmax(scores)


# --- prices


def independent_delta(rho: float, epsilon: float) -> float:
    """The conversion again, by scipy's minimiser over the order itself from many starts."""

    def log_delta(order: float) -> float:
        return (order - 1) * (order * rho - epsilon) - math.log(order - 1) + order * math.log1p(-1 / order)

    grid = 1 + np.logspace(-4, 6, 400)
    best = min(grid, key=log_delta)
    found = optimize.minimize_scalar(log_delta, bounds=(1 + (best - 1) / 1.2, 1 + (best - 1) * 1.2), method="bounded")
    return math.exp(min(found.fun, log_delta(best)))


@pytest.mark.parametrize(
    ("epsilon", "expected", "threshold_noise", "rho", "tokens"),
    [
        (1, 255, None, 0.0300, 155),
        (1, 255, 0.2, 0.0300, 31),
        (1, 1023, None, 0.0300, 2508),
        (3, 255, None, 0.2206, 1147),
        (3, 255, 0.2, 0.2206, 229),
        (10, 255, None, 1.7607, 9158),
    ],
)
def test_tokens_that_an_epsilon_buys(
    epsilon: float, expected: float, threshold_noise: float | None, rho: float, tokens: int
) -> None:
    """The table of specs 3.2: c = 10, temperature 2, delta = 1 / 120000."""
    found = pd.zcdp_budget(epsilon, 1 / 120_000)
    assert found == pytest.approx(rho, abs=6e-5)
    assert independent_delta(found, epsilon) == pytest.approx(1 / 120_000, rel=1e-6)
    asking = pd.threshold_epsilon(expected, threshold_noise) if threshold_noise else 0.0
    assert pd.tokens_within(found, span=pd.token_span(10, expected, 2), epsilon_per_threshold=asking) == tokens


@pytest.mark.parametrize(
    ("epsilon", "references", "tokens", "temperature", "clip"),
    [
        (10, 7, 500, 1.1, 0.604),
        (3, 7, 500, 1.1, 0.210),
        (1, 7, 500, 1.1, 0.076),
        (1, 31, 500, 1.1, 0.337),
        (8, 15, 256, 1, 1.36),
    ],
)
def test_clips_that_an_epsilon_allows(
    epsilon: float, references: int, tokens: int, temperature: float, clip: float
) -> None:
    """The figures of specs 3.6, at delta 1e-6."""
    rho = pd.zcdp_budget(epsilon, 1e-6)
    found = pd.clip_within(rho, tokens=tokens, expected=references, temperature=temperature)
    assert found == pytest.approx(clip, abs=6e-4)
    again = tokens * pd.zcdp_of_token(pd.token_span(found, references, temperature))
    assert independent_delta(again, epsilon) == pytest.approx(1e-6, rel=1e-6)


def test_the_tight_conversion_by_dp_accounting() -> None:
    """rho = 0.1 at delta 1e-5 is 1.914, where the loose formula says 2.246 (specs 3.2)."""
    import dp_accounting as dp
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    accountant = rdp.RdpAccountant(list(1 + np.logspace(-2, 3, 3000)))
    accountant.compose(dp.ZCDpEvent(0.1))
    theirs = accountant.get_epsilon(1e-5)
    assert theirs == pytest.approx(1.914, abs=1e-3)
    assert pd.zcdp_budget(theirs, 1e-5) == pytest.approx(0.1, rel=1e-4)
    assert pd.zcdp_delta(0.1, theirs) == pytest.approx(1e-5, rel=1e-3)
    assert pd.zcdp_delta(0.0, 1.0) == 0.0


def test_prices_by_hand() -> None:
    assert pd.token_span(10, 255, 2) == pytest.approx(20 / 510)
    assert pd.bound_of_span(20 / 510, 255, 2) == pytest.approx(10)
    assert pd.zcdp_of_token(pd.token_span(10, 255, 2)) == pytest.approx(0.5 * (10 / 510) ** 2)
    assert pd.zcdp_of_threshold(pd.threshold_epsilon(255, 0.2)) == pytest.approx(2 / 51**2)
    assert pd.usable(8.0) == 8 - 2.0**-10
