"""The ledger never under-counts: not after a crash at any write, not with many writers, not when edited."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.errors import BudgetSpent, LedgerCorrupt, LedgerRefusal
from fl_app.privacy import ledger as module
from fl_app.privacy.accountants import pld, rdp
from fl_app.privacy.chain import Reserved
from fl_app.privacy.ledger import Ledger
from fl_app.types import DpReceipt, Gaussian, PoissonGaussian

DELTA = 1e-5
HASH = "ab" * 32
RECEIPT = DpReceipt(event=Gaussian(noise_multiplier=6.0, clip_norm=1.0), unit="record")  # epsilon 0.5945, twice 0.868


def opened(folder: Path, **change: Any) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", **{"dataset": "fingerprint", "unit": "record"} | change)


def spend(ledger: Ledger, round_number: int, *, epsilon: float = 50.0) -> str:
    asked = {"run": "r1", "round_number": round_number, "receipts": [RECEIPT]}
    return ledger.reserve(**asked, epsilon=epsilon, delta=DELTA).id


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = opened(tmp_path)
    made.commit(spend(made, 1), sha256=HASH)
    spend(made, 2)
    return made


def test_a_reservation_is_spent_whether_finished_or_not(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.receipts() == (RECEIPT, RECEIPT)
    assert ledger.spent(DELTA) == pld.epsilon([RECEIPT, RECEIPT], DELTA)
    assert ledger.committed("r1", 1) == HASH
    assert ledger.committed("r1", 2) is None
    again = opened(tmp_path)  # a second run
    assert again.reserve(run="r2", round_number=1, receipts=[RECEIPT], epsilon=50, delta=DELTA).spent == pld.epsilon(
        [RECEIPT] * 3, DELTA
    )
    assert [type(entry).__name__ for entry in again.entries()] == [
        "Header",
        "Planned",
        "Reserved",
        "Committed",
        "Reserved",
        "Reserved",
    ]


def test_the_same_round_again_costs_again(ledger: Ledger) -> None:
    first = spend(ledger, 2)
    assert first != spend(ledger, 2)
    assert len(ledger.receipts()) == 4


def test_over_budget_is_refused_and_leaves_no_trace(ledger: Ledger, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        BudgetSpent,
        match=r"spent 0\.868\d of epsilon 1 at delta 1e-05, per record, .*no sampling, PLD .*asks 0\.59.*raise",
    ):
        spend(ledger, 3, epsilon=1.0)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    free = DpReceipt(event=Gaussian(noise_multiplier=0.0, clip_norm=1.0), unit="record")
    with pytest.raises(BudgetSpent):
        ledger.reserve(run="r", round_number=1, receipts=[free], epsilon=1e9, delta=DELTA)


def test_commit_needs_its_reservation_once(ledger: Ledger) -> None:
    with pytest.raises(LedgerRefusal, match="no reservation"):
        ledger.commit("0" * 16, sha256=HASH)
    pending = spend(ledger, 3)
    for bad in ("", "AB" * 32, "ab" * 31):
        with pytest.raises(LedgerRefusal, match="no SHA-256"):
            ledger.commit(pending, sha256=bad)
    ledger.commit(pending, sha256=HASH)
    with pytest.raises(LedgerRefusal, match="outbox"):
        ledger.commit(pending, sha256=HASH)


@pytest.mark.parametrize(
    "change",
    [
        {"receipts": []},
        {"receipts": [DpReceipt(event=RECEIPT.event, unit="patient")]},
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"delta": 0.0},
        {"run": ""},
        {"round_number": -1},
    ],
)
def test_strange_requests_are_refused(ledger: Ledger, change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"run": "r", "round_number": 1, "receipts": [RECEIPT], "epsilon": 9.0, "delta": DELTA}
    head = ledger.head
    with pytest.raises(LedgerRefusal):
        ledger.reserve(**asked | change)
    assert ledger.head == head


def test_a_foreign_ledger_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(LedgerCorrupt, match=r"line 1 .*'fingerprint', not 'other'.*own path"):
        opened(tmp_path, dataset="other")
    with pytest.raises(LedgerCorrupt, match="unit 'record', not 'patient'"):
        opened(tmp_path, unit="patient")


def test_time_is_utc_and_may_jump_back(tmp_path: Path) -> None:
    summer = timezone(timedelta(hours=2))
    times = iter([datetime(2030, 1, 1, 1, tzinfo=summer), *[datetime(2020, 1, 1, tzinfo=UTC)] * 2])
    ledger = opened(tmp_path, clock=lambda: next(times))
    spend(ledger, 1)
    assert [entry.time for entry in ledger.entries()] == [
        "2029-12-31T23:00:00+00:00",
        *["2020-01-01T00:00:00+00:00"] * 2,
    ]


def test_equal_histories_have_unlike_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head must not be a commitment that can be tried out: not even who knows every line but the salt can make it.

    The twin: with the salt known, the whole file is.
    """
    clock = {"clock": lambda: datetime(2030, 1, 1, tzinfo=UTC)}
    for name in ("a", "b"):
        made = opened(tmp_path / name, **clock)
        made.commit(spend(made, 1), sha256=HASH)
    files = [(tmp_path / name / "ledger.jsonl").read_bytes() for name in ("a", "b")]
    lines = [[json.loads(line) for line in content.splitlines()] for content in files]
    assert all(one["hash"] != two["hash"] for one, two in zip(*lines, strict=True))
    salts = [found[0]["salt"] for found in lines]
    assert salts[0] != salts[1]
    monkeypatch.setattr(module.secrets, "token_hex", lambda _: salts[0])
    again = opened(tmp_path / "c", **clock)
    again.commit(spend(again, 1), sha256=HASH)
    assert (tmp_path / "c/ledger.jsonl").read_bytes() == files[0]


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_any_changed_byte_is_noticed(ledger: Ledger, tmp_path: Path, flip: int) -> None:
    path = tmp_path / "ledger.jsonl"
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= flip
        path.write_bytes(changed)
        with pytest.raises(LedgerCorrupt, match=r"line \d+ .*restore"):
            ledger.verify()
    path.write_bytes(content)
    ledger.verify()


