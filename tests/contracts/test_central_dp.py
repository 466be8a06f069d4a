"""central_dp: what one site can change is bounded, noised at the scale that is charged, and charged before it is drawn.

A statistical test has a twin that is off by 3 % and must be seen. Adapters are small, except where noise is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fl_app import lora
from fl_app.config import parse
from fl_app.errors import AdapterMismatch, ConfigInvalid, LedgerCorrupt, RoundFailed
from fl_app.privacy import gaussian
from fl_app.privacy.chain import Committed, Reserved
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.types import Adapter, AdapterRelease, Broadcast, DpReceipt, Gaussian, LoraFactors, Upload
from strategies.aggregators.central_dp import CentralDp, PrivateMean, clipped_sum
from strategies.aggregators.mean_factors import MeanFactors
from strategies.config import ServerSection
from strategies.stages import Setting

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fl_app.types import Merged

SHAPES = {"blocks.0.q_proj": (5, 3), "blocks.0.v_proj": (2, 7), "blocks.1.q_proj": (1, 4)}
WIDE = {"blocks.0.q_proj": (25_000, 25_000)}
"""400 000 coordinates at rank 8: their standard deviation is known to 0.11 %."""

SITES = 5
CLIP = 2.0


class Silent:
    """Noise that adds nothing, and counts how often it was asked."""

    simulated = True

    def __init__(self) -> None:
        self.asked = 0

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        self.asked += 1
        return np.zeros(shape)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        raise AssertionError((count, rate))


def _adapter(seed: int, *, size: float = 1.0, shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = 2) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=(size * rng.normal(size=(rank, d_in))).astype(np.float32),
            b=(size * rng.normal(size=(d_out, rank))).astype(np.float32),
        )
        for name, (d_in, d_out) in shapes.items()
    }
    return Adapter(layers=layers, alpha=4.0, base="base")


START = _adapter(99)


def _broadcast(adapter: Adapter = START, *, number: int = 1, run: str = "run") -> Broadcast:
    return Broadcast(run=run, round=number, adapter=adapter, config_digest="d" * 64)


def _uploads(*adapters: Adapter, first: int = 0) -> list[Upload]:
    return [
        Upload(site=f"site-{index}", round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=math.inf)
        for index, adapter in enumerate(adapters, start=first)
    ]


def _section(**changes: Any) -> CentralDp:
    tree = {
        "kind": "central_dp",
        "inner": {"kind": "mean_factors"},
        "clip_norm": CLIP,
        "noise_multiplier": 4.0,
        "epsilon": 4.0,
        "delta": 1e-5,
        **changes,
    }
    return parse(CentralDp, tree, where="server.aggregator")


def _setting(directory: Path, **changes: Any) -> Setting:
    plain = Setting(run="run", mode="simulation", seed=0, rounds=3, sites=SITES, directory=directory)
    return dataclasses.replace(plain, **changes)


def _stage(directory: Path, *, setting: dict[str, Any] | None = None, **changes: Any) -> PrivateMean:
    stage = _section(**changes).build(_setting(directory, **(setting or {})))
    assert isinstance(stage, PrivateMean)
    return stage


def _silent(directory: Path, **changes: Any) -> PrivateMean:
    return dataclasses.replace(_stage(directory, **changes), noise=lambda _: Silent())


def _flat(adapter: Adapter) -> np.ndarray:
    """Return all factors as one float64 vector."""
    return np.concatenate([part.ravel() for name in sorted(adapter.layers) for part in _factors(adapter, name)]).astype(
        np.float64
    )


def _factors(adapter: Adapter, name: str) -> tuple[np.ndarray, np.ndarray]:
    return adapter.layers[name].a, adapter.layers[name].b


def _step(merged: Merged, start: Adapter = START) -> np.ndarray:
    """Return the sum behind a merged adapter: how far it moved, times the public divisor."""
    return SITES * (_flat(merged.adapter) - _flat(start))


def _update(seed: int, size: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [size * rng.normal(size=part.shape) for name in sorted(SHAPES) for part in _factors(START, name)]


LIKE = [part for name in sorted(SHAPES) for part in _factors(START, name)]


# --- what one site can change

SIZES = st.sampled_from([0.0, 1e-38, 1e-3, 0.1, 1.0, 1e4, 1e38, math.inf, math.nan])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=6),
    seed=st.integers(0, 999),
    clip_norm=st.sampled_from([1e-6, 0.1, 1.0, 3.0]),
)
def test_one_site_moves_the_sum_by_at_most_the_clip_norm(sizes: list[float], seed: int, clip_norm: float) -> None:
    """Taken out, or put there with anything at all; exactly by its own update, in any order of the others."""
    updates = [_update(seed + index, size) for index, size in enumerate(sizes)]

    whole = clipped_sum(updates, like=LIKE, clip_norm=clip_norm)

    for left_out in range(len(updates)):
        others = updates[:left_out] + updates[left_out + 1 :]
        rest = clipped_sum(reversed(others), like=LIKE, clip_norm=clip_norm)
        alone = clipped_sum([updates[left_out]], like=LIKE, clip_norm=clip_norm)
        moved = [one - other for one, other in zip(whole, rest, strict=True)]
        assert all(np.array_equal(one, other) for one, other in zip(moved, alone, strict=True))
        assert _norm(moved) <= gaussian.usable_clip(clip_norm) * (1 + 2**-50) < clip_norm


def _norm(parts: Sequence[np.ndarray]) -> float:
    return math.sqrt(math.fsum(float(value) ** 2 for part in parts for value in part.ravel()))


def test_clipping_every_tensor_for_itself_would_be_seen() -> None:
    """The twin: six tensors, each at the clip norm, are sqrt(6) clip norms together."""
    update = _update(1, 1e4)
    each = [clipped_sum([[part]], like=[part], clip_norm=CLIP)[0] for part in update]

    assert _norm(each) == pytest.approx(math.sqrt(len(update)) * CLIP, rel=1e-3)
    assert _norm(clipped_sum([update], like=LIKE, clip_norm=CLIP)) == pytest.approx(CLIP, rel=1e-3)


def test_a_plain_float_sum_would_depend_on_its_order() -> None:
    """The twin of `exactly`: without the cut, the order of the same updates is seen in the last bits."""
    updates = [_update(seed, 1.0) for seed in range(6)]
    sums = {sum(update[0][0, 0] for update in order) for order in itertools.permutations(updates)}

    assert len(sums) > 1
    assert (
        len({clipped_sum(order, like=LIKE, clip_norm=9.0)[0][0, 0] for order in itertools.permutations(updates)}) == 1
    )


@pytest.mark.parametrize("size", [0.0, 1.0, 1e30])
def test_the_lattice_keeps_the_bound(tmp_path: Path, size: float) -> None:
    """After rounding, on what is released: with the fifth site and without it, whatever it sends."""
    adapters = [_adapter(seed) for seed in range(4)]
    hostile = _adapter(4, size=size)

    without = _silent(tmp_path / "4")(_uploads(*adapters), _broadcast())
    there = _silent(tmp_path / "5")(_uploads(*adapters, hostile), _broadcast())

    moved = float(np.linalg.norm(_step(there) - _step(without)))
    assert 0.9 * CLIP < moved <= CLIP * (1 + 1e-4)  # float32 adapters round what the lattice held


def test_an_update_within_the_clip_is_not_shortened() -> None:
    update = _update(1, 0.01)

    for kept, part in zip(clipped_sum([update], like=LIKE, clip_norm=CLIP), update, strict=True):
        np.testing.assert_allclose(kept, part, atol=CLIP * 2**-24)


def test_without_noise_and_clip_it_is_the_mean_it_wraps(tmp_path: Path) -> None:
    uploads = _uploads(*(_adapter(seed) for seed in range(SITES)))

    merged = _silent(tmp_path, clip_norm=64.0)(uploads, _broadcast())

    mean = MeanFactors(kind="mean_factors").build(_setting(tmp_path))
    np.testing.assert_allclose(_flat(merged.adapter), _flat(mean(uploads, _broadcast()).adapter), atol=1e-4)


# --- the divisor is public


@pytest.mark.parametrize("came", [1, 2, 5])
def test_the_divisor_is_the_size_of_the_cohort_however_many_came(tmp_path: Path, came: int) -> None:
    """By hand: `came` sites each move one coordinate by 1, so it moves by came / 5."""
    b = np.array(START.layers["blocks.1.q_proj"].b)
    b[0, 0] += 1.0
    layers = {**START.layers, "blocks.1.q_proj": LoraFactors(a=START.layers["blocks.1.q_proj"].a, b=b)}
    moved = dataclasses.replace(START, layers=layers)

    merged = _silent(tmp_path)(_uploads(*[moved] * came), _broadcast())

    difference = _flat(merged.adapter) - _flat(START)
    assert difference.max() == pytest.approx(came / SITES, abs=1e-4)
    assert np.count_nonzero(difference) == 1


def test_a_site_that_is_missing_counts_as_one_that_did_not_move(tmp_path: Path) -> None:
    adapters = [_adapter(seed) for seed in (1, 2)]

    missing = _silent(tmp_path / "2")(_uploads(*adapters), _broadcast())
    still = _silent(tmp_path / "5")(_uploads(*adapters, START, START, START), _broadcast())

    assert lora.sha256(missing.adapter) == lora.sha256(still.adapter)
    assert (missing.used, still.used) == (("site-0", "site-1"), tuple(f"site-{n}" for n in range(5)))


def test_only_zero_updates_leave_the_adapter_where_it_was(tmp_path: Path) -> None:
    merged = _silent(tmp_path)(_uploads(START, START), _broadcast())

    assert lora.sha256(merged.adapter) == lora.sha256(START)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_no_number_counts_as_zero_and_is_named(tmp_path: Path, value: float) -> None:
    broken = _adapter(3)
    broken.layers["blocks.0.v_proj"].b[0, 0] = value
    sound = [_adapter(1), _adapter(2)]

    merged = _silent(tmp_path / "3")(_uploads(*sound, broken), _broadcast())

    assert lora.sha256(merged.adapter) == lora.sha256(_silent(tmp_path / "2")(_uploads(*sound), _broadcast()).adapter)
    assert merged.used == ("site-0", "site-1")
    assert merged.rejected == {"site-2": "finite: blocks.0.v_proj.b holds NaN or infinity"}


# --- the noise


def _measured(stage: PrivateMean, adapter: Adapter) -> float:
    """Return the standard deviation of what was added to the sum of no movement, in clip norms."""
    merged = stage(
        [Upload(site="a", round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=0.0)],
        _broadcast(adapter),
    )
    return float(np.std(SITES * (_flat(merged.adapter) - _flat(adapter))) / CLIP)


@pytest.mark.parametrize("mode", ["simulation", "production"])
def test_the_noise_has_the_scale_that_is_charged(tmp_path: Path, mode: str) -> None:
    start = _adapter(0, size=0.01, shapes=WIDE, rank=8)
    stage = _stage(tmp_path, setting={"mode": mode})
    (charged,) = [stage.section.event()]

    assert _measured(stage, start) == pytest.approx(charged.noise_multiplier, rel=0.01)


@pytest.mark.parametrize("off", [0.97, 1.03])
def test_noise_that_is_off_by_three_per_cent_would_be_seen(tmp_path: Path, off: float) -> None:
    class Off(SecureNoise):
        def normal(self, shape: tuple[int, ...]) -> np.ndarray:
            return off * super().normal(shape)

    start = _adapter(0, size=0.01, shapes=WIDE, rank=8)
    stage = dataclasses.replace(_stage(tmp_path), noise=lambda _: Off())

    assert _measured(stage, start) != pytest.approx(4.0, rel=0.01)


def test_every_coordinate_and_every_round_has_noise_of_its_own(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    one, two = (_step(stage(_uploads(START), _broadcast(number=number))) for number in (1, 2))

    assert np.count_nonzero(one) == one.size == np.unique(one).size
    assert not set(one) & set(two)


def test_simulated_noise_is_the_seeds_and_production_noise_nobodys(tmp_path: Path) -> None:
    def merged(name: str, **setting: Any) -> str:
        stage = _stage(tmp_path / name, setting=setting)
        return lora.sha256(stage(_uploads(_adapter(1)), _broadcast()).adapter)

    assert merged("a") == merged("b", run="another name") != merged("c", seed=1)
    assert merged("d", mode="production") != merged("e", mode="production")
    assert isinstance(_stage(tmp_path / "f").noise(1), SimulatedNoise)
    assert isinstance(_stage(tmp_path / "g", setting={"mode": "production"}).noise(1), SecureNoise)


# --- the budget


def _ledger(directory: Path) -> Ledger:
    path = directory / "client_level" / "ledger.jsonl"
    return Ledger.open(path, dataset="the sites of run run+simulation", unit="site")


def _analytic(noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of one Gaussian from its closed form (Balle & Wang 2018, theorem 8)."""

    def gap(epsilon: float) -> float:
        half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        return float(norm.cdf(half - shift) - math.exp(epsilon) * norm.cdf(-half - shift)) - delta

    return float(brentq(gap, 1e-6, 50.0, xtol=1e-9))


