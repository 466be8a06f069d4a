"""What the robust aggregators promise beyond the contract: dense float64 oracles, bounds on one hostile upload, limits.

Hostile uploads are finite: `strategies.validate` lets nothing else through. Every bound has its twin, the plain mean,
which the same upload moves further than the bound.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fl_app import lora
from fl_app.config import read_tree
from fl_app.errors import AdapterMismatch, ConfigInvalid, RoundFailed
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, Upload
from strategies.aggregators import AnyAggregator
from strategies.aggregators.krum_product import KrumProduct, scores
from strategies.aggregators.mean_factors import MeanFactors
from strategies.aggregators.mean_product import MeanProduct
from strategies.aggregators.median_factors import median_factors
from strategies.config import read_server
from strategies.stages import Setting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Merged

SHAPES = {"blocks.0.q_proj": (5, 3), "blocks.0.v_proj": (2, 7), "blocks.1.q_proj": (1, 4)}
"""Layer -> (d_in, d_out); none is square."""

ROUNDED = 1e-5
"""What float32 factors may add to a distance here, where products are of the order of 10."""

DRAWN = st.tuples(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.5, 1.0, 6.0, 16.0]))
"""Seed, rank and scaling of an adapter."""

ROBUST: tuple[dict[str, Any], ...] = (
    {"kind": "median_factors"},
    {"kind": "bounded_mean_product"},
    {"kind": "bounded_mean_product", "bound": 0.5},
    {"kind": "krum_product"},
    {"kind": "krum_product", "keep": 3},
)
EVERY = pytest.mark.parametrize(
    "options", ROBUST, ids=lambda options: "-".join(str(value) for value in options.values())
)
SETTING = Setting(run="run", mode="simulation", seed=0, rounds=1, sites=9, directory=Path("unused"))
MEAN_FACTORS = MeanFactors(kind="mean_factors").build(SETTING)
MEAN_PRODUCT = MeanProduct(kind="mean_product").build(SETTING)
ATTACKS = {
    "x100": lambda own, start: _moved(own, start, 100.0),
    "flipped": lambda own, start: _moved(own, start, -1.0),
    "flipped x100": lambda own, start: _moved(own, start, -100.0),
    "anything": lambda _own, _start: _adapter(4711, size=30.0),
}


def _adapter(
    seed: int,
    *,
    rank: int = 2,
    alpha: float = 4.0,
    size: float = 1.0,
    near: Adapter | None = None,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
) -> Adapter:
    """Return a drawn adapter; with `near`, that one moved by a draw of `size`."""
    rng = np.random.default_rng(seed)
    layers: dict[str, LoraFactors] = {}
    for name, (d_in, d_out) in shapes.items():
        a, b = rng.normal(0, size, (rank, d_in)), rng.normal(0, size, (d_out, rank))
        if near is not None:
            a, b = a + near.layers[name].a, b + near.layers[name].b
        layers[name] = LoraFactors(a=a.astype(np.float32), b=b.astype(np.float32))
    return Adapter(layers=layers, alpha=alpha, base="base")


START = _adapter(99)


def _honest(count: int, *, spread: float = 0.2) -> list[Adapter]:
    """Return uploads that all moved the same way from START, each a little differently."""
    towards = _adapter(7, near=START, size=0.3)
    return [_adapter(seed, near=towards, size=spread) for seed in range(count)]


def _moved(own: Adapter, start: Adapter, factor: float) -> Adapter:
    """Return the update of `own`, factor by factor, times `factor`."""
    layers = {
        name: LoraFactors(
            a=(start.layers[name].a + factor * (factors.a - start.layers[name].a)).astype(np.float32),
            b=(start.layers[name].b + factor * (factors.b - start.layers[name].b)).astype(np.float32),
        )
        for name, factors in own.layers.items()
    }
    return dataclasses.replace(own, layers=layers)


def _uploads(adapters: Sequence[Adapter]) -> list[Upload]:
    return [
        Upload(site=f"site-{index}", round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=0.0)
        for index, adapter in enumerate(adapters)
    ]


def _broadcast(adapter: Adapter = START) -> Broadcast:
    return Broadcast(run="run", round=1, adapter=adapter, config_digest="d" * 64)


def _build(options: dict[str, Any], sites: int) -> Any:
    section: Any = TypeAdapter(AnyAggregator).validate_python(options)
    return section.build(Setting(run="run", mode="simulation", seed=0, rounds=1, sites=sites, directory=Path("unused")))


def _merge(options: dict[str, Any], adapters: Sequence[Adapter], start: Adapter = START) -> Merged:
    return _build(options, len(adapters))(_uploads(adapters), _broadcast(start))


def _dense(adapter: Adapter) -> np.ndarray:
    """Return all layers' delta_W as one float64 vector: the oracle, from the definition alone."""
    parts = [
        (adapter.alpha / factors.a.shape[0])
        * np.einsum("or,ri->oi", factors.b.astype(np.float64), factors.a.astype(np.float64)).ravel()
        for _, factors in sorted(adapter.layers.items())
    ]
    return np.concatenate(parts)


