"""What was decided, when and by whom: an append-only log in which nothing can be changed unseen.

One event a line, canonical JSON, each line bound to the one before by its hash (`fl_app.hash_chain`):

    {"action","actor","code","hash","ledger_seq","object_sha256","outcome","policy_id","prev","round","run","seq",
     "software","ts"}

`ts` is UTC, RFC 3339. A line is on disk before `append` returns, so that whoever acts afterwards acts on record. The
log has fields for names, numbers and hashes only: no text of a row, no message of an error, no count. A site writes
one beside its rows, a server beside its run.

| found                                    | seen by                                                    |
|------------------------------------------|------------------------------------------------------------|
| a byte changed, a line moved or removed  | `verify`, which names the first seq that is off            |
| the end cut off, at a line               | `verify(known_head=...)`, the head kept by somebody else:  |
|                                          | the other party, or the site's ledger (every reservation)  |
| the end torn inside a line               | `verify`; the next `append` removes the torn bytes and     |
|                                          | says so with an event `recovered` of its own               |

Out of scope: an owner who writes the whole file anew with fresh hashes, before anybody kept a head; who may read it.
Source: ours; the fields are those of reliability-and-security.md 5.1 (after fedbiomed #1602).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fl_app import disk
from fl_app.errors import AuditBroken, DiskFull
from fl_app.hash_chain import NO_LINE, is_digest, seal, unseal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from fl_app.errors import StillroomError

SOFTWARE = "stillroom 0.1.0"
WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
MAX_RUN = 200
"""Characters of a run's name that are kept; it comes from elsewhere."""

_BLOCK = 1 << 12
_FIELDS = frozenset(
    {
        *("seq", "ts", "prev", "hash", "actor", "action", "run", "round", "object_sha256", "policy_id", "ledger_seq"),
        *("outcome", "code", "software"),
    }
)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One event. `ledger_seq` is the ledger's line it belongs to, -1 for none; empty texts stand for nothing."""

    seq: int
    ts: str
    prev: str
    hash: str
    actor: str
    action: str
    run: str
    round: int
    object_sha256: str
    policy_id: str
    ledger_seq: int
    outcome: str
    code: str
    software: str


