"""Who stays, by noisy counts: quotas of codes, and the texts that fill them. Everything here is post-processing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Doubles = npt.NDArray[np.float64]
    Indices = npt.NDArray[np.int64]

Rule: TypeAlias = Literal["rank", "sample"]


def apportion(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Return whole numbers in proportion to `weights` that add up to `total`, none above its `most`.

    By largest remainder, the first of equals first. A weight below 0, which noise makes, counts as 0; where all that
    are left weigh 0, they share evenly. What one may not hold goes to the others, so the sum is min(total, sum(most)).
    """
    weighs = np.maximum(np.asarray(weights, np.float64), 0.0)
    limits = np.asarray(most, np.int64)
    given = np.zeros(len(limits), np.int64)
    free = limits > 0
    while free.any():
        rest = total - int(given.sum())
        share = np.where(free, weighs, 0.0)
        if share.sum() == 0:
            share = free.astype(np.float64)
        quota = rest * share / share.sum()
        full = free & (quota >= limits)
        if not full.any():
            floor = np.floor(quota).astype(np.int64)
            order = np.argsort(-(quota - floor), kind="stable")
            order = order[free[order]][: rest - int(floor.sum())]
            given += floor
            given[order] += 1
            break
        given[full] = limits[full]
        free &= ~full
    return given.tolist()


def chosen(counts: Doubles, places: Indices, quota: int, rule: Rule, rng: np.random.Generator) -> list[int]:
    """Return `quota` of the `places`, or all if they are fewer, in the order in which they were chosen.

    | rule     | who is chosen                                                                             |
    |----------|-------------------------------------------------------------------------------------------|
    | "rank"   | the largest counts, the first of equals first                                             |
    | "sample" | one after another without replacement, each with probability in proportion to its count;  |
    |          | counts of 0 and below only when nothing else is left, in order                            |
    """
    own = counts[places]
    if rule == "sample":
        with np.errstate(divide="ignore"):  # log 0 = -inf: never before any other
            own = np.log(np.maximum(own, 0.0)) + rng.gumbel(size=len(own))
    return [int(places[i]) for i in np.argsort(-own, kind="stable")[:quota]]
