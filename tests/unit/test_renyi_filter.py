"""The filter's small promises: what it admits, what it refuses, and how a ledger may pass from one rule to another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import pytest

from fl_app.errors import BudgetSpent, LedgerRefusal
from fl_app.privacy import renyi_filter
from fl_app.privacy.renyi_filter import RenyiFilter, settle
from fl_app.types import DpReceipt, Gaussian

DELTA = 1e-5
ONE = RenyiFilter(epsilon=8.0, delta=DELTA, order=4)
HELD = renyi_filter.fix(epsilon=2.0, delta=DELTA)


def gaussian(noise: float, count: int = 1) -> DpReceipt:
    return DpReceipt(event=Gaussian(noise_multiplier=noise, clip_norm=1.0, count=count), unit="record")


def test_budget_by_hand() -> None:
    """8 - ln(3/4) + ln(4e-5) / 3 = 8 + 0.287682 - 3.375544 = 4.912138; a Gaussian at 2 spends 4 / 8 a time."""
    assert ONE.budget == pytest.approx(4.912138, abs=1e-6)
    assert ONE.spent([gaussian(2.0, 9)]) == pytest.approx(4.5)
    assert ONE.used([gaussian(2.0, 9)]) == pytest.approx(4.5 / 4.912138, rel=1e-6)
    assert ONE.epsilon_equivalent([gaussian(2.0, 9)]) == pytest.approx(8.0 - (4.912138 - 4.5), abs=1e-6)
    assert ONE.admits([gaussian(2.0, 9)])
    assert not ONE.admits([gaussian(2.0, 10)])
    assert ONE.epsilon_equivalent([gaussian(2.0, 10)]) > 8.0
    assert ONE.used([gaussian(2.0, 10)]) > 1


def test_nothing_costs_nothing_and_no_noise_is_never_admitted() -> None:
    assert (ONE.spent([]), ONE.used([]), ONE.epsilon_equivalent([])) == (0.0, 0.0, 0.0)
    assert ONE.admits([])
    for noise in (0.0, 1e-200):
        assert ONE.spent([gaussian(noise)]) == ONE.used([gaussian(noise)]) == math.inf
        assert ONE.epsilon_equivalent([gaussian(noise)]) == math.inf
        assert not ONE.admits([gaussian(noise)])


def test_the_order_looks_at_epsilon_and_delta_alone() -> None:
    """Two sites with any past and any plan get the same filter; that is what fixed in advance means."""
    assert renyi_filter.fix(epsilon=2.0, delta=DELTA) == HELD
    assert renyi_filter.fix(epsilon=2.5, delta=DELTA).order != HELD.order
    assert renyi_filter.fix(epsilon=2.0, delta=1e-8).order != HELD.order


def test_require_names_the_filter_and_the_share() -> None:
    ONE.require([gaussian(2.0, 9)])
    with pytest.raises(
        BudgetSpent, match=r"filter of order 4 .*epsilon 8 at delta 1e-05: 101\.8% .* 5 of 4\.912; ask for fewer"
    ):
        ONE.require([gaussian(2.0, 10)])


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": math.nan},
        {"order": 1},
        {"order": 4097},
        {"order": True},
        {"order": cast("Any", 4.0)},
    ],
)
def test_strange_filters_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LedgerRefusal):
        dataclasses.replace(ONE, **change)
    if "order" not in change:
        with pytest.raises(LedgerRefusal):
            renyi_filter.fix(**{"epsilon": 1.0, "delta": DELTA} | change)


def test_a_budget_too_small_for_any_order_is_refused() -> None:
    with pytest.raises(LedgerRefusal, match="leaves a Renyi filter no budget"):
        renyi_filter.fix(epsilon=1e-3, delta=1e-8)
    assert renyi_filter.fix(epsilon=1e-2, delta=1e-8).budget > 0


def test_units_do_not_mix() -> None:
    with pytest.raises(LedgerRefusal, match="units"):
        ONE.spent([gaussian(2.0), DpReceipt(event=gaussian(2.0).event, unit="patient")])


def policy(composition: str = "renyi_filter", epsilon: float = 2.0, delta: float = DELTA) -> dict[str, Any]:
    return {"composition": composition, "epsilon": epsilon, "delta": delta}


def test_passing_from_one_rule_to_another() -> None:
    assert settle(None, **policy("fixed_schedule")) is None
    assert settle(None, **policy()) == HELD
    assert settle(HELD, **policy()) == HELD
    lower = settle(HELD, **policy(epsilon=1.5, delta=1e-6))
    assert lower == RenyiFilter(epsilon=1.5, delta=1e-6, order=HELD.order)  # the recorded order, not that of 1.5
    assert lower.order != renyi_filter.fix(epsilon=1.5, delta=1e-6).order
    assert lower.budget < HELD.budget


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (policy("fixed_schedule"), "no fixed schedule certifies; write composition = 'renyi_filter'"),
        (policy("fixed_schedule", epsilon=0.1), "no fixed schedule certifies"),
        (policy(epsilon=2.001), "may be lowered, not raised"),
        (policy(delta=2e-5), "may be lowered, not raised"),
        (policy(epsilon=1.0, delta=2e-5), "may be lowered, not raised"),
    ],
)
def test_there_is_no_way_back_and_no_raise(now: dict[str, Any], words: str) -> None:
    with pytest.raises(LedgerRefusal, match=words):
        settle(HELD, **now)


def test_a_budget_lowered_below_what_the_order_carries_admits_nothing() -> None:
    tight = settle(ONE, **policy(epsilon=2.0))
    assert tight is not None
    assert tight.budget < 0
    assert tight.admits([]) is False
    assert tight.used([gaussian(100.0)]) == math.inf
    with pytest.raises(BudgetSpent):
        tight.require([gaussian(100.0)])
