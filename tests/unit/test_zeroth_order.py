"""Scalars for an adapter: the byte, the directions, and the same walk wherever it is taken."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.learners import zeroth_order as learners
from fl_app import lora, zeroth_order
from fl_app.errors import NotFinite
from fl_app.origin import ROOT
from fl_app.types import Adapter, LoraFactors
from fl_app.zeroth_order import LARGEST, SMALLEST, Walk, decode, encode, replay

MOST = math.expm1(1 / 32)
"""The relative error of a grid of steps of e^(1/16), at its worst half way: 3.17 %."""

PLACE: dict[str, Any] = {"run": "run-a.d", "site": "harbour", "round_number": 1}


def some_adapter(*, core: bool = False) -> Adapter:
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    layers = {
        name: LoraFactors(a=draw(2, d_in), b=draw(d_out, 2), core=draw(2, 2) if core else None)
        for name, d_in, d_out in (("v", 3, 5), ("q", 4, 3))
    }
    return Adapter(layers=layers, alpha=4.0, base="0" * 64)


# --- the byte


@given(size=st.floats(SMALLEST, LARGEST), sign=st.sampled_from([-1.0, 1.0]))
def test_a_byte_is_right_to_3_percent_within_its_range(size: float, sign: float) -> None:
    (found,) = decode(encode(np.array([sign * size])))
    assert abs(float(found) / (sign * size) - 1) <= MOST * (1 + 1e-6)


def test_and_no_better_half_way() -> None:
    """The twin: a bound of 3 % would be wrong."""
    between = LARGEST * math.exp(-1 / 32)
    (found,) = decode(encode(np.array([between * 0.9999])))
    assert abs(float(found) / between - 1) > 0.03


@given(size=st.floats(LARGEST, 1e30), sign=st.sampled_from([-1.0, 1.0]))
def test_beyond_its_range_a_byte_saturates(size: float, sign: float) -> None:
    assert decode(encode(np.array([sign * size]))).tolist() == [np.float32(sign * LARGEST)]


@given(size=st.floats(0, SMALLEST), sign=st.sampled_from([-1.0, 1.0]))
def test_below_its_range_a_byte_is_the_nearer_of_the_least_and_zero(size: float, sign: float) -> None:
    (found,) = decode(encode(np.array([sign * size]))).tolist()
    assert found == (np.float32(sign * SMALLEST) if size >= SMALLEST / 2 else 0.0)
    assert abs(found - sign * size) <= SMALLEST / 2 * (1 + 1e-6)


def test_every_byte_is_the_code_of_its_value() -> None:
    """All 256: the 255 that `encode` gives come back, minus zero is zero; values by an exponential of 50 digits."""
    import mpmath

    codes = np.arange(256, dtype=np.uint8)
    values = decode(codes)
    assert values.dtype == np.float32
    assert encode(values).tolist() == [0 if code == 128 else code for code in range(256)]
    assert not np.signbit(values[[0, 128]]).any()
    with mpmath.workdps(50):
        for code in range(1, 128):
            expected = np.float32(float(mpmath.e ** (mpmath.mpf(3) - mpmath.mpf(127 - code) / 16)))
            assert (values[code], values[code | 128]) == (expected, -expected)
    assert (np.diff(values[:128]) > 0).all()
    assert (values[1], values[127]) == (np.float32(SMALLEST), np.float32(LARGEST))


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_byte(odd: float) -> None:
    with pytest.raises(NotFinite, match="has no code"):
        encode(np.array([1.0, odd]))


# --- the walk


def by_hand(start: Adapter, scalars: np.ndarray, rate: float) -> dict[str, np.ndarray]:
    """Return where the definition leads, in float64: w - rate sum_t g_t z_t, z from numpy's own Philox."""
    names = sorted(f"{name}.{factor}" for name in start.layers for factor in "ab")
    weights = {}
    for name in names:
        layer, _, factor = name.rpartition(".")
        weights[name] = getattr(start.layers[layer], factor).astype(np.float64)
    for step, scalar in enumerate(scalars):
        text = "\x1f".join(["zeroth order", "run-a.d", "harbour", "1", str(step)])
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        draw = np.random.Generator(np.random.Philox(key=key))
        flat = draw.standard_normal(sum(part.size for part in weights.values()), dtype=np.float32)
        for name in names:
            z, flat = flat[: weights[name].size], flat[weights[name].size :]
            weights[name] = weights[name] - rate * float(scalar) * z.reshape(weights[name].shape)
    return weights


def test_a_replay_is_its_definition() -> None:
    start, scalars = some_adapter(), np.array([0.5, -2.0, 0.0, 20.0], np.float32)
    found = replay(start, scalars, **PLACE, learning_rate=0.1, schedule="both")
    for name, expected in by_hand(start, scalars, 0.1).items():
        layer, _, factor = name.rpartition(".")
        assert getattr(found.layers[layer], factor) == pytest.approx(expected, abs=2e-6)
    assert (found.alpha, found.base) == (start.alpha, start.base)
    nothing = replay(start, np.zeros(3, np.float32), **PLACE, learning_rate=0.1, schedule="both")
    assert lora.sha256(nothing) == lora.sha256(start)


