"""The data holder's desk: three commands that look at a site's directory and change nothing in it.

    python -m clients.desk ledger SITE                     what was spent, entry by entry, and whether all is whole
    python -m clients.desk preflight SITE --config FILE    what a run would spend, and every rule that would refuse it
    python -m clients.desk audit-log SITE                  what was decided, and whether the log is whole

Exit code 0: whole, or the run may begin. 1: something is off, or the site would refuse. 2: it cannot be told.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from clients import outlook
from clients.config import read_client
from clients.site import Site
from fl_app import audit_log
from fl_app.config import digest, read_tree, shared
from fl_app.errors import AuditBroken, LedgerRefusal, StillroomError
from fl_app.privacy.ledger import peek

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("ledger", "preflight", "audit-log"):
        command = commands.add_parser(name)
        command.add_argument("site", type=Path, help="the site's directory")
        if name == "preflight":
            command.add_argument("--config", required=True, help="TOML file, from the project's root")
            command.add_argument("--overrides", default="", help="key=value, separated by blanks")
    arguments = parser.parse_args(argv)
    site = Site(directory=arguments.site)
    try:
        if arguments.command == "ledger":
            return _ledger(site)
        if arguments.command == "audit-log":
            return _audit_log(site)
        return _preflight(site, arguments.config, arguments.overrides)
    except StillroomError as error:
        _say([f"{type(error).__name__}: {error}"], style="red")
        return 1 if isinstance(error, LedgerRefusal | AuditBroken) else 2


def _ledger(site: Site) -> int:
    """Show, verify and explain the ledger."""
    found = outlook.standing(site)
    _say(found.entries)
    _say(found.summary, style="bold")
    if found.entries:
        _say(["the chain is whole, and outbox and audit log agree with it"])
    return 0


def _preflight(site: Site, config: str, overrides: str) -> int:
    """Show what a run would spend."""
    tree = read_tree(config, overrides)
    found = outlook.forecast(site, shared(tree), read_client(tree), digest(tree))
    _say(found.words, style="bold")
    _say([f"would be refused: {words}" for words in found.refusals], style="red")
    if not found.refusals:
        _say(["nothing in the site's policy refuses it"])
    return 1 if found.refusals else 0


def _audit_log(site: Site) -> int:
    """Show and verify the audit log; the ledger, where there is one, tells whether its end was cut."""
    path = site.directory / "audit.jsonl"
    for entry in audit_log.read(path):
        place = f" run {entry.run!r} round {entry.round}" if entry.run else ""
        what = f" {entry.code}" if entry.code else ""
        ledger = f" ledger line {entry.ledger_seq}" if entry.ledger_seq >= 0 else ""
        sha256 = f" {entry.object_sha256[:12]}" if entry.object_sha256 else ""
        _say([f"{entry.seq:>4}  {entry.ts}  {entry.actor} {entry.action} {entry.outcome}{what}{place}{ledger}{sha256}"])
    book = peek(site.ledger_path)
    heads = [entry.audit for entry in book.reserved if entry.audit] if book else []
    head = audit_log.verify(path)
    for known in heads:
        audit_log.verify(path, known)
    _say([f"the chain is whole, and holds the {len(heads)} heads that the ledger names", f"head {head}"], style="bold")
    return 0


def _say(lines: Iterable[str], *, style: str = "") -> None:
    """Print lines; a message may name [tables], which are no markup, and a run's name what is not printable."""
    console = Console()
    for line in lines:
        told = "".join(c if c.isprintable() else "?" for c in line)
        console.print(told, style=style, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
