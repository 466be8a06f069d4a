"""Distances and weighted sums of products, against dense float64 matrices."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import lora
from fl_app.types import Adapter, LoraFactors
from strategies import products

SHAPES = {"blocks.0.q_proj": (5, 3), "blocks.0.v_proj": (2, 7), "blocks.1.q_proj": (1, 4)}
"""Layer -> (d_in, d_out); none is square."""


def _adapter(seed: int, *, rank: int = 2, alpha: float = 4.0) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=rng.normal(size=(rank, d_in)).astype(np.float32), b=rng.normal(size=(d_out, rank)).astype(np.float32)
        )
        for name, (d_in, d_out) in SHAPES.items()
    }
    return Adapter(layers=layers, alpha=alpha, base="base")


def _dense(adapter: Adapter) -> np.ndarray:
    """Return all layers' delta_W as one float64 vector, from the definition alone."""
    parts = [
        (adapter.alpha / factors.a.shape[0])
        * np.einsum("or,ri->oi", factors.b.astype(np.float64), factors.a.astype(np.float64)).ravel()
        for _, factors in sorted(adapter.layers.items())
    ]
    return np.concatenate(parts)


def _apart(left: Adapter, right: Adapter) -> float:
    return float(np.linalg.norm(_dense(left) - _dense(right)))


DRAWN = st.tuples(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.5, 1.0, 6.0, 16.0]))


@settings(max_examples=60, deadline=None)
@given(one=DRAWN, other=DRAWN)
def test_the_distance_is_the_norm_of_the_difference(one: tuple[int, int, float], other: tuple[int, int, float]) -> None:
    left, right = (_adapter(seed, rank=rank, alpha=alpha) for seed, rank, alpha in (one, other))

    assert products.distance(left, right) == pytest.approx(_apart(left, right), rel=1e-6, abs=1e-6)
    assert products.distance(left, left) == 0.0


def test_a_distance_of_one_float_is_not_lost() -> None:
    """The squares of the two lengths agree to 14 digits, so their difference would be noise."""
    left = _adapter(1)
    layers = {n: LoraFactors(a=f.a, b=np.nextafter(f.b, np.float32(np.inf))) for n, f in left.layers.items()}
    right = dataclasses.replace(left, layers=layers)

    assert products.distance(left, right) == pytest.approx(_apart(left, right), rel=1e-6)
    assert 0 < products.distance(left, right) < 1e-5


def test_a_factor_that_is_rescaled_against_the_other_moves_nothing() -> None:
    left = _adapter(1)
    layers = {name: LoraFactors(a=f.a / 64, b=f.b * 64) for name, f in left.layers.items()}

    assert products.distance(left, dataclasses.replace(left, layers=layers)) < 1e-5


@settings(max_examples=60, deadline=None)
@given(terms=st.lists(st.tuples(DRAWN, st.floats(-2, 2)), min_size=1, max_size=5))
def test_a_weighted_sum_is_the_weighted_sum_of_the_products(terms: list[tuple[tuple[int, int, float], float]]) -> None:
    adapters = [_adapter(seed, rank=rank, alpha=alpha) for (seed, rank, alpha), _ in terms]
    weights = [weight for _, weight in terms]

    stacked = lora.stacked(adapters, weights)

    expected = sum(weight * _dense(adapter) for weight, adapter in zip(weights, adapters, strict=True))
    np.testing.assert_allclose(_dense(stacked), expected, atol=1e-4)
    assert lora.rank_of(stacked) == sum(lora.rank_of(adapter) for adapter in adapters)