def test_every_round_is_one_gaussian_in_the_ledger(tmp_path: Path) -> None:
    stage = _stage(tmp_path)
    costs, hashes = [], []
    for number in (1, 2, 3):
        merged = stage(_uploads(_adapter(1)), _broadcast(number=number))
        costs.append(merged.cost)
        hashes.append(lora.sha256(merged.adapter))

    receipt = DpReceipt(event=Gaussian(noise_multiplier=4.0, clip_norm=CLIP), unit="site")
    entries = _ledger(tmp_path).entries()
    assert [(e.round, e.receipts) for e in entries if isinstance(e, Reserved)] == [(n, (receipt,)) for n in (1, 2, 3)]
    assert [e.sha256 for e in entries if isinstance(e, Committed)] == hashes
    for count, cost in enumerate(costs, start=1):
        assert cost is not None
        assert (cost.receipt, cost.budget, cost.delta, cost.scope) == (receipt, 4.0, 1e-5, "this run")
        exact = _analytic(4.0 / math.sqrt(count), 1e-5)
        assert exact <= cost.spent <= exact + 2e-3


def test_a_spent_budget_refuses_before_any_noise_is_drawn(tmp_path: Path) -> None:
    noise = Silent()
    stage = dataclasses.replace(_stage(tmp_path), noise=lambda _: noise)
    for number in (1, 2, 3):
        stage(_uploads(_adapter(1)), _broadcast(number=number))
    spent, asked = _ledger(tmp_path).spent(1e-5), noise.asked
    exhausted = dataclasses.replace(stage, section=_section(epsilon=spent))
    before = _ledger(tmp_path).entries()

    told = (
        rf"round 4: the client-level budget is spent: epsilon {spent:.4g} of {spent:g} at delta 1e-05 \(unit site, PLD"
    )
    with pytest.raises(RoundFailed, match=told):
        exhausted(_uploads(_adapter(1)), _broadcast(number=4))

    assert noise.asked == asked == 3 * len(LIKE)
    assert _ledger(tmp_path).entries() == before


