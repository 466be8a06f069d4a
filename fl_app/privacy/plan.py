"""A schedule that stays fixed: one mechanism for the life of a ledger, as often as its budget carries it.

Numerical composition (PLD) certifies a list of mechanisms that was fixed before the first release. A server that picks
a second run after seeing the first, other steps at another noise, leaves that list: with sample rate .01 and 100 steps
at noise 0.8, then 1 or 3000 steps at whatever noise still "fits" epsilon 2, an output can be found whose true epsilon
is 2.16 (`tests/privacy/test_fixed_schedule.py` computes it). So the first reservation of a ledger writes down, before
itself, what every later one must be made of: the noise multiplier, the sample rate, the unit, and the (epsilon, delta)
that is promised. How many steps, rounds and runs there will be stays open, and may depend on what was released.

Why that is sound. Let N be the most repetitions with PLD(N) <= epsilon at delta: a function of the plan alone. Each
step, whatever model, clip, learning rate or loss the server chose for it by then, is dominated by the plan's pair of
distributions (P, Q), that is, there is a random map which turns a draw of P into the step's output on one data set and
a draw of Q into that on its neighbour (Blackwell; Kairouz, Oh & Viswanath 2015, theorem 10). Draw N times from P (or Q)
before anything begins, and let the server play: every step that it asks for consumes one draw through its map, in any
order, run by run or interleaved. All it ever sees is a function of the N draws, so it is (epsilon, delta)-DP by PLD of
N. Stopping early, skipping a round, or losing one to a crash leaves draws unused and so never costs more. The proof
needs to know beforehand how many draws of which pair there will be: with two mechanisms to choose from at every turn,
their mixture would again be chosen by looking.

Beside the one mechanism that fills the budget a plan may hold `sides`: other mechanisms, each with the number of times
it may ever be used (one survey; the thresholds of a sparse vector). The proof is the same with a second bag of draws:
N is the most repetitions with PLD(N repetitions and every side in full) <= epsilon, again a function of the plan alone,
and what is not drawn from a bag costs nothing more.

| the ledger so far        | asked                                 | what happens                                   |
|--------------------------|---------------------------------------|------------------------------------------------|
| nothing reserved         | one mechanism                         | plan written, then the reservation             |
| nothing reserved         | one, and sides with their numbers     | plan written with them, then the reservation   |
| nothing reserved         | several mechanisms, without numbers   | refused: a filter can hold them, a plan cannot |
| a plan                   | its mechanism, same or lower promise  | granted while PLD of everything fits           |
| a plan                   | its mechanism, a higher promise       | refused: the promise may be lowered only       |
| a plan                   | a side, while some of it is left      | granted; it is counted in full already         |
| a plan                   | another mechanism, or too much        | refused: as planned, or under a Renyi filter   |
| an older version's lines | the one mechanism that all are of     | the plan is written now                        |
| an older version's lines | anything, where they are of several   | refused: what they are may have been chosen    |

What `spent` says of a ledger in the middle is PLD of the part of the schedule that was used, taken as fixed; what is
promised whatever the server does is the plan's (epsilon, delta).

The way out is `composition = "renyi_filter"`: everything counts in full, under the filter. The decision to change
looked at releases, so a history is held either by the plan or by the filter, each at delta: the promise is then
(epsilon, 2 delta), and `Book.promise` says so.

Source: ours; the argument is that of concurrent composition (Vadhan & Zhang 2022, arXiv 2207.08335) for one-step
mechanisms, with the dominating pairs of Zhu, Dong & Wang 2022 (arXiv 2106.08567).
Out of scope: files and lines (`ledger`, `chain`), schedules chosen by looking (`renyi_filter`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app.errors import LedgerRefusal
from fl_app.privacy.events import check_delta, check_receipt, merged
from fl_app.types import PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import DpReceipt

WAY_OUT = (
    'ask as planned, or let the data holder write composition = "renyi_filter" into site.toml, which holds what is '
    "chosen by looking (at 2 delta)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every reservation of a ledger is made of: `mechanism`, one step at clip norm 1, within `epsilon` at `delta`.

    `sides` are the other mechanisms, each at clip norm 1 with the number of times it may be used in the ledger's life.

    Raises: LedgerRefusal for an epsilon, delta or mechanism out of range, or a side that is the mechanism itself.
    """

    epsilon: float
    delta: float
    mechanism: DpReceipt
    sides: tuple[DpReceipt, ...] = ()

    def __post_init__(self) -> None:
        check_delta(self.delta)
        check_receipt(self.mechanism)
        if self.sides != merged(self.sides) or self.mechanism in mechanisms(self.sides):
            raise LedgerRefusal(f"sides {self.sides} are not other mechanisms, each once, at clip norm 1")
        if isinstance(self.epsilon, bool) or not 0 < self.epsilon < math.inf:
            raise LedgerRefusal(f"epsilon = {self.epsilon!r} of a plan must be positive and finite")
        if self.mechanism != one_step(self.mechanism):
            raise LedgerRefusal(f"{self.mechanism} is not one step at clip norm 1")

    def check_promise(self, *, epsilon: float, delta: float) -> None:
        """Return when a policy promises no more than the plan did. Raises: LedgerRefusal."""
        if epsilon > self.epsilon or delta > self.delta:
            raise LedgerRefusal(
                f"the policy says epsilon {epsilon:g} at delta {delta:g}, but this ledger's plan promised epsilon "
                f"{self.epsilon:g} at delta {self.delta:g} before the first release; a promise may be lowered, not "
                "raised: write those, or less"
            )

    def check(self, receipts: Sequence[DpReceipt]) -> None:
        """Return when everything ever reserved, `receipts`, is made of the plan. Raises: LedgerRefusal."""
        planned = {one_step(side): count(side) for side in self.sides}
        for used in merged(receipts):
            found = one_step(used)
            if found == self.mechanism:
                continue
            if found not in planned:
                others = "".join(f", and {describe(side)}" for side in self.sides)
                raise LedgerRefusal(
                    f"the schedule of this ledger is fixed to {describe(self.mechanism)}{others}, and "
                    f"{describe(found)} is asked: choosing it after looking at releases is what no fixed schedule "
                    f"certifies; {WAY_OUT}"
                )
            if count(used) > planned[found]:
                raise LedgerRefusal(
                    f"the schedule of this ledger holds {planned[found]} x {describe(found)}, and this would make it "
                    f"{count(used)}; leave it out, or {WAY_OUT}"
                )

    def in_full(self, receipts: Sequence[DpReceipt]) -> tuple[DpReceipt, ...]:
        """Return everything ever reserved with every side counted as often as it may ever be used.

        What a budget must have room for: its epsilon never falls below the true one, however the sides are used.
        """
        return (*(used for used in merged(receipts) if one_step(used) == self.mechanism), *self.sides)


