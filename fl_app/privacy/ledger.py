"""The budget ledger of one site: what was ever spent on one data set, on that site's own disk.

    reserve (fsync) -> train -> outbox -> commit (fsync) -> send

A reservation is spent the moment it is written; a crash afterwards gives nothing back. So the ledger may over-count
by a round that was never finished, and never under-counts.

Two files, one directory. `<path>` is append-only JSON lines: a header, then reservations and commits. Each line
holds its number, the hash of the line before and its own hash, and must equal its canonical form byte for byte.
`<path>.next` is the line being appended, written, synced and renamed *before* the ledger itself is touched: the next
opener completes a torn or lost tail from it, so that what was about to be spent counts as spent, in full. It stays
until the next append and so also tells that a shorter copy of the ledger was put back.

| found on disk                                | meaning                                          | what happens     |
|----------------------------------------------|--------------------------------------------------|------------------|
| last line torn or missing, `.next` holds it  | a crash in the middle of an append               | completed, spent |
| torn tail that `.next` does not continue     | not our crash: edited, or copied without `.next` | LedgerCorrupt    |
| `.next` ahead by two lines or more           | an older copy was put back                       | LedgerCorrupt    |
| a byte, a hash, a number or a key is off     | edited                                           | LedgerCorrupt    |
| both files gone, or both older               | cannot be seen here; `verify(known_head)` can    | new ledger       |

Everything ever reserved adds up in one of two ways, as the site's policy says. By PLD, which certifies a schedule fixed
in advance: a plan is written before the first reservation, and whatever follows is made of it (`plan`). Or also under a
Renyi filter, which certifies releases chosen after looking at earlier ones: it is written before the first reservation
under it, and its order and budget stay (the table in `renyi_filter`). From then on nothing is reserved without it.

There is no way to void a reservation, on purpose. That a round crashed may itself depend on a row (a letter that breaks
a tokenizer), and the server sees that it did: a crash that costs nothing is a question that may be asked for ever. And
"no release of it is in the outbox" does not say that none left: a copy of the outbox may be older than the ledger.

Out of scope: an owner who rewrites both files with fresh hashes. `public_head` is there to be sent along, so whoever
keeps the last one can tell. Every operation takes an exclusive lock and reads the file anew: nothing is remembered
between calls, threads and processes may share a ledger. Needs POSIX locks: a local disk, not a network share.

Source: ours; order of operations from reliability-and-security.md B4, write-ahead intent from ARIES.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fl_app.errors import LedgerCorrupt, LedgerRefusal
from fl_app.hash_chain import is_digest, seal
from fl_app.privacy.accountants import pld
from fl_app.privacy.book import Asked, Book
from fl_app.privacy.chain import (
    SCHEMA,
    WAY_OUT,
    Committed,
    Entry,
    Header,
    completed,
    read_chain,
    to_entry,
)
from fl_app.privacy.events import check_together, no_noise, receipt_to_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from fl_app.privacy.renyi_filter import RenyiFilter
    from fl_app.types import Composition, DpReceipt


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What `reserve` granted. `spent` is the epsilon of the whole ledger with this reservation, as `Ledger.spent`.

    `stream` names the simulated noise of this reservation and no other: its `seq`, lines of plans not counted.
    """

    id: str
    seq: int
    spent: float
    stream: int


