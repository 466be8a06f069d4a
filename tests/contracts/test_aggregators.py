"""Every aggregator keeps the promises of `strategies.stages.Aggregator`; `mean_product` is exact, its twin is not.

What central_dp promises beyond them is in `test_central_dp`, what the robust ones promise in `test_robust_aggregators`.
Here the noise of central_dp is silent, its clip wide and every site there, so that it has to keep the same promises as
what it wraps; and the robust ones get as many uploads as they ask for.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import lora
from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, Upload, VectorRelease
from strategies.aggregators import AnyAggregator
from strategies.aggregators.mean_factors import MeanFactors
from strategies.aggregators.mean_product import MeanProduct
from strategies.stages import Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Merged

SHAPES = {"blocks.0.q_proj": (5, 3), "blocks.0.v_proj": (2, 7), "blocks.1.q_proj": (1, 4)}
"""Layer -> (d_in, d_out); none is square."""

LATTICE = 1e-3
"""How far the public lattice of central_dp, 2^-12 at its clip norm here, may move a product of factors, per alpha."""

MEMBERS: tuple[Any, ...] = get_args(get_args(AnyAggregator)[0])
EVERY = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)


OPTIONS: dict[str, dict[str, Any]] = {
    "central_dp": {
        "inner": {"kind": "mean_factors"},
        "clip_norm": 64.0,
        "noise_multiplier": 8.0,
        "epsilon": 8.0,
        "delta": 1e-5,
    },
    "thresholded_svd": {"energy": 1.0},
    "sketched_svd": {"oversample": 64},
    "zero_padded": {},
}

FEWEST = {"median_factors": 3, "bounded_mean_product": 3, "krum_product": 5}
"""Uploads that a member asks for, where it is more than one."""


class Silent:
    """Noise that adds nothing."""

    simulated = True

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


def _aggregate(member: Any, uploads: Sequence[Upload], *, answering: Adapter | None = None) -> Merged:
    """Build the member for a cohort of as many sites as there are uploads, and let it aggregate them."""
    (kind,) = get_args(member.model_fields["kind"].annotation)
    first = [upload.release.adapter for upload in uploads if isinstance(upload.release, AdapterRelease)]
    broadcast = _broadcast(answering or (_like(first[0]) if first else _adapter(9)))
    with tempfile.TemporaryDirectory() as folder:
        run: Any = {"run": "run", "mode": "simulation", "seed": 0, "rounds": 1, "directory": Path(folder)}
        sites = max(len(uploads), _fewest(member))
        stage = member(kind=kind, **OPTIONS.get(kind, {})).build(Setting(sites=sites, **run))
        if kind == "central_dp":
            stage = dataclasses.replace(stage, noise=lambda _: Silent())
        return stage(uploads, broadcast)


def _fewest(member: Any) -> int:
    return FEWEST.get(_kind(member), 1)


def _kind(member: Any) -> str:
    return get_args(member.model_fields["kind"].annotation)[0]


def mean_factors(uploads: Sequence[Upload]) -> Merged:
    return _aggregate(MeanFactors, uploads)


def mean_product(uploads: Sequence[Upload]) -> Merged:
    return _aggregate(MeanProduct, uploads)


def _broadcast(adapter: Adapter) -> Broadcast:
    return Broadcast(run="run", round=1, adapter=adapter, config_digest="d" * 64)


def _like(adapter: Adapter) -> Adapter:
    """Return an adapter of the same shape that an upload may answer."""
    shapes = {name: (factors.a.shape[1], factors.b.shape[0]) for name, factors in adapter.layers.items()}
    return _adapter(77, rank=lora.rank_of(adapter), alpha=adapter.alpha, base=adapter.base, shapes=shapes)


def _adapter(
    seed: int,
    *,
    rank: int = 2,
    alpha: float = 4.0,
    base: str = "base",
    shapes: dict[str, tuple[int, int]] = SHAPES,
) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=rng.normal(size=(rank, d_in)).astype(np.float32), b=rng.normal(size=(d_out, rank)).astype(np.float32)
        )
        for name, (d_in, d_out) in shapes.items()
    }
    return Adapter(layers=layers, alpha=alpha, base=base)


def _upload(site: str, adapter: Adapter) -> Upload:
    return Upload(site=site, round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=0.0)


def _uploads(*adapters: Adapter) -> list[Upload]:
    return [_upload(f"site-{index}", adapter) for index, adapter in enumerate(adapters)]


def _dense(adapters: Sequence[Adapter], layer: str) -> np.ndarray:
    """Return the mean of delta_W in float64: the oracle, from the definition alone."""
    total = np.zeros((SHAPES[layer][1], SHAPES[layer][0]))
    for adapter in adapters:
        factors = adapter.layers[layer]
        rank = factors.a.shape[0]
        total += (adapter.alpha / rank) * np.einsum("or,ri->oi", factors.b.astype(float), factors.a.astype(float))
    return total / len(adapters)


# --- what every member promises


def test_the_union_is_what_these_tests_are_run_on() -> None:
    assert {get_args(member.model_fields["kind"].annotation)[0] for member in MEMBERS} == {
        "mean_factors",
        "mean_product",
        "central_dp",
        "median_factors",
        "bounded_mean_product",
        "krum_product",
        "stacked",
        "residual",
        "truncated_svd",
        "thresholded_svd",
        "sketched_svd",
        "ridge",
        "zero_padded",
    }


@EVERY
@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=5), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_uploads_does_not_matter(member: Any, seeds: list[int], shuffle: Any) -> None:
    seeds = [*seeds, *range(_fewest(member) - len(seeds))]
    uploads = _uploads(*(_adapter(seed) for seed in seeds))
    mixed = list(uploads)
    shuffle.shuffle(mixed)

    answering = _adapter(99)
    merged = _aggregate(member, uploads, answering=answering)
    again = _aggregate(member, mixed, answering=answering)

    assert lora.sha256(merged.adapter) == lora.sha256(again.adapter)
    assert merged.used == again.used
    assert merged.rejected == again.rejected
    assert sorted((*merged.used, *merged.rejected)) == [upload.site for upload in uploads], "every upload has a fate"
    assert member.__name__ == "KrumProduct" or merged.rejected == {}


@EVERY
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rank=st.integers(1, 4), alpha=st.sampled_from([0.5, 3.0, 8.0, 16.0]))
def test_the_fewest_uploads_that_are_one_pass_unchanged(member: Any, seed: int, rank: int, alpha: float) -> None:
    adapter = _adapter(seed, rank=rank, alpha=alpha)

    merged = _aggregate(member, _uploads(*[adapter] * _fewest(member))).adapter

    assert merged.base == adapter.base
    assert merged.layers.keys() == adapter.layers.keys()
    for layer in SHAPES:
        # A third of b, three times, is b to float32; so are the factors of a decomposition.
        rounded = {
            "CentralDp": LATTICE * alpha,
            "BoundedMeanProduct": 1e-6 * alpha,
            "TruncatedSvd": 2e-6 * alpha,
            "ThresholdedSvd": 2e-6 * alpha,
            "SketchedSvd": 2e-6 * alpha,
        }
        exact = rounded.get(member.__name__, 0.0)
        np.testing.assert_allclose(lora.delta(merged, layer), lora.delta(adapter, layer), rtol=1e-12, atol=exact)


@EVERY
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_uploads_give_their_own_delta(member: Any, count: int) -> None:
    adapter = _adapter(3)

    merged = _aggregate(member, _uploads(*[adapter] * max(count, _fewest(member)))).adapter

    for layer in SHAPES:
        exact = 2e-6 * adapter.alpha if member.__name__ != "CentralDp" else LATTICE * adapter.alpha
        np.testing.assert_allclose(lora.delta(merged, layer), lora.delta(adapter, layer), rtol=1e-6, atol=exact)


@EVERY
def test_the_uploads_are_left_as_they_were(member: Any) -> None:
    adapters = [_adapter(seed) for seed in range(1, 6)]
    before = [lora.sha256(adapter) for adapter in adapters]
    for adapter in adapters:
        for factors in adapter.layers.values():
            factors.a.setflags(write=False)
            factors.b.setflags(write=False)

    merged = _aggregate(member, _uploads(*adapters))
    for adapter in (merged.adapter, *([merged.start] if merged.start else []), *merged.blocks):
        for factors in adapter.layers.values():
            factors.a[...] = 0.0
            factors.b[...] = 0.0

    assert [lora.sha256(adapter) for adapter in adapters] == before


@EVERY
def test_what_comes_out_is_float32(member: Any) -> None:
    merged = _aggregate(member, _uploads(*(_adapter(seed) for seed in range(1, 6)))).adapter

    assert {part.dtype for factors in merged.layers.values() for part in (factors.a, factors.b)} == {
        np.dtype(np.float32)
    }


@EVERY
def test_another_base_is_refused(member: Any) -> None:
    with pytest.raises(AdapterMismatch, match="adapter 1 is for base other"):
        _aggregate(member, _uploads(_adapter(1), _adapter(2, base="other")))


@EVERY
def test_other_layers_are_refused(member: Any) -> None:
    fewer = {name: shape for name, shape in SHAPES.items() if name != "blocks.1.q_proj"}

    with pytest.raises(AdapterMismatch, match=r"differ in layers, e\.g\. blocks\.1\.q_proj"):
        _aggregate(member, _uploads(_adapter(1), _adapter(2, shapes=fewer)))


@EVERY
def test_nothing_to_aggregate_is_an_error(member: Any) -> None:
    with pytest.raises(ValueError, match="no adapter to aggregate"):
        _aggregate(member, [])


@EVERY
def test_a_vector_alone_is_no_adapter(member: Any) -> None:
    release = VectorRelease(vectors={"layer": np.zeros(3, np.float32)})

    with pytest.raises(ValueError, match="no adapter to aggregate"):
        _aggregate(member, [Upload(site="a", round=1, release=release, receipts=None, spent=0.0)])


# --- mean_product against the dense oracle


@settings(max_examples=60, deadline=None)
@given(
    sites=st.lists(
        st.tuples(st.integers(0, 999), st.integers(1, 5), st.sampled_from([0.5, 1.0, 6.0, 16.0, 33.0])),
        min_size=1,
        max_size=5,
    )
)
def test_mean_product_is_the_mean_of_the_products(sites: list[tuple[int, int, float]]) -> None:
    adapters = [_adapter(seed, rank=rank, alpha=alpha) for seed, rank, alpha in sites]

    merged = mean_product(_uploads(*adapters)).adapter

    assert lora.rank_of(merged) == sum(rank for _, rank, _ in sites)
    for layer in SHAPES:
        scale = max(np.abs(lora.delta(adapter, layer)).max() for adapter in adapters)
        np.testing.assert_allclose(lora.delta(merged, layer), _dense(adapters, layer), atol=1e-6 * (1 + scale))


def test_mean_product_by_hand() -> None:
    """Ranks 1 and 2, alphas 1 and 4: delta_1 = 1/1 * [[2, 0]], delta_2 = 4/2 * [[1, 1]]; their mean is [[2, 1]]."""
    first = LoraFactors(a=np.array([[1.0, 0.0]], np.float32), b=np.array([[2.0]], np.float32))
    second = LoraFactors(a=np.eye(2, dtype=np.float32), b=np.array([[1.0, 1.0]], np.float32))
    adapters = [
        Adapter(layers={"l": first}, alpha=1.0, base="base"),
        Adapter(layers={"l": second}, alpha=4.0, base="base"),
    ]

    merged = mean_product(_uploads(*adapters)).adapter

    np.testing.assert_array_equal(lora.delta(merged, "l"), [[2.0, 1.0]])


# --- mean_factors: exactly as wrong as the cross-covariance of the factors


@settings(max_examples=40, deadline=None)
@given(seeds=st.lists(st.integers(0, 999), min_size=2, max_size=5))
def test_mean_factors_misses_the_oracle_by_the_cross_covariance(seeds: list[int]) -> None:
    adapters = [_adapter(seed) for seed in seeds]

    merged = mean_factors(_uploads(*adapters)).adapter

    for layer in SHAPES:
        a_KRI = np.array([adapter.layers[layer].a for adapter in adapters], np.float64)
        b_KOR = np.array([adapter.layers[layer].b for adapter in adapters], np.float64)
        centred = np.einsum("kor,kri->oi", b_KOR - b_KOR.mean(0), a_KRI - a_KRI.mean(0)) / len(adapters)
        missed = _dense(adapters, layer) - lora.delta(merged, layer)
        np.testing.assert_allclose(missed, (4.0 / 2) * centred, atol=2e-5)


def test_mean_factors_is_not_the_mean_of_the_products() -> None:
    """By hand: b1 a1 = e1 e1', b2 a2 = e2 e2'; the mean is diag(.5, .5), the product of the means is .25 everywhere."""
    unit = np.eye(2, dtype=np.float32)
    adapters = [Adapter(layers={"l": LoraFactors(a=unit[[k]], b=unit[:, [k]])}, alpha=1.0, base="base") for k in (0, 1)]

    np.testing.assert_array_equal(lora.delta(mean_product(_uploads(*adapters)).adapter, "l"), [[0.5, 0.0], [0.0, 0.5]])
    np.testing.assert_array_equal(
        lora.delta(mean_factors(_uploads(*adapters)).adapter, "l"), [[0.25, 0.25], [0.25, 0.25]]
    )


@pytest.mark.parametrize("shared", ["a", "b"])
def test_mean_factors_is_exact_when_one_factor_is_shared(shared: str) -> None:
    first = _adapter(0)
    adapters = [
        Adapter(
            layers={
                name: LoraFactors(
                    a=first.layers[name].a if shared == "a" else factors.a,
                    b=first.layers[name].b if shared == "b" else factors.b,
                )
                for name, factors in _adapter(seed).layers.items()
            },
            alpha=4.0,
            base="base",
        )
        for seed in (1, 2, 3)
    ]

    merged = mean_factors(_uploads(*adapters)).adapter

    for layer in SHAPES:
        np.testing.assert_allclose(lora.delta(merged, layer), _dense(adapters, layer), atol=1e-5)


@pytest.mark.parametrize(("rank", "alpha"), [(3, 4.0), (2, 8.0)])
def test_mean_factors_refuses_mixed_ranks_and_scalings(rank: int, alpha: float) -> None:
    with pytest.raises(AdapterMismatch, match=rf"adapter 1 has alpha {alpha}, rank {rank}; adapter 0 has 4\.0, 2"):
        mean_factors(_uploads(_adapter(1), _adapter(2, rank=rank, alpha=alpha)))
