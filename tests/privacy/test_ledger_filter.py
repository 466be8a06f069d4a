"""A ledger under a Renyi filter: the filter is fixed before it is used, binds for ever, and survives every crash."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.errors import BudgetSpent, LedgerCorrupt, LedgerRefusal
from fl_app.hash_chain import seal
from fl_app.privacy import ledger as module
from fl_app.privacy import renyi_filter
from fl_app.privacy.accountants import pld
from fl_app.privacy.chain import Filtered
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.renyi_filter import RenyiFilter
from fl_app.types import DpReceipt, Gaussian, PoissonGaussian

DELTA = 1e-5
HASH = "ab" * 32
FILTER = renyi_filter.fix(epsilon=2.0, delta=DELTA)  # order 8, budget 0.7859
RECEIPT = DpReceipt(event=Gaussian(noise_multiplier=6.0, clip_norm=1.0), unit="record")  # 8 / 72 = 0.1111 of it


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", dataset="fingerprint", unit="record")


def spend(ledger: Ledger, number: int = 1, *, renyi: RenyiFilter | None = FILTER, epsilon: float = 2.0) -> str:
    asked = {"run": "r", "round_number": number, "receipts": [RECEIPT]}
    return ledger.reserve(**asked, epsilon=epsilon, delta=DELTA, renyi=renyi).id


def names(ledger: Ledger) -> list[str]:
    return [type(entry).__name__ for entry in ledger.entries()]


def test_the_filter_stands_before_what_it_holds(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    assert ledger.filter("renyi_filter", epsilon=2.0, delta=DELTA) == FILTER
    assert names(ledger) == ["Header"]  # asking writes nothing
    spend(ledger)
    spend(ledger, 2)
    assert names(ledger) == ["Header", "Filtered", "Reserved", "Reserved"]
    recorded = ledger.entries()[1]
    assert isinstance(recorded, Filtered)
    assert recorded.renyi == FILTER
    ledger.verify()


def test_seven_fit_the_filter_where_pld_alone_takes_eight(tmp_path: Path) -> None:
    """By hand: 7 * 8 / 72 = 0.7778 <= 0.7859 < 8 * 8 / 72 = 0.8889. The twin: without the filter the eighth passes."""
    ledger, plain = opened(tmp_path / "a"), opened(tmp_path / "b")
    for number in range(7):
        spend(ledger, number)
        spend(plain, number, renyi=None)
    before = (tmp_path / "a/ledger.jsonl").read_bytes()
    with pytest.raises(BudgetSpent, match=r"Renyi filter of order 8 .*113\.1% .*cannot be raised"):
        spend(ledger, 8)
    assert (tmp_path / "a/ledger.jsonl").read_bytes() == before
    spend(plain, 8, renyi=None)
    assert len(plain.receipts()) == 8


def test_a_refused_first_round_fixes_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    heavy = DpReceipt(event=Gaussian(noise_multiplier=2.05, clip_norm=1.0), unit="record")  # PLD 1.94, filter 0.95
    with pytest.raises(BudgetSpent, match="Renyi filter"):
        ledger.reserve(run="r", round_number=1, receipts=[heavy], epsilon=2.0, delta=DELTA, renyi=FILTER)
    assert names(ledger) == ["Header"]


def test_what_is_said_to_be_spent_is_the_filter_s_figure_and_never_below_pld(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    spend(ledger, renyi=None)
    assert ledger.spent(DELTA) == pld.epsilon([RECEIPT], DELTA)
    granted = ledger.reserve(
        run="r", round_number=2, receipts=[RECEIPT], epsilon=2.0, delta=DELTA, renyi=FILTER
    )  # everything before is charged as well
    assert granted.spent == ledger.spent(DELTA) == FILTER.epsilon_equivalent([RECEIPT] * 2)
    assert pld.epsilon([RECEIPT] * 2, DELTA) < granted.spent <= 2.0


def test_there_is_no_way_back_to_a_fixed_schedule(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    spend(ledger)
    head = ledger.head
    with pytest.raises(LedgerRefusal, match="no fixed schedule certifies"):
        spend(ledger, 2, renyi=None, epsilon=50.0)
    with pytest.raises(LedgerRefusal, match="no fixed schedule certifies"):
        ledger.filter("fixed_schedule", epsilon=50.0, delta=DELTA)
    assert ledger.head == head
    assert opened(tmp_path).filter("renyi_filter", epsilon=2.0, delta=DELTA) == FILTER  # another process knows it too


def test_the_promise_may_be_lowered_and_not_raised(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    spend(ledger)
    for more in ({"epsilon": 2.5, "delta": DELTA}, {"epsilon": 2.0, "delta": 1e-4}):
        with pytest.raises(LedgerRefusal, match="lowered, not raised"):
            ledger.filter("renyi_filter", **more)
        with pytest.raises(LedgerRefusal, match="lowered, not raised"):
            spend(ledger, 2, renyi=renyi_filter.fix(**more))
    lower = ledger.filter("renyi_filter", epsilon=1.45, delta=DELTA)
    assert lower == RenyiFilter(epsilon=1.45, delta=DELTA, order=FILTER.order)
    spend(ledger, 2, renyi=lower)
    with pytest.raises(BudgetSpent, match=r"for epsilon 1\.45.*site\.toml lowered it from epsilon 2 .*may go back"):
        spend(ledger, 3, renyi=lower)
    tiny = ledger.filter("renyi_filter", epsilon=0.1, delta=DELTA)  # below what this order can carry at all
    with pytest.raises(BudgetSpent, match=r"for epsilon 0\.1 .*site\.toml lowered it from epsilon 2 "):
        spend(ledger, 3, renyi=tiny, epsilon=0.1)
    spend(ledger, 3)  # back to what was promised first, and not beyond


@pytest.mark.parametrize("held", [False, True])
def test_an_order_chosen_by_hand_is_refused(tmp_path: Path, held: bool) -> None:
    """Choosing the order after looking is what a filter forbids, even where that order would carry more."""
    ledger = opened(tmp_path)
    if held:
        spend(ledger)
    head = ledger.head
    with pytest.raises(LedgerRefusal, match="order 11 is not this ledger's"):
        spend(ledger, 2, renyi=RenyiFilter(epsilon=2.0, delta=DELTA, order=11))
    assert ledger.head == head


def test_a_cap_below_the_promise_is_kept(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    spend(ledger, epsilon=0.6)
    with pytest.raises(BudgetSpent, match=r"of epsilon 0\.6"):
        spend(ledger, 2, epsilon=0.6)


@pytest.mark.parametrize(
    "change", [{"order": 1}, {"order": 2.5}, {"order": "10"}, {"epsilon": -1.0}, {"delta": 2.0}, {"note": 1}]
)
def test_a_strange_filter_line_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Well-formed and with a right hash, but no filter of ours."""
    ledger = opened(tmp_path)
    spend(ledger)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    line = json.loads(lines[1]) | change
    line.pop("hash")
    (tmp_path / "ledger.jsonl.next").unlink()
    path.write_bytes(lines[0] + seal(line))
    with pytest.raises(LedgerCorrupt, match="line 2 cannot be read"):
        ledger.verify()