def test_any_lost_or_moved_line_is_noticed(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for place in range(len(lines) - 1):
        for changed in (
            [*lines[:place], *lines[place + 1 :]],
            [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
            [*lines[: place + 1], lines[place], *lines[place + 1 :]],
        ):
            path.write_bytes(b"".join(changed))
            with pytest.raises(LedgerCorrupt):
                ledger.verify()


def test_a_tail_cut_anywhere_is_completed_and_an_older_copy_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = path.read_bytes()
    last_line = content.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length >= last_line:
            assert len(ledger.receipts()) == 2
            assert path.read_bytes() == content
        else:
            with pytest.raises(LedgerCorrupt, match=r"older or another copy|torn"):
                ledger.receipts()
    path.unlink()
    with pytest.raises(LedgerCorrupt):
        opened(tmp_path)


def test_a_torn_tail_without_its_announcement_stops_all_spending(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = path.read_bytes()
    (tmp_path / "ledger.jsonl.next").unlink()
    ledger.verify()
    path.write_bytes(content[:-7])
    with pytest.raises(LedgerCorrupt, match=r"line 5 is torn.*treat this data set's budget as spent"):
        spend(ledger, 5)
    assert path.read_bytes() == content[:-7]


def test_a_rollback_of_both_files_is_seen_by_whoever_kept_the_head(ledger: Ledger, tmp_path: Path) -> None:
    saved = {path: path.read_bytes() for path in tmp_path.iterdir()}
    spend(ledger, 3)
    head = ledger.head
    ledger.verify(head)
    for path, content in saved.items():
        path.write_bytes(content)
    ledger.verify()
    with pytest.raises(LedgerCorrupt, match="rolled back"):
        ledger.verify(head)


def test_a_newer_schema_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "SCHEMA", 3)
        patch.setattr("fl_app.privacy.chain.READABLE", (3,))
        opened(tmp_path)
    with pytest.raises(LedgerCorrupt, match="schema 3, we read 1, 2"):
        opened(tmp_path)


class Crash(BaseException):
    """The process is gone."""


class FailingOs:
    """`os`, but the call number `at` that changes the disk ends the process (or the disk space).

    Modes: `before` nothing of the call happened; `after` all of it; `torn` half of a write; `lost` all of it, but
    then the power fails and everything that was not synced is gone.
    """

    def __init__(self, folder: Path, at: int, mode: str) -> None:
        self.folder, self.at, self.mode, self.calls = folder, at, mode, 0
        self.synced: dict[Path, bytes] = {}
        self.durable: dict[Path, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        """Write, or half of it, or say that the disk is full."""
        if self.calls + 1 == self.at and self.mode == "torn":
            os.write(descriptor, data[: len(data) // 2])
            raise Crash
        if self.calls + 1 == self.at and self.mode == "full":
            os.write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._do(lambda: os.write(descriptor, data))

    def fsync(self, descriptor: int) -> None:
        """Sync, and remember what is now safe."""
        self._do(lambda: self._sync(descriptor))

    def replace(self, source: Path, target: Path) -> None:
        """Rename."""
        self._do(lambda: source.replace(target))

    def _sync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():  # names become durable, with the synced contents behind them
            self.durable |= {p: p.read_bytes() for p in path.iterdir() if p.name.endswith(".next")}
        else:
            self.durable[path] = path.read_bytes()

    def _do(self, action: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and self.mode == "before":
            raise Crash
        result = action()
        if self.calls == self.at and self.mode in ("after", "lost"):
            raise Crash
        return result

    def power_fails(self) -> None:
        """Put the folder into the state that was synced."""
        for path in list(self.folder.iterdir()):
            if path in self.durable:
                path.write_bytes(self.durable[path])
            else:
                path.unlink()


def story(folder: Path, granted: list[str]) -> None:
    """Two rounds. A grant is what lets a site train, so it must be on disk when it is made."""
    ledger = opened(folder)
    for round_number in (1, 2):
        reservation = spend(ledger, round_number)
        granted.append(reservation)
        ledger.commit(reservation, sha256=HASH)


CALLS = 36


def test_the_story_changes_the_disk_in_so_many_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = FailingOs(tmp_path, at=0, mode="none")
    monkeypatch.setattr(module, "os", counter)
    story(tmp_path, [])
    assert counter.calls == CALLS


@pytest.mark.parametrize("mode", ["before", "after", "torn", "lost"])
@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_no_crash_makes_it_under_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, mode: str) -> None:
    granted: list[str] = []
    failing = FailingOs(tmp_path, at, mode)
    with monkeypatch.context() as patch:
        patch.setattr(module, "os", failing)
        try:
            story(tmp_path, granted)
        except Crash:
            pass
        else:
            assert mode == "torn"  # no write at this point, so nothing tears
    if mode == "lost":
        failing.power_fails()
    after = opened(tmp_path)  # a new process: no help from a person
    reserved = [entry.id for entry in after.entries() if isinstance(entry, Reserved)]
    assert set(granted) <= set(reserved)
    assert len(granted) <= len(reserved) <= len(granted) + 1
    before = after.spent(DELTA)
    after.commit(spend(after, 9), sha256=HASH)
    assert after.spent(DELTA) > before
    after.verify()


@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_a_full_disk_is_named_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    granted: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "os", FailingOs(tmp_path, at, "full"))
        said = ""
        try:
            story(tmp_path, granted)
        except LedgerRefusal as refusal:
            said = str(refusal)
        assert re.search(r"cannot write .*ledger\.jsonl: No space left.*free some space|^$", said)
    after = opened(tmp_path)
    assert set(granted) <= {entry.id for entry in after.entries() if isinstance(entry, Reserved)}
    spend(after, 9)


def _spend_five_times(folder: Path, name: str) -> None:
    for round_number in range(5):
        ledger = opened(folder)
        asked = {"run": name, "round_number": round_number, "receipts": [RECEIPT]}
        ledger.commit(ledger.reserve(**asked, epsilon=50.0, delta=DELTA).id, sha256=HASH)


def test_eight_processes_lose_nothing(tmp_path: Path) -> None:
    pld.epsilon([RECEIPT], DELTA)  # imports before the fork, not in each child
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_spend_five_times, args=(tmp_path, f"run-{i}")) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    ledger = opened(tmp_path)
    assert len(ledger.receipts()) == 40
    assert all(ledger.committed(f"run-{i}", r) == HASH for i in range(8) for r in range(5))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    wishes=st.lists(st.tuples(st.sampled_from([2.0, 5.0, 20.0]), st.booleans(), st.booleans()), min_size=4, max_size=12)
)
def test_no_sequence_of_operations_exceeds_the_budget(
    tmp_path_factory: pytest.TempPathFactory, wishes: list[tuple[float, bool, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    ledger, granted = opened(folder), 0
    for number, (noise, finished, restarted) in enumerate(wishes):
        event = PoissonGaussian(noise_multiplier=2.0, sample_rate=0.2, steps=int(2 * noise), clip_norm=1.0)
        asked = [DpReceipt(event=event, unit="record")]
        try:
            reservation = ledger.reserve(run="r", round_number=number, receipts=asked, epsilon=2.0, delta=DELTA)
        except BudgetSpent:
            continue
        granted += 1
        if finished:
            ledger.commit(reservation.id, sha256=HASH)
        if restarted:
            ledger = opened(folder)
    assert len(ledger.receipts()) == granted
    assert ledger.spent(DELTA) <= 2.0
    assert ledger.spent(DELTA) <= rdp.epsilon(ledger.receipts(), DELTA) + 1e-9
