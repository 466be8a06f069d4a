"""The next token from many private prompts at once: what is clipped, summed and drawn, and what it costs.

A site shows its model each of its records as a prompt for another text of the kind, and adds up the scores of the next
token. Two clips bound what one record does to a sum:

    Amin et al.      clip_scores: the best score becomes c, what lies below -c becomes -c
    InvisibleInk     clip_differences: score minus public score, recentred at its median, within [-C, C]

The token is drawn from softmax(sum / (expected * temperature)): an exponential mechanism, whose log-ratio range
between neighbours is `token_span`. `expected` is the public number of privacy units in a bucket of records; dividing by
how many there really are would tell it. `Public drafter`: where the private prompts agree with a public one (their
`distance` is below a noisy threshold) the token is drawn from the public scores and costs nothing but the asking.

Sums are exact. Every clipped score is rounded towards zero to a multiple of a power of two (`grain`), so that a float64
sum has no rounding of its own: no order of rows, no cut into batches and no division among sites changes a bit of it,
and one record moves it by its own contribution and nothing else.

Out of scope: models and rows (`clients.decoding`); the certificate, which is the PLD of the receipts. The zCDP planner
here says how many tokens an epsilon buys before there is a ledger; it is the looser of the two.

Legend of shapes: R = private prompts, V = vocabulary, K = tokens of the public mask.
Source: Amin et al. 2024 (2407.12108v2), algorithm 1 and equations 1 to 3; InvisibleInk 2025 (2507.02974), DClip and
top-k+. Ours differs from the second in recentring each difference: softmax ignores a constant offset, a clip does not,
and an offset of more than C made all private prompts equal to the public one. Conversion of zCDP: Canonne, Kamath &
Steinke 2020 (2004.00010), proposition 12.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fl_app.errors import NotFinite, PolicyRefusal

if TYPE_CHECKING:
    import numpy.typing as npt

    from fl_app.privacy.noise import NoiseSource

    Singles = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]

GRAIN_BITS = 22
"""A clip bound is at least 2^22 grains: finer than float32 scores of that size are themselves."""

PROBABILITY_GRAIN = 2.0**-40

SLACK = 2.0**-13
"""Share of a clip bound that is not used: it pays for kernels that round a row by its company (4e-7, `fl_app.kernels`)
and for a span that is announced to nine decimals. The same share as in `fl_app.privacy.gaussian`."""

MOST_ORDERS = 1e9


def grain(bound: float) -> float:
    """Return the power of two that clipped scores are multiples of."""
    return 2.0 ** (math.floor(math.log2(bound)) - GRAIN_BITS)


def usable(bound: float) -> float:
    """Return what to clip to when `bound` is announced: the slack is left out."""
    return bound * (1 - SLACK)


def clip_scores(scores_RV: Singles, bound: float) -> Singles:
    """Return every row moved so that its best score is `bound`, and cut below at -bound.

    Guarantee: within [-bound, bound] and multiples of `grain(bound)`, whatever the scores hold; a score that is no
    number counts as the worst. A row whose scores differ by at most 2 bound loses nothing but the grain.
    Shapes: (R, V) -> (R, V).
    """
    step = grain(bound)
    top = math.floor(bound / step) * step
    with np.errstate(invalid="ignore"):
        moved_RV = scores_RV - scores_RV.max(axis=1, keepdims=True) + np.float32(top)
    np.nan_to_num(moved_RV, copy=False, nan=-top, posinf=-top, neginf=-top)
    np.clip(moved_RV, -top, top, out=moved_RV)
    return _to_grain(moved_RV, step)


def clip_differences(scores_RK: Singles, public_K: Singles, bound: float) -> Singles:
    """Return every row minus the public scores, minus the median of that difference, cut to [-bound, bound].

    Guarantee: within [-bound, bound] and multiples of `grain(bound)`, whatever the scores hold; where one is no
    number the row says nothing there, or nothing at all. A constant added to a row changes nothing.
    Shapes: (R, K), (K,) -> (R, K).
    """
    step = grain(bound)
    top = math.floor(bound / step) * step
    with np.errstate(invalid="ignore"):
        moved_RK = scores_RK - public_K
        if moved_RK.size:
            moved_RK -= np.median(moved_RK, axis=1, keepdims=True)
    np.nan_to_num(moved_RK, copy=False, nan=0.0, posinf=top, neginf=-top)
    np.clip(moved_RK, -top, top, out=moved_RK)
    return _to_grain(moved_RK, step)


def summed(clipped_RK: Singles) -> Doubles:
    """Return the sum over rows, exact: sums of parts add up to the sum of the whole, bit by bit. Shapes: (K,)."""
    return clipped_RK.sum(axis=0, dtype=np.float64)


def probability_sum(scores_RV: Singles) -> Doubles:
    """Return the sum over rows of softmax(scores) at temperature 1, exact as `summed`.

    A row that is no distribution, because a score of it is no number, adds nothing. Shapes: (R, V) -> (V,).
    """
    with np.errstate(invalid="ignore"):
        p_RV = np.exp((scores_RV - scores_RV.max(axis=1, keepdims=True)).astype(np.float64))
        p_RV /= p_RV.sum(axis=1, keepdims=True)
    p_RV[~np.isfinite(p_RV).all(axis=1)] = 0.0
    return (np.floor(p_RV / PROBABILITY_GRAIN) * PROBABILITY_GRAIN).sum(axis=0)


def distance(probability_sum_V: Doubles, public_V: Singles, expected: float) -> float:
    """Return the L1 distance of (1 / expected) sum softmax(private) from softmax(public).

    Guarantee: a row more or less moves it by at most 1 / expected. That is so for the mean of probabilities; the
    softmax of a mean of clipped scores moves ten times as far (specs 3.5, trap 4).
    """
    return float(np.abs(probability_sum_V / expected - softmax(public_V)).sum())


def softmax(scores_V: npt.NDArray[np.floating]) -> Doubles:
    """Return softmax in float64. Raises: NotFinite when the best score is no number."""
    best = float(scores_V.max())
    if not math.isfinite(best):
        raise NotFinite(f"best public score {best}: the model or the adapter on it holds NaN or infinity")
    weights_V = np.exp(scores_V.astype(np.float64) - best)
    return weights_V / weights_V.sum()


def public_mask(public_V: Singles, top: int, margin: float = 0.0) -> npt.NDArray[np.int64]:
    """Return the ascending ids of the `top` best public tokens and of all within `margin` of the last of them.

    A function of public scores and public constants alone, so it costs nothing. `top` 0 is the whole vocabulary.
    InvisibleInk's top-k+ is margin = 2 C / B: no token outside could have got into the private top k.
    Raises: NotFinite when the best public score is no number.
    """
    if not math.isfinite(float(public_V.max())):
        raise NotFinite("the public scores hold NaN or infinity; check the base model and the adapter on it")
    if not 0 < top < len(public_V):
        return np.arange(len(public_V))
    last = np.partition(public_V, len(public_V) - top)[len(public_V) - top]
    return np.flatnonzero(public_V >= last - margin).astype(np.int64, copy=False)


def draw(scores_K: Doubles, noise: NoiseSource) -> int:
    """Return the place of one draw from softmax(scores): the largest after adding Gumbel noise.

    Source: Gumbel-max trick (Maddison et al. 2014); what floating point leaves open: `fl_app.privacy.noise`.
    """
    return int(np.argmax(scores_K + noise.gumbel(scores_K.shape)))


def token_span(bound: float, expected: float, temperature: float) -> float:
    """Return the log-ratio range of one draw from softmax(sum / (expected * temperature)).

    A unit moves every coordinate of the sum by at most `bound` either way, so the log-probabilities' differences lie in
    an interval of width 2 bound / (expected * temperature).
    """
    return 2 * bound / (expected * temperature)


def bound_of_span(span: float, expected: float, temperature: float) -> float:
    """Return the clip bound that a span pays for: the inverse of `token_span`. InvisibleInk's C."""
    return span * expected * temperature / 2


