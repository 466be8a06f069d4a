"""The federated sums against a dense float64 oracle, sum_k p_k s_k B_k [core] A_k, written from the definition alone.

Maps are not square, ranks mixed, shares and scalings unequal. Everything is asked once more after a trip through
Flower's records, and on two tiny models whose layers store their weights the one way (Linear) and the other (Conv1D).
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fl_app import lora, wire
from fl_app.config import LoraSection, parse
from fl_app.errors import AdapterMismatch, ConfigInvalid, RoundFailed
from fl_app.models import FrozenModel, ResolvedModel
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, Upload
from strategies.aggregators import AnyAggregator
from strategies.aggregators.stacked import Stacked
from strategies.stages import Setting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.lora import LoraSpec
    from fl_app.types import Merged

SHAPES = {"blocks.0.q_proj": (48, 64), "blocks.0.v_proj": (50, 44), "blocks.1.q_proj": (20, 30)}
"""Layer -> (d_in, d_out); none is square, and the last is narrower than the ranks together."""

MIXED = [16, 8, 8, 4, 4]
SITES = [f"site-{index}" for index in range(len(MIXED))]
WEIGHTS = dict(zip(SITES, [1.0, 2.0, 3.0, 0.5, 4.0], strict=True))
ALPHAS = [16.0, 4.0, 24.0, 2.0, 12.0]
"""Scalings of 1, 0.5, 3, 0.5 and 3."""

ROUNDED = 2e-6
"""What float32 factors may add to a distance, as a share of the sum's norm."""

OPTIONS: dict[str, dict[str, Any]] = {
    "mean_factors": {},
    "mean_product": {},
    "stacked": {},
    "residual": {},
    "truncated_svd": {},
    "thresholded_svd": {"energy": 1.0},
    "sketched_svd": {"oversample": 40},
    "ridge": {},
    "zero_padded": {},
}
ANY_RANK = ("mean_product", "stacked", "thresholded_svd")
"""Exact for whatever comes."""

ONE_RANK = (*ANY_RANK, "residual")
CUT = ("truncated_svd", "sketched_svd")
"""Exact up to the run's rank: the best adapter of that rank."""

EVERY = pytest.mark.parametrize("kind", OPTIONS)


def _adapter(
    seed: int, *, rank: int = 8, alpha: float = 12.0, shapes: Mapping[str, tuple[int, int]] = SHAPES, base: str = "base"
) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=rng.normal(size=(rank, d_in)).astype(np.float32), b=rng.normal(size=(d_out, rank)).astype(np.float32)
        )
        for name, (d_in, d_out) in shapes.items()
    }
    return Adapter(layers=layers, alpha=alpha, base=base)


def _mixed() -> list[Adapter]:
    return [
        _adapter(seed, rank=rank, alpha=alpha) for seed, (rank, alpha) in enumerate(zip(MIXED, ALPHAS, strict=True))
    ]


def _alike(count: int = 5) -> list[Adapter]:
    return [_adapter(seed) for seed in range(count)]


def _fitting(kind: str) -> list[Adapter]:
    """Return mixed ranks where the kind takes them."""
    return _alike() if kind in {"mean_factors", "residual", "ridge"} else _mixed()


def _uploads(adapters: Sequence[Adapter]) -> list[Upload]:
    return [
        Upload(site=site, round=3, release=AdapterRelease(adapter=adapter), receipts=None, spent=0.0)
        for site, adapter in zip(SITES, adapters, strict=False)
    ]


def _start(rank: int, alpha: float = 12.0) -> Broadcast:
    return Broadcast(run="run", round=3, adapter=_adapter(99, rank=rank, alpha=alpha), config_digest="d" * 64)


def _build(kind: str, *, sites: int = 1, init: Any = "uniform", **options: Any) -> Any:
    section: Any = TypeAdapter(AnyAggregator).validate_python({"kind": kind, **OPTIONS[kind], **options})
    directory = Path("unused")
    return section.build(
        Setting(run="run", mode="simulation", seed=7, rounds=5, sites=sites, directory=directory, init=init)
    )


def _merge(kind: str, adapters: Sequence[Adapter], *, broadcast: Broadcast | None = None, **options: Any) -> Merged:
    rank = max(map(lora.rank_of, adapters))
    options = {"weights": WEIGHTS, **options}
    return _build(kind, **options)(_uploads(adapters), broadcast or _start(rank))


