"""Metrics on cases worked out by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.metrics.accuracy import accuracy
from fl_app.metrics.bits_per_byte import bits_per_byte
from fl_app.metrics.interval import bootstrap, wilson
from fl_app.metrics.macro_f1 import macro_f1
from fl_app.metrics.rouge import rouge_l

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.types import Score


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81/263 and 15/148 and 0/20.
    for successes, count, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        interval = wilson(successes, count)
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert wilson(20, 20).high == 1.0


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_refuses(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(successes, count)


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap(lambda items: float(values[items].mean()), count=400, rng=rng())
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.015)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.015)


def test_accuracy_by_hand() -> None:
    score = accuracy([1, 2, 3, 4], [1, 2, 0, 0])
    assert (score.value, score.count, score.higher_is_better) == (0.5, 4, True)
    assert (score.low, score.high) == (wilson(2, 4).low, wilson(2, 4).high)


def test_macro_f1_by_hand() -> None:
    # class 0: 2 hits, 3 predicted, 2 true: 4/5. class 1: 1 hit, 1 predicted, 2 true: 2/3. class 2: never predicted
    # right, 1 predicted, 1 true: 0. Mean (4/5 + 2/3 + 0) / 3.
    score = macro_f1([0, 0, 0, 1, 2], [0, 0, 1, 1, 5], rng=rng())
    # classes 2 and 5 occur on one side only: two zeros
    assert score.value == pytest.approx((4 / 5 + 2 / 3 + 0 + 0) / 4)
    assert score.low <= score.value <= score.high


def test_rouge_l_by_hand() -> None:
    # "the cat" against "the cat sat": precision 1, recall 2/3, F1 0.8; the other pair shares nothing.
    score = rouge_l(["the cat", "x"], ["the cat sat", "y"], rng=rng())
    assert score.value == pytest.approx(0.4)
    assert (score.low, score.high) == (0.0, pytest.approx(0.8))


def test_bits_per_byte_by_hand() -> None:
    # 16 bits over 8 bytes and 4 bits over 2 bytes: 20 / 10.
    score = bits_per_byte([-16 * math.log(2), -4 * math.log(2)], [8, 2], rng=rng())
    assert score.value == pytest.approx(2.0)
    assert not score.higher_is_better
    uneven = bits_per_byte([-16 * math.log(2), 0.0], [8, 8], rng=rng())
    assert (uneven.value, uneven.low, uneven.high) == pytest.approx((1.0, 0.0, 2.0))


@pytest.mark.parametrize(("log_prob", "size"), [(math.nan, 1), (-math.inf, 1), (0.5, 1), (-1.0, 0)])
def test_bits_per_byte_refuses(log_prob: float, size: int) -> None:
    with pytest.raises(ValueError, match="item 1"):
        bits_per_byte([-1.0, log_prob], [1, size], rng=rng())


METRICS: dict[str, Callable[[list[int], list[int]], Score]] = {
    "accuracy": accuracy,
    "macro_f1": lambda p, r: macro_f1(p, r, rng=rng()),
    "rouge_l": lambda p, r: rouge_l([f"word{one}" for one in p], [f"word{one}" for one in r], rng=rng()),
    "bits_per_byte": lambda p, r: bits_per_byte([-float(one) for one in p], [one + 1 for one in r], rng=rng()),
}


@pytest.mark.parametrize("name", METRICS)
def test_no_items_and_uneven_items_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: no items"):
        METRICS[name]([], [])
    with pytest.raises(ValueError, match=f"{name}: 1 items against 2"):
        METRICS[name]([1], [1, 2])


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_bounds_identity_and_repeatability(name: str, pairs: list[tuple[int, int]]) -> None:
    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    score = METRICS[name](predictions, references)
    assert score.low <= score.value <= score.high
    assert score.count == len(pairs)
    assert METRICS[name](predictions, references) == score
    if name != "bits_per_byte":
        assert score.low >= 0
        assert score.high <= 1
        assert METRICS[name](references, references).value == pytest.approx(1.0)