def _apart(left: Adapter, right: Adapter) -> float:
    return float(np.linalg.norm(_dense(left) - _dense(right)))


# --- median_factors


@settings(max_examples=40, deadline=None)
@given(seeds=st.lists(st.integers(0, 999), min_size=3, max_size=8))
def test_the_median_is_of_every_coordinate_of_both_factors(seeds: list[int]) -> None:
    adapters = [_adapter(seed) for seed in seeds]

    merged = _merge({"kind": "median_factors"}, adapters).adapter

    low, high = (len(seeds) - 1) // 2, len(seeds) // 2
    for name, factors in merged.layers.items():
        for factor in ("a", "b"):
            ranked = np.sort(np.array([getattr(one.layers[name], factor) for one in adapters], np.float64), axis=0)
            np.testing.assert_array_equal(
                getattr(factors, factor), ((ranked[low] + ranked[high]) / 2).astype(np.float32)
            )


def test_a_median_of_three_by_hand() -> None:
    """b1 = (0, 9), b2 = (1, 8), b3 = (100, -7); their median is (1, 8), their mean is not."""
    columns = [[[0.0], [9.0]], [[1.0], [8.0]], [[100.0], [-7.0]]]
    a = np.array([[2.0, 0.0, 1.0]], np.float32)
    adapters = [
        Adapter(layers={"l": LoraFactors(a=a, b=np.array(column, np.float32))}, alpha=1.0, base="base")
        for column in columns
    ]

    merged = median_factors(_uploads(adapters), _broadcast(adapters[0])).adapter

    np.testing.assert_array_equal(lora.delta(merged, "l"), [[2.0, 0.0, 1.0], [16.0, 0.0, 8.0]])


