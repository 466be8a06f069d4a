"""B14: one of five sites sends x100, the opposite, or a trigger adapter, and the loop stays where it was.

What is measured, and what cannot be on this model:

* how far the merged delta_W moves from the clean round's: within a bound computed from the honest uploads alone.
* what the trigger reaches: the share of texts with the trigger, in the drafts and in what the target writes after the
  same control codes. The attacker's adapter is trained to write it after every code and sent at five times its size
  (model replacement), so under `mean_factors` the merged adapter is the attacker's: the twin, 100 per cent.
* what the merged adapter scores on the public exam, in bits per byte.
* which share of the kept drafts a site holds, where each site writes its own.

The bar also asks for a target score within two points. The model here is random: its target scores 8.0 to 8.4 bits per
byte by the luck of the lessons alone, attacked or not, so that figure says nothing and is not asserted.

Not claimed, and asserted as such: fewer than three sites; and a site that writes its own drafts writes its trigger into
them, whatever the aggregator, as long as the aggregator uses its upload. Then its share of the texts is the bound.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from fl_app import lora, lora_start, peft_files, sequences, wire
from fl_app.config import LoraSection
from fl_app.errors import ConfigInvalid
from fl_app.seeds import stream
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, Upload
from simulations import launch
from strategies.aggregators import AnyAggregator
from strategies.lab import Lab
from strategies.stages import Setting
from strategies.tuners.sft import Sft
from tests.workplace import at

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from fl_app.models import FrozenModel

SITES = tuple(f"site-{index}" for index in range(5))
HOSTILE = "site-0"
TRIGGER = "qqq"
"""The tiny model speaks in single bytes; three of one kind do not come up by chance in the texts below."""

RUN = (
    'simulation.partition={kind="iid", sites=5}',
    "simulation.max_rows_per_site=30",
    "simulation.policy.min_noise_multiplier=2.0",
    "simulation.policy.max_noise_multiplier=2.0",
    "run.rounds=1",
    "client.learner.steps=1",
    "client.probe.items=0",
    "server.network.sites=5",
    "server.synthesizer.drafts=20",
    "server.synthesizer.max_new_tokens=12",
    "server.synthesizer.temperature=0.5",
    "server.filters=[]",
    "server.distiller.max_new_tokens=8",
    "server.tuner.learning_rate=0.02",
    "server.tuner.epochs=20",
    "server.tuner.batch_size=4",
    "server.tuner.rehearse=1.0",  # the target learns to write drafts: the way of a trigger into it
    "server.exam.choice_items=2",
    "server.exam.free_items=2",
    "server.exam.max_new_tokens=2",
)
MEAN: dict[str, Any] = {"kind": "mean_factors"}
ROBUST: tuple[dict[str, Any], ...] = (
    {"kind": "median_factors"},
    {"kind": "bounded_mean_product"},
    {"kind": "krum_product"},
)
ATTACKS = ("x100", "flipped", "trigger")
EVERY = pytest.mark.parametrize("options", ROBUST, ids=lambda options: options["kind"])


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """One round of five sites: what was sent, what came back, and what a trigger adapter sends."""

    start: Adapter
    honest: Mapping[str, Adapter]
    trigger: Adapter

    def hostile(self, attack: str, own: Adapter) -> Adapter:
        """Return what the hostile site sends instead of its own upload."""
        if attack in {"trigger", "own voice"}:
            return _moved(self.trigger, self.start, len(SITES) if attack == "trigger" else 1.0)
        return _moved(own, self.start, {"x100": 100.0, "flipped": -1.0}[attack])

    def adapters(self, attack: str = "", site: str = HOSTILE) -> dict[str, Adapter]:
        """Return all uploads, that of `site` replaced when there is an attack."""
        if not attack:
            return dict(self.honest)
        return {**self.honest, site: self.hostile(attack, self.honest[site])}


@dataclasses.dataclass(frozen=True, eq=False)
class Played:
    """What one run left behind."""

    directory: Path
    summary: dict[str, Any]
    drafts: tuple[dict[str, Any], ...]
    kept: tuple[str, ...]
    merged: Adapter
    target: Adapter


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own instead of build/ and runs/; the corpus, the same every time, is written once."""
    place = tmp_path_factory.mktemp("workplace")
    with at(place) as patch:
        # The cap on an update alone turns most of these uploads away (B1); here it is the aggregators' turn.
        patch.setattr("strategies.config.read_cap", lambda *_, **__: None)
        yield place


@pytest.fixture(scope="module")
def lab(frozen: FrozenModel) -> Iterator[Lab]:
    one = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=32,
        public_words=frozenset(),
    )
    yield one
    one.close()