def test_the_ledger_is_written_before_the_noise_is_drawn(tmp_path: Path) -> None:
    class Interrupted(Silent):
        def normal(self, shape: tuple[int, ...]) -> np.ndarray:
            raise KeyboardInterrupt

    stage = dataclasses.replace(_stage(tmp_path), noise=lambda _: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        stage(_uploads(_adapter(1)), _broadcast())

    assert len(_ledger(tmp_path).receipts()) == 1
    assert _ledger(tmp_path).committed("run", 1) is None


def test_rounds_that_do_not_fit_are_refused_before_any_site_is_asked(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigInvalid, match=r"20 rounds at noise_multiplier = 4 would make epsilon 4\.98\d* of epsilon = 4 "
    ):
        _stage(tmp_path, setting={"rounds": 20})
    assert list(tmp_path.iterdir()) == []


def test_a_delta_that_would_allow_publishing_a_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"delta = 0\.25 is not below 1 / sites = 0\.2"):
        _stage(tmp_path, delta=0.25)


def test_a_ledger_of_a_cohort_counts_over_its_runs(tmp_path: Path) -> None:
    kept = {"ledger": str(tmp_path / "kept" / "clinics.jsonl"), "cohort": "clinics", "epsilon": 2.0}
    first = _stage(tmp_path / "1", **kept)
    for number in (1, 2, 3):
        one = first(_uploads(_adapter(1)), _broadcast(number=number))
    second = _stage(tmp_path / "2", setting={"run": "second", "rounds": 1}, **kept)
    two = second(_uploads(_adapter(1)), _broadcast(run="second"))

    assert one.cost is not None
    assert two.cost is not None
    assert two.cost.scope == "all runs in the ledger of cohort clinics"
    assert one.cost.spent < two.cost.spent == pytest.approx(_analytic(2.0, 1e-5), abs=2e-3)
    with pytest.raises(ConfigInvalid, match=r"3 rounds .* of epsilon = 2 .*unit site, 1\.99\d* spent before"):
        _stage(tmp_path / "3", **kept)
    with pytest.raises(LedgerCorrupt, match="data set 'clinics\\+simulation', not 'schools\\+simulation'"):
        _stage(tmp_path / "4", **{**kept, "cohort": "schools"})


