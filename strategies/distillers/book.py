"""What every prompt to an endpoint came to, and what it has cost: in memory, and on disk as it comes.

The file is append-only JSON lines, one outcome a line, synced before the outcome is used: a run that was stopped pays
for nothing twice. Used by several threads of one process.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fl_app import disk
from fl_app.errors import RunInvalid, TeacherFailed

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one prompt came to. `skipped` says why there is no text."""

    text: str = ""
    finish: str = ""
    tokens: int = 0
    skipped: str = ""


class Book:
    """Outcomes by key, in memory and in a JSON-lines file, and the tokens paid for them."""

    def __init__(self, path: Path | None, max_total_tokens: int) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._path = path
        self._most = max_total_tokens
        self._lock = threading.Condition()
        self._reserved = 0
        if path is not None and path.is_file():
            self._load(path)
        self._paid = sum(outcome.tokens for outcome in self.outcomes.values())

    def reserve(self, tokens: int) -> None:
        """Set tokens aside for one request; wait for requests under way if they may turn out cheaper than feared.

        Raises: TeacherFailed when the cap does not carry them.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._reserved == 0 or self._paid + self._reserved + tokens <= self._most)
            if self._paid + self._reserved + tokens > self._most:
                cost = f"the next request may cost {tokens} tokens and {self._paid} are paid"
                raise TeacherFailed(f"{cost}: more than max_total_tokens = {self._most}; raise it to go on")
            self._reserved += tokens

    def settle(self, reserved: int, paid: int) -> None:
        """Turn a reservation into what the request has really cost."""
        with self._lock:
            self._reserved -= reserved
            self._paid += paid
            self._lock.notify_all()

    def write(self, key: str, outcome: Outcome) -> None:
        """Keep one outcome, on disk first. Raises: DiskFull; the file then holds what it held."""
        with self._lock:
            if self._path is not None:
                line = json.dumps({"key": key, **asdict(outcome)}) + "\n"
                with disk.naming(self._path, len(line)):
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                disk.append(self._path, line.encode(), sync=True)
            self.outcomes[key] = outcome

    def _load(self, path: Path) -> None:
        """Read the file; a last line that a crash has torn is cut off."""
        whole, newline, torn = path.read_bytes().rpartition(b"\n")
        lines = whole.splitlines() if torn[:6] in b'{"key"' else [*whole.splitlines(), torn]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key = str(row.pop("key"))
                self.outcomes[key] = Outcome(**row)
            except (ValueError, TypeError, AttributeError, KeyError):
                raise RunInvalid(f"{path} line {number} is no cached answer; move the file away") from None
        if torn:
            os.truncate(path, len(whole) + len(newline))