@pytest.mark.parametrize(
    ("schedule", "number", "core", "moving"),
    [
        ("both", 1, False, "ab"),
        ("b", 1, False, "b"),
        ("rounds", 1, False, "b"),
        ("rounds", 2, False, "a"),
        ("core", 1, True, "c"),
        ("both", 1, True, "ab"),
    ],
)
def test_what_is_not_active_stays_to_the_bit(schedule: Any, number: int, core: bool, moving: str) -> None:
    start = some_adapter(core=core)
    place = {**PLACE, "round_number": number}
    found = replay(start, np.ones(2, np.float32), **place, learning_rate=0.1, schedule=schedule)
    for name, began in start.layers.items():
        for factor in ("a", "b", "core") if core else ("a", "b"):
            same = np.array_equal(getattr(found.layers[name], factor), getattr(began, factor))
            assert same == (factor[0] not in moving)


def test_steps_take_turns() -> None:
    walk = Walk(some_adapter(), **PLACE, learning_rate=0.1, schedule="steps")
    assert [{name[-1] for name in walk.direction(step).parts} for step in range(3)] == [{"b"}, {"a"}, {"b"}]


def test_directions_are_normal_and_everybodys_own() -> None:
    rng = np.random.default_rng(0)
    layers = {"q": LoraFactors(a=rng.normal(size=(8, 2000)).astype(np.float32), b=np.zeros((2000, 8), np.float32))}
    start = Adapter(layers=layers, alpha=8.0, base="0" * 64)

    def drawn(step: int = 0, **place: Any) -> np.ndarray:
        walk = Walk(start, **{**PLACE, **place}, learning_rate=0.1, schedule="both")
        return np.concatenate([part.ravel() for part in walk.direction(step).parts.values()])

    first = drawn()
    assert np.array_equal(first, drawn())
    assert abs(first.mean()) < 5 / first.size**0.5
    assert abs(first.std() - 1) < 5 / (2 * first.size) ** 0.5
    others = [drawn(1), drawn(run="run-b"), drawn(site="school"), drawn(round_number=2)]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / first.size**0.5
    assert not np.array_equal(drawn(run="a", site="b"), drawn(run="a\x1eb", site=""))


REPLAY = """
import numpy as np
from fl_app import lora, zeroth_order
from tests.unit.test_zeroth_order import PLACE, some_adapter
codes = np.arange(1, 41, dtype=np.uint8) * 6
print(lora.sha256(zeroth_order.replay(
    some_adapter(), zeroth_order.decode(codes), **PLACE, learning_rate=0.013, schedule="both")))
"""


def test_another_process_walks_the_same_way() -> None:
    """From the bytes alone, with other threads, another hash seed and another state of numpy."""
    codes = np.arange(1, 41, dtype=np.uint8) * 6
    here = lora.sha256(replay(some_adapter(), decode(codes), **PLACE, learning_rate=0.013, schedule="both"))
    for seed, threads in (("1", "1"), ("7", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        code = f"import numpy; numpy.random.seed({seed})\n{REPLAY}"
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == here
    codes[0] += 1
    assert lora.sha256(replay(some_adapter(), decode(codes), **PLACE, learning_rate=0.013, schedule="both")) != here


def test_a_finite_difference_is_the_slope_of_a_quadratic() -> None:
    """loss = |w|^2 / 2 over all factors: its slope along z is w z, whatever the step; the mean of many g z is w."""
    start = some_adapter()
    walk = Walk(start, **PLACE, learning_rate=0.1, schedule="both")
    w = np.concatenate([part.ravel() for part in walk.weights.values()]).astype(np.float64)

    def loss(parts: dict[str, np.ndarray]) -> float:
        return float(sum((part.astype(np.float64) ** 2).sum() for part in parts.values())) / 2

    found = np.zeros_like(w)
    for step in range(4000):
        direction = walk.direction(step)
        z = np.concatenate([part.ravel() for part in direction.parts.values()]).astype(np.float64)
        slope = (loss(walk.beside(direction, 1e-2)) - loss(walk.beside(direction, -1e-2))) / 2e-2
        if step < 20:
            assert slope == pytest.approx(w @ z, abs=1e-4)
        found += slope * z / 4000
    # one coordinate of g z has variance |w|^2 + w_i^2; over 4000 draws, five standard errors
    assert np.abs(found - w).max() < 5 * np.sqrt((w @ w + w.max() ** 2) / 4000)
    assert np.corrcoef(found, w)[0, 1] > 0.95
    assert zeroth_order.SIGN == 128


def test_a_factor_at_rest_stands_where_the_walk_is(learned: Any) -> None:
    """With turns, a slope is taken around the walk's own place: what another step tried and left is put back."""
    start = learned(3)
    walk = Walk(start, run="r", site="s", round_number=1, learning_rate=0.1, schedule="steps")
    seen: list[dict[str, np.ndarray]] = []

    def losses_of(weights: Any, examples: Any) -> np.ndarray:
        seen.append(dict(weights))
        return np.ones(len(examples))

    for step in range(3):
        direction = walk.direction(step)
        rest = {name: part for name, part in walk.weights.items() if name not in direction.parts}
        learners.clipped_slope(losses_of, walk, direction, [], perturbation=0.5, clip_norm=1.0)
        for weights in seen[-2:]:
            assert weights.keys() == walk.weights.keys()
            assert rest
            for name, part in rest.items():
                np.testing.assert_array_equal(weights[name], part)
        walk.go(direction, 1.0)