def test_a_cohort_s_noise_is_chosen_once(tmp_path: Path) -> None:
    """Under another after looking at the first run, no fixed schedule certifies both; told before anybody trains."""
    kept = {"ledger": str(tmp_path / "clinics.jsonl"), "cohort": "clinics", "epsilon": 4.0}
    stage = _stage(tmp_path / "1", **kept)
    stage(_uploads(_adapter(1)), _broadcast())
    noise = stage.section.noise_multiplier
    with pytest.raises(ConfigInvalid, match=rf"'clinics' is fixed to gaussian with noise_multiplier {noise:g}: "):
        _stage(tmp_path / "2", **{**kept, "noise_multiplier": noise + 1})
    with pytest.raises(ConfigInvalid, match="may be lowered, not raised"):
        _stage(tmp_path / "3", **{**kept, "epsilon": 4.5})
    _stage(tmp_path / "4", **{**kept, "epsilon": 3.5})


def test_seeded_spending_never_stands_beside_real_spending(tmp_path: Path) -> None:
    kept = {"ledger": str(tmp_path / "clinics.jsonl"), "cohort": "clinics"}
    _stage(tmp_path / "1", **kept)(_uploads(_adapter(1)), _broadcast())

    with pytest.raises(LedgerCorrupt, match="clinics"):
        _stage(tmp_path / "2", setting={"mode": "production"}, **kept)