def test_the_median_of_the_factors_is_not_the_median_of_the_products() -> None:
    """By hand, in one dimension: factors (1, 6), (2, 5), (3, 1): products 6, 10, 3, median 6; medians 2 and 5: 10."""
    one = np.ones((1, 1), np.float32)
    adapters = [
        Adapter(layers={"l": LoraFactors(a=a * one, b=b * one)}, alpha=1.0, base="base")
        for a, b in ((1.0, 6.0), (2.0, 5.0), (3.0, 1.0))
    ]

    merged = median_factors(_uploads(adapters), _broadcast(adapters[0])).adapter

    np.testing.assert_array_equal(lora.delta(merged, "l"), [[10.0]])


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 8), size=st.sampled_from([0.01, 1.0, 1e4, 1e9]), seed=st.integers(0, 99), data=st.data())
def test_no_minority_moves_a_coordinate_out_of_the_honest_range(count: int, size: float, seed: int, data: Any) -> None:
    hostile = data.draw(st.integers(0, (count - 1) // 2))
    honest = _honest(count - hostile)
    drawn = [_adapter(1000 + seed + index, size=size) for index in range(hostile)]

    merged = _merge({"kind": "median_factors"}, [*drawn, *honest]).adapter

    for name, factors in merged.layers.items():
        for factor in ("a", "b"):
            there = np.array([getattr(one.layers[name], factor) for one in honest])
            assert (getattr(factors, factor) >= there.min(axis=0)).all()
            assert (getattr(factors, factor) <= there.max(axis=0)).all()


def test_a_half_does_move_it() -> None:
    """The twin: two of four are no minority, and neither is one of two."""
    merged = _merge({"kind": "median_factors"}, [*_honest(2), *[_adapter(1, size=1e4)] * 2]).adapter

    assert any(np.abs(factors.b).max() > 100 for factors in merged.layers.values())


# --- bounded_mean_product


def _bounded_oracle(adapters: Sequence[Adapter], start: Adapter, bound: float | str) -> np.ndarray:
    updates = [_dense(adapter) - _dense(start) for adapter in adapters]
    norms = [float(np.linalg.norm(update)) for update in updates]
    limit = sorted(norms)[(len(norms) - 1) // 2] if isinstance(bound, str) else bound
    cut = [update * min(1.0, limit / norm) if norm else update for update, norm in zip(updates, norms, strict=True)]
    return _dense(start) + np.mean(cut, axis=0)


@settings(max_examples=60, deadline=None)
@given(
    sites=st.lists(DRAWN, min_size=3, max_size=7),
    bound=st.one_of(st.just("median"), st.sampled_from([1e-3, 1.0, 30.0, 1e6])),
)
def test_the_bounded_mean_is_the_mean_of_the_cut_updates(
    sites: list[tuple[int, int, float]], bound: float | str
) -> None:
    """Ranks and scalings differ, and none is the broadcast's."""
    adapters = [_adapter(seed, rank=rank, alpha=alpha) for seed, rank, alpha in sites]

    merged = _merge({"kind": "bounded_mean_product", "bound": bound}, adapters).adapter

    scale = max(np.abs(_dense(adapter)).max() for adapter in [*adapters, START])
    np.testing.assert_allclose(_dense(merged), _bounded_oracle(adapters, START, bound), atol=1e-6 * (1 + scale))


def test_updates_within_the_bound_give_the_mean_of_the_products() -> None:
    adapters = _honest(5)

    merged = _merge({"kind": "bounded_mean_product", "bound": 1e6}, adapters).adapter

    assert lora.sha256(merged) == lora.sha256(MEAN_PRODUCT(_uploads(adapters), _broadcast()).adapter)


def test_sites_that_did_not_move_leave_the_broadcast() -> None:
    merged = _merge({"kind": "bounded_mean_product"}, [START, START, START, _adapter(1, size=50.0)]).adapter

    np.testing.assert_allclose(_dense(merged), _dense(START), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 7),
    bound=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_one_upload_moves_it_by_twice_the_bound_over_n(count: int, bound: float, seed: int, size: float) -> None:
    options = {"kind": "bounded_mean_product", "bound": bound}
    honest = _honest(count)
    attacked = [_adapter(seed, size=size), *honest[1:]]

    moved = _apart(_merge(options, honest).adapter, _merge(options, attacked).adapter)

    assert moved <= 2 * bound / count + ROUNDED * (1 + bound)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 8), seed=st.integers(0, 99), size=st.sampled_from([0.0, 0.5, 1.0, 1e3]))
def test_one_upload_moves_the_median_bound_no_further_than_stated(count: int, seed: int, size: float) -> None:
    options = {"kind": "bounded_mean_product"}
    honest = _honest(count, spread=0.4)
    attacked = [_adapter(seed, size=size), *honest[1:]]

    moved = _apart(_merge(options, honest).adapter, _merge(options, attacked).adapter)

    assert moved <= _median_bound(honest) + ROUNDED


def _median_bound(honest: Sequence[Adapter]) -> float:
    norms = [_apart(adapter, START) for adapter in honest]
    return (2 * max(norms) + (len(norms) - 1) * (max(norms) - min(norms))) / len(norms)


def test_an_update_of_honest_length_counts_in_full_whatever_its_direction() -> None:
    """What the module does not claim: turned around in products, it takes the mean back by exactly 2 N / n."""
    honest = [_adapter(3, near=START, size=0.5)] * 5
    back = lora.stacked([START, honest[0]], [2.0, -1.0])

    merged = _merge({"kind": "bounded_mean_product"}, [back, *honest[1:]]).adapter

    assert _apart(merged, honest[0]) == pytest.approx(2 * _apart(honest[0], START) / 5, rel=1e-4)


# --- krum_product


def _krum_oracle(adapters: Sequence[Adapter], hostile: int, keep: int) -> list[int]:
    vectors = np.array([_dense(adapter) for adapter in adapters])
    squared = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=-1)
    near = len(adapters) - hostile - 2
    scored = [np.sort(np.delete(row, index))[:near].sum() for index, row in enumerate(squared)]
    return sorted(np.argsort(scored, kind="stable")[:keep].tolist())