def _oracle(adapters: Sequence[Adapter], layer: str, weights: Mapping[str, float] = WEIGHTS) -> np.ndarray:
    """Return sum_k p_k (alpha_k / r_k) B_k [core] A_k in float64."""
    total = sum(weights[site] for site, _ in zip(SITES, adapters, strict=False))
    found = 0.0
    for site, adapter in zip(SITES, adapters, strict=False):
        one = adapter.layers[layer]
        a, b = one.a.astype(np.float64), one.b.astype(np.float64)
        core = np.eye(len(a)) if one.core is None else one.core.astype(np.float64)
        scale = weights[site] / total * adapter.alpha / len(a)
        found = found + scale * np.einsum("or,rs,si->oi", b, core, a)
    return np.asarray(found)


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _whole(merged: Merged, layer: str) -> np.ndarray:
    """Return what the next round begins with: start and blocks, or the adapter itself."""
    return sum((lora.delta(block, layer) for block in merged.blocks), lora.delta(merged.start or merged.adapter, layer))


# --- the oracle


@pytest.mark.parametrize("kind", ANY_RANK)
def test_the_sum_of_mixed_ranks_shares_and_scalings_is_exact(kind: str) -> None:
    adapters = _mixed()

    merged = _merge(kind, adapters)

    for layer in SHAPES:
        assert _apart(lora.delta(merged.adapter, layer), _oracle(adapters, layer)) < ROUNDED
        equal = _oracle(adapters, layer, dict.fromkeys(SITES, 1.0))
        assert _apart(lora.delta(merged.adapter, layer), equal) > 0.1, "the shares are seen"


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*ANY_RANK, *CUT]),
    sites=st.lists(
        st.tuples(st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.5, 3.0, 16.0]), st.floats(0.01, 100.0)),
        min_size=1,
        max_size=5,
    ),
)
def test_any_ranks_scalings_and_weights_add_up(kind: str, sites: list[tuple[int, int, float, float]]) -> None:
    """Up to 20 directions together, in a run of rank 20."""
    adapters = [_adapter(seed, rank=rank, alpha=alpha) for seed, rank, alpha, _ in sites]
    weights = {site: weight for site, (*_, weight) in zip(SITES, sites, strict=False)}

    merged = _merge(kind, adapters, broadcast=_start(20), weights=weights)

    for layer in SHAPES:
        largest = max(float(np.linalg.norm(lora.delta(adapter, layer))) for adapter in adapters)
        missed = lora.delta(merged.adapter, layer) - _oracle(adapters, layer, weights)
        assert np.linalg.norm(missed) < ROUNDED * largest


