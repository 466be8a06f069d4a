"""Quotas that add up, and texts chosen by count."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.selection import apportion, chosen


@pytest.mark.parametrize(
    ("weights", "total", "most", "expected"),
    [
        ([2.0, 1.0, 1.0], 4, [9, 9, 9], [2, 1, 1]),
        ([53.0, 24.0, 23.0], 7, [9, 9, 9], [4, 2, 1]),  # quotas 3.71, 1.68, 1.61: the two largest remainders
        ([5.0, 5.0], 3, [9, 9], [2, 1]),  # the first of equals
        ([100.0, 1.0, 1.0], 6, [2, 9, 9], [2, 2, 2]),  # what the first may not hold goes to the others
        ([-3.0, 1.0], 2, [9, 9], [0, 2]),  # noise below nothing is nothing
        ([0.0, -1.0, 0.0], 3, [9, 9, 9], [1, 1, 1]),
        ([1.0, 0.0], 5, [2, 9], [2, 3]),  # nobody else has weight, and there is room
        ([1.0, 1.0], 9, [2, 3], [2, 3]),  # no more than there is
        ([1.0, 1.0], 0, [2, 3], [0, 0]),
        ([1.0, 1.0], 2, [0, 3], [0, 2]),
    ],
)
def test_quotas_by_hand(weights: list[float], total: int, most: list[int], expected: list[int]) -> None:
    assert apportion(weights, total, most) == expected


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(-10, 1000), st.integers(0, 12)), min_size=1, max_size=8),
    total=st.integers(0, 60),
)
def test_quotas_add_up_within_their_limits(pairs: list[tuple[float, int]], total: int) -> None:
    weights, most = [weight for weight, _ in pairs], [limit for _, limit in pairs]

    given_out = apportion(weights, total, most)

    assert sum(given_out) == min(total, sum(most))
    assert all(0 <= one <= limit for one, limit in zip(given_out, most, strict=True))


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8), total=st.integers(0, 60))
def test_without_limits_nobody_is_a_whole_seat_off(weights: list[float], total: int) -> None:
    given_out = apportion(weights, total, [total] * len(weights))

    for one, weight in zip(given_out, weights, strict=True):
        exact = total * weight / sum(weights)
        assert math.floor(exact - 1e-9) <= one <= math.ceil(exact + 1e-9)


COUNTS = np.array([5.0, 1.0, 9.0, -2.0, 9.0, 0.0])
RNG = np.random.default_rng(0)


def test_ranking_takes_the_largest_and_the_first_of_equals() -> None:
    assert chosen(COUNTS, np.arange(6), 3, "rank", RNG) == [2, 4, 0]
    assert chosen(COUNTS, np.array([1, 3, 4]), 2, "rank", RNG) == [4, 1]
    assert chosen(COUNTS, np.array([1, 3]), 5, "rank", RNG) == [1, 3]


def test_sampling_draws_in_proportion_and_without_replacement() -> None:
    """First draws in 3,000 trials: each share within 4 standard errors of count / sum of positive counts."""
    rng, trials = np.random.default_rng(1), 3000
    drawn = [chosen(COUNTS, np.arange(6), 6, "sample", rng) for _ in range(trials)]

    assert all(sorted(one) == list(range(6)) for one in drawn)
    assert all(set(one[4:]) == {3, 5} for one in drawn), "counts of 0 and below come last"
    first = Counter(one[0] for one in drawn)
    for place in (0, 1, 2, 4):
        share = COUNTS[place] / 24
        assert abs(first[place] / trials - share) < 4 * math.sqrt(share * (1 - share) / trials)


def test_sampling_is_not_ranking() -> None:
    rng = np.random.default_rng(2)

    assert len({tuple(chosen(COUNTS, np.arange(6), 2, "sample", rng)) for _ in range(50)}) > 3
