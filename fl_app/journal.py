"""The run directory: atomic files, and one JSON line per event.

    runs/<id>/
      config.toml digest.txt     what was asked            journal.jsonl   what happened, live
      launch.json                how it was started        audit.jsonl     who decided what, hash-chained
      rounds/<n>/                releases/ merged/ drafts.jsonl screened.json lessons.jsonl target/
      rounds/<n>/done/           what each phase committed, so that the run can go on from there
      target/                    the newest target, PEFT   summary.json    every figure of the report
      client_level/              the server's own ledger, where an aggregator adds noise
      report.html                written by the simulator

Everything here is releasable: adapters that sites released, synthetic text, and figures computed from both.
A file is either whole or absent: it is written beside its place, fsynced and renamed.

JSON has no infinity, and an epsilon may be infinite (a release without noise): a float that is not finite stands as
the text "inf", "-inf" or "nan" in every file, never as a bare word that only Python reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

import tomli_w

from fl_app import disk
from fl_app.errors import RunInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

STAMP = "SIMULATION - NOT PRIVATE"
"""On every artefact of a simulation: its noise comes from a seed that anyone may know."""


ROOM = 1.2
"""A run begins only with this much more space than it is estimated to need (specs, B7)."""

FIXED_BYTES = 1 << 20
"""Configuration, summary, report and card, with room to spare (a report of two rounds is 0.2 MiB)."""

FILE_BYTES = 1 << 14
"""What stands beside each adapter: its configuration and receipts, and the blocks that short files fill up."""


class Journal:
    """The run directory of one run; the clock of its events goes on where that of a stopped run stood."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._one_writer = threading.Lock()
        with disk.naming(directory, 0):
            directory.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic() - _last_t(directory / "journal.jsonl")

    def event(self, name: str, **fields: object) -> None:
        """Append one line to `journal.jsonl`: the event, seconds since the start, and its public fields."""
        line = _json({"event": name, "t": round(time.monotonic() - self._start, 3), **fields})
        with self._one_writer:
            disk.append(self.directory / "journal.jsonl", (line + "\n").encode())

    def round(self, number: int) -> Path:
        """Return the directory of round `number`, made on first use."""
        folder = self.directory / "rounds" / str(number)
        with disk.naming(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


def check_space(directory: Path, need_bytes: int) -> None:
    """Return when there is room for `need_bytes` and a fifth more in `directory`, which need not exist yet.

    Raises: DiskFull, before anything is written.
    """
    disk.require(directory, math.ceil(need_bytes * ROOM))


def run_bytes(*, rounds: int, sites: int, adapter_bytes: int, text_bytes: int, aggregates: int = 1) -> int:
    """Return about how many bytes a run directory will take.

    `adapter_bytes` is one adapter in float32, of which a round keeps each site's, the merged one and the target; the
    aggregate takes as much as `aggregates` of them, more than one where it is a stack. `text_bytes` is what the drafts
    and lessons of one round may take.
    """
    kept = sites + 1 + aggregates
    return FIXED_BYTES + adapter_bytes + rounds * (kept * (adapter_bytes + FILE_BYTES) + text_bytes)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` as a whole. Raises: DiskFull, RunInvalid; the file is then as it was."""
    disk.replace(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace the file at `path` with indented JSON; dataclasses become objects."""
    write_text(path, _json(value, indent=1, sort_keys=True) + "\n")


def write_toml(path: Path, tree: Mapping[str, Any]) -> None:
    """Replace the file at `path` with a configuration tree."""
    write_text(path, tomli_w.dumps(tree))


def write_lines(path: Path, values: Iterable[object]) -> None:
    """Replace the file at `path` with one JSON line per value."""
    write_text(path, "".join(_json(value, sort_keys=True) + "\n" for value in values))


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


def _last_t(path: Path) -> float:
    """Return the time of the last whole event, 0 when there is none, and cut off a line that was never finished."""
    if not path.is_file():
        return 0.0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    last = whole.rstrip().rpartition(b"\n")[2]
    return float(json.loads(last)["t"]) if last else 0.0


def _json(value: object, *, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(_plain(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _plain(value: Any) -> Any:
    """Return what JSON can hold, all the way down."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    raise TypeError(f"{type(value).__name__} does not belong into a run directory")
