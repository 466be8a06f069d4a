"""What every accountant promises, whichever mathematics it uses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import dp_accounting as dp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.errors import LedgerRefusal
from fl_app.privacy.accountants import edgeworth, pld, prv, rdp
from fl_app.privacy.events import receipt_from_dict, receipt_to_dict, to_dp_event
from fl_app.privacy.renyi_filter import RenyiFilter
from fl_app.types import BoundedRange, DpReceipt, Exponential, Gaussian, MechanismEvent, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STEP = PoissonGaussian(noise_multiplier=1.0, sample_rate=0.05, steps=20, clip_norm=0.7)
ACCOUNTANTS = pytest.mark.parametrize("accountant", [pld, rdp, prv, edgeworth], ids=["pld", "rdp", "prv", "edgeworth"])
FEW = settings(max_examples=8, deadline=None, derandomize=True)

noises = st.floats(0.5, 5.0)
rates = st.floats(0.001, 0.5)
counts = st.integers(1, 200)
events = (
    st.builds(PoissonGaussian, noise_multiplier=noises, sample_rate=rates, steps=counts, clip_norm=st.floats(0.1, 9))
    | st.builds(Gaussian, noise_multiplier=noises, clip_norm=st.floats(0.1, 9), count=counts)
    | st.builds(Exponential, epsilon=st.floats(0.01, 3), count=st.integers(1, 20))
    | st.builds(BoundedRange, span=st.floats(0.001, 3), count=st.integers(1, 20))
)
receipts = st.builds(DpReceipt, event=events, unit=st.sampled_from(["record", "patient"]))


def per_record(*events: MechanismEvent) -> list[DpReceipt]:
    return [DpReceipt(event=event, unit="record") for event in events]


@ACCOUNTANTS
def test_nothing_costs_nothing_and_no_receipt_costs_everything(accountant: Any) -> None:
    assert accountant.epsilon([], 1e-5) == 0.0
    assert accountant.epsilon(None, 1e-5) == math.inf
    assert accountant.epsilon(per_record(STEP, replace(STEP, noise_multiplier=0.0)), 1e-5) == math.inf
    assert accountant.epsilon(per_record(Gaussian(noise_multiplier=0.0, clip_norm=1.0)), 1e-5) == math.inf


@ACCOUNTANTS
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf, True])
def test_delta_lies_strictly_between_zero_and_one(accountant: Any, delta: float) -> None:
    for spent in ([], None, per_record(STEP)):
        with pytest.raises(LedgerRefusal, match="delta"):
            accountant.epsilon(spent, delta)


@ACCOUNTANTS
def test_units_and_relations_do_not_mix(accountant: Any) -> None:
    record, patient = DpReceipt(event=STEP, unit="record"), DpReceipt(event=STEP, unit="patient")
    with pytest.raises(LedgerRefusal, match="units"):
        accountant.epsilon([record, patient], 1e-5)
    with pytest.raises(LedgerRefusal, match="replace_one"):
        accountant.epsilon([record, replace(record, relation=cast("Any", "replace_one"))], 1e-5)


@ACCOUNTANTS
def test_order_and_grouping_do_not_matter(accountant: Any) -> None:
    other = Gaussian(noise_multiplier=4.0, clip_norm=1.0)
    split = per_record(replace(STEP, steps=13), other, replace(STEP, steps=7, clip_norm=3.0))
    assert accountant.epsilon(split, 1e-5) == accountant.epsilon(per_record(other, STEP), 1e-5)


Point = tuple[float, float, int, float]

points = st.tuples(st.floats(0.8, 5.0), st.floats(0.001, 0.2), st.integers(2, 40), st.floats(1e-7, 1e-2))
turns = st.sampled_from(["noise", "rate", "steps", "delta"])
factors = st.floats(1.05, 2.0)


def renyi(receipts: Sequence[DpReceipt], delta: float) -> float:
    return RenyiFilter(epsilon=8.0, delta=delta, order=6).epsilon_equivalent(receipts)


def turned(point: Point, turn: str, factor: float) -> Point:
    """Return the point with more noise, a lower sample rate, fewer steps or a larger delta."""
    noise, rate, steps, delta = point
    match turn:
        case "noise":
            return noise * factor, rate, steps, delta
        case "rate":
            return noise, rate / factor, steps, delta
        case "steps":
            return noise, rate, max(1, int(steps / factor)), delta
        case _:
            return noise, rate, steps, delta * factor


def check_monotone(epsilon: Callable[[Sequence[DpReceipt], float], float], point: Point, cheaper: Point) -> None:
    def spent(noise: float, rate: float, steps: int, delta: float) -> float:
        event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
        return epsilon(per_record(event), delta)

    assert spent(*cheaper) <= spent(*point) * (1 + 1e-6) + 1e-9


# 500 examples in all, shared out by what one costs: 23, 36 and 0.1 ms.
@settings(max_examples=160, deadline=None, derandomize=True)
@given(point=points, turn=turns, factor=factors)
def test_pld_is_monotone(point: Point, turn: str, factor: float) -> None:
    check_monotone(pld.epsilon, point, turned(point, turn, factor))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(point=points, turn=turns, factor=factors)
def test_rdp_is_monotone(point: Point, turn: str, factor: float) -> None:
    check_monotone(rdp.epsilon, point, turned(point, turn, factor))


@settings(max_examples=260, deadline=None, derandomize=True)
@given(point=points, turn=turns, factor=factors)
def test_a_renyi_filter_is_monotone(point: Point, turn: str, factor: float) -> None:
    check_monotone(renyi, point, turned(point, turn, factor))


@pytest.mark.parametrize("turn", ["noise", "rate", "steps", "delta"])
def test_what_is_not_monotone_is_found(turn: str) -> None:
    """The twin: an accountant that takes a cheaper release for a dearer one fails the same check, at every turn."""
    point = (1.0, 0.1, 20, 1e-5)
    cheaper = turned(point, turn, 1.5)
    check_monotone(renyi, point, cheaper)
    with pytest.raises(AssertionError):
        check_monotone(lambda receipts, delta: -renyi(receipts, delta), point, cheaper)
    with pytest.raises(AssertionError):
        check_monotone(renyi, cheaper, point)


@FEW
@given(spent=st.lists(events, min_size=1, max_size=3), more=events)
def test_more_receipts_never_cost_less(spent: Sequence[MechanismEvent], more: MechanismEvent) -> None:
    assert pld.epsilon(per_record(*spent, more), 1e-5) >= pld.epsilon(per_record(*spent), 1e-5) * (1 - 1e-6) - 1e-9


@FEW
@given(event=events.filter(lambda event: not isinstance(event, Exponential | BoundedRange)))
def test_pld_is_the_library_s_own_accountant(event: MechanismEvent) -> None:
    """Our composition, merging and dispatch against dp-accounting's PLDAccountant on the same event."""
    receipt = DpReceipt(event=event, unit="record")
    library = dp.pld.PLDAccountant(value_discretization_interval=1e-3).compose(to_dp_event(receipt))
    found = pld.epsilon([receipt], 1e-5)
    assert found == math.inf or found == pytest.approx(library.get_epsilon(1e-5), rel=1e-6, abs=1e-6)