class AuditLog:
    """The log at `path`, written by `actor`. It holds no file open; threads and processes may share it."""

    def __init__(self, path: Path, actor: str, clock: Callable[[], datetime] = _utc_now) -> None:
        self._path = path
        self._actor = actor
        self._clock = clock

    def append(
        self,
        action: str,
        *,
        run: str = "",
        round: int = 0,  # noqa: A002 - the field's name in the file and in the spec
        object_sha256: str = "",
        policy_id: str = "",
        ledger_seq: int = -1,
        outcome: str = "ok",
        code: str = "",
    ) -> str:
        """Write one event and return its hash, the new head; on disk when this returns.

        Raises: AuditBroken, DiskFull when the log cannot be written or its last line was changed; ValueError for an
        action, outcome or code that is no plain word, or a hash that is none: such text does not belong here.
        """
        for name, word in (("actor", self._actor), ("action", action), ("outcome", outcome), ("code", code or "none")):
            if not WORD.fullmatch(word):
                raise ValueError(f"audit {name} {word[:40]!r} is no word of lower-case letters, digits and _")
        for name, value in (("object_sha256", object_sha256), ("policy_id", policy_id)):
            if value and not is_digest(value):
                raise ValueError(f"audit {name} is no SHA-256 in lower-case hex")
        event = {
            "actor": self._actor,
            "action": action,
            "run": run[:MAX_RUN],
            "round": round,
            "object_sha256": object_sha256,
            "policy_id": policy_id,
            "ledger_seq": ledger_seq,
            "outcome": outcome,
            "code": code,
        }
        with self._held() as descriptor:
            last, torn = _last_line(descriptor, self._path)
            if torn:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - torn)
                last = self._write(descriptor, last, {**event, **_RECOVERED})
            return self._write(descriptor, last, event)["hash"]

    def last(self) -> AuditEntry | None:
        """Return the newest event, None in a log without any. Raises: AuditBroken when it was changed."""
        if not self._path.exists():
            return None
        with self._held() as descriptor:
            line, _ = _last_line(descriptor, self._path)
        return _entry(line, self._path) if line else None

    def _write(self, descriptor: int, last: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
        line = {
            "seq": last.get("seq", -1) + 1,
            "ts": self._clock().astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "prev": last.get("hash", NO_LINE),
            "software": SOFTWARE,
            **event,
        }
        whole = rest = seal(line)
        before = os.fstat(descriptor).st_size
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise self._not_written(error, len(whole)) from None
        return line

    def _not_written(self, error: OSError, need_bytes: int) -> StillroomError:
        """Return what to raise: nothing is done off the record, whatever keeps it from being written."""
        if error.errno in disk.FULL:
            return DiskFull(
                f"{self._path} cannot be written: {error.strerror}; {disk.needs(self._path, need_bytes)}; free some "
                "space and run the same command again"
            )
        return AuditBroken(
            f"cannot write {self._path}: {error.strerror}; nothing is done off the record; fix the directory"
        )

    @contextlib.contextmanager
    def _held(self) -> Generator[int]:
        """Hold the file alone; it is made, for its owner alone, when there is none."""
        fresh = not self._path.exists()
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            if fresh:
                _sync_folder(self._path.parent)
        except OSError as error:
            raise self._not_written(error, _BLOCK) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # and the lock with it


_RECOVERED: dict[str, Any] = {
    "action": "recovered",
    "object_sha256": "",
    "ledger_seq": -1,
    "outcome": "torn_line",
    "code": "",
}


def read(path: Path) -> tuple[AuditEntry, ...]:
    """Return the events of a log whose chain is whole, oldest first.

    Raises: AuditBroken naming the first seq that is off, or that there is no log.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AuditBroken(f"no audit log can be read at {path}: {error.strerror}") from None
    *lines, torn = content.split(b"\n")
    entries: list[AuditEntry] = []
    head = NO_LINE
    for number, raw in enumerate(lines):
        line = unseal(raw)
        if line is None:
            raise AuditBroken(f"{path} seq {number} was changed: its bytes do not match its hash; {_WAY_OUT}")
        if line["seq"] != number or line.get("prev") != head:
            raise AuditBroken(
                f"{path} seq {number} does not follow the one before: a line was moved, added or removed; {_WAY_OUT}"
            )
        entries.append(_entry(line, path))
        head = line["hash"]
    if torn:
        raise AuditBroken(f"{path} seq {len(lines)} is torn: a crash while it was written, or cut; {_WAY_OUT}")
    return tuple(entries)


def verify(path: Path, known_head: str | None = None) -> str:
    """Return the head of a log whose chain is whole and, if given, contains `known_head`; 64 zeros when it is empty.

    Raises: AuditBroken naming the first seq that is off.
    """
    entries = read(path)
    if known_head is not None and known_head not in {NO_LINE, *(entry.hash for entry in entries)}:
        raise AuditBroken(
            f"{path} ends at seq {len(entries) - 1} and does not contain head {known_head}: from seq {len(entries)} or "
            f"before it was cut or written anew; {_WAY_OUT}"
        )
    return entries[-1].hash if entries else NO_LINE


_WAY_OUT = "what follows proves nothing; compare with the newest copy, and find out who had access"


def _last_line(descriptor: int, path: Path) -> tuple[dict[str, Any], int]:
    """Return the last whole line, empty when there is none, and how many bytes of a torn one follow it."""
    size = os.fstat(descriptor).st_size
    tail, start = b"", size
    while start and tail.count(b"\n") < 2:  # noqa: PLR2004 - the newline before the last line, and its own
        step = min(_BLOCK, start)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    whole, newline, torn = tail.rpartition(b"\n")
    if not newline:
        return {}, len(torn)
    line = unseal(whole.rpartition(b"\n")[2])
    if line is None:
        raise AuditBroken(f"{path}: its last line was changed; {_WAY_OUT}; move it aside to begin a new one")
    return line, len(torn)


def _entry(line: dict[str, Any], path: Path) -> AuditEntry:
    if line.keys() != _FIELDS:
        raise AuditBroken(f"{path} seq {line['seq']} has other fields than ours; use the version that wrote it")
    return AuditEntry(**line)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
