"""One-run audit: many canaries, each in or out by a fair coin, one release, and a bound on epsilon from the guesses.

    score every canary -> guess the top k in, the bottom k out -> p-value of that many right under epsilon -> invert

A mechanism that is (epsilon, delta)-DP lets nobody guess coins much better than epsilon-randomised response would.
So the largest epsilon at which the observed number of right guesses is still a surprise is a lower bound.

What it cannot do. The bound has a `ceiling` (all guesses right): 2,000 canaries never prove more than about 6.4, so
"not caught at a claimed epsilon of 8" says nothing, not even about a release without noise. Publish bound, ceiling and
power together, and never as evidence for a claim above 2.

Source: Steinke, Nasr & Jagielski 2023 (2305.08846), theorem 5.2 and algorithm 1. Ours differs in trying several numbers
of guesses at a Bonferroni share of the significance each, instead of fixing one in advance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from fl_app.config import Section
from simulations.attacks.stages import Attack, AttackResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simulations.attacks.stages import Doubles, Evidence

HIGHEST = 64.0
"""Where the search for a lower bound begins; 2^-92 of a coin is beyond what any number of guesses proves."""


class OneRun(Section):
    """[attack] kind = "one_run". `guesses` are tried all; each is half "in", half "out"."""

    kind: Literal["one_run"]
    delta: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    significance: Annotated[float, Field(gt=0, lt=1)] = 0.05
    guesses: Annotated[tuple[Annotated[int, Field(ge=2, multiple_of=2)], ...], Field(min_length=1)] = (200, 500)

    def build(self) -> Attack:
        """Return the stage."""
        return OneRunAttack(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRunAttack:
    """An `Attack` with the best linear scores that Gaussian noise of a known scale allows."""

    section: OneRun

    def __call__(self, evidence: Evidence, rng: np.random.Generator) -> AttackResult:
        """Return what the guesses prove.

        Guarantee: under any mechanism that is (epsilon, delta)-DP, the lower bound exceeds epsilon with probability
        at most `significance`.
        """
        told = self.section
        order = _ascending(scores(evidence), rng)
        count = order.size
        share = told.significance / len(told.guesses)
        lower_bound, best_guesses, best_right = 0.0, 0, 0
        for guesses in told.guesses:
            right = _right(order, evidence, min(guesses, count - count % 2))
            bound = lower_bound_of(count, guesses, right, delta=told.delta, significance=share)
            if bound >= lower_bound:
                lower_bound, best_guesses, best_right = bound, guesses, right
        return AttackResult(
            lower_bound=lower_bound,
            guesses=best_guesses,
            right=best_right,
            accuracy=_right(order, evidence, count - count % 2) / (count - count % 2),
            ceiling=ceiling(count, told.guesses, delta=told.delta, significance=told.significance),
        )


def scores(evidence: Evidence) -> Doubles:
    """Return the best linear estimate of every coin, up to a scale: noise and the other canaries taken out at once.

    release = c G'(x + 1/2) + noise with coins x = +-1/2. For known c = 1 the estimate of x is
    (G G' + 4 noise^2)^-1 G (release - G'1 / 2); the share of G'1 in the release is fitted instead, so that the
    estimates add up to zero and a clip that is not the claimed one hides nothing. Shapes: (M,).
    """
    ridge = 4 * evidence.noise_multiplier**2 * np.eye(evidence.matches.size)
    both = np.stack([evidence.matches, evidence.gram.sum(axis=1)], axis=1)
    estimate, common = np.linalg.solve(evidence.gram + ridge, both).T
    return estimate - common * (estimate.sum() / common.sum())


def p_value(canaries: int, guesses: int, right: int, *, epsilon: float, delta: float) -> float:
    """Return the probability, at most, that an (epsilon, delta)-DP release lets `right` of `guesses` be right.

    beta + 2 m delta alpha, where beta = P[Bin(r, q) >= v], q = 1 / (1 + exp(-epsilon)), and
    alpha = max over i of P[v - i <= Bin(r, q) < v] / i.
    """
    from scipy import stats

    share = 1 / (1 + math.exp(-epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, share))
    if delta == 0 or right == 0:
        return min(1.0, beta)
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
    alpha = float((below / np.arange(1, right + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * alpha)


def lower_bound_of(canaries: int, guesses: int, right: int, *, delta: float, significance: float) -> float:
    """Return the largest epsilon whose p-value is below `significance`, 0 when there is none; to 1e-4, from below."""

    def surprising(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon=epsilon, delta=delta) < significance

    return _largest(surprising)


def ceiling(canaries: int, guesses: Sequence[int], *, delta: float, significance: float) -> float:
    """Return the lower bound that an attack which is always right would reach."""
    share = significance / len(guesses)
    return max(lower_bound_of(canaries, r, r, delta=delta, significance=share) for r in guesses if r <= canaries)


def _largest(holds: Callable[[float], bool]) -> float:
    """Return the largest argument in [0, HIGHEST] up to which `holds`, by bisection."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, HIGHEST
    while high - low > 1e-4:  # noqa: PLR2004 - a tenth of the accountant's grid
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _ascending(values: Doubles, rng: np.random.Generator) -> np.ndarray:
    """Return the order of the values; equal ones in random order, so that ties tell nothing."""
    shuffled = rng.permutation(values.size)
    return shuffled[np.argsort(values[shuffled], kind="stable")]


def _right(order: np.ndarray, evidence: Evidence, guesses: int) -> int:
    half = guesses // 2
    inside = evidence.included[order[order.size - half :]].sum()
    return int(inside + (~evidence.included[order[:half]]).sum())