def fix(receipts: Sequence[DpReceipt], *, epsilon: float, delta: float, sides: Sequence[DpReceipt] = ()) -> Plan:
    """Return the plan whose first reservation is `receipts`; `sides` with the number of times for a ledger's life.

    Raises: LedgerRefusal when they are of several mechanisms that are no sides, or a value is out of range.
    """
    beside = merged(sides)
    found = [one for one in mechanisms(receipts) if one not in mechanisms(beside)]
    if len(found) != 1:
        told = ", ".join(map(describe, found)) or "none"
        raise LedgerRefusal(f"a fixed schedule is made of one mechanism, here are: {told}; {WAY_OUT}")
    plan = Plan(epsilon=epsilon, delta=delta, mechanism=found[0], sides=beside)
    plan.check(receipts)
    return plan


def mechanisms(receipts: Sequence[DpReceipt]) -> tuple[DpReceipt, ...]:
    """Return the different mechanisms of receipts, each as one step at clip norm 1, in an order of values alone."""
    return tuple(one_step(receipt) for receipt in merged(receipts))


def count(receipt: DpReceipt) -> int:
    """Return how often a receipt's mechanism is used."""
    return receipt.event.steps if isinstance(receipt.event, PoissonGaussian) else receipt.event.count


def one_step(receipt: DpReceipt) -> DpReceipt:
    """Return one repetition of a receipt's mechanism at clip norm 1, on which no epsilon depends."""
    (alone,) = merged([receipt])
    event = alone.event
    single = {"steps": 1} if isinstance(event, PoissonGaussian) else {"count": 1}
    return dataclasses.replace(alone, event=dataclasses.replace(event, **single))


def times(receipt: DpReceipt, number: int) -> DpReceipt:
    """Return a receipt's mechanism `number` times as often, at its own clip norm."""
    event, often = receipt.event, count(receipt) * number
    many = {"steps": often} if isinstance(event, PoissonGaussian) else {"count": often}
    return dataclasses.replace(receipt, event=dataclasses.replace(event, **many))


def repeated(mechanism: DpReceipt, times: int) -> DpReceipt:
    """Return `times` repetitions of one step. Raises: LedgerRefusal below one."""
    event = mechanism.event
    many = {"steps": times} if isinstance(event, PoissonGaussian) else {"count": times}
    made = dataclasses.replace(mechanism, event=dataclasses.replace(event, **many))
    check_receipt(made)
    return made


def describe(receipt: DpReceipt) -> str:
    """Return a receipt in words: '60 steps of noise multiplier 0.8 at sample rate 0.01'; one step without its count."""
    event = receipt.event
    if isinstance(event, PoissonGaussian):
        what = f"noise multiplier {event.noise_multiplier:g} at sample rate {event.sample_rate:g}"
        return what if event.steps == 1 else f"{event.steps} steps of {what}"
    name, skipped = type(event).__name__.lower(), {"count", "clip_norm"}
    values = {f.name: getattr(event, f.name) for f in dataclasses.fields(event) if f.name not in skipped}
    what = f"{name} with {', '.join(f'{key} {value:g}' for key, value in values.items())}"
    return what if event.count == 1 else f"{event.count} times {what}"
