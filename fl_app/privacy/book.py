"""What a ledger's lines add up to, and what they let in: the arithmetic between the lines and the file.

A reservation is let in when everything ever reserved plus it stays within its cap by PLD, and the rule that holds the
ledger admits it: the plan of a fixed schedule (`plan`), or a Renyi filter (`renyi_filter`). Which line must stand
before it, if any, is said here and written by `ledger`.

Out of scope: the file, its lock and its crashes (`ledger`), the line format (`chain`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_app.errors import BudgetSpent, LedgerRefusal
from fl_app.hash_chain import NO_LINE
from fl_app.privacy import plan as planning
from fl_app.privacy.accountants import pld
from fl_app.privacy.chain import Committed, Filtered, Header, Planned, Reserved
from fl_app.privacy.events import no_noise, receipt_to_dict
from fl_app.privacy.renyi_filter import settle
from fl_app.privacy.statement import of_receipts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.privacy.chain import Entry
    from fl_app.privacy.plan import Plan
    from fl_app.privacy.renyi_filter import RenyiFilter
    from fl_app.types import Composition, DpReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a ledger promises whatever anybody asks of it: (`epsilon`, `delta`), held by `composition`.

    `delta` is twice the policy's once a ledger went from a fixed schedule to a filter: some histories are held by the
    one, the others by the other, and each may fail with the policy's delta.
    """

    epsilon: float
    delta: float
    composition: Composition


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A reservation and the hash of what it became."""

    reserved: Reserved
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One reservation as it is asked for. `epsilon` caps the whole ledger by PLD, `promise` is the policy's own.

    `sides`: see `plan`; they count when this reservation writes the plan, and are ignored where there is one.
    """

    run: str
    round_number: int
    receipts: tuple[DpReceipt, ...]
    epsilon: float
    delta: float
    promise: float
    renyi: RenyiFilter | None
    sides: tuple[DpReceipt, ...] = ()