@pytest.mark.parametrize("kind", ONE_RANK)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_sum_of_one_rank_is_exact(kind: str, count: int) -> None:
    adapters = _alike(count)

    merged = _merge(kind, adapters)

    for layer in SHAPES:
        assert _apart(_whole(merged, layer), _oracle(adapters, layer)) < ROUNDED


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("rank", [16, 40])
def test_a_cut_sum_is_the_best_of_its_rank(kind: str, rank: int) -> None:
    """The first values of a dense decomposition; at rank 40 the sum itself."""
    adapters = _mixed()

    merged = _merge(kind, adapters, broadcast=_start(rank))

    for layer in SHAPES:
        expected = _oracle(adapters, layer)
        u, s, v = np.linalg.svd(expected, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert _apart(lora.delta(merged.adapter, layer), best) < ROUNDED
        if rank == 40:
            assert _apart(lora.delta(merged.adapter, layer), expected) < ROUNDED


@pytest.mark.parametrize("common", ["a", "b", "a and b"])
def test_the_mean_of_factors_is_exact_where_one_is_common(common: str) -> None:
    """FFA-LoRA and RoLoRA, FedSA-LoRA, Fed-SB; the common factor comes out as it went in, bit for bit."""
    first = _adapter(50)
    adapters: list[Adapter] = []
    for seed, one in enumerate(_alike()):
        rng = np.random.default_rng(seed)
        layers = {
            name: LoraFactors(
                a=first.layers[name].a if "a" in common.split() else factors.a,
                b=first.layers[name].b if "b" in common.split() else factors.b,
                core=rng.normal(size=(8, 8)).astype(np.float32) if common == "a and b" else None,
            )
            for name, factors in one.layers.items()
        }
        adapters.append(dataclasses.replace(one, layers=layers))

    merged = _merge("mean_factors", adapters, broadcast=dataclasses.replace(_start(8), adapter=adapters[0]))

    for layer in SHAPES:
        assert _apart(lora.delta(merged.adapter, layer), _oracle(adapters, layer)) < ROUNDED
        for name in set(common.split()) & {"a", "b"}:
            assert getattr(merged.adapter.layers[layer], name).tobytes() == getattr(first.layers[layer], name).tobytes()
    assert lora.has_core(merged.adapter) == (common == "a and b")


@pytest.mark.parametrize("kind", ["mean_factors", "ridge", "zero_padded"])
def test_what_is_not_exact_is_seen_not_to_be(kind: str) -> None:
    adapters = _alike()

    merged = _merge(kind, adapters)

    for layer in SHAPES:
        assert _apart(lora.delta(merged.adapter, layer), _oracle(adapters, layer)) > 0.1


def _with_core(a: int, b: int) -> Adapter:
    """Return an adapter with cores whose factors a and b are drawn by these seeds."""
    left, right = _adapter(a), _adapter(b)
    layers = {
        name: LoraFactors(a=left.layers[name].a, b=right.layers[name].b, core=np.eye(8, dtype=np.float32))
        for name in SHAPES
    }
    return dataclasses.replace(left, layers=layers)


@pytest.mark.parametrize("odd", [(1, 2), (2, 1)], ids=["b", "a"])
def test_cores_between_other_factors_are_refused_by_the_layer(odd: tuple[int, int]) -> None:
    broadcast = dataclasses.replace(_start(8), adapter=_with_core(1, 1))

    with pytest.raises(AdapterMismatch, match=r"blocks\.0\.q_proj: adapters 0 and 1 have cores between other factors"):
        _merge("mean_factors", [_with_core(1, 1), _with_core(*odd)], broadcast=broadcast)


@pytest.mark.parametrize("kind", ["residual", "truncated_svd", "sketched_svd", "ridge", "zero_padded"])
def test_cores_are_refused_where_they_are_not_needed(kind: str) -> None:
    with pytest.raises(AdapterMismatch, match=f"{kind} takes adapters without cores: .*; use mean_factors"):
        _merge(kind, [_with_core(1, 1)] * 2, broadcast=dataclasses.replace(_start(8), adapter=_with_core(1, 1)))


@pytest.mark.parametrize("kind", ANY_RANK)
def test_cores_are_folded_into_a_stack(kind: str) -> None:
    adapters = [_with_core(seed, seed + 1) for seed in range(3)]

    merged = _merge(kind, adapters, broadcast=dataclasses.replace(_start(8), adapter=_with_core(1, 1)))

    for layer in SHAPES:
        assert _apart(_whole(merged, layer), _oracle(adapters, layer)) < ROUNDED
    assert merged.start is None or lora.has_core(merged.start)


# --- what a next round begins with


@EVERY
def test_start_and_blocks_are_the_adapter(kind: str) -> None:
    merged = _merge(kind, _fitting(kind))

    for layer in SHAPES:
        assert _apart(_whole(merged, layer), lora.delta(merged.adapter, layer)) < ROUNDED


@EVERY
def test_the_start_is_of_the_run_s_spec(kind: str) -> None:
    """Rank, alpha and layers, exactly, where the section says that it carries; 0.1 / 11 * 11 is not 0.1 in float64."""
    adapters = [_adapter(seed, rank=11, alpha=0.1) for seed in range(3)]
    broadcast = _start(11, alpha=0.1)

    merged = _merge(kind, adapters, broadcast=broadcast)
    section: Any = TypeAdapter(AnyAggregator).validate_python({"kind": kind, **OPTIONS[kind]})

    fault = lora.difference(merged.start or merged.adapter, lora.spec_like(broadcast.adapter))
    assert (fault is None) == section.carries, fault


DOWN = {"stacked": 8 + 5 * 8, "residual": 8 + 4 * 8, "thresholded_svd": 8 + 5 * 8, "mean_product": 5 * 8}
"""Ranks that travel down of five sites of rank 8, start and blocks together; 8 for every other kind."""


@EVERY
def test_what_goes_down_is_its_closed_form(kind: str) -> None:
    """4 bytes x rank x (d_in + d_out) a layer: K r for a stack, (K - 1) r for a residual, and r for what is trained."""
    merged = _merge(kind, _alike())

    down = lora.num_bytes(merged.start or merged.adapter) + sum(map(lora.num_bytes, merged.blocks))

    assert down == 4 * DOWN.get(kind, 8) * sum(d_in + d_out for d_in, d_out in SHAPES.values())


@pytest.mark.parametrize("kind", ["stacked", "thresholded_svd"])
def test_a_fresh_start_changes_nothing_and_is_the_round_s_own(kind: str) -> None:
    adapters, broadcast = _mixed(), _start(16)

    first = _merge(kind, adapters, broadcast=broadcast).start
    again = _merge(kind, adapters, broadcast=broadcast).start
    later = _merge(kind, adapters, broadcast=dataclasses.replace(broadcast, round=4)).start
    other = _merge(kind, adapters, broadcast=broadcast, init="orthonormal").start

    assert first is not None
    assert again is not None
    assert later is not None
    assert other is not None
    assert lora.sha256(first) == lora.sha256(again)
    assert lora.sha256(first) != lora.sha256(later)
    for layer in SHAPES:
        assert not first.layers[layer].b.any()
        a = other.layers[layer].a
        np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-6)


