"""The fields of a message's manifest: closed lists of keys, and every value held to its type and size.

Errors name the rule that was broken, the key, and the value in short.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord

from fl_app.errors import WireViolation
from fl_app.hash_chain import is_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import RecordDict

MAX_TEXT = 200
"""Characters of one value where nothing else is said."""

RULES = {"site": "site", "run": "run", "round": "round", "base": "base", "receipts": "receipt", "spent": "spent"}
"""The rule that a value of the wrong type breaks, by its key; for all others, `keys`."""


def check_hash(found: str, manifest: dict[str, Any]) -> None:
    """Raise `WireViolation` unless the manifest names this hash."""
    if found != manifest["sha256"]:
        raise WireViolation("sha256 of what came is not the one in the manifest", rule="hash")


def alpha(manifest: Mapping[str, Any]) -> float:
    """Return the scaling of an adapter."""
    found = manifest["alpha"]
    if not isinstance(found, float) or not 0 < found < 1e6:  # noqa: PLR2004
        raise WireViolation(f"alpha = {shown(found)} is no scaling", rule="alpha")
    return found


def manifest(content: RecordDict, name: str, keys: frozenset[str], *, allowed: set[str]) -> dict[str, Any]:
    """Return the manifest of a message that holds exactly these records, with exactly these keys."""
    if {str(key) for key in content} != allowed:
        raise WireViolation(f"records {sorted(map(str, content))[:6]}; expected {sorted(allowed)}")
    record = content[name]
    if not isinstance(record, ConfigRecord) or {str(key) for key in record} != set(keys):
        found = sorted(map(str, record))[:12] if isinstance(record, ConfigRecord) else type(record).__name__
        raise WireViolation(f"{name} holds {found}; expected {sorted(keys)}")
    return dict(record)


def text(fields: Mapping[str, Any], key: str, limit: int = MAX_TEXT) -> str:
    """Return a text of at most `limit` characters."""
    value = fields[key]
    if not isinstance(value, str):
        raise WireViolation(f"{key} = {shown(value)} is no text", rule=RULES.get(key, "keys"))
    if len(value) > limit:
        raise WireViolation(f"{key} is {len(value)} characters, at most {limit}", rule="size")
    return value


def head(fields: Mapping[str, Any]) -> str:
    """Return the head of a ledger; 64 zeros when there is none to show."""
    if not is_digest(fields["head"]):
        raise WireViolation(f"head = {str(fields['head'])[:80]!r} is no SHA-256 in lower-case hex")
    return fields["head"]


def number(fields: Mapping[str, Any], key: str) -> float:
    """Return a finite number from 0."""
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e308:  # noqa: PLR2004
        raise WireViolation(f"{key} = {shown(value)} is no finite number from 0", rule=RULES.get(key, "keys"))
    return float(value)


def spending(fields: Mapping[str, Any], key: str) -> float:
    """Return an epsilon; infinite is what a site has spent that ever released without noise, and it may say so."""
    return math.inf if fields[key] == math.inf else number(fields, key)


def whole(fields: Mapping[str, Any], key: str) -> int:
    """Return a whole number from 0."""
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise WireViolation(f"{key} = {shown(value)} is no whole number", rule=RULES.get(key, "keys"))
    return value


def shown(value: object) -> str:
    """Return a value from outside in short: Python refuses to write out a whole number of thousands of digits."""
    return "a huge number" if isinstance(value, int) and value.bit_length() > 64 else repr(str(value)[:80])  # noqa: PLR2004
