"""Who learns when, and what of it leaves: RoLoRA, LA-LoRA, Fed-SB, FedSA-LoRA, and plain LoRA in their company."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import TypeAdapter

from clients import local_round
from clients.drawer import SiteDrawer
from clients.learners import AnyLearner
from clients.learners.dp_fedsa_lora import personal
from clients.learners.dp_la_lora import smoothed
from clients.site import Site
from clients.stages import Workbench
from fl_app import inference, lora, wire
from fl_app.errors import AdapterMismatch, RunInvalid
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import AdapterRelease, Broadcast, Upload
from fl_app.zeroth_order import decode, encode, replay
from tests.contracts.test_learners import CLIP, NOISE, STEPS, CountingNoise, constants, some_rows
from tests.privacy.replay import Kept, begin
from tests.unit.test_local_round import settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]


def learner_of(kind: str, number: int = 1, **options: Any) -> Any:
    private = {} if kind == "plain_lora" else {"clip_norm": CLIP}
    section: Any = TypeAdapter(AnyLearner).validate_python({"kind": kind, "steps": STEPS, **private, **options})
    return section.build(number)


def run(learner: Any, frozen: FrozenModel, start: Adapter, *, noise: Any = None, drawer: Any = None) -> Adapter:
    noise = noise or SimulatedNoise(stream(1, "noise"))
    bench = Workbench(model=frozen, codes={"cough": "A cough:"}, noise=noise, system="", drawer=drawer or Kept())
    return learner(some_rows(9), start, learner.announce(constants(), NOISE), constants(), bench).adapter


def moved(found: Adapter, start: Adapter) -> str:
    """Return the first letters of the factors that differ, in any number of any layer; the others are equal in bits."""
    letters = set()
    for name, began in start.layers.items():
        for tensor, values in lora.named_factors(name, began).items():
            if lora.named_factors(name, found.layers[name])[tensor].tobytes() != values.tobytes():
                letters.add(tensor.rpartition(".")[2][0])
    return "".join(sorted(letters))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect, of each AdamW step, which parameters had a gradient, and how many steps each one's state has."""
    import torch

    seen: list[dict[str, Any]] = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            before = [weight.detach().clone() for weight in weights]
            live = [weight.grad is not None for weight in weights]
            result = super().step(*args, **kwargs)
            counts = [int(self.state[weight]["step"]) if weight in self.state else 0 for weight in weights]
            still = [torch.equal(weight, was) for weight, was in zip(weights, before, strict=True)]
            sizes = [float((weight.detach() - was).abs().max()) for weight, was in zip(weights, before, strict=True)]
            seen.append({"live": live, "counts": counts, "still": still, "moved": sizes})
            return result

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return seen


# --- RoLoRA


@pytest.mark.parametrize(("number", "letters"), [(1, "b"), (2, "a"), (3, "b"), (4, "a")])
@pytest.mark.parametrize("kind", ["dp_rolora", "plain_lora"])
def test_rounds_take_turns(kind: str, number: int, letters: str, frozen: FrozenModel, learned: Make) -> None:
    options = {"schedule": "rounds"} if kind == "plain_lora" else {}
    found = run(learner_of(kind, number, weight_decay=0.1, **options), frozen, learned(5))
    assert moved(found, learned(5)) == letters


def test_the_mean_of_a_round_is_the_mean_of_the_products(frozen: FrozenModel, learned: Make) -> None:
    """In either phase, in float64 by the definition; two sites of plain LoRA are the twin where it is not."""

    def gap(kind: str, number: int) -> float:
        sites = [
            run(learner_of(kind, number, learning_rate=0.05), frozen, learned(5), noise=SimulatedNoise(stream(n, "n")))
            for n in (1, 2)
        ]
        worst = 0.0
        for name in learned(5).layers:
            a, b = (np.mean([getattr(one.layers[name], f) for one in sites], axis=0, dtype=np.float64) for f in "ab")
            products = np.mean([lora.delta(one, name) for one in sites], axis=0)
            mean = sites[0].alpha / a.shape[0] * b @ a
            worst = max(worst, float(np.abs(mean - products).max() / np.abs(products).max()))
        return worst

    assert gap("dp_rolora", 1) < 1e-12
    assert gap("dp_rolora", 2) < 1e-12
    assert gap("dp_lora", 1) > 1e-4