@settings(max_examples=60, deadline=None)
@given(count=st.integers(5, 9), seed=st.integers(0, 999), data=st.data())
def test_krum_picks_what_the_definition_picks(count: int, seed: int, data: Any) -> None:
    hostile = data.draw(st.integers(1, (count - 3) // 2))
    keep = data.draw(st.integers(1, count - hostile))
    adapters = [_adapter(seed + index, size=1 + index % 3) for index in range(count)]

    merged = _merge({"kind": "krum_product", "hostile": hostile, "keep": keep}, adapters)

    chosen = _krum_oracle(adapters, hostile, keep)
    assert merged.used == tuple(f"site-{index}" for index in chosen)
    expected = np.mean([_dense(adapters[index]) for index in chosen], axis=0)
    np.testing.assert_allclose(_dense(merged.adapter), expected, atol=1e-4)
    told = f"krum: not among the {keep} nearest to the others"
    assert merged.rejected == {f"site-{index}": told for index in range(count) if index not in chosen}


def test_krum_adds_squares_by_hand() -> None:
    """Five points, two neighbours each: (7, 3) has 10 + 16, (1, 8) has 1 + 29; unsquared the latter would win."""
    points = [(0, 8), (3, 3), (8, 6), (7, 3), (1, 8)]
    one = np.ones((1, 1), np.float32)
    adapters = [
        Adapter(layers={"l": LoraFactors(a=np.array([point], np.float32), b=one)}, alpha=1.0, base="base")
        for point in points
    ]

    merged = _merge({"kind": "krum_product"}, adapters, adapters[0])

    assert merged.used == ("site-3",)
    scored = scores({f"site-{index}": adapter for index, adapter in enumerate(adapters)}, hostile=1)
    assert {site: round(score, 6) for site, score in scored.items()} == {
        "site-0": 35,
        "site-1": 45,
        "site-2": 44,
        "site-3": 26,
        "site-4": 30,
    }


def test_krum_picks_a_whole_upload() -> None:
    adapters = _honest(5)

    merged = _merge({"kind": "krum_product"}, adapters)

    (site,) = merged.used
    assert lora.sha256(merged.adapter) == lora.sha256(adapters[int(site[-1])])


def test_krum_breaks_ties_by_the_name_of_the_site() -> None:
    assert _merge({"kind": "krum_product"}, [_adapter(1)] * 6).used == ("site-0",)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(5, 1, 1), (5, 1, 4), (7, 2, 1), (7, 2, 5), (9, 3, 2)]),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.0, 0.1, 0.3, 1.0, 100.0]),
    together=st.booleans(),
)
def test_what_krum_merges_is_within_the_stated_distance_of_every_honest_upload(
    shape: tuple[int, int, int], seed: int, size: float, *, together: bool
) -> None:
    """Hostile uploads near the honest ones, far away, alone or all the same."""
    count, hostile, keep = shape
    honest = _honest(count - hostile, spread=0.3)
    drawn = [_adapter(1000 + seed + (0 if together else k), near=honest[0], size=size) for k in range(hostile)]

    merged = _merge({"kind": "krum_product", "hostile": hostile, "keep": keep}, [*drawn, *honest]).adapter

    farthest = max(_apart(merged, adapter) for adapter in honest)
    assert farthest <= _krum_bound(honest, count, hostile) + ROUNDED


def _krum_bound(honest: Sequence[Adapter], count: int, hostile: int) -> float:
    widest = max(_apart(one, other) for one in honest for other in honest)
    return widest * (1 + math.sqrt((count - hostile - 2) / (count - 2 * hostile - 1)))


