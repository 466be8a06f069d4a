"""The only way a figure enters `results.jsonl`: one JSON object a line, with the commit it was measured on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"


def commit() -> str:
    """Return the short hash of HEAD, with `+` when the working tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results.jsonl", ":!docs"]
    dirty = subprocess.run(changed, capture_output=True, text=True, check=True).stdout
    return head.strip() + ("+" if dirty.strip() else "")


def append(line: dict[str, Any]) -> dict[str, Any]:
    """Append a line with its commit and return it. Guarantee: nothing but this line is written.

    A measurement that takes minutes brings the commit that it began on, as `commit()` gave it then.
    """
    stamped = {"commit": commit(), **line}
    with RESULTS.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(stamped, sort_keys=True) + "\n")
    return stamped


def lines(kind: str) -> list[dict[str, Any]]:
    """Return the lines of one kind, oldest first."""
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in found if line["kind"] == kind]