# --- a factor that nobody trains


def _with_own_a(seed: int) -> Adapter:
    """Return an upload that trained factor b alone, as FFA-LoRA does."""
    trained = _adapter(seed)
    layers = {name: LoraFactors(a=np.array(START.layers[name].a), b=trained.layers[name].b) for name in START.layers}
    return dataclasses.replace(START, layers=layers)


def test_a_frozen_factor_is_the_broadcast_one_to_the_bit(tmp_path: Path) -> None:
    merged = _stage(tmp_path, trains="b")(_uploads(_with_own_a(1), _with_own_a(2)), _broadcast())

    for name, began in START.layers.items():
        assert merged.adapter.layers[name].a.tobytes() == began.a.tobytes()
        assert merged.adapter.layers[name].a is not began.a
        assert (merged.adapter.layers[name].b != began.b).all()


def test_what_is_frozen_is_read_from_the_configuration_not_from_the_uploads(tmp_path: Path) -> None:
    """The twin: the same uploads, where both factors count as trained, put noise on both."""
    merged = _stage(tmp_path)(_uploads(_with_own_a(1), _with_own_a(2)), _broadcast())

    for name, began in START.layers.items():
        assert (merged.adapter.layers[name].a != began.a).all()


def test_the_clip_leaves_a_frozen_factor_out(tmp_path: Path) -> None:
    merged = _silent(tmp_path, trains="b")(_uploads(_with_own_a(1)), _broadcast())

    assert float(np.linalg.norm(_step(merged))) == pytest.approx(CLIP, rel=1e-3)