def test_a_site_that_sends_the_broadcast_back_looks_central() -> None:
    """What the module does not claim: where honest uploads are noise around the broadcast, the idle one wins."""
    honest = [_adapter(seed, near=START, size=0.5) for seed in range(4)]

    assert _merge({"kind": "krum_product"}, [*honest, START]).used == ("site-4",)


@pytest.mark.parametrize(
    ("hostile", "keep", "count", "told"),
    [
        (1, 1, 4, r"krum_product with hostile = 1 needs 2 \* hostile \+ 3 = 5"),
        (2, 1, 6, r"krum_product with hostile = 2 needs 2 \* hostile \+ 3 = 7"),
        (1, 5, 5, r"krum_product can keep sites - hostile = 4 at the most, not keep = 5"),
    ],
)
def test_too_few_for_krum_is_refused_before_the_run_and_at_the_round(
    hostile: int, keep: int, count: int, told: str
) -> None:
    section = KrumProduct(kind="krum_product", hostile=hostile, keep=keep)
    setting: Any = {"run": "run", "mode": "simulation", "seed": 0, "rounds": 1, "directory": Path("unused")}

    with pytest.raises(ConfigInvalid, match=rf"with server\.network\.sites = {count}, {told}"):
        section.build(Setting(sites=count, **setting))
    stage = section.build(Setting(sites=count + 1, **setting))
    with pytest.raises(RoundFailed, match=rf"round 1: with {count} sound uploads \(site-0, .*\), {told}.*kept"):
        stage(_uploads(_honest(count)), _broadcast())
    assert stage(_uploads(_honest(count + 1)), _broadcast()).used


# --- all of them


@EVERY
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", [0, 4])
def test_one_hostile_upload_of_five_moves_it_within_its_bound(options: dict[str, Any], attack: str, place: int) -> None:
    honest = _honest(5)
    attacked = [*honest]
    attacked[place] = ATTACKS[attack](honest[place], START)

    moved = _apart(_merge(options, honest).adapter, _merge(options, attacked).adapter)

    assert moved <= _stated_bound(options, honest) + ROUNDED


@EVERY
@pytest.mark.parametrize("attack", ["x100", "flipped x100", "anything"])
def test_the_plain_mean_goes_beyond_every_one_of_those_bounds(options: dict[str, Any], attack: str) -> None:
    """The twin: by a factor of ten or more."""
    honest = _honest(5)
    attacked = [ATTACKS[attack](honest[0], START), *honest[1:]]

    moved = _apart(
        MEAN_FACTORS(_uploads(honest), _broadcast()).adapter, MEAN_FACTORS(_uploads(attacked), _broadcast()).adapter
    )

    assert moved > 10 * _stated_bound(options, honest)


def _stated_bound(options: dict[str, Any], honest: Sequence[Adapter]) -> float:
    """Return how far apart the module lets the clean and the attacked result be, one upload of five being hostile."""
    if options["kind"] == "median_factors":
        return _box_bound(honest)
    if options["kind"] == "krum_product":
        return _krum_bound(honest, count=5, hostile=1)
    return 2 * options["bound"] / 5 if "bound" in options else _median_bound(honest)


def _box_bound(honest: Sequence[Adapter]) -> float:
    """Both have factors in the honest box: |b a - b' a'| <= width(b) max|a| + max|b| width(a), entry by entry."""
    squared = 0.0
    for name in SHAPES:
        a, b = (np.array([getattr(one.layers[name], part) for one in honest], np.float64) for part in ("a", "b"))
        entries = np.ptp(b, axis=0) @ np.abs(a).max(axis=0) + np.abs(b).max(axis=0) @ np.ptp(a, axis=0)
        squared += float(((4.0 / 2) ** 2 * entries**2).sum())
    return math.sqrt(squared)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "median_factors"}, "median_factors outvotes nobody with server.network.sites = 2.*mean_factors"),
        ({"kind": "bounded_mean_product"}, r'bound = "median" outvotes nobody with .*sites = 2.*write a number'),
    ],
)
def test_nothing_is_promised_for_two_sites(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigInvalid, match=told):
        _build(options, 2)
    with pytest.raises(RoundFailed, match=r"round 1: 2 sound uploads \(site-0, site-1\).*outvotes nobody.*kept"):
        _build(options, 3)(_uploads(_honest(2)), _broadcast())