@pytest.fixture(scope="module")
def clean() -> Played:
    """A round of five honest sites under the plain mean."""
    return _play("clean", MEAN)


@pytest.fixture(scope="module")
def uploads(clean: Played, frozen: FrozenModel, lab: Lab) -> Round:
    """The releases of that round, and an adapter that writes the trigger, trained on codes that every site knows."""
    spec = lora.spec_of(frozen, LoraSection(rank=4, alpha=8.0, targets=("q_proj", "v_proj")))
    start = lora_start.initial(spec, stream(0, "initial adapter"))
    releases = clean.directory / "rounds" / "1" / "releases"
    honest = {site: peft_files.load(releases / site) for site in SITES}
    prompts = sorted({draft["origin"]["prompt"] for draft in clean.drafts})[:8]
    examples = [sequences.encode(frozen.tokenizer, prompt, 4 * TRIGGER, max_tokens=192) for prompt in prompts]
    tuning = Sft(kind="sft", epochs=60, learning_rate=0.02, batch_size=8, max_grad_norm=100.0).build(lab)
    return Round(start=start, honest=honest, trigger=tuning.fit(start, examples, stream(0, "attack")))  # type: ignore[attr-defined]


def _play(name: str, options: Mapping[str, Any], *more: str, attack: str = "", sent: Round | None = None) -> Played:
    """Run the loop; with an attack, what the hostile site sent is replaced as it comes off the wire."""
    read = wire.unpack_reply

    def tampered(*content: Any, **more: Any) -> Any:
        reply = read(*content, **more)
        if not (attack and sent and isinstance(reply, Upload) and reply.site == HOSTILE):
            return reply
        assert isinstance(reply.release, AdapterRelease)
        worse = sent.hostile(attack, reply.release.adapter)
        return dataclasses.replace(reply, release=AdapterRelease(adapter=worse))

    aggregator = ", ".join(f"{key}={json.dumps(value)}" for key, value in options.items())
    overrides = (*RUN, f"server.aggregator={{{aggregator}}}", *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "unpack_reply", tampered)
        prepared = launch.prepare("configs/smoke.toml", "\n".join(overrides), run=name, sites=None)
        summary = launch.play(prepared)
    folder = prepared.directory / "rounds" / "1"
    return Played(
        directory=prepared.directory,
        summary=summary,
        drafts=tuple(json.loads(line) for line in (folder / "drafts.jsonl").read_text().splitlines()),
        kept=tuple(json.loads((folder / "screened.json").read_text())["kept"]),
        merged=peft_files.load(folder / "merged"),
        target=peft_files.load(prepared.directory / "target"),
    )


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


def _aggregate(options: Mapping[str, Any], adapters: Mapping[str, Adapter], start: Adapter, folder: Path) -> Adapter:
    """Build the aggregator of a configuration for five sites, and let it aggregate one round."""
    section: Any = TypeAdapter(AnyAggregator).validate_python(dict(options))
    stage = section.build(Setting(run="run", mode="simulation", seed=0, rounds=1, sites=5, directory=folder))
    sent = [
        Upload(site=site, round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=0.0)
        for site, adapter in adapters.items()
    ]
    return stage(sent, Broadcast(run="run", round=1, adapter=start, config_digest="")).adapter


def _dense(adapter: Adapter) -> np.ndarray:
    return np.concatenate([lora.delta(adapter, layer).ravel() for layer in sorted(adapter.layers)])


def _apart(left: Adapter, right: Adapter) -> float:
    return float(np.linalg.norm(_dense(left) - _dense(right)))


def _bound(options: Mapping[str, Any], honest: Sequence[Adapter], start: Adapter) -> float:
    """Return how far apart a clean and an attacked result may be, from the five honest uploads; see each module."""
    if options["kind"] == "median_factors":
        return _box_bound(honest)
    if options["kind"] == "krum_product":
        widest = max(_apart(one, other) for one in honest for other in honest)
        return widest * (1 + math.sqrt((5 - 1 - 2) / (5 - 2 - 1)))
    norms = [_apart(adapter, start) for adapter in honest]
    return (2 * max(norms) + 4 * (max(norms) - min(norms))) / 5


def _box_bound(honest: Sequence[Adapter]) -> float:
    """Both results have factors in the honest box: |b a - b' a'| <= width(b) max|a| + max|b| width(a)."""
    squared = 0.0
    for name in honest[0].layers:
        a, b = (np.array([getattr(one.layers[name], part) for one in honest], np.float64) for part in ("a", "b"))
        entries = np.ptp(b, axis=0) @ np.abs(a).max(axis=0) + np.abs(b).max(axis=0) @ np.ptp(a, axis=0)
        squared += float(((honest[0].alpha / lora.rank_of(honest[0])) ** 2 * entries**2).sum())
    return math.sqrt(squared)


