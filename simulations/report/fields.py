"""JSON that may say anything, read one field at a time: the expected kind of value, or None, or empty.

Out of scope: what the fields mean (`record`).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from pathlib import Path

Tree: TypeAlias = dict[str, Any]


def number_of(value: object) -> float | None:
    """Return a number, infinity included; None for anything else."""
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def finite_of(value: object) -> float | None:
    """Return a finite number, or None."""
    number = number_of(value)
    return number if number is not None and math.isfinite(number) else None


def count_of(value: object) -> int | None:
    """Return a whole number that counts something, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def text_of(value: object) -> str:
    """Return a text, or nothing."""
    return value if isinstance(value, str) else ""


def tree_of(value: object) -> Tree:
    """Return a JSON object, or an empty one."""
    return cast("Tree", value) if isinstance(value, dict) else {}


def list_of(value: object) -> list[Any]:
    """Return a JSON array, or an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def read_lines(path: Path) -> list[Tree]:
    """Return the JSON objects of a file with one a line; a missing file has none, a torn line is passed over."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [entry for line in text.split("\n") if (entry := parse_line(line))]


def parse_line(line: str) -> Tree:
    """Return the JSON object of one line, or an empty one when the line is torn or holds something else."""
    try:
        return tree_of(json.loads(line))
    except ValueError:
        return {}