def threshold_epsilon(expected: float, threshold_noise: float) -> float:
    """Return what one run of the sparse vector costs: from a threshold's draw to the first distance that passes it.

    The threshold gets Laplace noise of scale `threshold_noise`, each distance of twice that; a distance moves by at
    most 1 / expected either way: 1 / (expected * noise) + 2 / (expected * 2 noise).
    """
    return 2 / (expected * threshold_noise)


def zcdp_of_token(span: float) -> float:
    """Return the zCDP of one draw, span^2 / 8 (Cesar & Rogers 2021, lemma 3.3)."""
    return span**2 / 8


def zcdp_of_threshold(epsilon: float) -> float:
    """Return the zCDP of one run of the sparse vector, epsilon^2 / 2."""
    return epsilon**2 / 2


def zcdp_delta(rho: float, epsilon: float) -> float:
    """Return the least delta at which rho-zCDP is known to be (epsilon, delta)-DP."""
    if rho <= 0:
        return 0.0
    found = _least_log_delta(rho, epsilon)
    return min(1.0, math.exp(found)) if found > -700 else 0.0  # noqa: PLR2004 - below it exp is zero anyway


def zcdp_budget(epsilon: float, delta: float) -> float:
    """Return the largest rho that is (epsilon, delta)-DP by the tight conversion. Both must be positive, delta < 1."""
    low, high = 0.0, epsilon + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if _least_log_delta(middle, epsilon) <= math.log(delta):
            low = middle
        else:
            high = middle
    return low