class Ledger:
    """One site's spending on one data set. Open it with `Ledger.open`; it holds no file open and no state."""

    def __init__(self, path: Path, *, dataset: str, unit: str, clock: Callable[[], datetime]) -> None:
        self._path = path
        self._next = path.with_name(path.name + ".next")
        self._dataset = dataset
        self._unit = unit
        self._clock = clock

    @classmethod
    def open(cls, path: Path, *, dataset: str, unit: str, clock: Callable[[], datetime] = _utc_now) -> Ledger:
        """Return the ledger at `path` for the data set with fingerprint `dataset`, made when there is none.

        Raises: LedgerCorrupt when the file is of another data set or unit, torn, rolled back or edited, naming the
        line and the way out; LedgerRefusal when it cannot be written.
        """
        if not dataset or not unit:
            raise LedgerRefusal(f"a ledger needs a data set and a unit, not {dataset!r} and {unit!r}")
        ledger = cls(path, dataset=dataset, unit=unit, clock=clock)
        ledger._writing(lambda: _make_folder(path.parent))
        with ledger._locked():
            pass
        return ledger

    def reserve(
        self,
        *,
        run: str,
        round_number: int,
        receipts: Sequence[DpReceipt],
        epsilon: float,
        delta: float,
        renyi: RenyiFilter | None = None,
        promise: float | None = None,
        sides: Sequence[DpReceipt] = (),
        policy_id: str = "",
        audit: str = "",
    ) -> Reservation:
        """Spend `receipts` if everything ever reserved plus them stays within `epsilon` at `delta` by PLD.

        An infinite `epsilon` admits `events.no_noise` and nothing else; nothing finite fits afterwards.

        `promise` is the policy's own epsilon, of which `epsilon` may be a part: a cap on the pace (None: the same).
        Without `renyi` the first reservation fixes the plan that all others follow. With `renyi`, as `filter` gave it,
        everything ever reserved must also be admitted by that filter, and the ledger is held by it from now on.
        `sides`, with the number of times in the ledger's whole life, are other mechanisms for that plan (`plan`).

        `policy_id` and `audit` are kept with the reservation.

        The same run and round cost again: the earlier reservation may have released something.
        Guarantee: when this returns, the spending is on disk; when it raises BudgetSpent, nothing was written.
        Raises: BudgetSpent; LedgerCorrupt; LedgerRefusal for no receipts, a foreign unit, an unknown event, a
        non-finite budget, another mechanism than planned, a filter that is not this ledger's or none where there is
        one, or a disk that cannot be written (then it may count as spent, and nothing was released).
        """
        if not 0 < epsilon < float("inf") and tuple(receipts) != (no_noise(self._unit),):
            raise LedgerRefusal(f"budget epsilon = {epsilon!r} must be positive and finite")
        if not round_number >= 0:
            raise LedgerRefusal(f"round {round_number!r} is not a round")
        if not run or not receipts:
            raise LedgerRefusal("a reservation needs a run and at least one receipt; a release without any is refused")
        self._check_unit(receipts)
        asked = Asked(
            run=run,
            round_number=round_number,
            receipts=tuple(receipts),
            epsilon=epsilon,
            delta=delta,
            promise=epsilon if promise is None else promise,
            renyi=renyi,
            sides=tuple(sides),
        )
        with self._locked() as book:
            total, first = book.admit(asked)
            if first is not None:
                self._append(book, first)
            # Unique in this chain and equal in equal simulations: it names its place in the chain.
            place = f"{book.head}/{len(book.entries)}/{run}/{round_number}"
            reservation_id = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            body = {
                "kind": "reserve",
                "id": reservation_id,
                "run": run,
                "round": round_number,
                "receipts": [receipt_to_dict(receipt) for receipt in receipts],
                "policy_id": policy_id,
                "audit": audit,
            }
            entry = self._append(book, body)
            stream = book.stream_of(entry.seq)
            return Reservation(id=reservation_id, seq=entry.seq, spent=book.spent(total, delta), stream=stream)

    def commit(self, reservation_id: str, *, sha256: str) -> int:
        """Record that a reservation became the artefact with this hash (64 lower-case hex digits); return the seq.

        Raises: LedgerRefusal for an unknown reservation, one committed before, or something that is no hash.
        """
        if not is_digest(sha256):
            raise LedgerRefusal(f"{sha256[:80]!r} is no SHA-256 in lower-case hex")
        with self._locked() as book:
            if not any(entry.id == reservation_id for entry in book.reserved):
                raise LedgerRefusal(f"no reservation {reservation_id!r} in {self._path}; reserve before you train")
            for entry in book.entries:
                if isinstance(entry, Committed) and entry.id == reservation_id:
                    raise LedgerRefusal(
                        f"reservation {reservation_id} was committed as {entry.sha256}; resend that from the outbox"
                    )
            return self._append(book, {"kind": "commit", "id": reservation_id, "sha256": sha256}).seq

    def receipts(self) -> tuple[DpReceipt, ...]:
        """Return everything ever reserved, in order, committed or not. Raises: LedgerCorrupt."""
        with self._locked() as book:
            return book.receipts

    def spent(self, delta: float) -> float:
        """Return the epsilon of everything ever reserved, at `delta`.

        By PLD; in a ledger held by a Renyi filter the larger of that and the filter's equivalent, so that it never lies
        below what anybody computes from the receipts.
        Raises: LedgerCorrupt, LedgerRefusal.
        """
        with self._locked() as book:
            return book.spent(pld.epsilon(book.receipts, delta), delta)

    def filter(self, composition: Composition, *, epsilon: float, delta: float) -> RenyiFilter | None:
        """Return the filter under which this ledger goes on if the site's policy says so, None for its plan alone.

        Nothing is written: the filter is recorded with the first reservation under it.
        Raises: LedgerCorrupt; LedgerRefusal when the policy would leave the recorded filter, or raise the promise.
        """
        with self._locked() as book:
            return book.settle(composition, epsilon=epsilon, delta=delta)

    def book(self) -> Book:
        """Return what the ledger holds now, as values to reckon with. Raises: LedgerCorrupt."""
        with self._locked() as book:
            return Book(entries=list(book.entries))

    def entries(self) -> tuple[Entry, ...]:
        """Return every line, the header first. Raises: LedgerCorrupt."""
        with self._locked() as book:
            return tuple(book.entries)

    @property
    def head(self) -> str:
        """The hash of the last line. Raises: LedgerCorrupt."""
        with self._locked() as book:
            return book.head

    @property
    def public_head(self) -> str:
        """The head as it may travel with an upload; 64 zeros for a ledger without salt. Raises: LedgerCorrupt."""
        with self._locked() as book:
            return book.public_head

    def secret(self) -> bytes:
        """Return 32 bytes that are this ledger's alone and never leave the site: the salt of its header, hashed.

        A ledger of schema 1 has no salt, and its secret could be guessed by whoever knows the rows.
        Raises: LedgerCorrupt.
        """
        with self._locked() as book:
            header = book.entries[0]
            assert isinstance(header, Header)
            return hashlib.sha256(f"secret/{header.salt}".encode()).digest()

    def committed(self, run: str, round_number: int) -> str | None:
        """Return the hash of the last artefact committed for this run and round, if any. Raises: LedgerCorrupt."""
        with self._locked() as book:
            found = book.last_made(run, round_number)
            return found.sha256 if found else None

    def verify(self, known_head: str | None = None) -> None:
        """Return when the chain is whole and, if given, `known_head` is the hash of one of its lines.

        Raises: LedgerCorrupt.
        """
        hashes = {entry.hash for entry in self.entries()}
        if known_head is not None and known_head not in hashes:
            raise LedgerCorrupt(f"{self._path} does not contain head {known_head}: it was rolled back; {WAY_OUT}")

    def _check_unit(self, receipts: Sequence[DpReceipt]) -> None:
        check_together(receipts)
        if receipts[0].unit != self._unit:
            raise LedgerRefusal(f"receipts are per {receipts[0].unit!r}, the ledger is per {self._unit!r}")

    @contextlib.contextmanager
    def _locked(self) -> Generator[Book]:
        """Hold the ledger alone, with its tail completed, its header there and its chain checked."""
        descriptor = self._writing(lambda: os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            content = self._complete_tail(descriptor)
            book = Book(descriptor=descriptor, entries=read_chain(content, self._path))
            if not book.entries:
                header = {"kind": "header", "schema": SCHEMA, "salt": secrets.token_hex(32)}
                self._append(book, {**header, "dataset": self._dataset, "unit": self._unit})
            self._check_header(book.entries[0])
            yield book
        finally:
            os.close(descriptor)  # and the lock with it

    def _check_header(self, header: Entry) -> None:
        if not isinstance(header, Header):
            raise LedgerCorrupt(f"{self._path} line 1 is no header; {WAY_OUT}")
        for name, found, wanted in (
            ("data set", header.dataset, self._dataset),
            ("unit", header.unit, self._unit),
        ):
            if found != wanted:
                raise LedgerCorrupt(
                    f"{self._path} line 1 is the ledger of {name} {found!r}, not {wanted!r}; "
                    "only rows that share no unit with the old ones may get their own path"
                )

    def _complete_tail(self, descriptor: int) -> bytes:
        """Return the ledger's bytes after finishing the append that `.next` announces, if it was interrupted."""
        content = _read_all(descriptor)
        whole = completed(content, _intent(self._next), self._path)
        if len(whole) > len(content):
            self._write_all(descriptor, whole[len(content) :])
        return whole

    def _append(self, book: Book, body: dict[str, Any]) -> Entry:
        """Announce the line in `.next`, then append it; both on disk when this returns."""
        time = self._clock().astimezone(UTC).isoformat(timespec="seconds")
        line = {"seq": len(book.entries), "prev": book.head, "time": time, **body}
        data = seal(line)
        entry = to_entry(line, self._path)  # refuse here what a reader would refuse, before anything is written
        self._announce(data)
        self._write_all(book.descriptor, data)
        book.entries.append(entry)
        return entry

    def _announce(self, data: bytes) -> None:
        """Put `data` into `.next`, whole or not at all."""
        fresh = self._next.with_name(self._next.name + ".tmp")

        def write() -> None:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                self._write_all(descriptor, data)
            finally:
                os.close(descriptor)
            os.replace(fresh, self._next)  # noqa: PTH105 - the calls that the crash tests interrupt are all os.*
            _sync_folder(self._path.parent)

        self._writing(write)

    def _write_all(self, descriptor: int, data: bytes) -> None:
        def write() -> None:
            rest = data
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)

        self._writing(write)

    def _writing(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise LedgerRefusal(
                f"cannot write {self._path}: {error.strerror}; nothing was released; free some space or fix the "
                "directory's permissions, and run again"
            ) from error


def peek(path: Path) -> Book | None:
    """Return what the ledger at `path` holds, an announced line included; None where there is none.

    Nothing is written, made or completed, so that looking costs nothing and needs no rights but to read.
    Raises: LedgerCorrupt; LedgerRefusal when it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerRefusal(f"cannot read {path}: {error.strerror}; fix the directory's permissions") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        content = completed(_read_all(descriptor), _intent(path.with_name(path.name + ".next")), path)
        return Book(entries=read_chain(content, path))
    finally:
        os.close(descriptor)


def _intent(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    parts: list[bytes] = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _make_folder(folder: Path) -> None:
    """Make a folder whose names are on disk, not only in memory."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for made in missing:
        _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
