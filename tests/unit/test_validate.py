"""Each rule of `strategies.validate`, broken alone, is named with its tensor; a sound upload passes."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import lora, wire
from fl_app.errors import WireViolation
from fl_app.lora import LoraSpec
from fl_app.origin import ROOT
from fl_app.privacy.accountants import pld
from fl_app.types import (
    Adapter,
    AdapterRelease,
    Broadcast,
    DpReceipt,
    Gaussian,
    Hello,
    HistogramRelease,
    LoraFactors,
    PoissonGaussian,
    Upload,
    VectorRelease,
)
from strategies.reach import Reach, UpdateCap, read_cap
from strategies.validate import RULES, Rejection, broken_rule, cost_of, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable

SPEC = LoraSpec(shapes={"q": (3, 2), "v": (4, 5)}, rank=2, alpha=8.0, base="a" * 64)
DELTA = 1e-5
RECEIPT = DpReceipt(event=Gaussian(noise_multiplier=4.0, clip_norm=1.0), unit="record")
COST = pld.epsilon([RECEIPT], DELTA)
TWICE = pld.epsilon([RECEIPT, RECEIPT], DELTA)
SITE = Hello(site="mill", epsilon=8.0, delta=DELTA, unit="record", spent=0.0)


def _adapter(moved: float = 0.25, **changes: Any) -> Adapter:
    """Return the broadcast with every number moved: ones and zeros, so that norms are done in the head."""
    layers = {
        name: LoraFactors(a=np.full((2, d_in), 1 + moved, np.float32), b=np.full((d_out, 2), moved, np.float32))
        for name, (d_in, d_out) in SPEC.shapes.items()
    }
    return dataclasses.replace(Adapter(layers=layers, alpha=8.0, base="a" * 64), **changes)


START = Broadcast(run="run-a", round=2, adapter=_adapter(0.0), config_digest="d" * 64)
REACH = Reach(steps=1, coordinate=0.5)
CAP = UpdateCap(steps=1, reaches={"a": REACH, "b": REACH})
"""A quarter is well within it; a tensor of n numbers may move by a little more than half sqrt(n)."""
WIDE = dataclasses.replace(CAP, reaches=dict.fromkeys(("a", "b"), dataclasses.replace(REACH, coordinate=2.0)))


def _upload(**changes: Any) -> Upload:
    release = AdapterRelease(adapter=_adapter())
    sound = Upload(site="mill", run=START.named, round=2, release=release, receipts=(RECEIPT,), spent=COST)
    return dataclasses.replace(sound, **changes)


def _broken(upload: Upload, *, site: Hello | None = SITE, cap: UpdateCap | None = CAP, **more: Any) -> Rejection | None:
    return broken_rule(upload, broadcast=START, spec=SPEC, site=site, cap=cap, **more)


def _rule(upload: Upload, **more: Any) -> str:
    broken = _broken(upload, **more)
    return str(broken) if broken else ""


def test_a_sound_upload_passes() -> None:
    assert _broken(_upload()) is None


def test_an_unknown_site() -> None:
    assert _rule(_upload(), site=None) == "member: not a member of this run"


@pytest.mark.parametrize("number", [1, 3])
def test_another_round(number: int) -> None:
    assert _rule(_upload(round=number)) == f"round: is for round {number}, this is 2"


@pytest.mark.parametrize("run", ["", "run-a", "run-b." + "d" * 16, "run-a." + "e" * 16], ids=lambda run: run or "none")
def test_another_run_or_configuration(run: str) -> None:
    assert _rule(_upload(run=run)) == f"run: is for run {run!r}, this is 'run-a.{'d' * 16}'"


@pytest.mark.parametrize(
    "release",
    [
        VectorRelease(vectors={"q": np.zeros(2, np.float32)}),
        HistogramRelease(bins=("a",), counts=np.zeros(1, np.float32)),
    ],
    ids=["vector", "histogram"],
)
def test_another_kind_of_release(release: Any) -> None:
    assert _rule(_upload(release=release)) == f"kind: {release.kind} where adapter is asked"


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
    assert _rule(_with_adapter(layers={"q": _adapter().layers["q"]})) == "layers: v is missing"


def test_a_layer_too_many() -> None:
    layers = {**_adapter().layers, "o": _adapter().layers["q"]}

    assert _rule(_with_adapter(layers=layers)) == "layers: o is none of ours"


@pytest.mark.parametrize("alpha", [4.0, math.nan])
def test_another_scaling(alpha: float) -> None:
    assert _rule(_with_adapter(alpha=alpha)) == f"alpha: {alpha}, ours is 8.0"


@pytest.mark.parametrize(
    ("a", "b", "odd"),
    [
        ((3, 4), (5, 3), "a"),
        ((2, 5), (5, 2), "a"),
        ((2, 4), (4, 2), "b"),
        ((2, 4), (5, 3), "b"),
        ((2,), (5, 2), "a"),
        ((1, 4), (5, 2), "a"),
        ((), (5, 2), "a"),
    ],
    ids=["rank", "d_in", "d_out", "ranks that do not fit", "one axis", "one row, which numpy would repeat", "a scalar"],
)
def test_another_shape(a: tuple[int, ...], b: tuple[int, ...], odd: str) -> None:
    upload = _with_layer(lambda _: LoraFactors(a=np.ones(a, np.float32), b=np.ones(b, np.float32)))

    found, ours = (a, (2, 4)) if odd == "a" else (b, (5, 2))
    assert _rule(upload) == f"shape: v.{odd} is {found}, ours is {ours}"


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none(factor: str, value: float) -> None:
    def spoil(factors: LoraFactors) -> LoraFactors:
        part = np.array(getattr(factors, factor))
        part[-1, -1] = value
        return dataclasses.replace(factors, **{factor: part})

    assert _rule(_with_layer(spoil)) == f"finite: v.{factor} holds NaN or infinity"


# --- how far it may be from the broadcast


def _moved(tensor: str, change: Callable[[Any], Any]) -> Upload:
    """Return a sound upload with one factor changed."""
    layer, _, factor = tensor.rpartition(".")
    layers = dict(_adapter().layers)
    part = change(np.array(getattr(layers[layer], factor))).astype(np.float32)
    layers[layer] = dataclasses.replace(layers[layer], **{factor: part})
    return _with_adapter(layers=layers)


@pytest.mark.parametrize("tensor", ["q.a", "q.b", "v.a", "v.b"])
@pytest.mark.parametrize("share", [0.999, 1.001])
def test_the_cap_holds_for_each_tensor_and_names_it(tensor: str, share: float) -> None:
    began = getattr(START.adapter.layers[tensor[0]], tensor[-1])
    step = CAP.of(tensor[-1], began) / math.sqrt(began.size) * share

    rule = _rule(_moved(tensor, lambda _: began + step))

    assert rule.startswith(f"norm: {tensor} moved by " if share > 1 else "")
    assert bool(rule) == (share > 1)


def test_a_number_that_overflows_float32_when_squared_is_far() -> None:
    assert _rule(_moved("v.b", lambda part: part + 1e30)).startswith("norm: v.b moved by 3.162e+30, at most ")


def test_one_number_alone_may_not_leave_either() -> None:
    def far(part: Any) -> Any:
        part[0, 0] += 3
        return part

    assert _rule(_moved("q.a", far)).startswith("norm: q.a moved by ")


def test_the_whole_update_has_a_cap_of_its_own() -> None:
    """All 6 + 4 + 8 + 10 numbers moved by a quarter: 0.25 sqrt(28) = 1.3229."""
    at_most = dataclasses.replace(CAP, largest=1.3)

    assert _rule(_upload(), cap=at_most) == "norm: the update measures 1.323, at most 1.3"
    assert _rule(_upload(), cap=dataclasses.replace(CAP, largest=1.33)) == ""


def test_a_factor_that_no_step_trains_comes_back_as_it_was() -> None:
    only_b = dataclasses.replace(CAP, reaches={"b": REACH})
    kept = {name: dataclasses.replace(one, b=_adapter().layers[name].b) for name, one in START.adapter.layers.items()}

    assert _rule(_upload(), cap=only_b) == "norm: q.a moved, and no step trains it"
    assert _rule(_with_adapter(layers=kept), cap=only_b) == ""


def test_a_factor_whose_turn_it_is_not_comes_back_as_it_was() -> None:
    """RoLoRA: b in odd rounds, a in even ones."""
    run = read_cap({"kind": "dp_rolora", "steps": 1, "learning_rate": 1.0})
    moved_b = {
        name: dataclasses.replace(one, b=_adapter().layers[name].b) for name, one in START.adapter.layers.items()
    }

    assert _rule(_with_adapter(layers=moved_b), cap=run.of_round(1)) == ""
    assert _rule(_with_adapter(layers=moved_b), cap=run.of_round(2)) == "norm: q.b moved, and no step trains it"


def test_of_an_adapter_with_cores_only_the_cores_may_have_moved() -> None:
    spec = dataclasses.replace(SPEC, core=True)
    run = read_cap({"kind": "dp_lora_sb", "steps": 1, "learning_rate": 1.0}).of_round(1)

    def cored(adapter: Adapter, value: float) -> Adapter:
        core = np.full((2, 2), value, np.float32)
        layers = {name: dataclasses.replace(one, core=core) for name, one in adapter.layers.items()}
        return dataclasses.replace(adapter, layers=layers)

    def rule(adapter: Adapter) -> str:
        start = dataclasses.replace(START, adapter=cored(START.adapter, 0.0))
        upload = _upload(release=AdapterRelease(adapter=adapter))
        broken = broken_rule(upload, broadcast=start, spec=spec, site=SITE, cap=run)
        return str(broken) if broken else ""

    assert rule(cored(START.adapter, 0.25)) == ""
    assert rule(cored(START.adapter, 3.0)).startswith("norm: q.core moved by 6, at most ")
    assert rule(cored(_adapter(), 0.25)) == "norm: q.a moved, and no step trains it"
    assert rule(cored(START.adapter, 0.0)) == "replay: is the broadcast itself; a private release holds noise"
    assert rule(_adapter()).startswith("layers: q.core is missing")


def test_a_zeroth_order_update_has_one_scalar_a_step() -> None:
    cap = dataclasses.replace(CAP, by_scalars=True)
    for scalars in (None, np.zeros(2, np.float32), np.zeros((1, 1), np.float32)):
        release = dataclasses.replace(_upload().release, scalars=scalars)
        assert _rule(_upload(release=release), cap=cap) == (
            "shape: scalars a zeroth-order update is 1 scalars, one a step"
        )
    release = dataclasses.replace(_upload().release, scalars=np.ones(1, np.float32))
    assert _rule(_upload(release=release), cap=cap) == ""


# --- what holds no noise


def _from_start(change: Callable[[Any], Any] = lambda part: part) -> Upload:
    layers = {
        name: LoraFactors(a=change(one.a).astype(np.float32), b=change(one.b).astype(np.float32))
        for name, one in START.adapter.layers.items()
    }
    return _with_adapter(layers=layers)


def test_the_broadcast_sent_back_is_a_replay_also_with_other_signs_of_zero() -> None:
    told = "replay: is the broadcast itself; a private release holds noise"

    assert _rule(_from_start()) == told
    assert _rule(_from_start(lambda part: np.where(part == 0, -0.0, part))) == told


def test_one_number_that_moved_makes_another_adapter() -> None:
    def one_more(part: Any) -> Any:
        part = np.array(part)
        part[0, 0] += 0.125
        return part

    assert _rule(_from_start(one_more)) == ""


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-45], ids=str)
def test_a_trained_factor_of_zeros_and_denormals_is_named(value: float) -> None:
    assert _rule(_moved("v.a", lambda part: part * 0 + value), cap=WIDE).startswith("zero: v.a holds zeros and denorm")
    assert _rule(_moved("v.a", lambda part: part * 0 + value), cap=None).startswith("zero: v.a holds zeros and denorm")
    assert _rule(_moved("v.a", lambda part: part * 0 + 2e-38), cap=WIDE) == ""


def test_some_zeros_and_denormals_among_numbers_are_sound() -> None:
    def some(part: Any) -> Any:
        part[0, :] = [0.0, -0.0, 1e-40, 1.0]
        return part

    assert _rule(_moved("v.a", some), cap=WIDE) == ""


def test_a_release_seen_before_is_a_replay() -> None:
    seen = {lora.sha256(_adapter()): "the release of inn in round 1"}

    assert _rule(_upload(), seen=seen) == "replay: is the release of inn in round 1 once more; noise never comes twice"
    assert _rule(_moved("v.a", lambda part: part * 1.001), seen=seen) == ""


def test_what_is_not_private_may_be_the_broadcast() -> None:
    """Plain learning from an empty sample finds nothing to learn; norms hold for it all the same."""
    plain = dataclasses.replace(_from_start(), receipts=None, spent=math.inf)

    assert _rule(plain, accept_non_private=True) == ""
    assert _rule(plain, accept_non_private=True, seen={lora.sha256(START.adapter): "x"}) == ""
    far = dataclasses.replace(_moved("v.b", lambda part: part + 9), receipts=None, spent=math.inf)
    assert _rule(far, accept_non_private=True).startswith("norm: v.b")


# --- what is told of it


def test_what_is_told_is_one_line_that_prints() -> None:
    hostile = "\x1b[31mred\nline\r\u202eturned\x00\ud800\u200b" + "x" * 10_000_000

    told = Rejection(site=hostile, rule="keys", reason=hostile, tensor=hostile)

    for text in (told.site, told.reason, told.tensor, str(told)):
        assert text.isprintable()
    assert told.reason.startswith("?[31mred?line??turned???xxx")
    assert [len(text) for text in (told.site, told.reason, told.tensor)] == [200, 200, 200]
    assert Rejection(**dataclasses.asdict(told)) == told  # as the run directory keeps it
    assert str(Rejection(site="mill", rule="size", reason="grüße, 数字")) == "size: grüße, 数字"


def test_every_rule_of_the_wire_is_a_rule_of_ours() -> None:
    source = (ROOT / "fl_app" / "wire.py").read_text(encoding="utf-8")
    named = {*re.findall(r'rule="(\w+)"', source), *wire._RULES.values(), WireViolation("x").rule}

    assert len(named) > 10
    assert named <= {*RULES}
    for rule in named:
        assert unreadable("mill", WireViolation("is odd", rule=rule, tensor="v.a")) == Rejection(
            site="mill", rule=rule, tensor="v.a", reason="is odd"
        )


# --- the receipts


@pytest.mark.parametrize("receipts", [None, ()], ids=["none", "empty"])
def test_no_receipt(receipts: Any) -> None:
    assert _rule(_upload(receipts=receipts)) == "receipt: none, so the release is not private"


def _non_private(**changes: Any) -> str:
    return _rule(_upload(**{"receipts": None, "spent": math.inf, **changes}), accept_non_private=True)


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
    assert _rule(_upload(spent=spent)) == f"spent: {spent:.4g} of a budget of 8"


def test_the_budget_may_be_spent_to_the_end() -> None:
    assert _rule(_upload(spent=8.0)) == ""


def test_less_spent_than_before() -> None:
    before = dataclasses.replace(SITE, spent=3.0)

    assert _rule(_upload(spent=2.9), site=before) == "spent: 2.9 is less than the 3 of before"
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
def test_receipts_that_would_stop_the_server_are_a_broken_rule(kind: str) -> None:
    upload = _upload(receipts=tuple(DpReceipt(event=event, unit="record") for event in HOSTILE[kind]), spent=1.0)

    assert _rule(upload, cap=None).startswith("receipt: ")
    assert cost_of(upload, DELTA) == 1.0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_receipt_for_other_steps_than_the_round_has(steps: int) -> None:
    event = PoissonGaussian(noise_multiplier=4.0, sample_rate=0.1, steps=steps, clip_norm=1.0)
    upload = _upload(receipts=(DpReceipt(event=event, unit="record"),), spent=7.0)

    assert _rule(upload, cap=dataclasses.replace(CAP, steps=steps)) == ""
    assert _rule(upload, cap=dataclasses.replace(CAP, steps=2)) == (
        f"receipt: is for {steps} steps; a round of this run has 2"
    )


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