def test_a_lost_filter_line_is_noticed(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    spend(ledger)
    path = tmp_path / "ledger.jsonl"
    header, _, reserved = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(header + reserved)
    with pytest.raises(LedgerCorrupt):
        ledger.spent(DELTA)


class Crash(BaseException):
    """The process is gone."""


class DyingOs:
    """`os`, but the call number `at` that changes the disk is the last: nothing, half or all of it happens."""

    def __init__(self, at: int, mode: str) -> None:
        self.at, self.mode, self.calls = at, mode, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        """Write, or half of it."""
        if self.calls + 1 == self.at and self.mode in ("torn", "full"):
            os.write(descriptor, data[: len(data) // 2])
            if self.mode == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise Crash
        return self._do(lambda: os.write(descriptor, data))

    def fsync(self, descriptor: int) -> None:
        """Sync."""
        self._do(lambda: os.fsync(descriptor))

    def replace(self, source: Path, target: Path) -> None:
        """Rename."""
        self._do(lambda: Path(source).replace(target))

    def _do(self, action: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and self.mode == "before":
            raise Crash
        result = action()
        if self.calls == self.at and self.mode == "after":
            raise Crash
        return result


CALLS = 12
"""Of the first reservation under a filter: two appends of six calls each."""


def test_the_first_reservation_changes_the_disk_in_so_many_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, counter = opened(tmp_path), DyingOs(0, "none")
    monkeypatch.setattr(module, "os", counter)
    spend(ledger)
    assert counter.calls == CALLS


@pytest.mark.parametrize("mode", ["before", "after", "torn", "full"])
@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_no_crash_leaves_spending_without_its_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, mode: str
) -> None:
    ledger, granted = opened(tmp_path), False
    with monkeypatch.context() as patch:
        patch.setattr(module, "os", DyingOs(at, mode))
        try:
            spend(ledger)
            granted = True
        except (Crash, LedgerRefusal):
            pass
    after = opened(tmp_path)  # a new process
    after.verify()
    found = names(after)
    assert found in (["Header"], ["Header", "Filtered"], ["Header", "Filtered", "Reserved"])
    assert not granted or found[-1] == "Reserved"
    if "Filtered" in found:
        with pytest.raises(LedgerRefusal, match="no fixed schedule certifies"):
            spend(after, 2, renyi=None)
    spend(after, 2)
    assert names(after).count("Filtered") == 1


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    wishes=st.lists(st.tuples(st.sampled_from([1.5, 3.0, 8.0]), st.integers(1, 8)), min_size=4, max_size=10),
    earlier=st.integers(0, 2),
)
def test_no_adaptive_sequence_exceeds_the_filter(
    tmp_path_factory: pytest.TempPathFactory, wishes: list[tuple[float, int]], earlier: int
) -> None:
    """Each wish depends on what was granted before: after a refusal the next asks for the double of its noise."""
    folder = tmp_path_factory.mktemp("ledger")
    ledger, factor, granted = opened(folder), 1.0, earlier
    for number in range(earlier):
        spend(ledger, number, renyi=None)
    for number, (noise, steps) in enumerate(wishes):
        event = PoissonGaussian(noise_multiplier=noise * factor, sample_rate=0.3, steps=steps, clip_norm=1.0)
        asked = [DpReceipt(event=event, unit="record")]
        renyi = ledger.filter("renyi_filter", epsilon=2.0, delta=DELTA)
        try:
            ledger.reserve(run="r", round_number=number, receipts=asked, epsilon=2.0, delta=DELTA, renyi=renyi)
            factor, granted = 1.0, granted + 1
        except BudgetSpent:
            refused = [*ledger.receipts(), *asked]
            assert FILTER.spent(refused) > FILTER.budget or pld.epsilon(refused, DELTA) > 2.0
            factor *= 2
    receipts = ledger.receipts()
    assert FILTER.spent(receipts) <= FILTER.budget
    assert pld.epsilon(receipts, DELTA) <= ledger.spent(DELTA) <= 2.0
    assert len(receipts) == granted  # what was granted counts, all of it, and nothing that was refused
