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
from fl_app.privacy.calibrate import noise_multiplier
from fl_app.types import PoissonGaussian

if TYPE_CHECKING:
    from clients.config import SitePolicy
    from clients.stages import Learner
    from fl_app.privacy.book import Book
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
    """A round's receipt, and the epsilon that the whole ledger may reach with it, by PLD."""

    receipt: DpReceipt
    budget: float


def announced(policy: SitePolicy, book: Book, renyi: RenyiFilter | None, learner: Learner, asked: Round) -> Announced:
    """Return what this round costs.

    `asked.epsilon` caps what this run adds, by PLD, to what was spent before it, and never lifts the policy's own; a
    filter knows no such share, it holds the whole.

    Raises: BudgetSpent when this round, or at the beginning of a run all its rounds, do not fit; LedgerRefusal when
    the schedule is fixed to something else; PolicyRefusal when the site has raised its noise floor since.
    """
    delta = policy.privacy.delta
    before = [receipt for entry in book.reserved if entry.run != asked.run for receipt in entry.receipts]
    budget = min(policy.privacy.epsilon, pld.epsilon(before, delta) + asked.epsilon)
    held = None if renyi is not None else _held(book)
    multiplier, fixed = _kept(book, asked.run, held), True
    if multiplier is None:
        multiplier, fixed = _least_noise(policy, book, renyi, learner, asked, budget), False
    receipt = learner.announce(policy.public_constants(), multiplier)
    assert receipt is not None  # the learner is private
    if held is not None:
        planning.Plan(epsilon=1.0, delta=0.5, mechanism=held).check([receipt])
    if fixed and multiplier < policy.limits.min_noise_multiplier:
        raise PolicyRefusal(
            f"run {asked.run} would go on with noise multiplier {multiplier:g}, site.toml now asks for at least "
            f"{policy.limits.min_noise_multiplier:g}; "
            + ("start a new run" if held is None else 'lower it, or go on under composition = "renyi_filter"')
        )
    rounds = 1 if any(entry.run == asked.run for entry in book.reserved) else asked.left
    after = [*book.receipts, *[receipt] * rounds]
    if not (total := pld.epsilon(after, delta)) <= budget:
        raise BudgetSpent(_too_much(asked, rounds, receipt, held, total=total, budget=budget))
    if renyi is not None:
        renyi.require(after)
    return Announced(receipt=receipt, budget=budget)


def _held(book: Book) -> DpReceipt | None:
    """Return the sampled mechanism to which a schedule is fixed; None while there is none, or nothing to hold."""
    if not pld.epsilon(book.receipts, 0.5) < float("inf"):  # a release without noise: no budget is left to anybody
        return None
    return book.mechanism


def _kept(book: Book, run: str, held: DpReceipt | None) -> float | None:
    """Return the noise multiplier that is chosen already: the schedule's, or this run's; None when none is."""
    receipts = [held] if held is not None else [r for e in book.reserved if e.run == run for r in e.receipts]
    kept = [r.event.noise_multiplier for r in receipts if isinstance(r.event, PoissonGaussian)]
    return kept[0] if kept else None


def _least_noise(
    policy: SitePolicy, book: Book, renyi: RenyiFilter | None, learner: Learner, asked: Round, budget: float
) -> float:
    """Return the least noise multiplier with which all rounds of the run fit. Raises: BudgetSpent."""
    return noise_multiplier(
        book.receipts,
        sample_rate=policy.constants.sample_rate,
        steps=learner.steps,
        rounds=asked.left,
        clip_norm=learner.clip_norm,
        unit=policy.privacy.unit,
        epsilon=budget,
        delta=policy.privacy.delta,
        floor=policy.limits.min_noise_multiplier,
        ceiling=policy.limits.max_noise_multiplier,
        renyi=renyi,
    )


def _too_much(
    asked: Round, rounds: int, receipt: DpReceipt, held: DpReceipt | None, *, total: float, budget: float
) -> str:
    what = f"round {asked.number}" if rounds == 1 else f"its {rounds} rounds"
    told = f"run {asked.run}: {what} would reach epsilon {total:.4g} of epsilon {budget:.4g}"
    if held is None:
        return f"{told}; ask for fewer rounds or steps"
    return (
        f"{told} at the {planning.describe(planning.one_step(receipt))} to which this ledger's schedule is fixed; ask "
        f"for fewer rounds or steps; {planning.WAY_OUT}"
    )