@pytest.mark.parametrize("kind", ["stacked", "thresholded_svd"])
def test_a_start_from_the_base_model_cannot_be_drawn_here(kind: str) -> None:
    with pytest.raises(
        ConfigInvalid, match=f'{kind} begins every round with a fresh adapter, and lora.init = "weights"'
    ):
        _build(kind, init="weights")


@EVERY
def test_one_upload_comes_out_as_it_is(kind: str) -> None:
    merged = _merge(kind, [_adapter(3)])

    for layer in SHAPES:
        assert _apart(_whole(merged, layer), lora.delta(_adapter(3), layer)) < ROUNDED
    if kind == "residual":
        assert merged.blocks == ()


@EVERY
def test_equal_uploads_come_out_as_they_are(kind: str) -> None:
    merged = _merge(kind, [_adapter(3)] * 4)

    for layer in SHAPES:
        assert _apart(_whole(merged, layer), lora.delta(_adapter(3), layer)) < ROUNDED
    if kind == "mean_factors":
        assert lora.sha256(merged.adapter) == lora.sha256(_adapter(3))


# --- shares


@EVERY
def test_only_the_proportion_of_weights_counts(kind: str) -> None:
    once = _merge(kind, _fitting(kind)).adapter
    four = _merge(kind, _fitting(kind), weights={site: 4 * weight for site, weight in WEIGHTS.items()}).adapter
    thrice = _merge(kind, _fitting(kind), weights={site: 3.3 * weight for site, weight in WEIGHTS.items()}).adapter

    assert lora.sha256(once) == lora.sha256(four)
    for layer in SHAPES:
        assert _apart(lora.delta(thrice, layer), lora.delta(once, layer)) < ROUNDED


@EVERY
def test_the_order_of_weighed_uploads_does_not_matter(kind: str) -> None:
    uploads, broadcast = (
        _uploads(_fitting(kind)),
        _start(16 if kind not in {"mean_factors", "residual", "ridge"} else 8),
    )
    before = [lora.sha256(upload.release.adapter) for upload in uploads if isinstance(upload.release, AdapterRelease)]

    one = _build(kind, weights=WEIGHTS)(uploads, broadcast)
    other = _build(kind, weights=WEIGHTS)(uploads[::-1], broadcast)

    assert [
        lora.sha256(upload.release.adapter) for upload in uploads if isinstance(upload.release, AdapterRelease)
    ] == (before)
    found = [(one.adapter, other.adapter), (one.start or one.adapter, other.start or other.adapter)]
    found += list(zip(one.blocks, other.blocks, strict=True))
    assert all(lora.sha256(left) == lora.sha256(right) for left, right in found)


@EVERY
def test_shares_are_over_the_sites_that_are_there(kind: str) -> None:
    """With a silent site the others count as in a run of their own: what a stack without its rows is."""
    uploads, broadcast = (
        _uploads(_fitting(kind)),
        _start(16 if kind not in {"mean_factors", "residual", "ridge"} else 8),
    )
    fewer = {site: weight for site, weight in WEIGHTS.items() if site != "site-1"}
    there = [upload for upload in uploads if upload.site != "site-1"]

    some = _build(kind, weights=WEIGHTS)(there, broadcast).adapter
    alone = _build(kind, weights=fewer)(there, broadcast).adapter

    assert lora.sha256(some) == lora.sha256(alone)


