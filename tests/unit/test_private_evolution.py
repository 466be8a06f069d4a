"""The server's half of Private Evolution: a population that votes keep, and that outlives the process."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from clients.learners.pe_votes import PeVotes
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import lora, lora_start, peft_files, votes
from fl_app.config import LoraSection
from fl_app.embeddings import LocalStates
from fl_app.errors import AdapterMismatch, ConfigInvalid, RoundFailed
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import (
    Adapter,
    CodedText,
    ControlCode,
    HistogramRelease,
    LoraFactors,
    Material,
    VectorRelease,
)
from strategies.lab import Lab
from strategies.stages import Voices
from strategies.synthesizers import AnySynthesizer
from strategies.synthesizers.private_evolution import Evolution, PrivateEvolution

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fl_app.models import FrozenModel

CODES = tuple(ControlCode(id=name, text=f"About the {name}:\n") for name in ("skin", "lung", "heart"))
ADAPTER = Adapter(
    layers={"l": LoraFactors(a=np.ones((1, 2), np.float32), b=np.ones((3, 1), np.float32))}, alpha=1.0, base="base"
)
OTHER = dataclasses.replace(ADAPTER)


class Writer:
    """Writes a random number after each prompt, or nothing as often as it is told to."""

    def __init__(self, lab: FakeLab, adapter: Adapter | None) -> None:
        self.lab, self.adapter = lab, adapter

    def chat(self, user: str) -> str:
        return f"<chat>{user}</chat>"

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        if prompts:
            self.lab.asked.append((self.adapter, list(prompts)))
        texts = [f" text {settings['rng'].integers(10**9)}\n" for _ in prompts]
        if self.lab.blanks:
            self.lab.blanks -= 1
            texts = ["  ", *texts[1:]]
        return texts


class FakeLab:
    """Hands out writers; `directory` None: no run directory."""

    def __init__(self, directory: Path | None = None, *, blanks: int = 0) -> None:
        self.directory = directory
        self.blanks = blanks
        self.asked: list[tuple[Adapter | None, list[str]]] = []

    def local_with(self, adapter: Adapter | None, name: str) -> Writer:
        return Writer(self, adapter)


def section(**changes: Any) -> PrivateEvolution:
    tree = {"kind": "private_evolution", "codes": "", "population": 12, "keep": 5, **changes}
    return TypeAdapter[Any](AnySynthesizer).validate_python(tree)


def evolution(lab: Any = None, *, writer: Adapter | None = None, **changes: Any) -> Evolution:
    return Evolution(section=section(**changes), lab=lab or FakeLab(), codes=CODES, writer=writer)


def ballots(material: Material, *counts: Sequence[float]) -> dict[str, HistogramRelease]:
    names = votes.bin_names(material.texts)
    return {f"site {n}": HistogramRelease(bins=names, counts=np.array(c, np.float32)) for n, c in enumerate(counts)}


def voices(material: Material, *counts: Sequence[float], **more: Any) -> Voices:
    return Voices(merged=OTHER, by_site={}, releases=ballots(material, *counts), material=material, **more)


def first(one: Evolution, seed: int = 0) -> Material:
    return one.prepare(ADAPTER, (), stream(seed, "prepare", 1), 1)


# --- the first population


@settings(max_examples=30, deadline=None)
@given(population=st.integers(2, 30), seed=st.integers(0, 50))
def test_the_first_population_has_its_size_and_uses_codes_evenly(population: int, seed: int) -> None:
    one = evolution(population=population, keep=1)

    material = first(one, seed)

    assert len(material.texts) == population == one.asks.vectors["votes"]
    counts = Counter(text.code for text in material.texts)
    assert max(counts.values()) - min(counts[code.id] for code in CODES) <= 1
    assert material.texts == first(one, seed).texts
    assert material.texts != first(one, seed + 1).texts


@pytest.mark.parametrize(("writer", "expected"), [(None, ADAPTER), (OTHER, OTHER)])
def test_the_first_texts_are_written_after_codes_by_the_target_or_the_named_writer(
    writer: Adapter | None, expected: Adapter
) -> None:
    lab = FakeLab()

    material = first(evolution(lab, writer=writer))

    ((wrote, prompts),) = lab.asked
    assert wrote is expected
    assert prompts == [{code.id: code.text for code in CODES}[text.code] for text in material.texts]


def test_a_zero_shot_opening_asks_the_bare_model() -> None:
    lab = FakeLab()

    first(evolution(lab, writer=OTHER, opening="zero_shot", describe="Write: {code}!"))

    ((wrote, prompts),) = lab.asked
    assert wrote is None
    assert set(prompts) == {f"<chat>Write: {code.text.strip()}!</chat>" for code in CODES}


def test_blank_texts_are_written_again_and_then_are_their_code() -> None:
    again, never = FakeLab(blanks=1), FakeLab(blanks=2)

    once = first(evolution(again)).texts[0]
    twice = first(evolution(never)).texts[0]

    assert [len(prompts) for _, prompts in again.asked] == [12, 1]
    assert once.text.startswith("text ")
    assert twice.text == {code.id: code.text for code in CODES}[twice.code].strip()


# --- what stays


def material_of(*codes: str) -> Material:
    return Material(texts=tuple(CodedText(code=code, text=f"{code} {n}") for n, code in enumerate(codes)))


def kept(one: Evolution, found: Voices) -> list[str]:
    drafts = one(found, stream(0, "synthesise", 1), 1)
    return [draft.instruction for draft in drafts]


def test_votes_of_all_sites_are_added_and_the_most_voted_for_stay_in_that_order() -> None:
    material = material_of("skin", "skin", "skin", "skin")
    one = evolution(population=4, keep=2)

    assert kept(one, voices(material, [0, 3, 0, 2], [4, 3, 0, -1])) == ["skin 1", "skin 0"]
    assert kept(one, voices(material, [0, 3, 0, 2])) == ["skin 1", "skin 3"], "the twin: one site alone says otherwise"


def test_a_site_may_weigh_as_its_votes_or_as_any_other() -> None:
    """A hostile site shouts for the worst text; two others agree on the first, one by 3 votes and one by 30."""
    material = material_of("skin", "skin", "skin")
    counts = [3, 1, 0], [30, 10, 0], [-1e9, 0, 1e9]

    assert kept(evolution(population=3, keep=1, weigh="votes"), voices(material, *counts)) == ["skin 2"]
    assert kept(evolution(population=3, keep=1, weigh="sites"), voices(material, *counts)) == ["skin 0"]
    silent = [0, 0, 0], [0, 1, 0]
    assert kept(evolution(population=3, keep=1, weigh="sites"), voices(material, *silent)) == ["skin 1"]


def test_quotas_by_votes_evenly_and_by_survey() -> None:
    """8 bins, 6 stay; every code keeps one, the three left go by weight: votes 1 : 8 : 3, survey 30 : 1 : 1.

    Counts below zero count: noise alone must not make a code of many bins heavy.
    """
    material = material_of(*["skin"] * 3, *["lung"] * 3, *["heart"] * 2)
    counts = [4, -3, 0, 2, 3, 3, 3, 0]
    told = VectorRelease(vectors={"codes": np.array([0.5, 0.5, 15], np.float32)})  # heart, lung, skin: by id
    surveys = {"a": told, "b": told}

    def by(quota: str) -> dict[str, int]:
        one = evolution(population=8, keep=6, quota=quota)
        found = kept(one, voices(material, counts, surveys=surveys))
        return dict(Counter(text.split()[0] for text in found))

    assert by("votes") == {"skin": 1, "lung": 3, "heart": 2}, "lung is full with two; the last goes by 1 : 3"
    assert by("even") == {"skin": 2, "lung": 2, "heart": 2}
    assert by("survey") == {"skin": 3, "lung": 2, "heart": 1}


def test_no_code_dies_out_while_there_is_room_and_one_may_when_there_is_none() -> None:
    material = material_of(*["skin"] * 4, "lung", "heart")

    roomy = kept(evolution(population=6, keep=3), voices(material, [9, 9, 9, 9, -5, -5]))
    narrow = kept(evolution(population=6, keep=2), voices(material, [9, 9, 9, 9, -5, -5]))

    assert {text.split()[0] for text in roomy} == {"skin", "lung", "heart"}
    assert {text.split()[0] for text in narrow} == {"skin"}


def test_counts_below_the_threshold_are_nothing() -> None:
    """Sampling never prefers a text below the threshold to one above it, and without the threshold it does."""
    material = material_of(*["skin"] * 4)

    def ever(threshold: float) -> set[str]:
        one = evolution(population=4, keep=2, select="sample", threshold=threshold)
        found = voices(material, [10, 6, 4, 4])
        return {draft.instruction for seed in range(60) for draft in one(found, stream(seed, "s"), 1)}

    assert ever(5.0) == {"skin 0", "skin 1"}
    assert ever(0.0) == {"skin 0", "skin 1", "skin 2", "skin 3"}


def test_drafts_carry_their_whole_provenance() -> None:
    one = evolution()
    material = first(one)

    drafts = one(voices(material, range(12)), stream(0, "synthesise", 3), 3)

    texts = {code.id: code.text for code in CODES}
    assert len(drafts) == 5
    assert {(d.origin.round, d.origin.method, d.origin.voice, d.response) for d in drafts} == {
        (3, "private_evolution", "", "")
    }
    assert [d.origin.stream for d in drafts] == list("01234")
    assert all(d.origin.prompt == texts[d.origin.code] for d in drafts)
    assert len({d.id for d in drafts}) == 5


def test_the_whole_population_may_be_what_is_emitted_and_is_what_is_sent_next(tmp_path: Path) -> None:
    lab = FakeLab(tmp_path)
    one = evolution(lab, emits="population")
    material = first(one)
    lab.asked.clear()

    drafts = one(voices(material, range(12)), stream(0, "synthesise", 1), 1)
    asked = len(lab.asked)
    after = one.prepare(ADAPTER, (), stream(0, "prepare", 2), 2)

    places = [[text.text for text in material.texts].index(d.instruction) for d in drafts[:5]]
    assert places == sorted(places, reverse=True), "what was kept comes first, most votes first"
    assert [(text.code, text.text) for text in after.texts] == [(d.origin.code, d.instruction) for d in drafts]
    assert (asked, len(lab.asked)) == (1, 1), "variations were written once"


# --- the next population


def test_the_next_population_is_what_stayed_and_equal_numbers_of_variations_of_it(tmp_path: Path) -> None:
    lab = FakeLab(tmp_path)
    one = evolution(lab)
    drafts = one(voices(first(one), range(12)), stream(0, "synthesise", 1), 1)
    lab.asked.clear()

    after = one.prepare(ADAPTER, (), stream(0, "prepare", 2), 2)

    assert len(after.texts) == 12
    assert [text.text for text in after.texts[:5]] == [d.instruction for d in drafts]
    parents = [drafts[number % 5] for number in range(7)]
    assert [text.code for text in after.texts[5:]] == [d.origin.code for d in parents]
    ((wrote, prompts),) = lab.asked
    assert wrote is ADAPTER, "the target continues its own texts"
    assert all(p.startswith(d.origin.prompt) for p, d in zip(prompts, parents, strict=True))


@pytest.mark.parametrize("kind", ["rephrase", "fill"])
def test_following_instructions_is_left_to_the_bare_model(kind: str, tmp_path: Path) -> None:
    lab = FakeLab(tmp_path)
    one = evolution(lab, writer=OTHER, variation={"kind": kind})
    one(voices(first(one), range(12)), stream(0, "synthesise", 1), 1)
    lab.asked.clear()

    one.prepare(ADAPTER, (), stream(0, "prepare", 2), 2)

    assert [wrote for wrote, _ in lab.asked] == [None]


def test_a_new_process_goes_on_where_the_old_one_stopped(tmp_path: Path) -> None:
    """The files, not the drafts that filters kept: `earlier` is empty, and a round that failed left nothing."""
    lab = FakeLab(tmp_path)
    one = evolution(lab)
    sent: dict[int, Material] = {}
    for number in (1, 2):
        material = sent[number] = one.prepare(ADAPTER, (), stream(0, "prepare", number), number)
        one(voices(material, range(12)), stream(0, "synthesise", number), number)
    expected = one.prepare(ADAPTER, (), stream(0, "prepare", 4), 4)

    resumed = evolution(FakeLab(tmp_path))

    assert resumed.prepare(ADAPTER, (), stream(0, "prepare", 4), 4).texts == expected.texts
    again = resumed.prepare(ADAPTER, (), stream(0, "prepare", 2), 2).texts
    assert again == sent[2].texts, "the round's own file is not looked at, nor a later one"
    assert again != expected.texts
    assert sorted(path.name for path in (tmp_path / "evolution").iterdir()) == ["1.jsonl", "2.jsonl"]


def test_without_a_directory_the_population_is_kept_in_memory() -> None:
    one = evolution(FakeLab())
    drafts = one(voices(first(one), range(12)), stream(0, "synthesise", 1), 1)

    after = one.prepare(ADAPTER, (), stream(0, "prepare", 2), 2)

    assert [text.text for text in after.texts[:5]] == [d.instruction for d in drafts]


# --- what is refused


def test_a_round_without_histograms_is_refused_with_the_way_out() -> None:
    one = evolution()
    material = first(one)

    with pytest.raises(RoundFailed, match=r"no histogram.*pe_votes"):
        one(Voices(merged=ADAPTER, by_site={}, material=material), stream(0, "s"), 1)
    with pytest.raises(RoundFailed, match="no population"):
        one(Voices(merged=ADAPTER, by_site={}), stream(0, "s"), 1)


@pytest.mark.parametrize("broken", ["order", "length", "counts"])
def test_votes_on_something_else_are_refused(broken: str) -> None:
    one = evolution()
    found = voices(first(one), range(12))
    right = found.releases["site 0"]
    assert isinstance(right, HistogramRelease)
    wrong = {
        "order": HistogramRelease(bins=right.bins[::-1], counts=right.counts),
        "length": HistogramRelease(bins=right.bins[:-1], counts=right.counts[:-1]),
        "counts": HistogramRelease(bins=right.bins, counts=right.counts[:-1]),
    }[broken]

    with pytest.raises(RoundFailed, match="site 0 voted on"):
        one(dataclasses.replace(found, releases={"site 0": wrong}), stream(0, "s"), 1)


def test_a_survey_is_asked_for_and_missed() -> None:
    one = evolution(quota="survey")
    material = first(one)
    short = {"a": VectorRelease(vectors={"codes": np.ones(2, np.float32)})}

    assert dict(one.asks.survey) == {"codes": 3}
    assert one.asks.codes == {"skin", "lung", "heart"}
    assert dict(evolution().asks.survey) == {}
    for surveys in ({}, short):
        with pytest.raises(RoundFailed, match=r"survey of 3 codes.*quota = \"votes\""):
            one(voices(material, range(12), surveys=surveys), stream(0, "s"), 1)


@pytest.mark.parametrize(
    "wrong", [{"keep": 12}, {"describe": "no slot"}, {"describe": "{code} {code}"}, {"variation": {"kind": "swap"}}]
)
def test_sections_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section(**wrong)


# --- on the tiny model


@pytest.fixture
def lab(frozen: FrozenModel, tmp_path: Path) -> Iterator[Lab]:
    one = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=8,
        public_words=frozenset(),
        directory=tmp_path / "run",
    )
    (tmp_path / "run").mkdir()
    yield one
    one.close()


def _written(folder: Path) -> str:
    path = folder / "codes.jsonl"
    path.write_text("".join(json.dumps({"id": code.id, "text": code.text}) + "\n" for code in CODES))
    return str(path)


def test_a_former_run_s_adapter_writes_when_it_is_named(lab: Lab, tmp_path: Path) -> None:
    spec = lora.spec_of(lab.local, LoraSection(rank=2, alpha=4.0, targets=("q_proj",)))
    target = lora_start.initial(spec, stream(0, "start"))
    bent = dataclasses.replace(
        target, layers={k: LoraFactors(a=50 * f.a, b=np.ones_like(f.b)) for k, f in target.layers.items()}
    )
    codes = _written(tmp_path)
    peft_files.save(bent, tmp_path / "merged", base_name="tiny-random")
    foreign = dataclasses.replace(bent, base="f" * 64)
    peft_files.save(foreign, tmp_path / "foreign", base_name="tiny-random")
    small: dict[str, Any] = {"codes": codes, "population": 3, "keep": 1, "max_new_tokens": 6}

    plain = section(**small).build(lab)
    named = section(**small, writer=str(tmp_path / "merged")).build(lab)

    def opening(one: Any, adapter: Adapter) -> list[str]:
        return [text.text for text in one.prepare(adapter, (), stream(0, "p"), 1).texts]

    assert opening(named, target) == opening(plain, bent) != opening(plain, target)
    with pytest.raises(ConfigInvalid, match=r"server\.synthesizer\.writer: no PEFT adapter in"):
        section(**small, writer=str(tmp_path / "nothing")).build(lab)
    with pytest.raises(AdapterMismatch):
        opening(section(**small, writer=str(tmp_path / "foreign")).build(lab), target)


# --- both halves


PRIVATE = [("skin", "zz zz zz zz"), ("lung", "zz zz 09 09"), ("heart", "09 zz 09 zz")]
WORDS = ("zz", "aa", "kk", "!!", "09", "QQ")


class Babbler(Writer):
    """Writes four random words after each prompt, fewer the more words there are."""

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        begun = [len(prompt.rpartition("\n")[2].split()) for prompt in prompts]
        return [" ".join(settings["rng"].choice(WORDS, max(1, 4 - count))) for count in begun]


class BabblingLab(FakeLab):
    def local_with(self, adapter: Adapter | None, name: str) -> Babbler:
        return Babbler(self, adapter)


def _rounds(frozen: FrozenModel, noise: float) -> list[float]:
    """Play six rounds with both halves; return how near the private texts are to what is kept of their code."""
    one = evolution(BabblingLab(), population=48, keep=6)
    learner = PeVotes(kind="pe_votes", embedder=LocalStates(kind="local")).build(1)
    rows = PrivateRows(
        [PrivateRow(instruction=text, output="", code=code, unit=str(n)) for n, (code, text) in enumerate(PRIVATE * 4)]
    )
    told = PublicConstants(sample_rate=1.0, expected_batch=4, max_tokens=64, max_rows_per_unit=1, unit="record")
    embed = LocalStates(kind="local").build(frozen)
    near: list[float] = []
    for number in range(1, 7):
        material = one.prepare(ADAPTER, (), stream(0, "prepare", number), number)
        noisy = SimulatedNoise(stream(0, "noise", number))
        bench = Workbench(model=frozen, codes={}, noise=noisy, system="", material=material)
        release = learner(rows, ADAPTER, learner.announce(told, noise), told, bench)
        found = Voices(merged=ADAPTER, by_site={}, releases={"abbey": release}, material=material)
        drafts = one(found, stream(0, "synthesise", number), number)
        near += [
            np.mean(
                [
                    float((embed([text]) @ embed([d.instruction for d in drafts if d.origin.code == code]).T).max())
                    for code, text in PRIVATE
                ]
            )
        ]
    return near


def test_over_rounds_the_population_moves_towards_the_private_texts(frozen: FrozenModel) -> None:
    """Real votes at little noise; the twin drowns them, and what it keeps is no nearer than chance."""
    heard, drowned = _rounds(frozen, 0.05), _rounds(frozen, 1000.0)

    assert heard == sorted(heard)
    assert heard[-1] > heard[0] + 0.02
    assert heard[-1] > max(drowned) + 0.1, (heard, drowned)