# --- LA-LoRA


@pytest.mark.parametrize("kind", ["dp_la_lora", "plain_lora"])
def test_steps_take_turns_and_a_factor_at_rest_stays_as_it_is(
    kind: str, frozen: FrozenModel, learned: Make, watched: list[dict[str, Any]]
) -> None:
    options = {"schedule": "steps"} if kind == "plain_lora" else {}
    found = run(learner_of(kind, steps=4, weight_decay=0.1, **options), frozen, learned(5))
    assert moved(found, learned(5)) == "ab"
    for step, seen in enumerate(watched):
        halves = sum(seen["live"]), len(seen["live"])
        assert halves[0] * 2 == halves[1]
        assert [not live for live in seen["live"]] == seen["still"]
        expected = {True: step // 2 + 1, False: (step + 1) // 2}
        assert seen["counts"] == [expected[live] for live in seen["live"]]
    assert [seen["live"] for seen in watched[::2]] == [watched[0]["live"]] * 2
    assert [seen["live"] for seen in watched[1::2]] == [[not one for one in watched[0]["live"]]] * 2


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_b_learns_at_its_own_rate(
    factor: float, frozen: FrozenModel, learned: Make, watched: list[dict[str, Any]]
) -> None:
    """The first step of AdamW is one learning rate, whatever the gradient; and b is first."""
    learner = learner_of("dp_la_lora", steps=2, learning_rate=1e-3, b_learning_rate_factor=factor)
    run(learner, frozen, learned(5), noise=CountingNoise(level=1.0))
    assert max(watched[0]["moved"]) == pytest.approx(factor * 1e-3, rel=1e-3)
    assert max(watched[1]["moved"]) == pytest.approx(1e-3, rel=1e-3)


@given(
    gradient=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(-8, 8, width=32)
    ),
    strength=st.floats(0.01, 20),
)
def test_the_filter_solves_its_equation(gradient: np.ndarray, strength: float) -> None:
    """(1 - s D) h = g on the ring, with D written out; so the mean stays, and nothing is added."""
    n = gradient.size
    ring = np.zeros((n, n))
    for i in range(n):
        for j in ((i - 1) % n, (i + 1) % n):
            ring[i, j] += 1
            ring[i, i] -= 1
    found = smoothed(gradient, strength=strength)
    expected = np.linalg.solve(np.eye(n) - strength * ring, gradient.ravel().astype(np.float64))
    assert found.shape == gradient.shape
    assert found.dtype == np.float32
    assert np.abs(found.ravel() - expected).max() <= 1e-5
    assert abs(found.mean(dtype=np.float64) - gradient.mean(dtype=np.float64)) <= 1e-6
    assert np.abs(found).max() <= np.abs(gradient).max() * (1 + 1e-6)


@pytest.mark.parametrize(("strength", "share"), [(0.5, 0.385), (1.0, 0.268), (3.0, 0.149)])
def test_the_filter_takes_the_golden_share_of_noise(strength: float, share: float) -> None:
    """The integral over the ring, (1 + 2 s) / (1 + 4 s)^1.5, and what is measured of 200,000 normals."""
    assert (1 + 2 * strength) / (1 + 4 * strength) ** 1.5 == pytest.approx(share, abs=5e-4)
    noise = np.random.default_rng(0).standard_normal((100, 2000)).astype(np.float32)
    assert smoothed(noise, strength=strength).var() == pytest.approx(share, rel=0.02)


def test_smoothing_is_post_processing(frozen: FrozenModel, learned: Make, watched: list[dict[str, Any]]) -> None:
    """Same receipt, same questions to the noise source; another adapter."""
    plain, smooth = learner_of("dp_la_lora"), learner_of("dp_la_lora", smoothing=2.0)
    assert plain.announce(constants(), NOISE) == smooth.announce(constants(), NOISE)
    noises = CountingNoise(level=0.5, sampled=None), CountingNoise(level=0.5, sampled=None)
    one, two = (run(way, frozen, learned(5), noise=noise) for way, noise in zip((plain, smooth), noises, strict=True))
    assert (noises[0].shapes, noises[0].samples) == (noises[1].shapes, noises[1].samples)
    assert lora.sha256(one) != lora.sha256(two)
    assert len(watched) == 2 * STEPS


# --- Fed-SB


