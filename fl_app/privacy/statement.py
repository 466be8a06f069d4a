"""What must be read with an epsilon: delta, unit, neighbouring relation, sampling and accountant. Never one without.

Whoever prints, logs or writes an epsilon takes the five from here, so that they have one wording and none is forgotten.

Out of scope: how a report words them (`simulations.report.words`); what the epsilon is (`accountants`).
Source: house rule; federated-methods-and-dp.md 3.5; jax_privacy: docs/sharp_edges_dp_training_pitfalls.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from fl_app.privacy.accountants import pld
from fl_app.types import PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Composition, DpReceipt, Relation

SCHEDULE = "for a schedule fixed in advance"
"""What PLD composition assumes; where later runs are chosen by looking at earlier ones only a filter holds."""

POISSON, NO_SAMPLING = "Poisson", "no"
"""Poisson: every unit joins a step by its own coin. No: every unit, every time, so that no amplification is claimed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """The five words of one epsilon."""

    delta: float
    unit: str
    accountant: str
    relation: Relation = "add_or_remove_one"
    sampling: str = POISSON

    def fields(self) -> dict[str, Any]:
        """Return the five under their names in `summary.json` and in the journal."""
        return asdict(self)

    def words(self) -> str:
        """Return what follows the number: 'at delta 1e-05, per record, add_or_remove_one, Poisson sampling, PLD'."""
        return f"at delta {self.delta:g}, per {self.unit}, {self.relation}, {self.sampling} sampling, {self.accountant}"


def rounded_up(epsilon: float) -> str:
    """Return an epsilon with four digits and never below it: a guarantee is not rounded to nearest."""
    if not math.isfinite(epsilon) or epsilon <= 0:
        return f"{epsilon:.4g}"
    digits = 3 - math.floor(math.log10(epsilon))
    return f"{math.ceil(epsilon * 10**digits) / 10**digits:.4g}"


def of_entry(entry: Mapping[str, Any]) -> Statement:
    """Return the statement that `fields` put into an entry. Raises: KeyError when one of the five is missing."""
    return Statement(**{field.name: entry[field.name] for field in fields(Statement)})


def of_receipts(receipts: Sequence[DpReceipt], *, delta: float, accountant: str) -> Statement:
    """Return the statement of receipts that may be added up (`events.check_together`), at least one."""
    sampled = {isinstance(receipt.event, PoissonGaussian) for receipt in receipts}
    names = {True: POISSON, False: NO_SAMPLING}
    return Statement(
        delta=delta,
        unit=receipts[0].unit,
        accountant=accountant,
        relation=receipts[0].relation,
        sampling=" and ".join(names[one] for one in sorted(sampled, reverse=True)),
    )


HELD: dict[Composition | Literal[""], str] = {
    "": f"{SCHEDULE}, or the site's Renyi filter",
    "fixed_schedule": SCHEDULE,
    "renyi_filter": "and the site's Renyi filter, whatever was chosen by looking",
}
"""What stands behind the accountant of a site's figure, by the way its ledger adds up; empty: not known, or mixed."""


def of_site(*, delta: float, unit: str, composition: Composition | Literal[""] = "") -> Statement:
    """Return the statement of what a site says that its ledger has spent, and of the budget it is held within.

    The figure is the site's, by PLD or the larger of it and its filter's, and no less than what the server made of its
    receipts by PLD. `delta` is the one that the site's promise holds at (`types.Hello`).
    """
    return Statement(delta=delta, unit=unit, accountant=f"{pld.label()}, {HELD[composition]}")