def test_who_moves_a_frozen_factor_counts_as_zero_and_is_named(tmp_path: Path) -> None:
    sound = _with_own_a(1)

    merged = _silent(tmp_path / "2", trains="b")(_uploads(sound, _adapter(2)), _broadcast())
    alone = _silent(tmp_path / "1", trains="b")(_uploads(sound), _broadcast())

    assert lora.sha256(merged.adapter) == lora.sha256(alone.adapter)
    assert merged.used == ("site-0",)
    assert "blocks.0.q_proj.a was changed, but server.aggregator.trains = 'b'" in merged.rejected["site-1"]


def test_when_every_site_moves_a_frozen_factor_nothing_is_spent(tmp_path: Path) -> None:
    with pytest.raises(
        RoundFailed, match=r"no update is left to sum \(site-0: frozen: .*; site-1: frozen: .*choose 'both'"
    ):
        _stage(tmp_path, trains="b")(_uploads(_adapter(1), _adapter(2)), _broadcast())
    assert list(tmp_path.iterdir()) == []


# --- what cannot be aggregated


def test_two_uploads_of_one_site_would_count_twice(tmp_path: Path) -> None:
    twice = [*_uploads(_adapter(1)), *_uploads(_adapter(2))]

    with pytest.raises(ValueError, match="a site sent two uploads"):
        _stage(tmp_path)(twice, _broadcast())


@pytest.mark.parametrize("start", [dataclasses.replace(START, base="other"), dataclasses.replace(START, alpha=1.0)])
def test_uploads_that_answer_another_adapter_are_refused(tmp_path: Path, start: Adapter) -> None:
    with pytest.raises(AdapterMismatch, match="uploads do not answer the broadcast adapter"):
        _stage(tmp_path)(_uploads(_adapter(1)), _broadcast(start))


def test_a_shape_that_numpy_would_stretch_is_refused(tmp_path: Path) -> None:
    upload = _adapter(1)
    stretched = {
        **upload.layers,
        "blocks.0.v_proj": LoraFactors(a=upload.layers["blocks.0.v_proj"].a, b=np.ones((1, 2), np.float32)),
    }

    with pytest.raises(
        AdapterMismatch, match=r"site-0: blocks\.0\.v_proj\.b is \(1, 2\), the broadcast one is \(7, 2\)"
    ):
        _stage(tmp_path)(_uploads(dataclasses.replace(upload, layers=stretched)), _broadcast())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["mean_product", "central_dp", "mean_factor", "median_factors", "bounded_mean_product", "krum_product"]
)
def test_only_a_sum_of_factors_can_be_wrapped(kind: str) -> None:
    told = rf"server\.aggregator\.inner = .*'{kind}' cannot be wrapped: .*write inner = \{{kind = \"mean_factors\"\}}"
    with pytest.raises(ConfigInvalid, match=told):
        _section(inner={"kind": kind})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inner": None}, "None cannot be wrapped"),
        ({"clip_norm": 0.0}, "clip_norm = '0.0'"),
        ({"noise_multiplier": 0.0}, "noise_multiplier = '0.0'"),
        ({"noise_multiplier": math.inf}, "noise_multiplier = 'inf'"),
        ({"delta": 1.0}, "delta = '1.0'"),
        ({"trains": "c"}, "trains = 'c'"),
        ({"ledger": "/kept/ledger.jsonl"}, "name the cohort"),
        ({"ledger": "kept.jsonl", "cohort": "clinics"}, "'kept.jsonl' is no absolute path"),
        ({"clip": 1.0}, "unknown key server.aggregator.clip (did you mean 'clip_norm'?)"),
    ],
)
def test_what_it_does_not_understand_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigInvalid, match=re.escape(told)):
        _section(**changes)


def test_it_is_a_member_of_the_server_table() -> None:
    tree = {"aggregator": {"kind": "central_dp", "inner": {"kind": "mean_product"}}}

    with pytest.raises(ConfigInvalid, match="'mean_product' cannot be wrapped"):
        parse(ServerSection, tree, where="server")