@EVERY
def test_a_site_without_a_weight_is_named(kind: str) -> None:
    few = {"site-0": 1.0, "site-2": 1.0}

    with pytest.raises(RoundFailed, match=r"round 3: site-1 sent an adapter and has no weight .*known: site-0, site-2"):
        _merge(kind, _alike(3), weights=few)
    with pytest.raises(
        ConfigInvalid, match=r"weights names 2 sites \(site-0, site-2\), and server\.network\.sites = 3"
    ):
        _build(kind, weights=few, sites=3)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_positive_number(weight: float) -> None:
    with pytest.raises(ConfigInvalid, match=r"weights"):
        parse(Stacked, {"kind": "stacked", "weights": {"site-0": weight}}, where="server.aggregator")


# --- ranks


@pytest.mark.parametrize("kind", ["mean_factors", "residual", "ridge"])
def test_mixed_ranks_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(
        AdapterMismatch, match=rf"rank 8.*\({kind} .* factors of different ranks or scalings have no mean\)"
    ):
        _merge(kind, _mixed())


def test_a_rank_beyond_the_run_s_is_refused() -> None:
    with pytest.raises(AdapterMismatch, match=r"zero_padded fills up to lora\.rank = 8, and an upload has rank 16"):
        _merge("zero_padded", _mixed(), broadcast=_start(8))
    with pytest.raises(AdapterMismatch, match=r"server\.aggregator\.rank = 9 is above lora\.rank = 8"):
        _merge("truncated_svd", _alike(), rank=9)


# --- through Flower, and on models


@EVERY
def test_a_trip_through_flower_changes_no_bit(kind: str) -> None:
    """Each upload read against the spec of its own rank."""
    uploads = _uploads(_fitting(kind))
    broadcast = _start(16 if kind not in {"mean_factors", "residual", "ridge"} else 8)
    travelled: list[Any] = []
    for upload in uploads:
        assert isinstance(upload.release, AdapterRelease)
        sent = recorddict_from_proto(recorddict_to_proto(wire.pack_reply(upload)))
        travelled.append(wire.unpack_reply(sent, lora.spec_like(upload.release.adapter)))

    here = _build(kind, weights=WEIGHTS)(uploads, broadcast)
    there = _build(kind, weights=WEIGHTS)(travelled, broadcast)

    assert lora.sha256(here.adapter) == lora.sha256(there.adapter)
    assert [lora.sha256(block) for block in here.blocks] == [lora.sha256(block) for block in there.blocks]


@pytest.fixture(scope="module")
def gpt2() -> FrozenModel:
    import torch
    import transformers as hf

    config = hf.GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=64)
    config._attn_implementation = "eager"
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.copy_(torch.from_numpy(rng.normal(0, 0.3, tuple(weight.shape)) + (weight.ndim == 1)))
    resolved = ResolvedModel(name="gpt2", path=Path("nowhere"), sha256="gpt2")
    return FrozenModel(resolved=resolved, tokenizer=object(), model=model.eval().requires_grad_(False))


def _logits(model: Any, dtype: Any) -> np.ndarray:
    import torch

    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, (2, 12)))
    with torch.no_grad():
        return model.to(dtype)(input_ids=ids).logits.double().numpy()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ONE_RANK)
def test_a_model_that_goes_on_is_the_base_and_the_oracle(family: str, kind: str, request: Any) -> None:
    """Start and blocks by PEFT in float32 against base weights with the dense sum added, in float64."""
    import torch

    frozen: FrozenModel = request.getfixturevalue("frozen" if family == "llama" else "gpt2")
    targets = ("q_proj", "v_proj", "down_proj") if family == "llama" else ("c_attn", "c_fc", "c_proj")
    spec: LoraSpec = lora.spec_of(frozen, LoraSection(rank=4, alpha=2.0, targets=targets))
    adapters = [_adapter(seed, rank=4, alpha=2.0, shapes=spec.shapes, base=spec.base) for seed in range(3)]
    broadcast = dataclasses.replace(_start(4), adapter=adapters[0])

    merged = _merge(kind, adapters, broadcast=broadcast)

    carried = lora.attach(frozen, merged.start or merged.adapter, merged.blocks)
    dense: Any = copy.deepcopy(frozen.model).double()
    before = _logits(dense, torch.float64)
    for layer in spec.shapes:
        module: Any = dense.get_submodule(layer)
        added = torch.from_numpy(_oracle(adapters, layer))
        module.weight += added.T if type(module).__name__ == "Conv1D" else added
    expected = _logits(dense, torch.float64)
    assert _apart(before, expected) > 0.1, "the sum moves the model"
    assert _apart(_logits(carried, torch.float32), expected) < 1e-4