def test_one_event_of_ours_is_one_of_theirs() -> None:
    gaussian = dp.GaussianDpEvent(1.0)
    expected = {
        STEP: dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.05, gaussian), 20),
        Gaussian(noise_multiplier=1.0, clip_norm=2.0, count=3): dp.SelfComposedDpEvent(gaussian, 3),
        Exponential(epsilon=math.log(3), count=2): dp.SelfComposedDpEvent(dp.RandomizedResponseDpEvent(0.5, 2), 2),
        Gaussian(noise_multiplier=0.0, clip_norm=2.0): dp.NonPrivateDpEvent(),
        replace(STEP, noise_multiplier=0.0): dp.NonPrivateDpEvent(),
    }
    for event, theirs in expected.items():
        assert to_dp_event(DpReceipt(event=event, unit="record")) == theirs


@settings(max_examples=50, deadline=None, derandomize=True)
@given(receipt=receipts)
def test_receipts_survive_json(receipt: DpReceipt) -> None:
    assert receipt_from_dict(json.loads(json.dumps(receipt_to_dict(receipt)))) == receipt


@pytest.mark.parametrize(
    "change",
    [
        {"note": "x"},
        {"unit": ""},
        {"unit": 3},
        {"relation": "replace_one"},
        {"event": {"kind": "laplace", "epsilon": 1.0}},
        {"event": {"kind": ["gaussian"]}},
        {"event": "gaussian"},
        {"event": {"kind": "gaussian", "noise_multiplier": 1.0, "clip_norm": 1.0}},
        {"event": {"kind": "gaussian", "noise_multiplier": 1.0, "clip_norm": 1.0, "count": 1, "seed": 0}},
        {"event": {"kind": "gaussian", "noise_multiplier": True, "clip_norm": 1.0, "count": 1}},
        {"event": {"kind": "gaussian", "noise_multiplier": "1", "clip_norm": 1.0, "count": 1}},
        {"event": {"kind": "gaussian", "noise_multiplier": math.nan, "clip_norm": 1.0, "count": 1}},
        {"event": {"kind": "gaussian", "noise_multiplier": math.inf, "clip_norm": 1.0, "count": 1}},
        {"event": {"kind": "gaussian", "noise_multiplier": -1.0, "clip_norm": 1.0, "count": 1}},
        {"event": {"kind": "gaussian", "noise_multiplier": 1.0, "clip_norm": 0.0, "count": 1}},
        {"event": {"kind": "gaussian", "noise_multiplier": 1.0, "clip_norm": 1.0, "count": 0}},
        {"event": {"kind": "gaussian", "noise_multiplier": 1.0, "clip_norm": 1.0, "count": 2.0}},
        {"event": {"kind": "gaussian", "noise_multiplier": 1.0, "clip_norm": 1.0, "count": 10**400}},
        {"event": {"kind": "exponential", "epsilon": 0.0, "count": 1}},
    ],
)
def test_strange_receipts_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LedgerRefusal):
        receipt_from_dict(receipt_to_dict(DpReceipt(event=STEP, unit="record")) | change)


