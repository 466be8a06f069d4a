"""The least noise that fits: never over the budget, never much more than needed, the past included."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fl_app.errors import BudgetSpent, LedgerRefusal
from fl_app.privacy import renyi_filter
from fl_app.privacy.accountants import pld
from fl_app.privacy.calibrate import noise_multiplier
from fl_app.types import DpReceipt, Gaussian, PoissonGaussian

ASKED: dict[str, Any] = {
    "sample_rate": 0.05,
    "steps": 60,
    "rounds": 1,
    "clip_norm": 1.0,
    "unit": "record",
    "epsilon": 2.0,
    "delta": 1e-5,
    "floor": 0.3,
    "ceiling": 20.0,
}


def rounds(noise: float, *, sample_rate: float, steps: int, rounds: int, **_: object) -> list[DpReceipt]:
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=sample_rate, steps=steps, clip_norm=1.0)
    return [DpReceipt(event=event, unit="record")] * rounds


PAST = [*rounds(1.5, **ASKED), DpReceipt(event=Gaussian(noise_multiplier=8.0, clip_norm=1.0), unit="record")]


@pytest.mark.parametrize(
    ("past", "change"),
    [
        ([], {}),
        ([], {"rounds": 10}),
        ([], {"rounds": 3, "epsilon": 8.0}),
        ([], {"sample_rate": 0.01, "epsilon": 0.2, "delta": 1e-6}),
        ([], {"sample_rate": 0.5, "steps": 10, "epsilon": 0.5, "floor": 0.02, "ceiling": 100.0}),
        (PAST, {"rounds": 4, "epsilon": 4.0}),
    ],
)
def test_fits_and_is_the_smallest(past: list[DpReceipt], change: dict[str, Any]) -> None:
    asked = ASKED | change
    noise = noise_multiplier(past, **asked)
    assert noise == round(noise, 4)
    assert pld.epsilon([*past, *rounds(noise, **asked)], asked["delta"]) <= asked["epsilon"]
    assert pld.epsilon([*past, *rounds(noise - 2e-4, **asked)], asked["delta"]) > asked["epsilon"]


SEVERAL = [
    ([], {}),
    ([], {"rounds": 10, "epsilon": 8.0}),
    ([], {"sample_rate": 0.01, "epsilon": 0.2, "delta": 1e-6}),
    ([], {"sample_rate": 0.5, "steps": 10, "epsilon": 0.5, "floor": 0.02, "ceiling": 100.0}),
    (PAST, {"rounds": 4, "epsilon": 4.0}),
]


@pytest.mark.parametrize(("past", "change"), SEVERAL)
def test_under_a_filter_it_fits_both_and_is_the_smallest(past: list[DpReceipt], change: dict[str, Any]) -> None:
    asked = ASKED | change
    renyi = renyi_filter.fix(epsilon=asked["epsilon"], delta=asked["delta"])
    noise = noise_multiplier(past, **asked, renyi=renyi)
    assert noise == round(noise, 4)
    fits, less = [*past, *rounds(noise, **asked)], [*past, *rounds(noise - 1e-4, **asked)]
    assert renyi.admits(fits)
    assert pld.epsilon(fits, asked["delta"]) <= renyi.epsilon_equivalent(fits) <= asked["epsilon"] * (1 + 1e-12)
    assert not renyi.admits(less)
    # the twin: what PLD alone asks for is less, and the filter does not admit it
    plain = noise_multiplier(past, **asked)
    assert plain < noise < 1.6 * plain  # 1.5 where few steps at rate .01 meet epsilon .2
    assert not renyi.admits([*past, *rounds(plain, **asked)])


@pytest.mark.parametrize(("past", "change"), SEVERAL)
@pytest.mark.parametrize("filtered", [False, True])
def test_at_most_one_per_cent_above_optimal(past: list[DpReceipt], change: dict[str, Any], filtered: bool) -> None:
    """Noise lower by one per cent no longer fits, whichever rule the site lives under."""
    asked = ASKED | change
    renyi = renyi_filter.fix(epsilon=asked["epsilon"], delta=asked["delta"]) if filtered else None
    less = [*past, *rounds(0.99 * noise_multiplier(past, **asked, renyi=renyi), **asked)]
    assert not renyi.admits(less) if renyi else pld.epsilon(less, asked["delta"]) > asked["epsilon"]


def test_a_run_s_cap_binds_below_the_filter() -> None:
    """`epsilon` caps by PLD what the filter of the whole budget would still let through."""
    renyi = renyi_filter.fix(epsilon=8.0, delta=1e-5)
    capped = noise_multiplier([], **ASKED | {"epsilon": 1.0}, renyi=renyi)
    assert capped == noise_multiplier([], **ASKED | {"epsilon": 1.0})
    assert renyi.used(rounds(capped, **ASKED)) < 0.2


def test_a_filter_that_is_full_names_its_share() -> None:
    renyi = renyi_filter.fix(epsilon=2.0, delta=1e-5)
    full = [DpReceipt(event=Gaussian(noise_multiplier=2.2, clip_norm=1.0), unit="record")]  # PLD 1.79, filter 105 %
    with pytest.raises(BudgetSpent, match=r"Renyi filter of order 8 .* ask for fewer rounds"):
        noise_multiplier(full, **ASKED | {"rounds": 20, "ceiling": 8.0}, renyi=renyi)


@pytest.mark.parametrize(("steps", "published"), [(60, 1.194), (600, 2.617)])
def test_published_noise_for_epsilon_two(steps: int, published: float) -> None:
    """Opacus' PRV says 1.194 and 2.617; it adds 0.01 to epsilon, so ours is up to 1 % less."""
    noise = noise_multiplier([], **ASKED | {"steps": steps})
    assert 0.99 * published <= noise <= published


