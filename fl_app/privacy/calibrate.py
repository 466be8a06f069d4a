"""The least noise that keeps a site within its budget: past spending plus the rounds to come.

The site asks this of its own ledger and its own policy; the server's wish enters nowhere. Under a fixed schedule it is
asked once in the life of a ledger, before the first round, and the answer is kept by the ledger's plan: that is what
numerical composition certifies (`privacy.plan`). Whoever asks again after looking at releases needs a Renyi filter, and
gives it here: once per run, the noise is then the least with which the rounds fit both.

Source: root finding on the PLD epsilon, as dp_accounting.calibrate_dp_mechanism; ours keeps the composed past
between evaluations, searches on a grid of 1e-4 and proves the answer by recomputing what the ledger will compute.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fl_app.errors import BudgetSpent, LedgerRefusal
from fl_app.privacy.accountants import pld
from fl_app.privacy.events import check_delta
from fl_app.privacy.plan import describe
from fl_app.privacy.statement import of_receipts
from fl_app.types import DpReceipt, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.privacy.renyi_filter import RenyiFilter

TICKS = 10_000
"""Noise multipliers are multiples of 1 / TICKS: four decimals, printed exactly as used."""

MAX_LIFTS = 20
"""How many ticks the final proof may add. The search differs from the ledger only in the order of convolutions, a
relative 1e-9 of delta; one tick is far more than that. Observed: none."""


def noise_multiplier(
    past: Sequence[DpReceipt],
    *,
    sample_rate: float,
    steps: int,
    rounds: int,
    clip_norm: float,
    unit: str,
    epsilon: float,
    delta: float,
    floor: float,
    ceiling: float,
    renyi: RenyiFilter | None = None,
) -> float:
    """Return the smallest noise multiplier, to four decimals, with which `rounds` more rounds of DP-SGD fit the budget.

    Each round is PoissonGaussian(noise_multiplier, sample_rate, steps, clip_norm) for `unit`, on top of `past`.
    Guarantee, Raises: see `least_noise`.
    """
    if isinstance(rounds, bool) or not rounds >= 1:
        raise LedgerRefusal(f"rounds = {rounds!r} must be at least 1")

    def schedule(noise: float) -> list[DpReceipt]:
        event = PoissonGaussian(
            noise_multiplier=noise, sample_rate=sample_rate, steps=steps * rounds, clip_norm=clip_norm
        )
        return [DpReceipt(event=event, unit=unit)]

    return least_noise(past, schedule, epsilon=epsilon, delta=delta, floor=floor, ceiling=ceiling, renyi=renyi)


def least_noise(
    past: Sequence[DpReceipt],
    schedule: Callable[[float], Sequence[DpReceipt]],
    *,
    epsilon: float,
    delta: float,
    floor: float,
    ceiling: float,
    renyi: RenyiFilter | None = None,
) -> float:
    """Return the smallest noise, to four decimals, with which `schedule(noise)` fits the budget on top of `past`.

    More noise must never cost more. What does not depend on it, such as a survey, may be part of the schedule.

    Guarantee: pld.epsilon(past + schedule, delta) <= epsilon, and renyi.admits(past + schedule) where there is a
    filter, both recomputed with the value returned; floor <= value <= ceiling. Less than 1e-4 of noise is given away by
    rounding up.
    Raises: BudgetSpent when even `ceiling` does not fit; LedgerRefusal for a value out of range or foreign units.
    """
    check_delta(delta)
    if not (0 < epsilon < math.inf):
        raise LedgerRefusal(f"epsilon = {epsilon!r} must be positive and finite")
    lowest, highest = _ticks(floor, ceiling)

    def after(tick: int) -> list[DpReceipt]:
        return [*past, *schedule(tick / TICKS)]

    def fits(tick: int) -> bool:
        return pld.epsilon(after(tick), delta) <= epsilon and (renyi is None or renyi.admits(after(tick)))

    if renyi is not None:
        lowest = _least_admitted(renyi, after, lowest=lowest, highest=highest)
    spent_loss = pld.compose(past)
    least_total = pld.epsilon(after(highest), delta)
    if not least_total <= epsilon:
        statement = of_receipts(after(highest), delta=delta, accountant=pld.label())
        raise BudgetSpent(
            f"spent {pld.epsilon(past, delta):.4g} of epsilon {epsilon:g} {statement.words()}; "
            f"{', '.join(map(describe, schedule(highest / TICKS)))} would make it {least_total:.4g} even with the "
            f"largest noise multiplier allowed, {highest / TICKS:g}; ask for fewer rounds or steps or a lower sample "
            "rate, or raise epsilon in the site's policy"
        )
    found = _least(
        lambda tick: pld.read(pld.join(spent_loss, pld.compose(schedule(tick / TICKS))), delta),
        budget=epsilon,
        lowest=lowest,
        highest=highest,
        at_highest=least_total,
    )
    for tick in range(found, min(found + MAX_LIFTS, highest)):
        if fits(tick):
            return tick / TICKS
    return highest / TICKS  # found to fit above


def _least_admitted(
    renyi: RenyiFilter, after: Callable[[int], Sequence[DpReceipt]], *, lowest: int, highest: int
) -> int:
    """Return the smallest tick in [lowest, highest] that the filter admits. Raises: BudgetSpent when none is."""
    renyi.require(after(highest))
    return _least(
        lambda tick: renyi.spent(after(tick)),
        budget=renyi.budget,
        lowest=lowest,
        highest=highest,
        at_highest=renyi.spent(after(highest)),
    )


def _ticks(floor: float, ceiling: float) -> tuple[int, int]:
    """Return the grid points inside [floor, ceiling]."""
    if not (0 < floor <= ceiling < math.inf):
        raise LedgerRefusal(f"noise floor {floor!r} and ceiling {ceiling!r} must satisfy 0 < floor <= ceiling")
    lowest, highest = round(floor * TICKS), round(ceiling * TICKS)
    lowest += lowest / TICKS < floor
    highest -= highest / TICKS > ceiling
    if not 1 <= lowest <= highest:
        raise LedgerRefusal(f"no noise multiplier with four decimals lies in [{floor!r}, {ceiling!r}]")
    return lowest, highest


def _least(spend: Callable[[int], float], *, budget: float, lowest: int, highest: int, at_highest: float) -> int:
    """Return the smallest tick in [lowest, highest] whose spending fits, given that `highest` fits.

    False position on log(spend) over log(tick), which is nearly straight, with the Anderson-Bjorck correction (the
    end that stays is weighted down); every fourth turn, and while an end is infinite or zero, the geometric middle.
    """
    low, low_gap = lowest, _gap(spend(lowest), budget)
    if low_gap <= 0:
        return lowest
    high, high_gap = highest, _gap(at_highest, budget)
    turn, low_moved = 0, False
    while high - low > 1:
        turn += 1
        weight = 0.5
        if turn % 4 and math.isfinite(low_gap) and math.isfinite(high_gap):
            weight = low_gap / (low_gap - high_gap) if low_gap > high_gap else 0.5
        guess = math.exp(math.log(low) + weight * (math.log(high) - math.log(low)))
        # When the last point did not fit, look just above the root, else just below: two looks then close the bracket.
        middle = min(max(math.ceil(guess) if low_moved else math.floor(guess), low + 1), high - 1)
        gap = _gap(spend(middle), budget)
        fits = gap <= 0
        if fits:
            low_gap *= _keep(gap, high_gap) if turn > 1 and not low_moved else 1.0
            high, high_gap = middle, gap
        else:
            high_gap *= _keep(gap, low_gap) if turn > 1 and low_moved else 1.0
            low, low_gap = middle, gap
        low_moved = not fits
    return high


def _keep(new: float, old: float) -> float:
    """Return the Anderson-Bjorck weight of the end that stays."""
    share = 1 - new / old if math.isfinite(old) and old != 0 else 0.0
    return share if share > 0 else 0.5


def _gap(spent: float, budget: float) -> float:
    return math.log(spent / budget) if spent > 0 else -math.inf
