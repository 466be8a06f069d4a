"""Every synthesizer keeps the promises of `strategies.stages.Synthesizer`, and asks with public text alone.

With voices = "each_site" every release that was used writes its share, and nobody writes in another's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import lora, lora_start
from fl_app.config import LoraSection
from fl_app.errors import ConfigInvalid, RoundFailed, StillroomError
from fl_app.seeds import stream
from fl_app.types import Adapter, ControlCode, Draft, LoraFactors
from strategies.coded import read_codes
from strategies.lab import Lab
from strategies.stages import Voices
from strategies.synthesizers import AnySynthesizer
from strategies.synthesizers.control_codes import CodedSampling, ControlCodes
from strategies.synthesizers.epsvec import EpsVec
from strategies.synthesizers.private_evolution import PrivateEvolution
from strategies.synthesizers.public_only import PublicOnly
from strategies.synthesizers.released_texts import ReleasedTexts
from strategies.synthesizers.zero_shot import ZeroShot

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fl_app.models import FrozenModel

CODES = tuple(ControlCode(id=f"house/{name}", text=f"A letter about {name}:\n") for name in ("skin", "lung", "heart"))
ADAPTER = Adapter(
    layers={"l": LoraFactors(a=np.ones((1, 2), np.float32), b=np.ones((3, 1), np.float32))}, alpha=1.0, base="base"
)
MERGED = Voices(merged=ADAPTER, by_site={})
SITES = ("abbey", "brook", "cliff", "delta", "fjord")


class FakeWriter:
    """Writes a random number after each prompt, and remembers what it was asked."""

    def __init__(self, asked: list[dict[str, Any]]) -> None:
        self._asked = asked

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self._asked.append({"prompts": list(prompts), **settings})
        return [f"  text {settings['rng'].integers(10**9)}\n" for _ in prompts]


class FakeRows:
    """Writes after each prompt a number that only its adapter's share of the stream decides."""

    def __init__(self, asked: list[dict[str, Any]]) -> None:
        self._asked = asked

    def generate(self, prompts: Sequence[str], voices: Sequence[str], **settings: Any) -> list[str]:
        self._asked.append({"prompts": list(prompts), "voices": list(voices), **settings})
        return [f"  text {settings['rng'].integers(10**9)}\n" for _ in prompts]


