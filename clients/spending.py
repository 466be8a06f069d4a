"""What a round will cost, said before it begins: the receipt, the cap, and the rule that holds the ledger.

The noise multiplier is chosen once. Under a fixed schedule that is for the life of the ledger: the first round of the
first run asks for the least noise with which its run fits, and every later run goes on with it (`privacy.plan`). Under
a Renyi filter each run chooses anew, from what is left. Within a run it never changes, whatever the rounds showed.

Everything here is reckoned from a `Book`, so that a data holder can look ahead (`clients.desk`) with the very code that
a round uses, and nothing is written.

Out of scope: what the policy forbids at any price (`gate`); who writes it down (`privacy.ledger`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app.errors import BudgetSpent, PolicyRefusal
from fl_app.privacy import plan as planning
from fl_app.privacy.accountants import pld
from fl_app.privacy.calibrate import least_noise
from fl_app.privacy.events import noise_of
from fl_app.types import Exponential

if TYPE_CHECKING:
    from clients.config import SitePolicy
    from clients.stages import Learner
    from clients.survey import Survey
    from fl_app.privacy.book import Book
    from fl_app.privacy.plan import Plan
    from fl_app.privacy.renyi_filter import RenyiFilter
    from fl_app.types import DpReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of one run, as a server asks for it: `epsilon` is the most that the run may add, by PLD."""

    run: str
    number: int
    rounds: int
    epsilon: float

    @property
    def left(self) -> int:
        """Rounds from this one to the last."""
        return self.rounds - self.number + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """What the learner costs in `every` round, what is paid `once`, and the epsilon that the ledger may reach, by PLD.

    `sides` are the other mechanisms that a new plan must hold, with their numbers for the ledger's life (`plan`).
    """

    every: tuple[DpReceipt, ...]
    once: tuple[DpReceipt, ...]
    sides: tuple[DpReceipt, ...]
    budget: float

    @property
    def receipts(self) -> tuple[DpReceipt, ...]:
        """What this round costs."""
        return (*self.every, *self.once)

    @property
    def surveys(self) -> bool:
        """Whether the survey is part of this round."""
        return bool(self.once)

    def run(self, rounds: int) -> tuple[DpReceipt, ...]:
        """Return the receipts of this round and those after it, `rounds` in all."""
        return (*self.every * rounds, *self.once)


NOTHING = Announced(every=(), once=(), sides=(), budget=float("inf"))
"""A round without any receipt, and so without any promise."""


def announced(
    policy: SitePolicy, book: Book, renyi: RenyiFilter | None, learner: Learner, survey: Survey | None, asked: Round
) -> Announced:
    """Return what this round costs. The survey is part of the first round that a site plays in a run.

    `asked.epsilon` caps what this run adds, by PLD, to what was spent before it, and never lifts the policy's own; a
    filter knows no such share, it holds the whole.

    Raises: BudgetSpent when this round, or at the beginning of a run all its rounds, do not fit; LedgerRefusal when
    the schedule is fixed to something else; PolicyRefusal when the noise is less than the site's floor.
    """
    delta, constants = policy.privacy.delta, policy.public_constants()
    before = [receipt for entry in book.reserved if entry.run != asked.run for receipt in entry.receipts]
    budget = min(policy.privacy.epsilon, pld.epsilon(before, delta) + asked.epsilon)
    begins = not any(entry.run == asked.run for entry in book.reserved)
    once = (survey.announce(constants),) if survey is not None and begins else ()

    def cost(noise: float) -> Announced:
        """Return what the round costs at this noise."""
        every = learner.announce(constants, noise)
        beside = tuple(planning.times(side, asked.left) for side in every[1:])
        return Announced(every=every, once=once, sides=(*beside, *once), budget=budget)

    plan = None if renyi is not None else _held(book)
    noise = _kept(book, asked.run, plan)
    kept = noise is not None
    if learner.noise is not None:
        noise = learner.noise
    if noise is None:
        noise = least_noise(
            book.receipts,
            lambda tried: cost(tried).run(asked.left),
            epsilon=budget,
            delta=delta,
            floor=policy.limits.min_noise_multiplier,
            ceiling=policy.limits.max_noise_multiplier,
            renyi=renyi,
        )
    _check_floor(policy, noise, asked, plan, kept=kept)
    found = cost(noise)
    for receipt in found.receipts:
        _check_beside(policy, receipt)
    after = (*book.receipts, *(found.run(asked.left) if begins else found.receipts))
    if plan is not None:
        plan.check((*book.receipts, *found.receipts))
        after = plan.in_full(after)
    if not (total := pld.epsilon(after, delta)) <= budget:
        raise BudgetSpent(_too_much(asked, found, plan, begins=begins, total=total))
    if renyi is not None:
        renyi.require(after)
    return found


def _held(book: Book) -> Plan | None:
    """Return the plan of a fixed schedule; None while there is none, or nothing to hold."""
    if not pld.epsilon(book.receipts, 0.5) < float("inf"):  # a release without noise: no budget is left to anybody
        return None
    mechanism = book.mechanism  # raises for an older version's lines of several
    if mechanism is None:
        return None
    return book.plan or planning.Plan(epsilon=1.0, delta=0.5, mechanism=mechanism)


def _kept(book: Book, run: str, plan: Plan | None) -> float | None:
    """Return the noise that is chosen already: the schedule's, or this run's; None when none is."""
    if plan is not None:
        return noise_of(plan.mechanism.event)
    entry = next((entry for entry in book.reserved if entry.run == run), None)
    return noise_of(entry.receipts[0].event) if entry is not None else None


def _check_floor(policy: SitePolicy, noise: float, asked: Round, plan: Plan | None, *, kept: bool) -> None:
    """Return when the noise is at least what the site asks for. Raises: PolicyRefusal."""
    if (floor := policy.limits.min_noise_multiplier) <= noise:
        return
    if not kept:
        raise PolicyRefusal(
            f"the configuration fixes noise {noise:.4g}, site.toml asks for at least {floor:g}; a smaller clip, a "
            "larger batch or a higher temperature makes it larger"
        )
    raise PolicyRefusal(
        f"run {asked.run} would go on with noise multiplier {noise:g}, site.toml now asks for at least {floor:g}; "
        + ("start a new run" if plan is None else 'lower it, or go on under composition = "renyi_filter"')
    )


def _check_beside(policy: SitePolicy, receipt: DpReceipt) -> None:
    """Return when a survey or a threshold is as noisy as the site asks for. Raises: PolicyRefusal.

    What is known to be epsilon-DP and no more counts as noise 1 / epsilon, as a Laplace of that scale would.
    """
    event, floor = receipt.event, policy.limits.min_noise_multiplier
    noise = 1 / event.epsilon if isinstance(event, Exponential) else noise_of(event)
    if noise is not None and not noise >= floor * (1 - 1e-9):
        raise PolicyRefusal(
            f"{planning.describe(planning.one_step(receipt))} is asked, of noise {noise:.4g}; site.toml asks for at "
            f"least {floor:g} of every mechanism"
        )


def _too_much(asked: Round, found: Announced, plan: Plan | None, *, begins: bool, total: float) -> str:
    what = f"its {asked.left} rounds" if begins and asked.left > 1 else f"round {asked.number}"
    told = f"run {asked.run}: {what} would reach epsilon {total:.4g} of epsilon {found.budget:.4g}"
    if plan is None:
        return f"{told}; ask for fewer rounds or steps"
    return (
        f"{told} at the {planning.describe(planning.one_step(found.receipts[0]))} to which this ledger's schedule is "
        f"fixed; ask for fewer rounds or steps; {planning.WAY_OUT}"
    )
