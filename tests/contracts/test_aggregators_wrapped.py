"""Aggregators that wrap another: what they may wrap, why not the rest, and that what is inside does its own work.

`central_dp` adds noise to a sum of factors, `krum_product` chooses uploads, `bounded_mean_product` cuts products. Every
kind of the union is either accepted by each of them, or refused with a reason of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from fl_app import lora
from fl_app.config import parse
from fl_app.errors import AdapterMismatch, ConfigInvalid, RoundFailed
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, Upload
from strategies import products
from strategies.aggregators import AnyAggregator, bounded_mean_product, central_dp, krum_product
from strategies.aggregators.bounded_mean_product import BoundedMeanProduct
from strategies.aggregators.central_dp import CentralDp, trained
from strategies.aggregators.krum_product import KrumProduct
from strategies.aggregators.median_factors import median_factors
from strategies.stages import Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Merged

SHAPES = {"blocks.0.q_proj": (12, 9), "blocks.0.v_proj": (7, 11)}
KINDS: tuple[str, ...] = tuple(
    get_args(member.model_fields["kind"].annotation)[0] for member in get_args(get_args(AnyAggregator)[0])
)
SUMS = ("mean_product", "stacked", "truncated_svd", "thresholded_svd", "sketched_svd")
FACTORS = ("mean_factors", "residual", "ridge", "zero_padded", "median_factors")
OPTIONS: dict[str, dict[str, Any]] = {"thresholded_svd": {"energy": 1.0}, "sketched_svd": {"oversample": 40}}
CLIP = 2.0


def _adapter(
    seed: int, *, rank: int = 3, near: Adapter | None = None, size: float = 1.0, core: bool = False
) -> Adapter:
    rng = np.random.default_rng(seed)
    layers: dict[str, LoraFactors] = {}
    for name, (d_in, d_out) in SHAPES.items():
        a, b = rng.normal(0, size, (rank, d_in)), rng.normal(0, size, (d_out, rank))
        middle = rng.normal(0, size, (rank, rank)).astype(np.float32) if core else None
        if near is not None:
            a, b = a + near.layers[name].a, b + near.layers[name].b
        layers[name] = LoraFactors(a=a.astype(np.float32), b=b.astype(np.float32), core=middle)
    return Adapter(layers=layers, alpha=6.0, base="base")


START = _adapter(99)


def _uploads(adapters: Sequence[Adapter]) -> list[Upload]:
    return [
        Upload(site=f"site-{index}", round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=math.inf)
        for index, adapter in enumerate(adapters)
    ]


def _broadcast(adapter: Adapter = START, *, number: int = 1) -> Broadcast:
    return Broadcast(run="run", round=number, adapter=adapter, config_digest="d" * 64)


def _setting(sites: int, directory: Path = Path("unused")) -> Setting:
    return Setting(run="run", mode="simulation", seed=3, rounds=3, sites=sites, directory=directory)


def _merge(tree: dict[str, Any], adapters: Sequence[Adapter], start: Adapter = START) -> Merged:
    section: Any = TypeAdapter(AnyAggregator).validate_python(tree)
    return section.build(_setting(len(adapters)))(_uploads(adapters), _broadcast(start))


def _inner(kind: str, **options: Any) -> dict[str, Any]:
    return {"kind": kind, **OPTIONS.get(kind, {}), **options}


def _dense(adapter: Adapter) -> np.ndarray:
    parts: list[np.ndarray] = []
    for _, one in sorted(adapter.layers.items()):
        core = np.eye(len(one.a)) if one.core is None else one.core.astype(float)
        parts.append((adapter.alpha / len(one.a) * one.b.astype(float) @ core @ one.a.astype(float)).ravel())
    return np.concatenate(parts)


def _honest(count: int) -> list[Adapter]:
    towards = _adapter(7, near=START, size=0.3)
    return [_adapter(seed, near=towards, size=0.2) for seed in range(count)]


# --- what may be wrapped


@pytest.mark.parametrize("kind", KINDS)
def test_central_dp_accepts_or_says_why_not(kind: str) -> None:
    tree = {"kind": "central_dp", "inner": _inner(kind), "clip_norm": 1.0, "noise_multiplier": 4.0, "epsilon": 4.0}
    if kind == "mean_factors":
        assert parse(CentralDp, {**tree, "delta": 1e-5}).inner.kind == kind
        return
    with pytest.raises(
        ConfigInvalid, match=re.escape(f"'{kind}' cannot be wrapped: {central_dp.REFUSED[kind]}; write")
    ):
        parse(CentralDp, {**tree, "delta": 1e-5})


@pytest.mark.parametrize("kind", KINDS)
def test_krum_accepts_or_says_why_not(kind: str) -> None:
    options = {"bounded_mean_product": {"bound": 1.0}}.get(kind, {})
    if kind not in krum_product.REFUSED:
        assert parse(KrumProduct, {"kind": "krum_product", "inner": _inner(kind, **options)}).inner.kind == kind
        return
    with pytest.raises(ConfigInvalid, match=re.escape(f"'{kind}' cannot be wrapped: {krum_product.REFUSED[kind]}")):
        parse(KrumProduct, {"kind": "krum_product", "inner": {"kind": kind}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_accepts_or_says_why_not(kind: str) -> None:
    if kind in SUMS:
        assert parse(BoundedMeanProduct, {"kind": "bounded_mean_product", "inner": _inner(kind)}).inner.kind == kind
        return
    told = f"'{kind}' cannot be wrapped: {bounded_mean_product.REFUSED[kind]}"
    with pytest.raises(ConfigInvalid, match=re.escape(told)):
        parse(BoundedMeanProduct, {"kind": "bounded_mean_product", "inner": {"kind": kind}})


@pytest.mark.parametrize("reasons", [central_dp.REFUSED, krum_product.REFUSED, bounded_mean_product.REFUSED])
def test_a_reason_is_given_for_kinds_that_exist(reasons: dict[str, str]) -> None:
    assert reasons.keys() <= set(KINDS)


@pytest.mark.parametrize("wrapper", ["krum_product", "bounded_mean_product"])
def test_a_misspelt_inner_is_told_the_right_ones(wrapper: str) -> None:
    section = KrumProduct if wrapper == "krum_product" else BoundedMeanProduct
    with pytest.raises(ConfigInvalid, match="truncated_svd"):
        parse(section, {"kind": wrapper, "inner": {"kind": "truncated"}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_says_whether_a_run_can_go_on_from_it(kind: str) -> None:
    tree = _inner(kind)
    if kind == "central_dp":
        tree |= {
            "inner": {"kind": "mean_factors"},
            "clip_norm": 1.0,
            "noise_multiplier": 4.0,
            "epsilon": 4.0,
            "delta": 1e-5,
        }
    section: Any = TypeAdapter(AnyAggregator).validate_python(tree)

    assert section.carries == (kind not in {"mean_product", "bounded_mean_product", "krum_product"})


@pytest.mark.parametrize("kind", SUMS)
def test_a_wrapper_carries_what_its_inner_carries(kind: str) -> None:
    for wrapper in ("krum_product", "bounded_mean_product"):
        section: Any = TypeAdapter(AnyAggregator).validate_python({"kind": wrapper, "inner": _inner(kind)})
        assert section.carries == (kind != "mean_product")


# --- krum: a choice of uploads, and then any sum


@pytest.mark.parametrize("kind", [*SUMS, *FACTORS])
def test_krum_is_its_inner_over_what_it_chose(kind: str) -> None:
    adapters = _honest(6)
    chosen = _merge({"kind": "krum_product", "keep": 3}, adapters).used
    there = [upload for upload in _uploads(adapters) if upload.site in chosen]
    section: Any = TypeAdapter(AnyAggregator).validate_python(_inner(kind))
    alone = section.build(_setting(3))(there, _broadcast())

    merged = _merge({"kind": "krum_product", "keep": 3, "inner": _inner(kind)}, adapters)

    assert merged.used == alone.used == chosen
    assert merged.rejected.keys() == {f"site-{index}" for index in range(6)} - set(chosen)
    assert lora.sha256(merged.adapter) == lora.sha256(alone.adapter)
    assert (merged.start is None) == (alone.start is None)
    assert [lora.sha256(block) for block in merged.blocks] == [lora.sha256(block) for block in alone.blocks]


def test_krum_weighs_what_it_chose() -> None:
    weights = {f"site-{index}": float(index + 1) for index in range(6)}
    inner = _inner("mean_product", weights=weights)

    merged = _merge({"kind": "krum_product", "keep": 2, "inner": inner}, _honest(6))

    total = sum(weights[site] for site in merged.used)
    expected = sum(weights[site] / total * _dense(_honest(6)[int(site[-1])]) for site in merged.used)
    np.testing.assert_allclose(_dense(merged.adapter), expected, atol=1e-5)


def test_krum_of_mixed_ranks_needs_an_inner_that_takes_them() -> None:
    adapters = [_adapter(seed, rank=rank, size=0.5) for seed, rank in enumerate([3, 2, 1, 3, 2])]

    assert _merge({"kind": "krum_product", "keep": 3, "inner": _inner("truncated_svd")}, adapters).used
    with pytest.raises(AdapterMismatch, match="factors of different ranks or scalings have no mean"):
        _merge({"kind": "krum_product", "keep": 3, "inner": _inner("mean_factors")}, adapters)


def test_krum_refuses_before_the_run_what_its_inner_refuses() -> None:
    with pytest.raises(ConfigInvalid, match=r"median_factors outvotes nobody with server\.network\.sites = 2"):
        _merge({"kind": "krum_product", "keep": 2, "inner": _inner("median_factors")}, _honest(6))


# --- a bound: cut products, added up


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("bound", [0.8, 1e6])
def test_a_bound_is_its_inner_s_sum_of_cut_products(kind: str, bound: float) -> None:
    """delta_W(broadcast) + sum_k p_k c_k update_k, dense, for weights and one upload a hundred times too long.

    Seven adapters of rank 3 fill up a map of 9 by 12, so the run has rank 9 here and nothing is cut off.
    """
    weights = {f"site-{index}": float(index + 1) for index in range(6)}
    start = _adapter(99, rank=9)
    adapters = [*[_adapter(seed, near=start, rank=9, size=0.05) for seed in range(5)], _adapter(5, rank=9, size=10.0)]
    tree = {"kind": "bounded_mean_product", "bound": bound, "inner": _inner(kind, weights=weights)}

    merged = _merge(tree, adapters, start=start)

    began = _dense(start)
    expected = began.copy()
    for index, adapter in enumerate(adapters):
        update = _dense(adapter) - began
        expected += (index + 1) / 21 * min(1.0, bound / float(np.linalg.norm(update))) * update
    assert np.linalg.norm(_dense(merged.adapter) - expected) < 2e-6 * np.linalg.norm(_dense(adapters[-1]))
    whole = sum((_dense(block) for block in merged.blocks), _dense(merged.start or merged.adapter))
    np.testing.assert_allclose(whole, _dense(merged.adapter), atol=1e-6 * float(np.abs(whole).max()))


def test_a_bound_of_cut_updates_needs_one_block_more_and_no_further() -> None:
    adapters = [*_honest(4), _adapter(5, size=10.0)]

    assert lora.rank_of(_merge({"kind": "bounded_mean_product"}, adapters).adapter) == 3 * 6
    assert lora.rank_of(_merge({"kind": "bounded_mean_product", "bound": 1e6}, adapters).adapter) == 3 * 5


def test_a_bound_refuses_what_its_inner_refuses() -> None:
    few = _inner("stacked", weights={"site-0": 1.0})
    with pytest.raises(ConfigInvalid, match="weights names 1 sites"):
        _merge({"kind": "bounded_mean_product", "bound": 1.0, "inner": few}, _honest(3))
    tree = {"kind": "bounded_mean_product", "bound": 1.0, "inner": _inner("truncated_svd")}
    with pytest.raises(AdapterMismatch, match="truncated_svd takes adapters without cores"):
        _merge(tree, [_adapter(1, core=True)] * 3, start=_adapter(2, core=True))


# --- cores under the robust ones


def _same_bases(count: int) -> list[Adapter]:
    """Return adapters whose cores alone differ, the last far from the others."""
    first = _adapter(0)
    found: list[Adapter] = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        size = 50.0 if seed == count - 1 else 0.1
        layers = {
            name: LoraFactors(a=one.a, b=one.b, core=(np.eye(3) + rng.normal(0, size, (3, 3))).astype(np.float32))
            for name, one in first.layers.items()
        }
        found.append(dataclasses.replace(first, layers=layers))
    return found


def test_a_distance_sees_the_cores() -> None:
    """Equal factors and other cores: without them every distance would be 0, and Krum would choose by name."""
    one, _, other = _same_bases(3)

    assert products.distance(one, other) == pytest.approx(float(np.linalg.norm(_dense(one) - _dense(other))), rel=1e-6)
    assert "site-4" not in _merge({"kind": "krum_product", "keep": 4}, _same_bases(5), start=one).used


def test_a_median_of_cores_is_of_every_coordinate() -> None:
    adapters = _same_bases(5)

    merged = median_factors(_uploads(adapters), _broadcast(adapters[0])).adapter

    for name, one in merged.layers.items():
        cores = np.stack([adapter.layers[name].core for adapter in adapters if adapter.layers[name].core is not None])
        np.testing.assert_array_equal(one.core, np.median(cores, axis=0))
        assert one.a.tobytes() == adapters[0].layers[name].a.tobytes()
    with pytest.raises(AdapterMismatch, match="cores between other factors"):
        median_factors(_uploads([_adapter(seed, core=True) for seed in range(3)]), _broadcast(_adapter(0, core=True)))


def test_a_core_of_another_shape_is_refused() -> None:
    adapters = _same_bases(5)
    layers = {
        name: dataclasses.replace(one, core=np.ones((1, 3), np.float32)) for name, one in adapters[0].layers.items()
    }
    odd = dataclasses.replace(adapters[0], layers=layers)

    with pytest.raises(AdapterMismatch, match=r"site-5: blocks\.0\.q_proj\.core is \(1, 3\), its rank 3"):
        _merge({"kind": "mean_factors"}, [*adapters, odd], start=adapters[0])


# --- central_dp: what is trained is clipped and noised, and nothing else


class Silent:
    """Noise that adds nothing."""

    simulated = True

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


TRAINS = [
    ("both", 1, ("a", "b")),
    ("a", 1, ("a",)),
    ("b", 1, ("b",)),
    ("rounds", 1, ("b",)),
    ("rounds", 2, ("a",)),
    ("core", 1, ("core",)),
]


def _private(directory: Path, trains: str, **changes: Any) -> Any:
    tree = {
        "kind": "central_dp",
        "inner": {"kind": "mean_factors"},
        "clip_norm": CLIP,
        "noise_multiplier": 4.0,
        "epsilon": 4.0,
        "delta": 1e-5,
        "trains": trains,
        **changes,
    }
    return parse(CentralDp, tree, where="server.aggregator").build(_setting(4, directory))


def _moved(start: Adapter, names: tuple[str, ...], size: float) -> Adapter:
    layers = {
        name: dataclasses.replace(one, **{factor: getattr(one, factor) + np.float32(size) for factor in names})
        for name, one in start.layers.items()
    }
    return dataclasses.replace(start, layers=layers)


def _flat(adapter: Adapter, names: tuple[str, ...]) -> np.ndarray:
    return np.concatenate(
        [getattr(adapter.layers[name], factor).ravel() for name in sorted(adapter.layers) for factor in names]
    ).astype(float)


@pytest.mark.parametrize(("trains", "number", "names"), TRAINS)
def test_what_is_trained_is_clipped_as_one_vector(tmp_path: Path, trains: str, number: int, names: Any) -> None:
    start = _adapter(99, core=trains == "core")
    stage = dataclasses.replace(_private(tmp_path, trains), noise=lambda _: Silent())

    near = stage(_uploads([_moved(start, names, 0.01)]), _broadcast(start, number=number)).adapter
    other = dataclasses.replace(_private(tmp_path / "2", trains), noise=lambda _: Silent())
    far = other(_uploads([_moved(start, names, 100.0)]), _broadcast(start, number=number)).adapter

    np.testing.assert_allclose(_flat(near, names) - _flat(start, names), 0.01 / 4, atol=1e-4)
    assert 4 * np.linalg.norm(_flat(far, names) - _flat(start, names)) == pytest.approx(CLIP, rel=1e-3)


@pytest.mark.parametrize(("trains", "number", "names"), TRAINS)
def test_what_is_not_trained_stays_to_the_bit(tmp_path: Path, trains: str, number: int, names: Any) -> None:
    start = _adapter(99, core=trains == "core")

    merged = _private(tmp_path, trains)(_uploads([_moved(start, names, 0.1)]), _broadcast(start, number=number)).adapter

    for name, began in start.layers.items():
        for tensor, values in lora.named_factors(name, began).items():
            found = lora.named_factors(name, merged.layers[name])[tensor]
            if tensor.rpartition(".")[2] in names:
                assert (found != values).all(), "noise on every coordinate"
            else:
                assert found.tobytes() == values.tobytes()
                assert found is not values


@pytest.mark.parametrize(("trains", "number", "names"), TRAINS[1:])
def test_who_moves_anything_else_counts_as_zero(tmp_path: Path, trains: str, number: int, names: Any) -> None:
    start = _adapter(99, core=trains == "core")
    stray = next(name for name in ("a", "b") if name not in names)
    told = rf"q_proj\.{stray} was changed, but server\.aggregator\.trains = '{trains}' moves {names[0]};"

    with pytest.raises(RoundFailed, match=told):
        _private(tmp_path, trains)(_uploads([_moved(start, (stray,), 0.1)]), _broadcast(start, number=number))
    assert list(tmp_path.iterdir()) == []


def test_a_core_that_nobody_trains_is_frozen(tmp_path: Path) -> None:
    start = _adapter(99, core=True)

    with pytest.raises(RoundFailed, match=r"q_proj\.core was changed, but server\.aggregator\.trains = 'both'"):
        _private(tmp_path, "both")(_uploads([_moved(start, ("core",), 0.1)]), _broadcast(start))


def test_cores_are_trained_where_there_are_any(tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatch, match="trains = 'core', and the broadcast adapter has no cores"):
        _private(tmp_path, "core")(_uploads([START]), _broadcast())


def test_rounds_take_turns_as_the_learner_does() -> None:
    assert [trained("rounds", number) for number in (1, 2, 3)] == [("b",), ("a",), ("b",)]


def test_weights_have_no_place_under_noise(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"inner\.weights cannot be wrapped: a site that counts more moves the sum"):
        _private(tmp_path, "both", inner={"kind": "mean_factors", "weights": {"site-0": 2.0}})