class FakeLab:
    """Hands out the writers, and remembers for which adapters."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.adapters: list[Adapter | None] = []
        self.names: list[str] = []
        self.rows: list[dict[str, Adapter]] = []

    def local_with(self, adapter: Adapter | None, name: str) -> FakeWriter:
        self.adapters.append(adapter)
        self.names.append(name)
        return FakeWriter(self.asked)

    def local_with_rows(self, adapters: dict[str, Adapter]) -> FakeRows:
        self.rows.append(dict(adapters))
        return FakeRows(self.asked)


def _section(**changes: Any) -> ControlCodes:
    return ControlCodes(**{"kind": "control_codes", "codes": "", "drafts": 7, **changes})


def _sampling(lab: Any, **changes: Any) -> CodedSampling:
    return CodedSampling(section=_section(**changes), lab=lab, codes=CODES)


def _write_codes(folder: Path) -> Path:
    path = folder / "codes.jsonl"
    path.write_text("".join(json.dumps({"id": code.id, "text": code.text}) + "\n" for code in CODES))
    return path


@pytest.fixture(scope="module")
def lab(frozen: FrozenModel) -> Iterator[Lab]:
    one = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=4,
        public_words=frozenset(),
    )
    yield one
    one.close()


@pytest.fixture(scope="module")
def adapter(lab: Lab) -> Adapter:
    section = LoraSection(rank=2, alpha=4.0, targets=("q_proj",))
    return lora_start.initial(lora.spec_of(lab.local, section), stream(0, "start"))


def test_the_union_is_what_these_tests_are_run_on() -> None:
    """The other members have files of their own."""
    members: tuple[Any, ...] = get_args(get_args(AnySynthesizer)[0])

    assert members == (ControlCodes, ReleasedTexts, EpsVec, PrivateEvolution, PublicOnly, ZeroShot)


# --- on the tiny model


def test_the_same_generator_gives_the_same_drafts(lab: Lab, adapter: Adapter, tmp_path: Path) -> None:
    write = _section(codes=str(_write_codes(tmp_path)), max_new_tokens=6).build(lab)

    voices = Voices(merged=adapter, by_site={})
    drafts = write(voices, stream(0, "synthesise", 1), 1)

    assert drafts == write(voices, stream(0, "synthesise", 1), 1)
    other = write(voices, stream(1, "synthesise", 1), 1)
    assert [draft.instruction for draft in drafts] != [draft.instruction for draft in other]


def test_the_adapter_is_the_one_that_writes(lab: Lab, adapter: Adapter, tmp_path: Path) -> None:
    """The twin of the test above: same generator, an adapter that bends the model, other drafts."""
    write = _section(codes=str(_write_codes(tmp_path)), max_new_tokens=6).build(lab)
    bent = dataclasses.replace(
        adapter, layers={k: LoraFactors(a=50 * f.a, b=np.ones_like(f.b)) for k, f in adapter.layers.items()}
    )

    drafts = [write(Voices(merged=one, by_site={}), stream(0, "synthesise", 1), 1) for one in (adapter, bent)]

    assert [draft.instruction for draft in drafts[0]] != [draft.instruction for draft in drafts[1]]


# --- provenance, codes, prompts


@settings(max_examples=40, deadline=None)
@given(drafts=st.integers(1, 20), round_number=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_draft_says_where_it_comes_from(drafts: int, round_number: int, seed: int) -> None:
    written = _sampling(FakeLab(), drafts=drafts)(MERGED, stream(seed, "synthesise", round_number), round_number)

    assert len(written) == drafts
    assert all(isinstance(draft, Draft) and draft.id and draft.response == "" for draft in written)
    assert {(draft.origin.round, draft.origin.method) for draft in written} == {(round_number, "control_codes")}
    assert {draft.origin.code for draft in written} <= {code.id for code in CODES}
    assert [draft.origin.stream for draft in written] == [str(index) for index in range(drafts)]
    assert len({draft.id for draft in written}) == drafts


@settings(max_examples=40, deadline=None)
@given(drafts=st.integers(1, 20), seed=st.integers(0, 99))
def test_codes_are_used_evenly(drafts: int, seed: int) -> None:
    written = _sampling(FakeLab(), drafts=drafts)(MERGED, stream(seed, "synthesise", 1), 1)

    counts = Counter(draft.origin.code for draft in written)
    used = [counts[code.id] for code in CODES]
    assert max(used) - min(used) <= 1


def test_codes_are_not_always_used_in_the_order_of_the_file() -> None:
    orders = {
        tuple(draft.origin.code for draft in _sampling(FakeLab(), drafts=3)(MERGED, stream(seed, "s"), 1))
        for seed in range(20)
    }

    assert len(orders) > 1


def test_equal_texts_of_two_rounds_have_different_ids() -> None:
    write = _sampling(FakeLab())

    first, second = write(MERGED, stream(0, "s"), 1), write(MERGED, stream(0, "s"), 2)

    assert [draft.instruction for draft in first] == [draft.instruction for draft in second]
    assert not {draft.id for draft in first} & {draft.id for draft in second}


@settings(max_examples=20, deadline=None)
@given(drafts=st.integers(1, 20))
def test_a_prompt_is_the_text_of_a_control_code_and_nothing_else(drafts: int) -> None:
    lab = FakeLab()

    written = _sampling(lab, drafts=drafts)(MERGED, stream(0, "s"), 1)

    texts = {code.id: code.text for code in CODES}
    assert len(lab.asked) == 1
    assert lab.asked[0]["prompts"] == [texts[draft.origin.code] for draft in written]
    assert lab.adapters == [ADAPTER]


def test_the_knobs_of_the_section_reach_the_model() -> None:
    lab = FakeLab()

    _sampling(lab, max_new_tokens=9, temperature=0.5, top_p=0.25)(MERGED, stream(0, "s"), 1)

    assert {key: lab.asked[0][key] for key in ("max_new_tokens", "temperature", "top_p")} == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.25,
    }


def test_a_draft_has_no_blanks_around_it() -> None:
    assert all(draft.instruction.startswith("text ") for draft in _sampling(FakeLab())(MERGED, stream(0, "s"), 1))


def test_drafts_of_the_merged_adapter_are_what_they_were_before_there_were_voices() -> None:
    """Ids cover codes, order, numbers and texts; these were written by the code of commit 422860b."""
    written = _sampling(FakeLab())(MERGED, stream(3, "synthesise", 2), 2)

    assert [draft.id for draft in written] == [
        "241028a6f6c35a62",
        "2582770c211eec43",
        "cac7e1f6cc2fe273",
        "65e440ed0175b409",
        "1465f36315a175d0",
        "3aab8121e8dee395",
        "5b05958562404e2b",
    ]
    assert {draft.origin.voice for draft in written} == {""}


# --- each site writes


def _voices(*sites: str) -> Voices:
    """Return voices whose adapters can be told apart, handed over in no order."""
    return Voices(merged=ADAPTER, by_site={site: dataclasses.replace(ADAPTER) for site in reversed(sites)})


@settings(max_examples=60, deadline=None)
@given(drafts=st.integers(1, 40), sites=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_site_writes_an_equal_share_and_the_first_names_the_rest(drafts: int, sites: int, seed: int) -> None:
    write = _sampling(FakeLab(), drafts=drafts, voices="each_site")

    written = write(_voices(*SITES[:sites]), stream(seed, "s"), 1)

    counts = Counter(draft.origin.voice for draft in written)
    expected = {site: drafts // sites + (index < drafts % sites) for index, site in enumerate(SITES[:sites])}
    assert counts == {site: count for site, count in expected.items() if count}
    assert [draft.origin.stream for draft in written] == [str(index) for index in range(drafts)]
    assert [draft.origin.voice for draft in written] == [SITES[index % sites] for index in range(drafts)]
    assert len({draft.id for draft in written}) == drafts


@settings(max_examples=40, deadline=None)
@given(drafts=st.integers(1, 60), sites=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_site_and_all_together_use_codes_evenly(drafts: int, sites: int, seed: int) -> None:
    written = _sampling(FakeLab(), drafts=drafts, voices="each_site")(_voices(*SITES[:sites]), stream(seed, "s"), 1)

    together = Counter(draft.origin.code for draft in written)
    assert max(together.values()) - min(together[code.id] for code in CODES) <= 1
    for site in SITES[:sites]:
        own = Counter(draft.origin.code for draft in written if draft.origin.voice == site)
        assert max(own.values(), default=0) - min(own[code.id] for code in CODES) <= 2


def test_a_site_s_drafts_are_written_by_its_own_release_and_all_sites_write_at_once() -> None:
    lab, voices = FakeLab(), _voices(*SITES[:3])

    written = _sampling(lab, voices="each_site")(voices, stream(0, "s"), 1)

    (adapters,), (asked,) = lab.rows, lab.asked
    assert list(adapters) == list(SITES[:3])
    assert all(adapters[site] is voices.by_site[site] for site in SITES[:3])
    assert asked["voices"] == [draft.origin.voice for draft in written]
    texts = {code.id: code.text for code in CODES}
    assert asked["prompts"] == [texts[draft.origin.code] for draft in written]
    assert not lab.adapters


def test_a_site_without_a_share_is_not_put_on_the_model() -> None:
    lab = FakeLab()

    written = _sampling(lab, drafts=2, voices="each_site")(_voices(*SITES), stream(0, "s"), 1)

    assert [list(adapters) for adapters in lab.rows] == [["abbey", "brook"]]
    assert len(written) == 2


def test_each_site_has_the_codes_that_it_had_when_sites_wrote_one_after_another() -> None:
    """A site's run of the shuffled codes, dealt to its places; written by hand for seven drafts of three sites."""
    order = [code for seed in (stream(3, "s"),) for _ in range(3) for code in seed.permutation(len(CODES))][:7]

    written = _sampling(FakeLab(), voices="each_site")(_voices(*SITES[:3]), stream(3, "s"), 1)

    abbey, brook, cliff = order[:3], order[3:5], order[5:7]
    dealt = [abbey[0], brook[0], cliff[0], abbey[1], brook[1], cliff[1], abbey[2]]
    assert [draft.origin.code for draft in written] == [CODES[code].id for code in dealt]