def tokens_within(rho: float, *, span: float, epsilon_per_threshold: float = 0.0) -> int:
    """Return how many private tokens a bucket affords, each with one threshold where there is a drafter."""
    return math.floor(rho / (zcdp_of_token(span) + zcdp_of_threshold(epsilon_per_threshold)))


def clip_within(rho: float, *, tokens: int, expected: float, temperature: float) -> float:
    """Return InvisibleInk's clip C = B tau sqrt(2 rho / T)."""
    return bound_of_span(math.sqrt(8 * rho / tokens), expected, temperature)


LEAST_BOUND = 1e-6
"""A clip below it moves no score, and far below it float32 has no grain: 0 / 0 would tell whether there is a row."""


def check_bound(bound: float) -> None:
    """Return when scores can be clipped to `bound`. Raises: PolicyRefusal naming it; a function of public values."""
    if not bound >= LEAST_BOUND:
        raise PolicyRefusal(
            f"a clip of {bound:.3g} is left for every score, at least {LEAST_BOUND:g} is needed; ask for fewer tokens, "
            "larger buckets or a higher temperature"
        )


def _to_grain(clipped: Singles, step: float) -> Singles:
    assert np.float32(step) > 0, "callers clip to no less than LEAST_BOUND"
    clipped /= np.float32(step)  # powers of two: exact both ways
    np.trunc(clipped, out=clipped)
    clipped *= np.float32(step)
    return clipped


def _least_log_delta(rho: float, epsilon: float) -> float:
    """Return log of inf over a > 1 of exp((a - 1)(a rho - epsilon)) / (a - 1) * (1 - 1 / a)^a, by golden section.

    In u = log(a - 1) the function has one valley; every a gives a valid delta, so stopping early errs upwards.
    """

    def log_delta(u: float) -> float:
        less = math.exp(u)
        order = 1 + less
        return less * (order * rho - epsilon) - u + order * (u - math.log(order))

    low, high = -20.0, math.log(MOST_ORDERS)
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = log_delta(left), log_delta(right)
    for _ in range(90):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = log_delta(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = log_delta(right)
    return min(at_left, at_right)
