"""EPSVec at the server: what the sites are told, how their vectors add up, and that W_loc is pushed along them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.learners.epsvec import EpsVec as SiteSection
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import steering
from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import Adapter, ControlCode, LoraFactors, Material, VectorRelease
from strategies.lab import Lab
from strategies.stages import Voices
from strategies.synthesizers.epsvec import EpsVec, SteeredSampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from fl_app.models import FrozenModel

WIDTH, LAYERS = 64, (1, 0)
CODES = tuple(ControlCode(id=f"house/{name}", text=f"A letter about {name}:\n") for name in ("skin", "lung", "heart"))
ADAPTER = Adapter(
    layers={"l": LoraFactors(a=np.ones((1, 2), np.float32), b=np.ones((3, 1), np.float32))}, alpha=1.0, base="base"
)
NEGATIVES = [(code.id, f"{word} {code.id}") for code in CODES for word in ("why", "what now", "is it", "please tell")]
SHOTS = [(CODES[0].id, "does it heal"), (CODES[0].id, "how long"), (CODES[0].id, "third"), (CODES[1].id, "may I run")]


class FakeWriter:
    """Remembers how it is steered and what it is asked."""

    def __init__(self, lab: FakeLab) -> None:
        self._lab = lab

    def steered(self, directions: Mapping[int, np.ndarray], lengths: Mapping[int, float]) -> FakeWriter:
        self._lab.directions, self._lab.lengths = dict(directions), dict(lengths)
        return self

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self._lab.asked.append({"prompts": list(prompts), **settings})
        return [f"\n  text {settings['rng'].integers(10**9)}\n\nA letter" for _ in prompts]


class FakeLab:
    """The tiny model to read with, and a writer that only writes down what it was asked."""

    def __init__(self, frozen: FrozenModel) -> None:
        self.local = frozen
        self.asked: list[dict[str, Any]] = []
        self.adapters: list[Adapter | None] = []
        self.directions: dict[int, np.ndarray] = {}
        self.lengths: dict[int, float] = {}

    def local_with(self, adapter: Adapter | None, name: str) -> FakeWriter:
        self.adapters.append(adapter)
        return FakeWriter(self)


def _lab(frozen: FrozenModel, threads: int) -> Lab:
    return Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=threads,
        batch_rows=4,
        public_words=frozenset(),
    )


@pytest.fixture(scope="module")
def lab(frozen: FrozenModel) -> Iterator[Lab]:
    one = _lab(frozen, 1)
    yield one
    one.close()


def lines(folder: Path, name: str, rows: Sequence[dict[str, str]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., EpsVec]:
    """Return a function: changes -> a section whose files are there."""
    codes = lines(tmp_path, "codes", [{"id": code.id, "text": code.text} for code in CODES])
    negatives = lines(tmp_path, "negatives", [{"code": code, "text": text} for code, text in NEGATIVES])
    shots = lines(tmp_path, "shots", [{"code": code, "text": text} for code, text in SHOTS])

    def make(**changes: Any) -> EpsVec:
        values: dict[str, Any] = {
            "kind": "epsvec",
            "codes": codes,
            "drafts": 7,
            "layers": list(LAYERS),
            "negatives": negatives,
            "shots": shots,
            "max_new_tokens": 6,
        }
        return EpsVec(**{**values, **changes})

    return make


def vectors(seed: int, counts: Sequence[float] = (5, 3, 9)) -> VectorRelease:
    rng = np.random.default_rng(seed)
    found = {f"{code.id}/{layer}": rng.normal(0, 2, WIDTH).astype(np.float32) for code in CODES for layer in LAYERS}
    found |= {f"{code.id}/count": np.array([count], np.float32) for code, count in zip(CODES, counts, strict=True)}
    return VectorRelease(vectors=found)


SCALED = Material(vectors={"0/scale": np.array([0.5], np.float32), "1/scale": np.array([3.0], np.float32)})


def voices(releases: Mapping[str, Any], material: Material | None = SCALED) -> Voices:
    return Voices(merged=ADAPTER, by_site={}, releases=releases, material=material)


def fake(frozen: FrozenModel, **changes: Any) -> tuple[SteeredSampling, FakeLab]:
    """Return the stage without shots over a fake lab."""
    lab = FakeLab(frozen)
    values: dict[str, Any] = {"kind": "epsvec", "codes": "", "drafts": 7, "layers": list(LAYERS), **changes}
    none: dict[str, list[str]] = {code.id: [] for code in CODES}
    stage = SteeredSampling(section=EpsVec(**values), lab=lab, codes=CODES, shots=none, negatives=none)  # type: ignore[arg-type]
    return stage, lab


# --- what the sites are told


def test_sites_get_each_class_s_prompt_with_its_first_shots(section: Callable[..., EpsVec], lab: Lab) -> None:
    sent = section().build(lab).prepare(ADAPTER, (), stream(0, "prepare", 1), 1)

    assert [one.code for one in sent.texts] == [code.id for code in CODES]
    skin, lung, heart = (code.text for code in CODES)
    assert [one.text for one in sent.texts] == [
        f"{skin}does it heal\n\n{skin}how long\n\n{skin}",
        f"{lung}may I run\n\n{lung}",
        heart,
    ]


def test_centres_are_means_over_the_public_texts_and_scales_their_usual_distance(
    section: Callable[..., EpsVec], lab: Lab
) -> None:
    sent = section(max_text_tokens=9).build(lab).prepare(ADAPTER, (), stream(0, "prepare", 1), 1)

    distances: dict[int, list[float]] = {layer: [] for layer in LAYERS}
    for code, prompt in zip(CODES, (one.text for one in sent.texts), strict=True):
        texts = [text for of, text in NEGATIVES if of == code.id]
        alone = [
            steering.representations(
                lab.local.model,
                lab.local.tokenizer,
                [prompt],
                [text],
                layers=LAYERS,
                max_text_tokens=9,
                batch_rows=1,
            )
            for text in texts
        ]
        for layer in LAYERS:
            centre = sum(one[layer][0] for one in alone) / len(texts)
            assert sent.vectors[f"{code.id}/{layer}/centre"] == pytest.approx(centre, abs=1e-5)
            distances[layer] += [float(np.linalg.norm(one[layer][0] - centre)) for one in alone]
    for layer in LAYERS:
        assert float(sent.vectors[f"{layer}/scale"][0]) == pytest.approx(np.median(distances[layer]), rel=1e-4)
    assert len(sent.vectors) == len(CODES) * len(LAYERS) + len(LAYERS)
    assert all(one.dtype == np.float32 for one in sent.vectors.values())


def _equal(one: Material, other: Material) -> bool:
    same = one.texts == other.texts and one.vectors.keys() == other.vectors.keys()
    return same and all(np.array_equal(vector, other.vectors[name]) for name, vector in one.vectors.items())


def test_written_negatives_are_the_same_in_every_round_and_after_a_new_start(
    section: Callable[..., EpsVec], lab: Lab
) -> None:
    stage = section(negatives="", num_negatives=5).build(lab)
    first = stage.prepare(ADAPTER, (), stream(0, "prepare", 1), 1)

    assert stage.prepare(ADAPTER, (), stream(0, "prepare", 2), 2) is first  # made once
    again = section(negatives="", num_negatives=5).build(lab)
    assert _equal(again.prepare(ADAPTER, (), stream(7, "prepare", 2), 2), first)
    other = section(negatives="", num_negatives=5, negatives_seed=1).build(lab)
    assert not _equal(other.prepare(ADAPTER, (), stream(0, "prepare", 1), 1), first)
    assert not _equal(section().build(lab).prepare(ADAPTER, (), stream(0, "prepare", 1), 1), first)


def test_only_so_many_negatives_are_used(section: Callable[..., EpsVec], lab: Lab, tmp_path: Path) -> None:
    short = lines(tmp_path, "short", [{"code": c, "text": t} for n, (c, t) in enumerate(NEGATIVES) if n % 4 < 2])
    two = section(num_negatives=2).build(lab).prepare(ADAPTER, (), stream(0, "p"), 1)
    assert _equal(section(negatives=short).build(lab).prepare(ADAPTER, (), stream(0, "p"), 1), two)
    assert not _equal(section().build(lab).prepare(ADAPTER, (), stream(0, "p"), 1), two)


def test_too_few_written_negatives_end_the_round(section: Callable[..., EpsVec], frozen: FrozenModel) -> None:
    lab = _lab(frozen, 1)
    stage = section(negatives="", num_negatives=3).build(lab)
    silent = dataclasses.replace(stage, lab=FakeSilence(lab))  # type: ignore[type-var]
    with pytest.raises(RoundFailed, match="wrote 1 texts for code 'house/skin' that are not blank, and 2 are needed"):
        silent.prepare(ADAPTER, (), stream(0, "p"), 1)
    lab.close()


class FakeSilence:
    """A lab whose model writes once and then blanks."""

    def __init__(self, lab: Lab) -> None:
        self.local, self.side_by_side = lab.local, lab.side_by_side

    def local_with(self, adapter: Adapter | None, name: str) -> Any:
        class Writer:
            def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
                return ["once", *[" \n\n"] * (len(prompts) - 1)]

        return Writer()


def test_public_texts_that_are_all_the_same_have_no_scale(
    section: Callable[..., EpsVec], lab: Lab, tmp_path: Path
) -> None:
    same = lines(tmp_path, "same", [{"code": code.id, "text": "same"} for code in CODES for _ in range(2)])
    with pytest.raises(RoundFailed, match="public texts are all the same after block"):
        section(negatives=same).build(lab).prepare(ADAPTER, (), stream(0, "p"), 1)


def test_the_site_s_half_answers_what_the_server_s_half_asks(section: Callable[..., EpsVec], lab: Lab) -> None:
    stage = section().build(lab)
    found = site(lab, stage.prepare(ADAPTER, (), stream(0, "p"), 1), ["it itches"])

    assert stage.asks.kind == found.kind
    assert {name: len(vector) for name, vector in found.vectors.items()} == stage.asks.vectors


# --- from vectors to drafts


def site(lab: Lab, material: Material, texts: Sequence[str], level: float = 1e-6) -> VectorRelease:
    """Return what a site with these rows of all classes releases, with hardly any noise."""
    learner = SiteSection(kind="epsvec", layers=LAYERS).build(1)
    told = PublicConstants(sample_rate=0.5, expected_batch=4, max_tokens=24, max_rows_per_unit=1, unit="record")
    rows = [
        PrivateRow(instruction=text, output="", code=CODES[n % 3].id, unit=text) for n, text in enumerate(sorted(texts))
    ]
    bench = Workbench(
        model=lab.local, codes={}, noise=SimulatedNoise(stream(0, *texts, "n")), system="", material=material
    )
    return learner(PrivateRows(rows), ADAPTER, learner.announce(told, level), told, bench)  # type: ignore[return-value]


@settings(max_examples=40, deadline=None)
@given(drafts=st.integers(1, 20), round_number=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_draft_says_where_it_comes_from(frozen: FrozenModel, drafts: int, round_number: int, seed: int) -> None:
    stage, lab = fake(frozen, drafts=drafts)

    written = stage(voices({"a": vectors(0)}), stream(seed, "s"), round_number)

    texts = {code.id: code.text for code in CODES}
    assert [draft.origin.stream for draft in written] == [str(index) for index in range(drafts)]
    assert {(draft.origin.round, draft.origin.method, draft.origin.voice) for draft in written} == {
        (round_number, "epsvec", "")
    }
    assert [draft.origin.prompt for draft in written] == [texts[draft.origin.code] for draft in written]
    assert lab.asked[0]["prompts"] == [draft.origin.prompt for draft in written]
    assert len({draft.id for draft in written}) == drafts
    used = Counter(draft.origin.code for draft in written)
    assert max(used.values()) - min(used[code.id] for code in CODES) <= 1
    assert lab.adapters == [None]  # W_loc bare


@settings(max_examples=60, deadline=None)
@given(
    drafts=st.integers(1, 60),
    counts=st.tuples(*[st.floats(-50, 200, width=32)] * 3),
    seed=st.integers(0, 99),
)
def test_counts_share_the_drafts_out(
    frozen: FrozenModel, drafts: int, counts: tuple[float, float, float], seed: int
) -> None:
    """Every class gets its share, give or take one; one counted below zero gets none, unless nobody is above."""
    stage, _ = fake(frozen, drafts=drafts, quota="counts")

    written = stage(voices({"a": vectors(0, counts)}), stream(seed, "s"), 1)

    used = Counter(draft.origin.code for draft in written)
    total = sum(max(count, 0) for count in counts)
    assert len(written) == drafts
    for code, count in zip(CODES, counts, strict=True):
        share = drafts * max(count, 0) / total if total else drafts / 3
        assert abs(used[code.id] - share) < 1
        if total and count <= 0:
            assert not used[code.id]


def test_drafts_come_in_random_order(frozen: FrozenModel) -> None:
    stage, _ = fake(frozen, drafts=4)
    orders = {
        tuple(draft.origin.code for draft in stage(voices({"a": vectors(0)}), stream(seed, "s"), 1))
        for seed in range(20)
    }
    assert len(orders) > 5


def test_each_draft_is_pushed_along_the_sum_of_the_sites_for_its_class(frozen: FrozenModel) -> None:
    stage, lab = fake(frozen, coefficient=2.0)
    sent = {"b": vectors(1), "a": vectors(0), "c": vectors(2)}

    written = stage(voices(sent), stream(0, "s"), 1)

    assert lab.lengths == {0: 1.0, 1: 6.0}  # coefficient * scale
    for layer in LAYERS:
        assert lab.directions[layer].shape == (7, WIDTH)
        for row, draft in enumerate(written):
            expected = sum(one.vectors[f"{draft.origin.code}/{layer}"].astype(np.float64) for one in sent.values())
            assert lab.directions[layer][row] == pytest.approx(expected, rel=1e-5)


def test_sites_in_another_order_give_the_same_bits(frozen: FrozenModel) -> None:
    """Of sizes at which the order of a sum tells: large, small, and minus the large."""
    names = vectors(0).vectors
    sent = {
        site: VectorRelease(vectors={name: np.full_like(one, size) for name, one in names.items()})
        for site, size in (("a", 3e30), ("b", 1.0), ("c", -3e30))
    }
    assert (3e30 + 1.0) - 3e30 != (3e30 - 3e30) + 1.0
    found: list[bytes] = []
    for order in ("abc", "acb", "cba"):
        stage, lab = fake(frozen)
        stage(voices({site: sent[site] for site in order}), stream(0, "s"), 1)
        found.append(lab.directions[0].tobytes())
    assert found[0] == found[1] == found[2]


def test_the_sum_of_the_sites_is_the_vector_of_all_rows(section: Callable[..., EpsVec], lab: Lab) -> None:
    """Three sites with a part of the rows each, against one with all: same directions, up to the lattice."""
    sent = section().build(lab).prepare(ADAPTER, (), stream(0, "p"), 1)
    texts = ["a rash", "be well", "can I run", "dry cough", "every night", "fever", "gone now", "how long", "itches"]
    found: list[dict[int, np.ndarray]] = []
    for parts in ([texts], [texts[:3], texts[3:6], texts[6:]]):
        stage, probe = fake(lab.local, drafts=6)
        releases = {f"site-{n}": site(lab, sent, part) for n, part in enumerate(parts)}
        stage(voices(releases, sent), stream(0, "s"), 1)
        found.append(probe.directions)
    for layer in LAYERS:
        assert np.linalg.norm(found[0][layer]) > 0.1
        assert found[1][layer] == pytest.approx(found[0][layer], abs=2e-5)


def test_the_knobs_of_the_section_reach_the_model(frozen: FrozenModel) -> None:
    stage, lab = fake(frozen, max_new_tokens=9, temperature=0.5, top_p=0.25)
    stage(voices({"a": vectors(0)}), stream(0, "s"), 1)
    asked = lab.asked[0]
    assert (asked["max_new_tokens"], asked["temperature"], asked["top_p"]) == (9, 0.5, 0.25)


def test_a_draft_after_shots_ends_where_the_next_would_begin(frozen: FrozenModel) -> None:
    stage, _ = fake(frozen)
    shown = dataclasses.replace(stage, shots={code.id: ["one"] for code in CODES})
    with_shots, without = (one(voices({"a": vectors(0)}), stream(0, "s"), 1)[0] for one in (shown, stage))
    assert with_shots.instruction == without.instruction.removesuffix("\n\nA letter") != without.instruction


# --- on the tiny model


def test_the_same_generator_gives_the_same_drafts_on_any_number_of_threads(
    section: Callable[..., EpsVec], frozen: FrozenModel, lab: Lab
) -> None:
    pair = _lab(frozen, 2)
    given_voices = voices({"a": vectors(0), "b": vectors(1)})
    try:
        first = section().build(lab)(given_voices, stream(0, "s"), 1)
        assert section().build(pair)(given_voices, stream(0, "s"), 1) == first
        assert section().build(lab)(given_voices, stream(1, "s"), 1) != first
    finally:
        pair.close()


def test_vectors_move_what_is_written_and_a_coefficient_of_zero_does_not(
    section: Callable[..., EpsVec], lab: Lab
) -> None:
    def texts(coefficient: float, *releases: VectorRelease) -> list[str]:
        stage = section(coefficient=coefficient, shots="", drafts=9).build(lab)
        named = {str(n): one for n, one in enumerate(releases)}
        return [draft.instruction for draft in stage(voices(named), stream(0, "s"), 1)]

    base = texts(0.0, vectors(0))
    assert texts(0.0, vectors(5)) == base
    moved = texts(20.0, vectors(0))
    assert moved != base
    assert texts(20.0, vectors(5)) != moved
    nothing = VectorRelease(vectors={name: np.zeros_like(one) for name, one in vectors(0).vectors.items()})
    assert texts(20.0, nothing) == base  # a vector of zeros has no direction, and divides by nothing
    rng = stream(0, "s")
    drawn = section(shots="", drafts=9).build(lab)._chosen(vectors(0).vectors, rng)  # type: ignore[attr-defined]
    plain = lab.local_with(None, "x").generate(
        [code.text for code in drawn], max_new_tokens=6, temperature=0.9, top_p=0.95, rng=rng
    )
    assert base == [text.strip() for text in plain]  # coefficient 0: what the bare model writes, and nothing else


# --- refusals


@pytest.mark.parametrize(
    ("releases", "told"),
    [
        ({}, r"round 3: no site sent vectors"),
        ({"a": dataclasses.replace(vectors(0), vectors={})}, "a sent no 'house/skin/1' of 64 finite numbers"),
        (
            {
                "a": vectors(0),
                "b": VectorRelease(vectors={**vectors(0).vectors, "house/lung/0": np.ones(63, np.float32)}),
            },
            "b sent no 'house/lung/0'",
        ),
        (
            {"a": VectorRelease(vectors={**vectors(0).vectors, "house/heart/count": np.array([np.nan], np.float32)})},
            "'house/heart/count' of 1 finite",
        ),
    ],
)
def test_vectors_that_were_not_asked_for_end_the_round(frozen: FrozenModel, releases: Any, told: str) -> None:
    with pytest.raises(RoundFailed, match=told):
        fake(frozen)[0](voices(releases), stream(0, "s"), 3)


def test_no_material_ends_the_round(frozen: FrozenModel) -> None:
    with pytest.raises(RoundFailed, match="round 3: no material"):
        fake(frozen)[0](voices({"a": vectors(0)}, None), stream(0, "s"), 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"codes": "nowhere.jsonl"}, r"server\.synthesizer\.codes: no file at nowhere"),
        ({"negatives": "nowhere.jsonl"}, r"server\.synthesizer\.negatives: no file at nowhere"),
        ({"shots": "nowhere.jsonl"}, r"server\.synthesizer\.shots: no file at nowhere"),
        ({"layers": [2]}, r"layers \[2\]: name one or more of 0 to 1"),
    ],
)
def test_a_section_that_names_what_is_not_there_is_refused(
    section: Callable[..., EpsVec], lab: Lab, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigInvalid, match=told):
        section(**changes).build(lab)


def test_files_of_something_else_are_refused(section: Callable[..., EpsVec], lab: Lab, tmp_path: Path) -> None:
    stray = lines(tmp_path, "stray", [{"code": "house/knee", "text": "hm"}])
    with pytest.raises(ConfigInvalid, match=r"stray\.jsonl has a text of code 'house/knee'"):
        section(shots=stray).build(lab)
    few = lines(tmp_path, "few", [{"code": c, "text": t} for c, t in NEGATIVES[:5]])
    with pytest.raises(ConfigInvalid, match=r"has 1 texts of code 'house/lung', and needs 2"):
        section(negatives=few).build(lab)
    for row in ({"id": "x", "text": "y"}, {"code": "house/skin", "text": " "}, {"code": "house/skin"}):
        odd = lines(tmp_path, "odd", [row])
        with pytest.raises(ConfigInvalid, match=r"odd\.jsonl:1: a row needs code and text"):
            section(negatives=odd).build(lab)