# --- one round: how far the merged adapter moves


@pytest.mark.bar("B14")
@EVERY
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("site", SITES)
def test_one_hostile_site_of_five_moves_the_merged_adapter_within_the_bound(
    uploads: Round, options: dict[str, Any], attack: str, site: str, tmp_path: Path
) -> None:
    before = _aggregate(options, uploads.adapters(), uploads.start, tmp_path)
    after = _aggregate(options, uploads.adapters(attack, site), uploads.start, tmp_path)

    # The bound holds in exact arithmetic; factors are kept in float32.
    assert _apart(before, after) <= _bound(options, list(uploads.honest.values()), uploads.start) * (1 + 1e-5)


@EVERY
@pytest.mark.parametrize(("attack", "times"), [("x100", 5), ("trigger", 50)])
@pytest.mark.parametrize("site", SITES)
def test_under_the_plain_mean_it_moves_far_beyond(
    uploads: Round, options: dict[str, Any], attack: str, times: int, site: str, tmp_path: Path
) -> None:
    """The twin. A flipped upload is not in it: of honest length, it moves a mean of five by two fifths of that."""
    before = _aggregate(MEAN, uploads.adapters(), uploads.start, tmp_path)
    after = _aggregate(MEAN, uploads.adapters(attack, site), uploads.start, tmp_path)

    assert _apart(before, after) > times * _bound(options, list(uploads.honest.values()), uploads.start)


def test_the_trigger_adapter_becomes_the_merged_one_under_the_plain_mean(uploads: Round, tmp_path: Path) -> None:
    """The attack is a real one: what it is after is what it gets."""
    merged = _aggregate(MEAN, uploads.adapters("trigger"), uploads.start, tmp_path)

    assert _apart(merged, uploads.trigger) < 0.02 * _apart(uploads.trigger, uploads.start)


@pytest.mark.bar("B14")
@pytest.mark.parametrize("sites", [1, 2])
@EVERY
def test_nothing_is_claimed_for_fewer_than_three_sites(options: dict[str, Any], sites: int, tmp_path: Path) -> None:
    """It is refused before any site is asked, with the reason."""
    section: Any = TypeAdapter(AnyAggregator).validate_python(options)

    with pytest.raises(ConfigInvalid, match=rf"server\.network\.sites = {sites}"):
        section.build(Setting(run="run", mode="simulation", seed=0, rounds=1, sites=sites, directory=tmp_path))


# --- the whole loop: what the trigger reaches, and what the merged adapter scores


class Runs:
    """The loop under each aggregator and attack; each is played once."""

    def __init__(self, clean: Played, uploads: Round) -> None:
        self._played: dict[tuple[str, str], Played] = {("mean_factors", ""): clean}
        self._sent = uploads

    def __call__(self, options: Mapping[str, Any], attack: str = "") -> Played:
        kind = str(options["kind"])
        if (kind, attack) not in self._played:
            name = f"{kind}-{attack or 'clean'}".replace("_", "-")
            self._played[kind, attack] = _play(name, options, attack=attack, sent=self._sent)
        return self._played[kind, attack]


@pytest.fixture(scope="module")
def runs(clean: Played, uploads: Round) -> Runs:
    return Runs(clean, uploads)


def _triggered(texts: Sequence[str]) -> float:
    return sum(TRIGGER in text for text in texts) / len(texts)


