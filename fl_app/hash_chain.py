"""One line of a file in which no byte may change: canonical JSON that holds the hash of the line before and its own.

`hash` is the SHA-256 of the canonical line without it, `prev` the line before's, 64 zeros for the first. A line whose
bytes are not exactly the canonical form of what they say is none of ours. The budget ledger (`privacy.chain`) and the
audit log are made of such lines.

Out of scope: what the lines say, files, locks and crashes. Whoever may rewrite a whole file may make new hashes: only a
head that somebody else kept tells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any, cast

NO_LINE = "0" * 64
"""What the first line names as the one before it, and what stands for "no head" where one is sent."""

_HEX = frozenset("0123456789abcdef")


def is_digest(text: object) -> bool:
    """Return whether `text` is a SHA-256 in lower-case hex."""
    return isinstance(text, str) and len(text) == len(NO_LINE) and _HEX.issuperset(text)


def seal(line: dict[str, Any]) -> bytes:
    """Put the hash into `line` and return its bytes, newline included. Raises: ValueError for nan or infinity."""
    line["hash"] = _hash(line)
    return canonical(line) + b"\n"


def unseal(raw: bytes) -> dict[str, Any] | None:
    """Return the line whose canonical bytes (without newline) `raw` is and whose hash is right; None for any other."""
    try:
        parsed: object = json.loads(raw)
    except (ValueError, RecursionError):  # JSON and UTF-8 errors alike
        return None
    if isinstance(parsed, dict):
        line = cast("dict[str, Any]", parsed)
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # nan, a lone surrogate: not canonical either
            if canonical(line) == raw and line.get("hash") == _hash(line) and isinstance(line.get("seq"), int):
                return line
    return None


def canonical(value: dict[str, Any]) -> bytes:
    """Return the one form of a JSON object: sorted keys, no blanks, ASCII. Raises: ValueError for nan or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _hash(line: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({key: value for key, value in line.items() if key != "hash"})).hexdigest()