@pytest.mark.parametrize("kind", ["dp_lora_sb", "plain_lora"])
def test_only_the_core_moves(kind: str, frozen: FrozenModel, learned: Make) -> None:
    start = begin(learned(5), "dp_lora_sb")
    options = {"schedule": "core"} if kind == "plain_lora" else {}
    for number in (1, 2):
        assert moved(run(learner_of(kind, number, weight_decay=0.1, **options), frozen, start), start) == "c"


@pytest.mark.parametrize("kind", ["dp_lora_sb", "plain_lora"])
def test_an_adapter_without_cores_is_refused(kind: str, frozen: FrozenModel, learned: Make) -> None:
    options = {"schedule": "core"} if kind == "plain_lora" else {}
    with pytest.raises(AdapterMismatch, match="has no core to train"):
        run(learner_of(kind, **options), frozen, learned(5))


def test_noise_on_cores_is_all_the_noise_there_is(frozen: FrozenModel, learned: Make) -> None:
    noise, start = CountingNoise(level=1.0), begin(learned(5), "dp_lora_sb")
    run(learner_of("dp_lora_sb"), frozen, start, noise=noise)
    assert noise.shapes == [(4, 4)] * len(start.layers) * STEPS


def test_the_mean_of_cores_is_the_mean_of_the_products(frozen: FrozenModel, learned: Make) -> None:
    start = begin(learned(5), "dp_lora_sb")
    sites = [run(learner_of("dp_lora_sb"), frozen, start, noise=SimulatedNoise(stream(n, "n"))) for n in (1, 2)]
    for name, began in start.layers.items():
        core = np.mean([one.layers[name].core for one in sites], axis=0, dtype=np.float64)
        products = np.mean([lora.delta(one, name) for one in sites], axis=0)
        mean = start.alpha / 4 * began.b.astype(np.float64) @ core @ began.a.astype(np.float64)
        assert np.abs(mean - products).max() <= 1e-12 * np.abs(products).max()


# --- FedSA-LoRA


def test_a_leaves_and_b_stays(frozen: FrozenModel, learned: Make) -> None:
    """The first round begins at the broadcast's b, the second at the site's own; the release has neither."""
    drawer = Kept()
    first = run(learner_of("dp_fedsa_lora"), frozen, learned(5), drawer=drawer)
    assert moved(first, learned(5)) == "a"
    both = run(learner_of("dp_lora"), frozen, learned(5))
    assert moved(personal(first, drawer.rounds[1]), both) == ""  # what DP-LoRA trains, in two places
    second = run(learner_of("dp_fedsa_lora", 2), frozen, learned(6), drawer=drawer)
    assert moved(second, learned(6)) == "a"
    own = run(learner_of("dp_lora"), frozen, personal(learned(6), drawer.rounds[1]))
    assert moved(personal(second, drawer.rounds[2]), own) == ""
    assert moved(own, run(learner_of("dp_lora"), frozen, learned(6))) == "ab"  # the twin: its own b is heard


def test_without_a_place_for_b_nothing_is_learned(frozen: FrozenModel, learned: Make) -> None:
    noise = CountingNoise()
    bench = Workbench(model=frozen, codes={}, noise=noise, system="")
    learner = learner_of("dp_fedsa_lora")
    with pytest.raises(RunInvalid, match="needs a place of the site's own"):
        learner(some_rows(3), learned(5), learner.announce(constants(), NOISE), constants(), bench)
    assert not noise.samples


def test_a_b_of_another_shape_is_refused(learned: Make) -> None:
    b = {name: factors.b for name, factors in learned(5).layers.items()}
    first = next(iter(b))
    for wrong in ({**b, first: b[first][:, :2]}, {**b, "q": b[first]}, {}):
        with pytest.raises(AdapterMismatch, match="does not fit"):
            personal(learned(5), wrong)


def asked(number: int, adapter: Adapter) -> Broadcast:
    return Broadcast(run="run-a", round=number, adapter=adapter, config_digest="d")


FEDSA = settings(rounds=4, learner={"kind": "dp_fedsa_lora", "steps": 2})


def drawer_of(site: Site) -> SiteDrawer:
    return SiteDrawer(directory=_only(site))


def _only(site: Site) -> Path:
    (place,) = (site.directory / "personal").iterdir()
    return place


