"""A plan that holds other mechanisms beside its own, each with the number of times it may ever be used."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.errors import BudgetSpent, LedgerCorrupt, LedgerRefusal
from fl_app.privacy import plan as planning
from fl_app.privacy.accountants import pld
from fl_app.privacy.book import Book
from fl_app.privacy.chain import Planned
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.plan import Plan
from fl_app.types import BoundedRange, DpReceipt, Exponential, Gaussian, PoissonGaussian

if TYPE_CHECKING:
    from pathlib import Path

EPSILON, DELTA = 4.0, 1e-5


def receipt(event: Any) -> DpReceipt:
    return DpReceipt(event=event, unit="record")


def steps(number: int, noise: float = 1.0) -> DpReceipt:
    return receipt(PoissonGaussian(noise_multiplier=noise, sample_rate=0.05, steps=number, clip_norm=1.0))


def survey(noise: float = 5.0, count: int = 1) -> DpReceipt:
    return receipt(Gaussian(noise_multiplier=noise, clip_norm=1.0, count=count))


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", dataset="rows", unit="record")


def reserve(ledger: Ledger, *receipts: DpReceipt, sides: tuple[DpReceipt, ...] = (), run: str = "r") -> None:
    ledger.reserve(run=run, round_number=1, receipts=receipts, epsilon=EPSILON, delta=DELTA, sides=sides)


def test_a_plan_holds_a_side_and_says_so(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, steps(20), survey(), sides=(survey(),))
    _, planned, _ = ledger.entries()
    assert isinstance(planned, Planned)
    assert planned.plan == Plan(epsilon=EPSILON, delta=DELTA, mechanism=steps(1), sides=(survey(),))
    line = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[1])
    assert line["sides"][0]["event"] == {"kind": "gaussian", "noise_multiplier": 5.0, "clip_norm": 1.0, "count": 1}
    reserve(opened(tmp_path), steps(3))  # read back from the file, it goes on
    assert ledger.spent(DELTA) == pld.epsilon([steps(23), survey()], DELTA)


def test_without_a_side_the_line_is_what_it_was(tmp_path: Path) -> None:
    reserve(opened(tmp_path), steps(3))
    assert "sides" not in json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[1])


def test_a_side_is_used_up(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, steps(5), sides=(survey(count=2),))  # none used yet
    reserve(ledger, steps(5), survey())
    reserve(ledger, survey(), run="another")
    before = ledger.head
    with pytest.raises(LedgerRefusal, match=r"holds 2 x gaussian with noise_multiplier 5, .* make it 3; leave it out"):
        reserve(ledger, steps(5), survey())
    assert ledger.head == before


@pytest.mark.parametrize("other", [survey(noise=5.1), receipt(Exponential(epsilon=0.01)), steps(1, noise=1.1)])
def test_what_is_neither_is_refused(tmp_path: Path, other: DpReceipt) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, steps(5), sides=(survey(),))
    with pytest.raises(
        LedgerRefusal, match=r"sample rate 0\.05, and gaussian with noise_multiplier 5, and .* is asked"
    ):
        reserve(ledger, other)


def test_a_side_counts_in_full_before_it_is_used(tmp_path: Path) -> None:
    """The main mechanism may fill what all sides leave, whether they are used or not; the twin has no sides."""
    sides = (survey(noise=2.0, count=3),)
    most = max(n for n in range(1, 400) if pld.epsilon([steps(n), *sides], DELTA) <= EPSILON)
    alone = max(n for n in range(1, 400) if pld.epsilon([steps(n)], DELTA) <= EPSILON)
    assert most + 20 < alone
    ledger = opened(tmp_path / "sides")
    reserve(ledger, steps(most), sides=sides)
    with pytest.raises(BudgetSpent):
        reserve(ledger, steps(1))
    reserve(ledger, *sides)  # what was set aside is still there
    assert ledger.spent(DELTA) <= EPSILON
    without = opened(tmp_path / "twin")
    reserve(without, steps(most))
    reserve(without, steps(alone - most))


WISHES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=8)


@pytest.mark.parametrize("room", [True, False], ids=["as it is", "twin: sides take no room"])
def test_whatever_is_asked_the_plan_in_full_is_within_budget(
    room: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the proof needs: at any moment the sides in full and the steps so far fit, so any later use of them does."""
    if not room:
        monkeypatch.setattr(Book, "_require_room", lambda *_: None)
    outcomes: list[str] = []

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(WISHES)
    def search(wishes: list[tuple[int, int, int]]) -> None:
        play(tmp_path_factory.mktemp("ledger"), wishes, outcomes)

    if room:
        search()
        assert {"granted", "BudgetSpent", "LedgerRefusal"} <= set(outcomes)
    else:
        with pytest.raises(AssertionError, match="over budget"):
            search()


def play(folder: Path, wishes: list[tuple[int, int, int]], outcomes: list[str]) -> None:
    """Ask a fresh ledger for one wish after the other, and look at its plan in full after every grant."""
    ledger = opened(folder)
    sides = (survey(noise=3.0, count=2), receipt(Exponential(epsilon=0.05, count=3)))
    for main, surveys, thresholds in wishes:
        receipts = [steps(main)] * bool(main) + [survey(noise=3.0, count=surveys)] * bool(surveys)
        receipts += [receipt(Exponential(epsilon=0.05, count=thresholds))] * bool(thresholds)
        if not receipts:
            continue
        try:
            reserve(ledger, *receipts, sides=sides)
        except (BudgetSpent, LedgerRefusal) as error:
            outcomes.append(type(error).__name__)
            continue
        outcomes.append("granted")
        plan = ledger.book().plan
        assert plan is not None
        assert pld.epsilon(plan.in_full(ledger.receipts()), DELTA) <= EPSILON, "over budget"
        assert pld.epsilon(ledger.receipts(), DELTA) <= pld.epsilon(plan.in_full(ledger.receipts()), DELTA) + 1e-9
    if ledger.receipts():
        used = {planning.one_step(one): planning.count(one) for one in planning.merged(ledger.receipts())}
        assert used.pop(planning.one_step(sides[0]), 0) <= 2
        assert used.pop(planning.one_step(sides[1]), 0) <= 3
        assert used.keys() <= {steps(1)}


def test_a_first_reservation_names_its_main_mechanism(tmp_path: Path) -> None:
    """Two that are no sides, or nothing but sides, fix no schedule."""
    for receipts in ((steps(1), survey()), (survey(),)):
        ledger = opened(tmp_path / str(len(receipts)))
        with pytest.raises(LedgerRefusal, match="a fixed schedule is made of one mechanism"):
            reserve(ledger, *receipts, sides=(survey(),) if len(receipts) == 1 else ())


def test_a_side_cannot_be_the_mechanism_itself() -> None:
    with pytest.raises(LedgerRefusal, match="are not other mechanisms"):
        Plan(epsilon=EPSILON, delta=DELTA, mechanism=steps(1), sides=(steps(3),))


def test_a_side_that_was_edited_is_found(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    reserve(ledger, steps(5), sides=(survey(),))
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"count":1', b'"count":9', 1))
    with pytest.raises(LedgerCorrupt, match="line 2 was changed"):
        ledger.receipts()


def test_draws_of_bounded_range_are_a_mechanism_like_others(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    tokens = receipt(BoundedRange(span=0.1, count=40))
    thresholds = receipt(Exponential(epsilon=0.02, count=41))
    reserve(ledger, tokens, thresholds, sides=(thresholds,))
    with pytest.raises(LedgerRefusal, match=r"boundedrange with span 0\.2 is asked"):
        reserve(ledger, receipt(BoundedRange(span=0.2, count=1)))
