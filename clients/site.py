"""A site as a place: one directory, its policy, its ledger, its logs; and what of it others may read.

    rows.jsonl  codes.jsonl  site.toml      what the data holder puts there
    ledger/  outbox/  personal/  audit.jsonl  site.log  what the rounds leave there, for the owner alone (0700, 0600)
    received/                               the last broadcast, which is public to the sites of a run

Out of scope: what happens in a round (`local_round`), what a policy forbids (`gate`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients.config import SitePolicy, read_policy
from clients.received import Received
from fl_app.audit_log import AuditLog
from fl_app.errors import AuditBroken, DiskFull, PolicyRefusal, RowsInvalid
from fl_app.privacy.ledger import Ledger
from fl_app.types import NO_HEAD

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A site's directory."""

    directory: Path

    @property
    def policy(self) -> SitePolicy:
        """The site's own policy, read afresh: it may be tightened while a run goes on."""
        return read_policy(self.directory)

    @property
    def outbox(self) -> Path:
        """Where releases are kept."""
        return self.directory / "outbox"

    @property
    def received(self) -> Received:
        """What is kept of the last broadcast."""
        return Received(directory=self.directory / "received")

    @property
    def ledger_path(self) -> Path:
        """Where the ledger is."""
        return self.directory / "ledger" / "ledger.jsonl"

    @property
    def audit(self) -> AuditLog:
        """The site's audit log."""
        return AuditLog(self.directory / "audit.jsonl", "site")

    def fingerprint(self, policy: SitePolicy) -> str:
        """Return the name of these rows in the ledger. Raises: RowsInvalid when there are none."""
        rows = self.directory / "rows.jsonl"
        if not rows.is_file():
            raise RowsInvalid(f"no rows at {rows}: a site directory holds rows.jsonl and site.toml")
        with rows.open("rb") as handle:
            fingerprint = hashlib.file_digest(handle, "sha256").hexdigest()
        # Seeded noise protects nobody, so its spending may never be certified together with real spending.
        return fingerprint + ("+simulation" if policy.limits.simulation else "")

    def ledger(self, policy: SitePolicy) -> Ledger:
        """The site's ledger on these rows and this unit."""
        return Ledger.open(self.ledger_path, dataset=self.fingerprint(policy), unit=policy.privacy.unit)

    def check_place(self, policy: SitePolicy) -> None:
        """Raise `PolicyRefusal` when others on this machine may enter a production site's directory."""
        mode = stat.S_IMODE(self.directory.stat().st_mode)
        if mode & stat.S_IRWXO and not policy.limits.simulation:
            raise PolicyRefusal(
                f"{self.directory} has mode {mode:04o}: everybody on this machine may look at private rows; run: "
                f"chmod 700 {self.directory}"
            )

    def note_policy(self, policy: SitePolicy) -> None:
        """Enter into the audit log under which policy the site acts, when that is another one than before.

        Raises: AuditBroken, DiskFull.
        """
        last = self.audit.last()
        if last is None or last.policy_id != policy.id:
            self.audit.append("policy_read" if last is None else "policy_changed", policy_id=policy.id)

    def log(self, line: str) -> None:
        """Append to the site's own log, which may name what must not leave; whether that works changes nothing."""
        try:  # a key of a row may be no valid text, and the disk may be full: neither may leave
            descriptor = os.open(self.directory / "site.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.write(line + "\n")
        except OSError as error:
            logging.getLogger("stillroom.site").warning("site.log cannot be written (%s)", error.strerror)

    def note_refusal(self, run: str, round_number: int, code: str) -> None:
        """Enter a refusal into the audit log; it stands whether or not that works."""
        try:
            last = self.audit.last()
            policy_id = last.policy_id if last else ""
            self.audit.append("refused", run=run, round=round_number, policy_id=policy_id, outcome="refused", code=code)
        except (AuditBroken, DiskFull) as error:
            self.log(f"the audit log does not take a refusal: {error}")


def public_head(ledger: Ledger, policy: SitePolicy) -> str:
    """Return the ledger's head as it may be sent; NO_HEAD from a simulated site, whose replies must repeat."""
    return NO_HEAD if policy.limits.simulation else ledger.public_head