def test_the_past_costs_noise() -> None:
    assert noise_multiplier(PAST, **ASKED | {"epsilon": 3.0}) > noise_multiplier([], **ASKED | {"epsilon": 3.0})


def test_the_floor_holds_and_is_rounded_up() -> None:
    assert noise_multiplier([], **ASKED | {"epsilon": 50.0, "floor": 1.00001}) == 1.0001


def test_a_spent_budget_names_what_was_spent_and_the_way_out() -> None:
    with pytest.raises(
        BudgetSpent, match=r"spent 1\.\d+ of epsilon 1\.5 at .* PLD .* 30000 steps of noise .* ask for fewer"
    ):
        noise_multiplier(PAST, **ASKED | {"epsilon": 1.5, "rounds": 500})


def test_a_past_without_noise_leaves_nothing() -> None:
    with pytest.raises(BudgetSpent, match="spent inf"):
        noise_multiplier(rounds(0.0, **ASKED), **ASKED)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": math.nan},
        {"epsilon": 0.0},
        {"delta": math.nan},
        {"delta": 1.0},
        {"rounds": 0},
        {"steps": 0},
        {"sample_rate": 1.5},
        {"floor": 3.0, "ceiling": 2.0},
        {"floor": math.nan},
        {"floor": 1.00001, "ceiling": 1.00002},
        {"unit": ""},
    ],
)
def test_bad_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LedgerRefusal):
        noise_multiplier([], **ASKED | change)


def test_units_do_not_mix() -> None:
    with pytest.raises(LedgerRefusal, match="patient, record"):
        noise_multiplier(PAST, **ASKED | {"unit": "patient"})


def test_it_looks_at_few_noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look costs 20 to 60 ms; a plain bisection of [0.3, 20] to four decimals would take 18."""
    looks, compose = [], pld.compose
    monkeypatch.setattr(pld, "compose", lambda receipts: looks.append(receipts) or compose(receipts))
    noise_multiplier(PAST, **ASKED | {"rounds": 10, "epsilon": 6.0})
    assert len(looks) <= 16