def test_equal_texts_of_two_sites_have_different_ids() -> None:
    drafts = [
        _sampling(FakeLab(), drafts=1, voices="each_site")(_voices(site), stream(0, "s"), 1)[0] for site in SITES[:2]
    ]

    assert drafts[0].instruction == drafts[1].instruction
    assert drafts[0].id != drafts[1].id


def test_each_site_on_the_tiny_model(lab: Lab, adapter: Adapter, tmp_path: Path) -> None:
    """Same generator, same drafts; and a site whose release is another one changes its own drafts alone."""
    write = _section(codes=str(_write_codes(tmp_path)), max_new_tokens=6, drafts=9, voices="each_site").build(lab)
    bent = dataclasses.replace(
        adapter, layers={k: LoraFactors(a=50 * f.a, b=np.ones_like(f.b)) for k, f in adapter.layers.items()}
    )
    clean = Voices(merged=adapter, by_site=dict.fromkeys(SITES[:3], adapter))

    drafts = write(clean, stream(0, "synthesise", 1), 1)
    attacked = write(Voices(merged=bent, by_site={**clean.by_site, "brook": bent}), stream(0, "synthesise", 1), 1)

    assert drafts == write(clean, stream(0, "synthesise", 1), 1)
    changed = {one.origin.voice for one, other in zip(drafts, attacked, strict=True) if one != other}
    assert changed == {"brook"}


