"""What every site of a run has spent, as far as its server knows: by the receipts it saw and by the sites' own words.

An epsilon here never lies below what the receipts of this run add up to; it may lie below the truth for a site that
was asked and never heard of, and says so (`unheard`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_app import lora, releases
from fl_app.privacy.accountants import pld
from fl_app.privacy.statement import of_receipts, rounded_up
from fl_app.types import NO_HEAD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.journal import Journal
    from fl_app.types import Adapter, ClientLevelCost, DpReceipt, Hello, RoundRecord, Upload
    from strategies.collected import Judged

NON_PRIVATE = "not differentially private at site level"
"""On every artefact of a run that used a release without receipts, with the sites it came from."""


@dataclass(slots=True, kw_only=True, eq=False)
class Spending:
    """The sites of a run with what they spent, and the releases that paid for; tells the journal as it goes.

    `released` are the lines of "what left a site"; `client_level` what merged adapters cost at the server. `heads` are
    the heads of the sites' ledgers as they were last shown: a site gets its own back, and refuses when its ledger does
    not contain it, because then an older copy was put in its place.
    """

    journal: Journal
    sites: dict[str, Hello] = field(default_factory=dict)
    receipts: dict[str, list[DpReceipt]] = field(default_factory=dict)
    released: list[dict[str, Any]] = field(default_factory=list)
    unheard: set[str] = field(default_factory=set)
    non_private: set[str] = field(default_factory=set)
    client_level: list[ClientLevelCost] = field(default_factory=list)
    heads: dict[str, str] = field(default_factory=dict)

    def join(self, sites: Mapping[str, Hello]) -> None:
        """Learn of sites; what is known of one already stays."""
        self.heads = {**{name: hello.head for name, hello in sites.items() if hello.head != NO_HEAD}, **self.heads}
        self.sites = {**sites, **self.sites}

    def epsilon(self, site: str) -> float:
        """Return the PLD epsilon of what a site released in this run, recomputed from its receipts.

        Infinite once a release without receipts was used.
        """
        if site in self.non_private:
            return math.inf
        receipts = self.receipts.get(site, [])
        return pld.epsilon(receipts, self.sites[site].delta) if receipts else 0.0

    def adapters(self, start: Adapter, records: Sequence[RoundRecord]) -> dict[str, str]:
        """Return every adapter of former rounds by its hash, and what it was: no new release can be one of them."""
        known = {lora.sha256(start): "the adapter that the run began with"}
        for record in records:
            known |= {
                record.hashes[name]: f"the {name} adapter of round {record.round}" for name in ("merged", "target")
            }
        for one in self.released:
            known[one["sha256"]] = f"the release of {one['site']} in round {one['round']}"
        return known

    def enter(self, number: int, judged: Judged) -> None:
        """Enter the receipts of sound releases and what rejected sites spent; tell the journal about every site."""
        for upload in judged.sound:
            self._enter_release(number, upload, judged.bytes_up.get(upload.site, 0))
        for site, spent in judged.booked.items():
            self._raise(site, spent)
            self.unheard.add(site)
        self.unheard |= {*judged.broken, *judged.silent} - {*judged.heard}
        self.unheard |= {refusal.site for refusal in judged.refusals if refusal.code in {"internal", "ledger"}}
        for refusal in judged.refusals:
            self.tell(number, refusal.site, "refused", code=refusal.code)
        for site, broken in judged.rejected.items():
            self.tell(number, site, "rejected", code=str(broken), rule=broken.rule, tensor=broken.tensor)
        for stray in judged.strays:
            self.journal.event("stray", round=number, **dataclasses.asdict(stray))
        for site in judged.silent:
            self.tell(number, site, "silent")

    def charge(self, number: int, cost: ClientLevelCost | None) -> None:
        """Enter what the merged adapter cost every site at the server, if its aggregator added noise."""
        if cost is None:
            return
        self.client_level.append(cost)
        self.journal.event(
            "client_level",
            round=number,
            epsilon=cost.spent,
            budget=cost.budget,
            **of_receipts([cost.receipt], delta=cost.delta, accountant=pld.label()).fields(),
            scope=cost.scope,
        )

    def tell(self, number: int, site: str, state: str, **fields: object) -> None:
        """Tell the journal about one site in one round."""
        hello = self.sites.get(site)
        budget = {"budget": hello.epsilon} if hello else {}
        self.journal.event("site", round=number, site=site, state=state, **budget, **fields)

    def _enter_release(self, number: int, upload: Upload, num_bytes: int) -> None:
        receipts = upload.receipts
        if upload.head != NO_HEAD:
            self.heads[upload.site] = upload.head
        if receipts is None:
            self.non_private.add(upload.site)
        self.receipts.setdefault(upload.site, []).extend(receipts or ())
        hello = self.sites[upload.site]
        spent = self._raise(upload.site, max(upload.spent, self.epsilon(upload.site)))
        self.released.append(
            {
                "site": upload.site,
                "round": number,
                "kind": upload.release.kind + (" and survey" if upload.survey else ""),
                "bytes": num_bytes,
                "sha256": releases.sha256(upload.release, upload.survey),
                "event": "; ".join(str(receipt.event) for receipt in receipts or ()) or "none",
                "guarantee": f"this run so far ({rounded_up(self.epsilon(upload.site))}, {hello.delta:g})-DP per "
                f"{hello.unit}, {receipts[0].relation}"
                if receipts
                else f"{NON_PRIVATE}: released without noise, epsilon is infinite",
            }
        )
        self.tell(number, upload.site, "trained", bytes=num_bytes, epsilon=spent)

    def _raise(self, site: str, spent: float) -> float:
        """Raise what a site is known to have spent, and return it; an upload that was rejected has cost as well."""
        hello = self.sites.get(site)
        if hello is None:
            return spent
        self.sites[site] = dataclasses.replace(hello, spent=max(hello.spent, spent))
        return self.sites[site].spent
