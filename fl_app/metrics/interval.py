"""Two-sided 95 % intervals, shared by the metrics: Wilson for shares, percentile bootstrap for everything else.

Out of scope: comparing two models on the same items; that is a paired test, not two intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sized

    import numpy.typing as npt

    Indices = npt.NDArray[np.intp]

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""

RESAMPLES = 1000
"""Bootstrap draws. The 2.5 % percentile then rests on 25 draws; convention (Efron & Tibshirani 1993), not studied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds of a 95 % interval."""

    low: float
    high: float


def wilson(successes: int, count: int) -> Interval:
    """Return the Wilson score interval of a share; inside [0, 1] and never of width zero.

    Raises: ValueError unless 0 <= successes <= count and count >= 1.
    Source: Wilson 1927, without continuity correction.
    """
    if not (count >= 1 and 0 <= successes <= count):
        raise ValueError(f"wilson needs 0 <= successes <= count and count >= 1, not {successes} of {count}")
    share, z2 = successes / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Interval(low=0.0 if successes == 0 else centre - half, high=1.0 if successes == count else centre + half)


def bootstrap(
    statistic: Callable[[Indices], float], *, count: int, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Return the percentile interval of `statistic` over items drawn with replacement.

    `statistic` takes the indices of one resample. The interval is widened to hold the value of the full sample, which
    a percentile interval of a biased statistic on few items may miss.
    Source: Efron & Tibshirani 1993, section 13.3.
    """
    draws = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    value = statistic(np.arange(count))
    low, high = (float(bound) for bound in np.percentile(draws, [2.5, 97.5]))
    return Interval(low=min(low, value), high=max(high, value))


def paired_count(metric: str, left: Sized, right: Sized) -> int:
    """Return how many items both sides hold.

    Raises: ValueError when there is none, or the sides differ in length.
    """
    if len(left) != len(right):
        raise ValueError(f"{metric}: {len(left)} items against {len(right)}; every item needs its partner")
    if not len(left):
        raise ValueError(f"{metric}: no items; a score of nothing does not exist, leave the metric out")
    return len(left)