@dataclass(slots=True, kw_only=True)
class Book:
    """The ledger's entries. `descriptor` is its file while that is locked, -1 in a book to reckon with."""

    entries: list[Entry]
    descriptor: int = -1

    @property
    def head(self) -> str:
        """The hash of the last line; 64 zeros when there is none."""
        return self.entries[-1].hash if self.entries else NO_LINE

    @property
    def public_head(self) -> str:
        """The head as it may be sent: 64 zeros for a ledger without salt, whose hashes would tell of its rows."""
        header = self.entries[0]
        return self.head if isinstance(header, Header) and header.salt else NO_LINE

    def stream_of(self, seq: int) -> int:
        """Return the number that names the simulated noise of a reservation: its line, lines of plans not counted."""
        return seq - sum(isinstance(entry, Planned) and entry.seq < seq for entry in self.entries)

    @property
    def reserved(self) -> tuple[Reserved, ...]:
        """Every reservation, in order."""
        return tuple(entry for entry in self.entries if isinstance(entry, Reserved))

    @property
    def receipts(self) -> tuple[DpReceipt, ...]:
        """Everything ever reserved, in order, committed or not."""
        return tuple(receipt for entry in self.reserved for receipt in entry.receipts)

    @property
    def renyi(self) -> RenyiFilter | None:
        """The filter as it was recorded; only the first counts, for it was fixed before all others."""
        return next((entry.renyi for entry in self.entries if isinstance(entry, Filtered)), None)

    @property
    def plan(self) -> Plan | None:
        """The plan of the fixed schedule: the last one written, none of which stands after a reservation of its own."""
        return next((entry.plan for entry in reversed(self.entries) if isinstance(entry, Planned)), None)

    @property
    def mechanism(self) -> DpReceipt | None:
        """The mechanism that a fixed schedule is held to; None while nothing was reserved.

        Raises: LedgerRefusal for an older version's lines of several mechanisms, which no schedule certifies.
        """
        if not self.reserved:
            return None
        if self.plan is not None:
            return self.plan.mechanism
        return planning.fix(self.receipts, epsilon=1.0, delta=0.5).mechanism

    @property
    def switched(self) -> bool:
        """Whether something was reserved that no filter held: before the filter's line, or with none so far."""
        kinds = [type(entry) for entry in self.entries]
        filtered = kinds.index(Filtered) if Filtered in kinds else len(kinds)
        return Reserved in kinds[:filtered]

    def is_made(self, reservation_id: str) -> bool:
        """Return whether a reservation became an artefact."""
        return any(isinstance(entry, Committed) and entry.id == reservation_id for entry in self.entries)

    def last_made(self, run: str, round_number: int) -> Made | None:
        """Return the newest reservation of this run and round that became an artefact, if any."""
        made = {entry.id: entry.sha256 for entry in self.entries if isinstance(entry, Committed)}
        for entry in reversed(self.reserved):
            if (entry.run, entry.round) == (run, round_number) and entry.id in made:
                return Made(reserved=entry, sha256=made[entry.id])
        return None

    def spent(self, by_pld: float, delta: float) -> float:
        """Return `by_pld`, or in a ledger held by a filter the larger of it and the filter's equivalent."""
        if self.renyi is None:
            return by_pld
        return max(by_pld, dataclasses.replace(self.renyi, delta=delta).epsilon_equivalent(self.receipts))

    def promise(self, composition: Composition, *, epsilon: float, delta: float) -> Promise:
        """Return what is promised under a policy that says this."""
        held = self.renyi is not None or composition == "renyi_filter"
        return Promise(
            epsilon=epsilon,
            delta=2 * delta if held and self.switched else delta,
            composition="renyi_filter" if held else "fixed_schedule",
        )

    def settle(self, composition: Composition, *, epsilon: float, delta: float) -> RenyiFilter | None:
        """Return the filter under which this ledger goes on if the policy says so; None for its plan alone.

        Raises: LedgerRefusal when the policy would leave a filter, or promise more than was promised.
        """
        renyi = settle(self.renyi, composition=composition, epsilon=epsilon, delta=delta)
        if self.plan is not None and self.reserved:
            self.plan.check_promise(epsilon=epsilon, delta=delta)
        return renyi

    def admit(self, asked: Asked) -> tuple[float, dict[str, Any] | None]:
        """Return the PLD epsilon with what is asked, and the line that must be written before it, if any.

        Raises: BudgetSpent; LedgerRefusal when the rule that holds the ledger does not know what is asked.
        """
        self._check_filter(asked.renyi)
        after = [*self.receipts, *asked.receipts]
        if asked.renyi is not None:
            self._require(asked.renyi, after)  # first: where it binds, raising epsilon is no way out
        total = pld.epsilon(after, asked.delta)
        if not total <= min(asked.epsilon, asked.promise):
            raise BudgetSpent(self._too_much(asked, after, total))
        if asked.receipts == (no_noise(asked.receipts[0].unit),):
            return total, None  # nothing is promised from here on
        if asked.renyi is not None:
            if self.plan is not None and self.reserved:
                self.plan.check_promise(epsilon=asked.renyi.epsilon, delta=asked.renyi.delta)
            return total, {"kind": "filter", **dataclasses.asdict(asked.renyi)} if self.renyi is None else None
        return total, self._planned(asked, after)

    def _planned(self, asked: Asked, after: Sequence[DpReceipt]) -> dict[str, Any] | None:
        """Return the plan's line when there is none yet that holds. Raises: LedgerRefusal."""
        plan = self.plan
        if plan is not None and self.reserved:
            plan.check_promise(epsilon=asked.promise, delta=asked.delta)
            plan.check(after)
            self._require_room(plan, asked, after)
            return None
        if self.reserved:  # lines of a version without plans: they are of one mechanism, whatever sides are named now
            planning.fix(self.receipts, epsilon=asked.promise, delta=asked.delta)
        fresh = planning.fix(after, epsilon=asked.promise, delta=asked.delta, sides=asked.sides)
        self._require_room(fresh, asked, after)
        if fresh == plan:  # a crash came between the plan and its first reservation
            return None
        mechanism = receipt_to_dict(fresh.mechanism)
        sides = {"sides": [receipt_to_dict(side) for side in fresh.sides]} if fresh.sides else {}
        return {"kind": "plan", "epsilon": fresh.epsilon, "delta": fresh.delta, "mechanism": mechanism, **sides}

    def _require_room(self, plan: Plan, asked: Asked, after: Sequence[DpReceipt]) -> None:
        """Return when the plan's sides, counted in full, leave room for `after`. Raises: BudgetSpent."""
        if not plan.sides:
            return
        full = plan.in_full(after)
        total = pld.epsilon(full, asked.delta)
        if not total <= min(asked.epsilon, asked.promise):
            raise BudgetSpent(self._too_much(asked, full, total))

    def _check_filter(self, renyi: RenyiFilter | None) -> None:
        """Return when `renyi` is what `settle` makes of this ledger. Raises: LedgerRefusal."""
        if renyi is None:
            settle(self.renyi, composition="fixed_schedule", epsilon=1.0, delta=0.5)
        elif renyi != settle(self.renyi, composition="renyi_filter", epsilon=renyi.epsilon, delta=renyi.delta):
            raise LedgerRefusal(f"order {renyi.order} is not this ledger's; ask the ledger for its filter")

    def _require(self, renyi: RenyiFilter, after: Sequence[DpReceipt]) -> None:
        """Return when the filter admits `after`. Raises: BudgetSpent, which says when a policy lowered the budget."""
        try:
            renyi.require(after)
        except BudgetSpent as error:
            if self.renyi is None or self.renyi == renyi:
                raise
            raise BudgetSpent(
                f"{error}. site.toml lowered it from epsilon {self.renyi.epsilon:g} at delta {self.renyi.delta:g}, to "
                "which it may go back"
            ) from None

    def _too_much(self, asked: Asked, after: Sequence[DpReceipt], total: float) -> str:
        statement = of_receipts(after, delta=asked.delta, accountant=pld.label())
        spent, alone = pld.epsilon(self.receipts, asked.delta), pld.epsilon(asked.receipts, asked.delta)
        most = self.plan.epsilon if self.plan is not None and self.reserved else float("inf")
        way_out = "ask for less, or raise epsilon in the site's policy"
        if most < float("inf"):
            way_out += f", to at most {most:g}, which was promised before the first release"
        if not asked.epsilon < most:
            way_out = f"ask for less; epsilon {most:g} was promised before the first release and cannot be raised"
        return (
            f"spent {spent:.4g} of epsilon {asked.epsilon:g} {statement.words()}; "
            f"run {asked.run} round {asked.round_number} asks {alone:.4g}, together {total:.4g}; {way_out}"
        )