def test_a_sites_b_is_in_no_message_and_no_outbox(site_folder: Any, learned: Make, tmp_path: Path) -> None:
    site = Site(directory=site_folder.directory)
    upload = local_round.train(site, asked(1, learned(5)), FEDSA)
    own = drawer_of(site).latest(2)
    assert own is not None
    assert moved(upload.release.adapter, learned(5)) == "a"
    for name, factors in learned(5).layers.items():
        assert not np.array_equal(own[name], factors.b)
    sent = wire.pack_reply(upload)
    packed = b"".join(array.data for record in sent.array_records.values() for array in record.values())
    files = b"".join(path.read_bytes() for path in sorted(site.outbox.rglob("*")) if path.is_file())
    hidden = [row.tobytes() for b in own.values() for row in b]
    assert not any(row in packed or row in files for row in hidden)
    a = upload.release.adapter.layers
    shared = [row.tobytes() for factors in a.values() for row in factors.a]
    assert all(row in packed and row in files for row in shared)  # the twin: what is sent would be found
    kept = _only(site) / "round-1.safetensors"
    assert all(row in kept.read_bytes() for row in hidden)
    assert [path.stat().st_mode & 0o077 for path in (_only(site), _only(site).parent)] == [0, 0]


def test_two_sites_keep_two_bs(site_folder: Any, learned: Make, tmp_path: Path) -> None:
    import shutil

    one, two = Site(directory=site_folder.directory), Site(directory=tmp_path / "school")
    shutil.copytree(one.directory, two.directory)
    policy = (two.directory / "site.toml").read_text().replace('"harbour"', '"school"')
    (two.directory / "site.toml").write_text(policy)
    for site in (one, two):
        local_round.train(site, asked(1, learned(5)), FEDSA)
    first, second = (drawer_of(site).latest(2) for site in (one, two))
    assert first is not None
    assert second is not None
    assert all(not np.array_equal(first[name], second[name]) for name in first)


