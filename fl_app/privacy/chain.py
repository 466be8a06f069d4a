"""The line format of the ledger: canonical JSON, numbered, each line bound to the one before by its hash.

    {"dataset","hash","kind":"header","prev","salt","schema","seq","time","unit"}
    {"delta","epsilon","hash","kind":"plan","mechanism","prev","seq","time"}, and "sides" where there are any
    {"delta","epsilon","hash","kind":"filter","order","prev","seq","time"}
    {"audit","hash","id","kind":"reserve","policy_id","prev","receipts","round","run","seq","time"}
    {"hash","id","kind":"commit","prev","seq","sha256","time"}

A plan stands before the first reservation of a fixed schedule, a filter before the first one under a Renyi filter; a
version that does not know them refuses the whole file, as it must. Schema 1, still read and continued, had no salt, no
plan, and no `policy_id` and `audit` in its reservations.

The salt is random and never leaves the site. Every later hash depends on it, so a head that is sent along commits to
the chain and to nothing that the receiver could try out: without it a server that knows all rows but one could hash its
guess of the last, build the header, and compare.

Out of scope: files, locks, crashes and budgets (`ledger`); what makes a line (`fl_app.hash_chain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fl_app.errors import LedgerCorrupt, LedgerRefusal
from fl_app.hash_chain import NO_LINE, is_digest, unseal
from fl_app.privacy.events import receipt_from_dict
from fl_app.privacy.plan import Plan
from fl_app.privacy.renyi_filter import RenyiFilter

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.types import DpReceipt

SCHEMA = 2
READABLE = (1, SCHEMA)
"""Schema 1 differs in what it lacks; its lines mean what they always meant."""
WAY_OUT = (
    "restore the newest copy of the ledger and its .next file together; if there is none, treat this data set's "
    "budget as spent: more may have been released than the file says"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Line 0: whose budget this is. `dataset` is a fingerprint, `unit` the privacy unit, `time` UTC in ISO 8601.

    `salt` is what keeps the hashes from telling the fingerprint; empty in schema 1, whose heads must not be sent.
    """

    seq: int
    hash: str
    time: str
    dataset: str
    unit: str
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Spending, from the moment it is written, finished or not.

    `policy_id` is the policy it was granted under, `audit` the head of the site's audit log at that moment: a copy of
    the log that does not contain it was cut. Both are empty where nobody gave them.
    """

    seq: int
    hash: str
    time: str
    id: str
    run: str
    round: int
    receipts: tuple[DpReceipt, ...]
    policy_id: str = ""
    audit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """The reservation `id` became the artefact with this SHA-256."""

    seq: int
    hash: str
    time: str
    id: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """From here on `renyi` holds this ledger, with everything that was ever reserved."""

    seq: int
    hash: str
    time: str
    renyi: RenyiFilter


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """From here on `plan` holds this ledger; one before which nothing was reserved gives way to a later one."""

    seq: int
    hash: str
    time: str
    plan: Plan


Entry: TypeAlias = Header | Reserved | Committed | Filtered | Planned


def read_chain(content: bytes, path: Path) -> list[Entry]:
    """Return the entries of whole lines. Raises: LedgerCorrupt naming the first line that is off."""
    entries: list[Entry] = []
    head = NO_LINE
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):
        line = read_line(raw, path, number)
        if line["seq"] != number - 1 or line.get("prev") != head:
            raise LedgerCorrupt(f"{path} line {number} does not follow the line before it; {WAY_OUT}")
        try:
            entries.append(to_entry(line, path))
        except LedgerCorrupt:
            raise
        except (LedgerRefusal, KeyError, TypeError) as error:
            raise LedgerCorrupt(f"{path} line {number} cannot be read: {error}; {WAY_OUT}") from None
        head = line["hash"]
    return entries


def completed(content: bytes, intent: bytes, path: Path) -> bytes:
    """Return the ledger's bytes with the append that `intent`, the bytes of `.next`, announces finished.

    Raises: LedgerCorrupt when the two do not belong together (the table in `ledger`).
    """
    whole, newline, torn = content.rpartition(b"\n")
    whole += newline
    lines = whole.count(b"\n")
    if not intent:
        if torn:
            raise LedgerCorrupt(f"{path} line {lines + 1} is torn, and there is no .next; {WAY_OUT}")
        return content
    announced = read_line(intent.removesuffix(b"\n"), path.with_name(path.name + ".next"), 1)
    if announced["seq"] == lines and intent.endswith(b"\n"):
        if not intent.startswith(torn):
            raise LedgerCorrupt(f"{path} line {lines + 1} is torn and is not what .next holds; {WAY_OUT}")
        read_chain(whole + intent, path)  # never complete a chain that .next does not continue
        return whole + intent
    last = whole.rstrip(b"\n").rpartition(b"\n")[2]
    if torn or announced["seq"] != lines - 1 or last + b"\n" != intent:
        read_chain(whole, path)  # when a line was changed, name that line first
        raise LedgerCorrupt(
            f"{path} ends at line {lines}, but .next holds line {announced['seq'] + 1}: an older or another copy was "
            f"put back; {WAY_OUT}"
        )
    return content


def read_line(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    """Return one line whose hash is right and whose bytes are canonical. Raises: LedgerCorrupt."""
    line = unseal(raw)
    if line is None:
        raise LedgerCorrupt(f"{path} line {number} was changed: its bytes do not match its hash; {WAY_OUT}")
    return line


def to_entry(line: dict[str, Any], path: Path) -> Entry:
    """Return a line as a value. Raises: LedgerCorrupt, LedgerRefusal, KeyError or TypeError when it is none of ours."""
    common = {"seq": line["seq"], "hash": line["hash"], "time": line["time"]}
    rest = {key: value for key, value in line.items() if key not in (*common, "prev", "kind")}
    match line["kind"]:
        case "header":
            if (schema := rest.pop("schema")) not in READABLE:
                raise LedgerCorrupt(
                    f"{path} has schema {schema!r}, we read {', '.join(map(str, READABLE))}; use the version that "
                    "wrote it"
                )
            if schema != 1 and not is_digest(rest["salt"]):
                raise LedgerRefusal("a header of schema 2 holds a salt of 64 hex digits")
            return Header(**common, **rest)
        case "reserve":
            receipts = tuple(receipt_from_dict(tree) for tree in rest.pop("receipts"))
            return Reserved(**common, **rest, receipts=receipts)
        case "commit":
            return Committed(**common, **rest)
        case "filter":
            return Filtered(**common, renyi=RenyiFilter(**rest))
        case "plan":
            mechanism = receipt_from_dict(rest.pop("mechanism"))
            sides = tuple(receipt_from_dict(tree) for tree in rest.pop("sides", ()))
            return Planned(**common, plan=Plan(**rest, mechanism=mechanism, sides=sides))
        case kind:
            raise LedgerCorrupt(f"{path} line {line['seq'] + 1} has unknown kind {kind!r}; {WAY_OUT}")
