"""The run directory: atomic files, and one JSON line per event.

    runs/<id>/
      config.toml digest.txt     what was asked            journal.jsonl   what happened, live
      rounds/<n>/                releases/ merged/ drafts.jsonl screened.json lessons.jsonl target/
      target/                    the newest target, PEFT   summary.json    every figure of the report
      report.html                written by the simulator

Everything here is releasable: adapters that sites released, synthetic text, and figures computed from both.
A file is either whole or absent: it is written beside its place, fsynced and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import tomli_w

from fl_app.errors import RunInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

STAMP = "SIMULATION - NOT PRIVATE"
"""On every artefact of a simulation: its noise comes from a seed that anyone may know."""


class Journal:
    """The run directory of one run; the clock of its events starts when it is opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._start = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)

    def event(self, name: str, **fields: object) -> None:
        """Append one line to `journal.jsonl`: the event, seconds since the start, and its public fields."""
        line = json.dumps({"event": name, "t": round(time.monotonic() - self._start, 3), **fields}, default=_plain)
        with (self.directory / "journal.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def round(self, number: int) -> Path:
        """Return the directory of round `number`, made on first use."""
        folder = self.directory / "rounds" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Replace the file at `path` with indented JSON; dataclasses become objects."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, default=_plain) + "\n")


def write_toml(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace the file at `path` with a configuration tree."""
    write_text(path, tomli_w.dumps(tree))


def write_lines(path: Path, values: Iterable[object]) -> None:
    """Replace the file at `path` with one JSON line per value."""
    write_text(path, "".join(json.dumps(value, sort_keys=True, default=_plain) + "\n" for value in values))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file.

    Raises: RunInvalid naming file and line when one of them is no JSON object.
    """
    return [row for _, row in numbered_lines(path)]


def numbered_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a JSON-lines file, each with the number of its line; blank lines count and are left out.

    Raises: RunInvalid as `read_lines`.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    # Lines of bytes: those of text would also end at U+2028 and U+0085, which JSON allows inside a string.
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise RunInvalid(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise RunInvalid(f"{path}:{number}: not JSON ({error.msg}); repair or remove the line") from None
        if not isinstance(row, dict):
            raise RunInvalid(f"{path}:{number}: expected an object, found {type(row).__name__}")
        rows.append((number, row))
    return rows


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    raise TypeError(f"{type(value).__name__} does not belong into a run directory")