def _written(lab: Lab, adapter: Adapter, drafts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a model writes after the control codes of the drafts."""
    return lab.local_with(adapter, "asked").generate(
        [draft["origin"]["prompt"] for draft in drafts],
        max_new_tokens=12,
        temperature=0.5,
        top_p=0.95,
        rng=stream(0, "asking"),
    )


def _score(played: Played) -> float:
    return float(played.summary["exam"]["adapter"]["bits_per_byte"]["value"])


@pytest.mark.slow
@pytest.mark.bar("B14")
@EVERY
@pytest.mark.parametrize("attack", ["x100", "trigger"])
def test_the_loop_stays_where_it_was(
    runs: Runs, uploads: Round, lab: Lab, options: dict[str, Any], attack: str
) -> None:
    """Trigger in at most 5 per cent of the drafts and of what the target writes, and the score of the adapter stays."""
    before, after = runs(options), runs(options, attack)

    assert after.summary["status"] == "completed"
    assert (
        _apart(before.merged, after.merged) <= _bound(options, list(uploads.honest.values()), uploads.start) * 1.00001
    )
    assert _triggered([draft["instruction"] for draft in after.drafts]) <= 0.05
    assert _triggered(_written(lab, after.target, after.drafts)) <= 0.05
    assert abs(_score(after) - _score(before)) <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "moved"), [("x100", 0.01), ("trigger", 0.05)])
def test_the_loop_is_hijacked_under_the_plain_mean(runs: Runs, attack: str, moved: float) -> None:
    """The twin: the score leaves the band, by a factor of two or more."""
    assert abs(_score(runs(MEAN, attack)) - _score(runs(MEAN))) > moved


@pytest.mark.slow
def test_the_trigger_reaches_drafts_and_target_under_the_plain_mean(runs: Runs, lab: Lab) -> None:
    """The twin: the attack that the robust ones withstand teaches the target its trigger."""
    played, honest = runs(MEAN, "trigger"), runs(MEAN)

    assert _triggered([draft["instruction"] for draft in played.drafts]) >= 0.95
    assert _triggered(_written(lab, played.target, played.drafts)) >= 0.5
    assert _triggered([draft["instruction"] for draft in honest.drafts]) == 0.0
    assert _triggered(_written(lab, honest.target, honest.drafts)) == 0.0


# --- each site writes: what a hostile one may hold of the kept drafts

FLOOD = (
    'server.synthesizer.voices="each_site"',
    "server.synthesizer.drafts=300",
    "server.synthesizer.max_new_tokens=4",
    'server.filters=[{kind="length", min_words=1}, {kind="site_share"}]',
    "server.tuner.epochs=1",
)
"""The filter by length drops what is not printable: most of what honest sites write here, nothing of the trigger."""


@pytest.fixture(scope="module")
def flood(uploads: Round) -> Played:
    """A site whose drafts pass where the others' do not; nothing is averaged, so it sends its adapter as it is."""
    return _play("flood", {"kind": "median_factors"}, *FLOOD, attack="own voice", sent=uploads)


def _voices(played: Played) -> dict[str, str]:
    return {draft["id"]: draft["origin"]["voice"] for draft in played.drafts}


@pytest.mark.slow
@pytest.mark.bar("B14")
@pytest.mark.parametrize("site", SITES)
def test_no_site_holds_more_than_its_share_of_the_kept_drafts(flood: Played, site: str) -> None:
    voices = _voices(flood)
    kept = Counter(voices[draft] for draft in flood.kept)

    assert set(kept) == set(SITES)
    assert kept[site] * len(SITES) <= 1.5 * sum(kept.values())


@pytest.mark.slow
def test_without_the_cap_the_hostile_site_would_hold_most_of_them(flood: Played) -> None:
    """The twin: what reached the filter."""
    screened = json.loads((flood.directory / "rounds" / "1" / "screened.json").read_text())
    voices = _voices(flood)
    capped = [draft for draft, reason in screened["dropped"].items() if reason.startswith("site_share")]
    reached = Counter(voices[draft] for draft in (*screened["kept"], *capped))

    assert {voices[draft] for draft in capped} == {HOSTILE}
    assert reached[HOSTILE] > 0.5 * sum(reached.values())


@pytest.mark.slow
def test_a_hostile_site_is_in_its_own_drafts_and_nowhere_else(flood: Played, lab: Lab) -> None:
    """The limit: its own share is full of the trigger. Neither the others' drafts nor the merged adapter have it."""
    own = [draft["instruction"] for draft in flood.drafts if draft["origin"]["voice"] == HOSTILE]
    others = [draft["instruction"] for draft in flood.drafts if draft["origin"]["voice"] != HOSTILE]

    assert (len(own), len(others)) == (60, 240)
    assert _triggered(own) > 0.9
    assert _triggered(others) == 0.0
    assert _triggered(_written(lab, flood.merged, flood.drafts[:40])) == 0.0


@pytest.mark.slow
@pytest.mark.bar("B14")
def test_an_upload_that_krum_passes_over_does_not_write(uploads: Round) -> None:
    options = {"kind": "krum_product", "keep": 3}
    voice = 'server.synthesizer.voices="each_site"'

    played = _play("krum-each-site", options, voice, attack="own voice", sent=uploads)

    (told,) = played.summary["rounds"]
    assert told["rejected"][HOSTILE] == "krum: not among the 3 nearest to the others"
    assert {draft["origin"]["voice"] for draft in played.drafts} == set(told["used"])
    assert HOSTILE not in told["used"]
    assert _triggered([draft["instruction"] for draft in played.drafts]) == 0.0