def test_a_constant_bound_is_a_promise_for_any_number_of_sites() -> None:
    merged = _merge({"kind": "bounded_mean_product", "bound": 0.25}, [_adapter(1, size=100.0)]).adapter

    assert _apart(merged, START) == pytest.approx(0.25, abs=1e-3)


@EVERY
def test_two_uploads_of_one_site_are_refused(options: dict[str, Any]) -> None:
    uploads = _uploads(_honest(6))
    uploads[5] = dataclasses.replace(uploads[5], site="site-0")

    with pytest.raises(ValueError, match="a site sent two uploads"):
        _build(options, 6)(uploads, _broadcast())


@EVERY
@pytest.mark.parametrize("stretched", ["a", "b"])
def test_a_shape_that_numpy_would_stretch_is_refused(options: dict[str, Any], stretched: str) -> None:
    honest = _honest(5)
    short = honest[3].layers["blocks.0.v_proj"]
    cut = dataclasses.replace(short, **{stretched: short.a[:, :1] if stretched == "a" else short.b[:1]})
    honest[3] = dataclasses.replace(honest[3], layers={**honest[3].layers, "blocks.0.v_proj": cut})

    with pytest.raises(AdapterMismatch, match=r"site-3: blocks\.0\.v_proj is .*the broadcast one adapts \(7, 2\)"):
        _build(options, 5)(_uploads(honest), _broadcast())


@EVERY
def test_what_is_not_finite_is_refused(options: dict[str, Any]) -> None:
    honest = _honest(5)
    honest[2].layers["blocks.1.q_proj"].b[0, 0] = np.nan

    with pytest.raises(AdapterMismatch, match=r"site-2: blocks\.1\.q_proj holds NaN or infinity"):
        _build(options, 5)(_uploads(honest), _broadcast())


@EVERY
def test_uploads_for_another_broadcast_are_refused(options: dict[str, Any]) -> None:
    other = dataclasses.replace(START, base="other")

    with pytest.raises(AdapterMismatch, match=r"do not answer the broadcast adapter \(adapter 0\).*base"):
        _build(options, 5)(_uploads(_honest(5)), _broadcast(other))


@pytest.mark.parametrize(("rank", "alpha"), [(3, 4.0), (2, 8.0)])
def test_a_median_of_factors_refuses_mixed_ranks_and_scalings(rank: int, alpha: float) -> None:
    odd = _adapter(1, rank=rank, alpha=alpha)

    with pytest.raises(AdapterMismatch, match=rf"adapter 2 has alpha {alpha}, rank {rank}; adapter 0 has 4\.0, 2"):
        _merge({"kind": "median_factors"}, [*_honest(2), odd])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("bounded_mean_product', bound=0.0", "server.aggregator.bound = '0.0'"),
        ("bounded_mean_product', bound=inf", "server.aggregator.bound = 'inf'"),
        ("bounded_mean_product', bound='mean'", "server.aggregator.bound = 'mean'"),
        ("bounded_mean_product', bound=true", "server.aggregator.bound = 'True'"),
        ("bounded_mean_product', bound=nan", "server.aggregator.bound = 'nan'"),
        ("bounded_mean_product', bounds=1.0", "unknown key server.aggregator.bounds (did you mean 'bound'?)"),
        ("krum_product', hostile=0", "server.aggregator.hostile = '0'"),
        ("krum_product', keep=0", "server.aggregator.keep = '0'"),
        ("median_factor'", "median_factors"),
    ],
)
def test_what_is_no_setting_is_refused_by_name(keys: str, told: str) -> None:
    tree = read_tree("configs/smoke.toml", f"server.aggregator={{kind='{keys}}}")

    with pytest.raises(ConfigInvalid, match=re.escape(told)):
        read_server(tree)


@pytest.mark.parametrize("bound", ["'median'", "2", "0.5"])
def test_a_bound_is_a_word_or_a_number(bound: str) -> None:
    tree = read_tree("configs/smoke.toml", f"server.aggregator={{kind='bounded_mean_product', bound={bound}}}")

    assert getattr(read_server(tree).aggregator, "bound", None) == ast.literal_eval(bound)
