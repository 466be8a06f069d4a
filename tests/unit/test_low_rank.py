"""Singular values of delta_W from its factors, against dense decompositions; bases with cores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import lora, low_rank
from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, LoraFactors

SHAPES = {"wide": (19, 11), "tall": (8, 23)}


def _adapter(seed: int, *, rank: int = 6, alpha: float = 9.0, core: bool = False) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=rng.normal(size=(rank, d_in)).astype(np.float32),
            b=rng.normal(size=(d_out, rank)).astype(np.float32),
            core=rng.normal(size=(rank, rank)).astype(np.float32) if core else None,
        )
        for name, (d_in, d_out) in SHAPES.items()
    }
    return Adapter(layers=layers, alpha=alpha, base="base")


def _dense(adapter: Adapter, layer: str) -> np.ndarray:
    one = adapter.layers[layer]
    core = np.eye(len(one.a)) if one.core is None else one.core.astype(float)
    return adapter.alpha / len(one.a) * np.einsum("or,rs,si->oi", one.b.astype(float), core, one.a.astype(float))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 12), core=st.booleans(), alpha=st.sampled_from([0.5, 7.0]))
def test_singular_values_are_those_of_the_dense_map(seed: int, rank: int, core: bool, alpha: float) -> None:
    adapter = _adapter(seed, rank=rank, core=core, alpha=alpha)

    for layer, part in low_rank.decompose(adapter).items():
        dense = _dense(adapter, layer)
        values = np.linalg.svd(dense, compute_uv=False)[: len(part.s)]
        np.testing.assert_allclose(part.s, values, atol=1e-10 * values[0])
        np.testing.assert_allclose((part.u * part.s) @ part.v, dense, atol=1e-10 * values[0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 6), core=st.booleans())
def test_a_basis_with_a_core_is_the_best_adapter_of_its_rank(seed: int, rank: int, core: bool) -> None:
    adapter = _adapter(seed, core=core)

    found = low_rank.with_core(adapter, rank)

    assert lora.rank_of(found) == rank
    assert found.alpha / rank == pytest.approx(adapter.alpha / 6)
    for layer in SHAPES:
        one = found.layers[layer]
        assert one.core is not None
        np.testing.assert_allclose(one.a @ one.a.T, np.eye(rank), atol=1e-6)
        np.testing.assert_allclose(one.b.T @ one.b, np.eye(rank), atol=1e-6)
        np.testing.assert_array_equal(one.core, np.diag(np.diag(one.core)))
        u, s, v = np.linalg.svd(_dense(adapter, layer), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(_dense(found, layer), best, atol=1e-5 * s[0])


def test_a_basis_is_a_function_of_the_released_adapter_alone() -> None:
    """Post-processing: the same release gives the same bits, and is left as it was."""
    adapter = _adapter(3)
    before = lora.sha256(adapter)

    assert lora.sha256(low_rank.with_core(adapter, 4)) == lora.sha256(low_rank.with_core(_adapter(3), 4))
    assert lora.sha256(adapter) == before


@pytest.mark.parametrize(("rank", "told"), [(7, "tall has 6 directions, fewer than the 7"), (9, "6 directions")])
def test_directions_that_nobody_trained_are_not_made_up(rank: int, told: str) -> None:
    with pytest.raises(AdapterMismatch, match=told):
        low_rank.with_core(_adapter(1), rank)


def test_the_fewest_values_by_hand() -> None:
    """Squares 16, 9, 4 and 1 of 30: shares 0.533, 0.833, 0.967, 1."""
    s = np.array([4.0, 3.0, 2.0, 1.0])
    part = {"l": low_rank.Svd(u=np.eye(4), s=s, v=np.eye(4)), "none": low_rank.Svd(u=np.eye(4), s=0 * s, v=np.eye(4))}

    found = [low_rank.energy_ranks(part, energy)["l"] for energy in (0.1, 0.5, 0.54, 0.84, 0.96, 0.97, 1.0)]

    assert found == [1, 1, 2, 3, 3, 4, 4]
    assert low_rank.energy_ranks(part, 1.0)["none"] == 0