def test_an_unknown_event_is_named() -> None:
    with pytest.raises(LedgerRefusal, match="complex"):
        to_dp_event(DpReceipt(event=cast("Any", 1j), unit="record"))
    with pytest.raises(LedgerRefusal, match="Exponential"):
        prv.epsilon(per_record(Exponential(epsilon=1.0)), 1e-5)
    with pytest.raises(LedgerRefusal, match="Exponential"):
        edgeworth.epsilon(per_record(Exponential(epsilon=1.0)), 1e-5)


def test_receipts_from_elsewhere_cannot_ask_for_gigabytes() -> None:
    absurd = [
        PoissonGaussian(noise_multiplier=1e-9, sample_rate=1.0, steps=10**9, clip_norm=1.0),
        PoissonGaussian(noise_multiplier=0.1, sample_rate=1.0, steps=10**9, clip_norm=1.0),
        Gaussian(noise_multiplier=0.2, clip_norm=1.0, count=10**9),
        Exponential(epsilon=500.0, count=10**9),
    ]
    for event in absurd:
        assert pld.epsilon(per_record(event), 1e-5) == math.inf
        if not isinstance(event, Exponential):
            assert edgeworth.epsilon(per_record(event), 1e-5) == math.inf
    assert rdp.epsilon(per_record(replace(STEP, noise_multiplier=1e-300)), 1e-5) == math.inf


@pytest.mark.parametrize("accountant", [pld, rdp, prv], ids=["pld", "rdp", "prv"])
def test_the_label_names_the_library(accountant: Any) -> None:
    assert "0.001" in pld.label()
    assert "ESTIMATE" not in accountant.label()
    assert any(library in accountant.label() for library in ("dp-accounting 0.6", "opacus 1.6"))


def test_an_estimate_says_that_it_is_one() -> None:
    assert "ESTIMATE" in edgeworth.label()
    assert "can under-report, no certificate" in edgeworth.label()
