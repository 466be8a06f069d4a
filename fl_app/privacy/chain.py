"""The line format of the ledger: canonical JSON, numbered, each line bound to the one before by its hash.

    {"dataset","hash","kind":"header","prev","schema","seq","time","unit"}
    {"hash","id","kind":"reserve","prev","receipts","round","run","seq","time"}
    {"hash","id","kind":"commit","prev","seq","sha256","time"}
    {"delta","epsilon","hash","kind":"filter","order","prev","seq","time"}

The last stands before the first reservation under a Renyi filter, if there is one; a version that does not know it
refuses the whole file, as it must.

`hash` is the SHA-256 of the canonical line without it; `prev` is the line before's, 64 zeros for the header. A line
whose bytes are not exactly the canonical form of what they say is refused, so there is no byte that may change.

Out of scope: files, locks, crashes and budgets (`ledger`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from fl_app.errors import LedgerCorrupt, LedgerRefusal
from fl_app.privacy.events import receipt_from_dict
from fl_app.privacy.renyi_filter import RenyiFilter

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.types import DpReceipt

SCHEMA = 1
NO_LINE = "0" * 64
WAY_OUT = (
    "restore the newest copy of the ledger and its .next file together; if there is none, treat this data set's "
    "budget as spent: more may have been released than the file says"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Line 0: whose budget this is. `dataset` is a fingerprint, `unit` the privacy unit, `time` UTC in ISO 8601."""

    seq: int
    hash: str
    time: str
    dataset: str
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """Spending, from the moment it is written, finished or not."""

    seq: int
    hash: str
    time: str
    id: str
    run: str
    round: int
    receipts: tuple[DpReceipt, ...]


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


Entry: TypeAlias = Header | Reserved | Committed | Filtered


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


def read_line(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    """Return one line whose hash is right and whose bytes are canonical. Raises: LedgerCorrupt."""
    try:
        parsed: object = json.loads(raw)
    except ValueError:  # JSON and UTF-8 errors alike
        parsed = None
    if isinstance(parsed, dict):
        line = cast("dict[str, Any]", parsed)
        with contextlib.suppress(ValueError, TypeError):  # nan, or a lone surrogate: not canonical either
            if _canonical(line) == raw and line.get("hash") == _hash(line) and isinstance(line.get("seq"), int):
                return line
    raise LedgerCorrupt(f"{path} line {number} was changed: its bytes do not match its hash; {WAY_OUT}")


def to_entry(line: dict[str, Any], path: Path) -> Entry:
    """Return a line as a value. Raises: LedgerCorrupt, LedgerRefusal, KeyError or TypeError when it is none of ours."""
    common = {"seq": line["seq"], "hash": line["hash"], "time": line["time"]}
    rest = {key: value for key, value in line.items() if key not in (*common, "prev", "kind")}
    match line["kind"]:
        case "header":
            if rest.pop("schema") != SCHEMA:
                raise LedgerCorrupt(
                    f"{path} has schema {line['schema']!r}, we read {SCHEMA}; use the version that wrote it"
                )
            return Header(**common, **rest)
        case "reserve":
            receipts = tuple(receipt_from_dict(tree) for tree in rest.pop("receipts"))
            return Reserved(**common, **rest, receipts=receipts)
        case "commit":
            return Committed(**common, **rest)
        case "filter":
            return Filtered(**common, renyi=RenyiFilter(**rest))
        case kind:
            raise LedgerCorrupt(f"{path} line {line['seq'] + 1} has unknown kind {kind!r}; {WAY_OUT}")


def seal(line: dict[str, Any]) -> bytes:
    """Put the hash into `line` and return its bytes, newline included."""
    line["hash"] = _hash(line)
    return _canonical(line) + b"\n"


def _canonical(line: dict[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _hash(line: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: value for key, value in line.items() if key != "hash"})).hexdigest()