def test_no_release_to_write_with_is_refused() -> None:
    with pytest.raises(RoundFailed, match=r'round 4: .*"each_site", and no single release may write.*"merged"'):
        _sampling(FakeLab(), voices="each_site")(MERGED, stream(0, "s"), 4)


# --- the file of codes


def test_codes_are_read_from_the_file(tmp_path: Path) -> None:
    assert read_codes(_write_codes(tmp_path)) == CODES


def test_no_file_of_codes_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"

    with pytest.raises(ConfigInvalid, match=r"server\.synthesizer\.codes: no file at .*nowhere\.jsonl"):
        _section(codes=str(missing)).build(FakeLab())  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_of_codes_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text(content)

    with pytest.raises(ConfigInvalid, match=r"codes\.jsonl holds no control code"):
        _section(codes=str(path)).build(FakeLab())  # type: ignore[arg-type]


@pytest.mark.parametrize("line", ['{"id": "skin"}', '{"text": "A letter:"}', '{"id": "skin", "text": 3}'])
def test_a_line_that_is_no_code_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text(f'{{"id": "lung", "text": "On lungs:"}}\n\n{line}\n')

    with pytest.raises(ConfigInvalid, match=r"codes\.jsonl:3: a control code needs id and text"):
        read_codes(path)


def test_a_code_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text('{"id": "lung", "text": "On lungs:"}\n{"id": "lung", "text": "On skin:"}\n')

    with pytest.raises(ConfigInvalid, match="lung"):
        read_codes(path)


def test_a_torn_file_of_codes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_text('{"id": "lung", "te')

    with pytest.raises(StillroomError, match=r"codes\.jsonl:1"):
        read_codes(path)
