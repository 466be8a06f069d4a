"""Texts that sites wrote become drafts: every one, once, under its site's name; what is sent along is public."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.seeds import stream
from fl_app.types import (
    Adapter,
    AdapterRelease,
    CodedText,
    ControlCode,
    Draft,
    LoraFactors,
    Material,
    Origin,
    ReleaseSpec,
    TextRelease,
)
from strategies.stages import Voices
from strategies.synthesizers import AnySynthesizer
from strategies.synthesizers.released_texts import Collected

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from strategies.stages import Synthesizer

CODES = {"cough": ControlCode(id="cough", text="A cough:"), "rash": ControlCode(id="rash", text="Of a rash:")}
ADAPTER = Adapter(
    layers={"l": LoraFactors(a=np.ones((1, 2), np.float32), b=np.ones((3, 1), np.float32))}, alpha=1.0, base="base"
)
PUBLIC = tuple(CodedText(code="cough", text=f"public cough {n}") for n in range(9))


def section(**changes: Any) -> Any:
    values = {"kind": "released_texts", "codes": "", "max_texts": 8, "max_bytes": 99, **changes}
    return TypeAdapter(AnySynthesizer).validate_python(values)


def collected(**changes: Any) -> Synthesizer:
    return Collected(section=section(**changes), codes=CODES, public_texts=PUBLIC)


def voices(**sites: Sequence[tuple[str, str]]) -> Voices:
    releases = {
        site: TextRelease(texts=tuple(CodedText(code=code, text=text) for code, text in texts))
        for site, texts in sites.items()
    }
    return Voices(merged=ADAPTER, by_site={}, releases=releases)


def rng(seed: int = 0) -> np.random.Generator:
    return stream(seed, "synthesise")


def kept(code: str, text: str) -> Draft:
    return Draft(id=text, instruction=text, response="", origin=Origin(round=1, method="m", code=code, stream="0"))


def test_sites_take_turns_each_in_its_own_order() -> None:
    found = collected()(voices(brook=[("rash", "b0"), ("cough", "b1")], abbey=[("cough", " a0 ")]), rng(), 4)
    assert [draft.instruction for draft in found] == ["a0", "b0", "b1"]
    assert [draft.response for draft in found] == ["", "", ""]
    assert [draft.origin for draft in found] == [
        Origin(round=4, method="released_texts", code="cough", stream="0", prompt="A cough:", voice="abbey"),
        Origin(round=4, method="released_texts", code="rash", stream="0", prompt="Of a rash:", voice="brook"),
        Origin(round=4, method="released_texts", code="cough", stream="1", prompt="A cough:", voice="brook"),
    ]


def test_the_learner_is_named_when_it_is_known() -> None:
    (found,) = collected(learner="invisible_ink")(voices(abbey=[("cough", "a")]), rng(), 1)
    assert found.origin.method == "released_texts:invisible_ink"


TEXTS = st.lists(st.tuples(st.sampled_from(sorted(CODES)), st.sampled_from(["same", "x", "y z"])), max_size=6)


@settings(max_examples=50, deadline=None)
@given(sites=st.dictionaries(st.sampled_from(["abbey", "brook", "cliff"]), TEXTS, min_size=1), seed=st.integers(0, 9))
def test_every_text_is_one_draft_of_its_site(sites: dict[str, list[tuple[str, str]]], seed: int) -> None:
    found = collected()(voices(**sites), rng(seed), 2)
    assert found == collected()(voices(**dict(reversed(sites.items()))), rng(seed + 1), 2)
    assert len({draft.id for draft in found}) == len(found)  # alike texts are told apart by their origin
    for site, texts in sites.items():
        mine = [(draft.origin.code, draft.instruction) for draft in found if draft.origin.voice == site]
        assert mine == texts


def test_a_lone_surrogate_does_not_stop_the_round() -> None:
    (found,) = collected()(voices(abbey=[("cough", "odd \ud800 one")]), rng(), 1)
    assert found.instruction == "odd ? one"


def test_without_texts_there_is_no_round() -> None:
    silent = Voices(merged=ADAPTER, by_site={}, releases={"abbey": AdapterRelease(adapter=ADAPTER)})
    with pytest.raises(RoundFailed, match="no site released texts"):
        collected()(silent, rng(), 1)
    assert collected()(voices(abbey=[]), rng(), 1) == ()  # it wrote, and nothing came of it


def test_a_code_that_is_not_ours_is_refused() -> None:
    with pytest.raises(RoundFailed, match="'gout'"):
        collected()(voices(abbey=[("gout", "toe")]), rng(), 1)


def test_what_is_asked_of_a_site() -> None:
    assert collected().asks == ReleaseSpec(kind="text", codes=frozenset(CODES), max_texts=8, max_bytes=99)


# --- what is sent along


def test_public_texts_are_sent_as_many_as_asked_and_drawn_anew() -> None:
    made = collected(shots=3)
    sent = made.prepare(ADAPTER, (), rng(), 1)
    assert len(sent.texts) == 3
    assert len(set(sent.texts)) == 3
    assert set(sent.texts) <= set(PUBLIC)
    assert made.prepare(ADAPTER, (), rng(), 1).texts == sent.texts
    assert made.prepare(ADAPTER, (), rng(1), 1).texts != sent.texts


def test_earlier_drafts_take_their_place_only_when_asked() -> None:
    earlier = (kept("rash", "on the arm"), kept("cough", "dry"))
    assert {text.code for text in collected().prepare(ADAPTER, earlier, rng(), 2).texts} == {"cough"}
    recycled = collected(recycle=True).prepare(ADAPTER, earlier, rng(), 2)
    assert sorted(recycled.texts, key=lambda one: one.code) == [
        CodedText(code="cough", text="dry"),
        CodedText(code="rash", text="on the arm"),
    ]
    first = collected(recycle=True, shots=2).prepare(ADAPTER, earlier[:1], rng(), 2).texts
    assert [text.code for text in first] == ["cough", "cough", "rash"]  # of a code without drafts, public ones


def test_nothing_to_send_is_an_empty_material() -> None:
    made = Collected(section=section(), codes=CODES, public_texts=())
    sent = made.prepare(ADAPTER, (), rng(), 1)
    assert isinstance(sent, Material)
    assert sent.texts == ()


# --- files


def lines(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_codes_and_public_texts_come_from_files(tmp_path: Path) -> None:
    codes = lines(tmp_path / "codes.jsonl", {"id": "cough", "text": "A cough:"})
    public = lines(tmp_path / "public.jsonl", {"code": "cough", "text": "dry"})
    lab: Any = None
    made = section(codes=codes, public_texts=public).build(lab)
    assert made.asks.codes == {"cough"}
    assert made.prepare(ADAPTER, (), rng(), 1).texts == (CodedText(code="cough", text="dry"),)
    odd = lines(tmp_path / "odd.jsonl", {"code": "gout", "text": "toe"})
    with pytest.raises(ConfigInvalid, match="'gout'"):
        section(codes=codes, public_texts=odd).build(lab)
    with pytest.raises(ConfigInvalid, match="public_texts: no file"):
        section(codes=codes, public_texts=str(tmp_path / "none")).build(lab)
