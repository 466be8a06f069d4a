"""Each rule of `strategies.validate`, broken alone, is named; a sound upload passes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app.lora import LoraSpec
from fl_app.privacy.accountants import pld
from fl_app.types import (
    Adapter,
    AdapterRelease,
    DpReceipt,
    Gaussian,
    Hello,
    HistogramRelease,
    LoraFactors,
    PoissonGaussian,
    Upload,
    VectorRelease,
)
from strategies.validate import broken_rule, cost_of

if TYPE_CHECKING:
    from collections.abc import Callable

SPEC = LoraSpec(shapes={"q": (3, 2), "v": (4, 5)}, rank=2, alpha=8.0, base="a" * 64)
DELTA = 1e-5
RECEIPT = DpReceipt(event=Gaussian(noise_multiplier=4.0, clip_norm=1.0), unit="record")
COST = pld.epsilon([RECEIPT], DELTA)
TWICE = pld.epsilon([RECEIPT, RECEIPT], DELTA)
SITE = Hello(site="mill", epsilon=8.0, delta=DELTA, unit="record", spent=0.0)


def _adapter(**changes: Any) -> Adapter:
    layers = {
        name: LoraFactors(a=np.ones((2, d_in), np.float32), b=np.zeros((d_out, 2), np.float32))
        for name, (d_in, d_out) in SPEC.shapes.items()
    }
    return dataclasses.replace(Adapter(layers=layers, alpha=8.0, base="a" * 64), **changes)


def _upload(**changes: Any) -> Upload:
    sound = Upload(site="mill", round=2, release=AdapterRelease(adapter=_adapter()), receipts=(RECEIPT,), spent=COST)
    return dataclasses.replace(sound, **changes)


def _rule(upload: Upload, *, site: Hello | None = SITE) -> str:
    return broken_rule(upload, spec=SPEC, site=site, round_number=2)


def test_a_sound_upload_passes() -> None:
    assert _rule(_upload()) == ""


def test_an_unknown_site() -> None:
    assert _rule(_upload(), site=None) == "site: not a member of this run"


@pytest.mark.parametrize("number", [1, 3])
def test_another_round(number: int) -> None:
    assert _rule(_upload(round=number)) == f"round: is for round {number}, this is 2"


@pytest.mark.parametrize(
    "release",
    [
        VectorRelease(vectors={"q": np.zeros(2, np.float32)}),
        HistogramRelease(bins=("a",), counts=np.zeros(1, np.float32)),
    ],
    ids=["vector", "histogram"],
)
def test_another_kind_of_release(release: Any) -> None:
    assert _rule(_upload(release=release)) == f"kind: {release.kind} where an adapter is asked"


# --- the adapter


def _with_adapter(**changes: Any) -> Upload:
    return _upload(release=AdapterRelease(adapter=_adapter(**changes)))


def _with_layer(change: Callable[[LoraFactors], LoraFactors]) -> Upload:
    layers = dict(_adapter().layers)
    layers["v"] = change(layers["v"])
    return _with_adapter(layers=layers)


def test_another_base() -> None:
    assert _rule(_with_adapter(base="b" * 64)) == "base: bbbbbbbbbbbb, ours is aaaaaaaaaaaa"


def test_a_layer_too_few() -> None:
    assert _rule(_with_adapter(layers={"q": _adapter().layers["q"]})) == "layers: differ in ['v']"


def test_a_layer_too_many() -> None:
    layers = {**_adapter().layers, "o": _adapter().layers["q"]}

    assert _rule(_with_adapter(layers=layers)) == "layers: differ in ['o']"


@pytest.mark.parametrize("alpha", [4.0, math.nan])
def test_another_scaling(alpha: float) -> None:
    assert _rule(_with_adapter(alpha=alpha)) == f"alpha: {alpha}, ours is 8.0"


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4), (5, 3)), ((2, 5), (5, 2)), ((2, 4), (4, 2)), ((2, 4), (5, 3)), ((2,), (5, 2))],
    ids=["rank", "d_in", "d_out", "ranks that do not fit", "one axis"],
)
def test_another_shape(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    upload = _with_layer(lambda _: LoraFactors(a=np.ones(a, np.float32), b=np.ones(b, np.float32)))

    assert _rule(upload) == f"shape: v is {a} and {b}"


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none(factor: str, value: float) -> None:
    def spoil(factors: LoraFactors) -> LoraFactors:
        part = np.array(getattr(factors, factor))
        part[-1, -1] = value
        return dataclasses.replace(factors, **{factor: part})

    assert _rule(_with_layer(spoil)) == "finite: v holds NaN or infinity"


# --- the receipts


@pytest.mark.parametrize("receipts", [None, ()], ids=["none", "empty"])
def test_no_receipt(receipts: Any) -> None:
    assert _rule(_upload(receipts=receipts)) == "receipt: none, so the release is not private"


def _non_private(**changes: Any) -> str:
    upload = _upload(**{"receipts": None, "spent": math.inf, **changes})
    return broken_rule(upload, spec=SPEC, site=SITE, round_number=2, accept_non_private=True)


def test_a_release_without_receipts_passes_only_where_the_configuration_says_so() -> None:
    assert _non_private() == ""
    assert _rule(_upload(receipts=None, spent=math.inf)) == "receipt: none, so the release is not private"


@pytest.mark.parametrize("spent", [0.0, COST, math.nan])
def test_a_release_without_receipts_cannot_claim_an_epsilon(spent: float) -> None:
    assert _non_private(spent=spent) == f"receipt: none, but spent {spent:.4g} where only inf is true"


def test_who_accepts_what_is_not_private_still_holds_the_rest_to_its_rules() -> None:
    assert _non_private(receipts=()) == "receipt: none, so the release is not private"
    assert _non_private(round=3) == "round: is for round 3, this is 2"
    assert _non_private(receipts=(RECEIPT,), spent=0.0).startswith("receipt: adds up to ")
    assert _non_private(receipts=(RECEIPT,), spent=COST) == ""


def test_a_receipt_for_another_unit() -> None:
    foreign = dataclasses.replace(RECEIPT, unit="patient")

    assert _rule(_upload(receipts=(foreign,))) == "receipt: unit is not record"
    assert _rule(_upload(receipts=(RECEIPT, foreign), spent=TWICE)) == "receipt: unit is not record"


def test_receipts_that_add_up_to_more_than_the_site_says() -> None:
    said = _upload(receipts=(RECEIPT, RECEIPT), spent=COST)

    assert _rule(said) == f"receipt: adds up to {TWICE:.4g}, the site says {COST:.4g} in all"
    assert _rule(dataclasses.replace(said, spent=TWICE)) == ""


def test_a_receipt_without_noise() -> None:
    bare = DpReceipt(event=Gaussian(noise_multiplier=0.0, clip_norm=1.0), unit="record")

    assert _rule(_upload(receipts=(bare,), spent=7.9)) == "receipt: adds up to inf, the site says 7.9 in all"


@pytest.mark.parametrize("spent", [0.0, COST * 0.999, math.nan])
def test_less_said_than_the_receipts_add_up_to(spent: float) -> None:
    assert _rule(_upload(spent=spent)).startswith("receipt: adds up to ")


@pytest.mark.parametrize("spent", [8.001, math.inf])
def test_more_spent_than_the_budget(spent: float) -> None:
    assert _rule(_upload(spent=spent)) == f"receipt: spent {spent:.4g} of a budget of 8"


def test_the_budget_may_be_spent_to_the_end() -> None:
    assert _rule(_upload(spent=8.0)) == ""


def test_less_spent_than_before() -> None:
    before = dataclasses.replace(SITE, spent=3.0)

    assert _rule(_upload(spent=2.9), site=before) == "receipt: spent 2.9 is less than the 3 of before"
    assert _rule(_upload(spent=3.0), site=before) == ""


def test_two_machines_may_round_differently() -> None:
    assert _rule(_upload(spent=COST * (1 - 1e-9))) == ""


HOSTILE = {
    "two whose sum overflows": [Gaussian(noise_multiplier=1e6, clip_norm=1.0, count=10**9)] * 2,
    "a billion steps": [PoissonGaussian(noise_multiplier=1e6, sample_rate=0.5, steps=10**9, clip_norm=1.0)],
    "hundreds": [Gaussian(noise_multiplier=50.0 + n, clip_norm=1.0) for n in range(200)],
    "no accountant knows it": [Gaussian(noise_multiplier=-1.0, clip_norm=1.0)],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_receipts_that_would_stop_the_server_are_a_broken_rule(kind: str, spec: Any, learned: Any) -> None:
    receipts = tuple(DpReceipt(event=event, unit="record") for event in HOSTILE[kind])
    upload = Upload(site="a", round=1, release=AdapterRelease(adapter=learned(1)), receipts=receipts, spent=1.0)
    hello = Hello(site="a", epsilon=8.0, delta=1e-5, unit="record", spent=0.0)
    rule = broken_rule(upload, spec=spec, site=hello, round_number=1)
    assert rule.startswith("receipt: ")
    assert cost_of(upload, 1e-5) == 1.0


def test_a_rejected_upload_is_booked_at_what_it_cost_not_at_what_it_says(learned: Any) -> None:
    told = Upload(
        site="a",
        round=1,
        release=AdapterRelease(adapter=learned(1)),
        receipts=(DpReceipt(event=Gaussian(noise_multiplier=0.8, clip_norm=1.0), unit="record"),),
        spent=1.0,
    )
    assert cost_of(told, 1e-5) == pytest.approx(5.68, abs=0.01)
    assert cost_of(dataclasses.replace(told, receipts=None), 1e-5) == math.inf
    assert cost_of(dataclasses.replace(told, spent=7.0), 1e-5) == 7.0