def test_a_round_that_was_broken_off_begins_again_from_the_round_before(
    site_folder: Any, learned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b is written, the release is not: the retry, under another reservation, does not build upon it."""
    site = Site(directory=site_folder.directory)
    local_round.train(site, asked(1, learned(5)), FEDSA)
    before = drawer_of(site).latest(2)
    assert before is not None
    with monkeypatch.context() as patch:
        patch.setattr(local_round.outbox, "put", lambda *_, **__: (_ for _ in ()).throw(RunInvalid("power")))
        with pytest.raises(RunInvalid, match="power"):
            local_round.train(site, asked(2, learned(6)), FEDSA)
    broken = drawer_of(site).latest(3)
    assert broken is not None
    assert any((broken[name] != before[name]).any() for name in before)
    began: list[Any] = []
    attach = lora.attach
    monkeypatch.setattr(
        lora, "attach", lambda frozen, start, *rest, **kw: began.append(start) or attach(frozen, start, *rest, **kw)
    )
    local_round.train(site, asked(2, learned(6)), FEDSA)
    assert moved(began[0], personal(learned(6), before)) == ""
    again = drawer_of(site).latest(3)
    local_round.train(site, asked(2, learned(6)), FEDSA)  # resent from the outbox
    after = drawer_of(site).latest(3)
    assert again is not None
    assert after is not None
    assert all(np.array_equal(again[name], after[name]) for name in again)


def test_a_probe_scores_the_sites_own_model(site_folder: Any, learned: Make, frozen: FrozenModel) -> None:
    site = Site(directory=site_folder.directory)

    def bits(adapter: Adapter) -> float:
        model = lora.attach(frozen, adapter)
        ((found,),) = inference.option_likelihood(model, frozen.tokenizer, [""], [["A cough:"]])
        return -found.log_prob / np.log(2) / 8

    assert local_round.probe(site, asked(1, learned(5)), FEDSA).bits_per_byte == pytest.approx(bits(learned(5)))
    upload = local_round.train(site, asked(1, learned(5)), FEDSA)
    assert isinstance(upload, Upload)
    assert isinstance(upload.release, AdapterRelease)
    merged = upload.release.adapter
    own = personal(merged, drawer_of(site).latest(2))
    found = local_round.probe(site, asked(1, merged), FEDSA).bits_per_byte
    assert found == pytest.approx(bits(own))
    assert abs(bits(own) - bits(merged)) > 1e-6  # the twin
    plain = local_round.probe(site, asked(1, merged), settings(rounds=4)).bits_per_byte
    assert plain == pytest.approx(bits(merged))
    other = dataclasses.replace(asked(1, merged), run="run-b")
    assert local_round.probe(site, other, FEDSA).bits_per_byte == pytest.approx(bits(merged))


# --- a whole round over cores and blocks


def test_a_site_trains_cores_over_blocks_and_looks_at_both_before_it_spends(site_folder: Any, learned: Make) -> None:
    site, start = Site(directory=site_folder.directory), begin(learned(5), "dp_lora_sb")
    told = settings(rounds=4, learner={"kind": "dp_lora_sb", "steps": 2})
    sound = dataclasses.replace(asked(1, start), blocks=(learned(6), learned(7)))
    layers = dict(learned(7).layers)
    first = next(iter(layers))
    nan = {**layers, first: dataclasses.replace(layers[first], a=layers[first].a * np.float32(np.nan))}
    fewer = {name: one for name, one in layers.items() if name != first}
    odd = [dataclasses.replace(learned(7), layers=one) for one in (nan, fewer)]
    odd += [dataclasses.replace(learned(7), base="f" * 64)]
    for one in odd:
        with pytest.raises(AdapterMismatch):
            local_round.train(site, dataclasses.replace(sound, blocks=(learned(6), one)), told)
    with pytest.raises(AdapterMismatch, match="core is missing"):
        local_round.train(site, asked(1, learned(5)), told)
    with pytest.raises(AdapterMismatch, match="core is none of ours"):
        local_round.train(site, asked(1, start), settings(rounds=4))
    assert not site.ledger(site.policy).book().receipts
    upload = local_round.train(site, sound, told)
    assert isinstance(upload.release, AdapterRelease)
    assert moved(upload.release.adapter, start) == "c"
    bare = local_round.train(site, dataclasses.replace(asked(1, start), run="run-b"), told)
    assert isinstance(bare.release, AdapterRelease)
    assert lora.sha256(bare.release.adapter) != lora.sha256(upload.release.adapter)


def test_a_zeroth_order_round_is_resent_with_its_scalars(site_folder: Any, learned: Make) -> None:
    """And it is the walk that the server takes from the scalars, under the names of the upload."""
    site = Site(directory=site_folder.directory)
    told = settings(rounds=4, learner={"kind": "zeroth_order", "steps": 3, "learning_rate": 0.01, "clip_norm": 4.0})
    upload, again = (local_round.train(site, asked(2, learned(5)), told) for _ in range(2))
    assert isinstance(upload.release, AdapterRelease)
    assert isinstance(again.release, AdapterRelease)
    assert upload.release.scalars is not None
    assert again.release.scalars is not None
    assert np.array_equal(again.release.scalars, upload.release.scalars)
    walked = replay(
        learned(5),
        decode(encode(upload.release.scalars)),
        run=upload.run,
        site=upload.site,
        round_number=upload.round,
        learning_rate=0.01,
        schedule="both",
    )
    assert lora.sha256(walked) == lora.sha256(upload.release.adapter) == lora.sha256(again.release.adapter)
    assert moved(walked, learned(5)) == "ab"


# --- the drawer


def test_a_drawer_keeps_the_last_round_and_the_one_before(tmp_path: Path) -> None:
    drawer = SiteDrawer(directory=tmp_path / "personal" / "run")
    assert drawer.latest(9) is None

    def number(before: int) -> float | None:
        found = drawer.latest(before)
        return None if found is None else float(found["q"][0])

    for one in (1, 4, 10):
        drawer.put(one, {"q": np.full(2, one, np.float32)})
    assert (number(11), number(10), number(4)) == (10.0, 4.0, None)
    drawer.put(10, {"q": np.full(2, 7, np.float32)})
    assert (number(11), number(10)) == (7.0, 4.0)
    assert sorted(path.name for path in drawer.directory.iterdir()) == ["round-10.safetensors", "round-4.safetensors"]


def test_a_drawer_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    drawer = SiteDrawer(directory=tmp_path / "run")
    drawer.put(1, {"q": np.ones(2, np.float32)})
    (drawer.directory / "round-1.safetensors").write_bytes(b"torn")
    with pytest.raises(RunInvalid, match="cannot be read; restore it, or delete it"):
        drawer.latest(2)
