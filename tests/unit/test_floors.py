"""The floors: text without any site, by a public adapter or by the bare model."""

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

from fl_app import lora, lora_start, peft_files
from fl_app.config import LoraSection
from fl_app.errors import ConfigInvalid
from fl_app.seeds import stream
from fl_app.types import Adapter, ControlCode, LoraFactors, Material, ReleaseSpec
from strategies.coded import asked_for, unquoted
from strategies.lab import Lab
from strategies.stages import Voices
from strategies.synthesizers import AnySynthesizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fl_app.models import FrozenModel
    from strategies.stages import Synthesizer

CODES = tuple(ControlCode(id=name, text=f"About the {name}:\n") for name in ("skin", "lung", "heart"))
ADAPTER = Adapter(
    layers={"l": LoraFactors(a=np.ones((1, 2), np.float32), b=np.ones((3, 1), np.float32))}, alpha=1.0, base="base"
)
KINDS = ("public_only", "zero_shot")
every_floor = pytest.mark.parametrize("kind", KINDS)


class FakeLab:
    """Models that answer with a quoted random number; remembers adapters and prompts."""

    def __init__(self) -> None:
        self.asked: list[tuple[Adapter | None, list[str], dict[str, Any]]] = []
        self._adapter: Adapter | None = None

    def local_with(self, adapter: Adapter | None, name: str) -> FakeLab:
        self._adapter = adapter
        return self

    def chat(self, user: str) -> str:
        return f"<chat>{user}</chat>"

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self.asked.append((self._adapter, list(prompts), settings))
        return [f' "text {settings["rng"].integers(10**9)}"\n' for _ in prompts]


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("codes") / "codes.jsonl"
    path.write_text("".join(json.dumps({"id": code.id, "text": code.text}) + "\n" for code in CODES))
    return str(path)


def build(kind: str, codes: str, lab: Any, **changes: Any) -> Synthesizer:
    tree = {"kind": kind, "codes": codes, "drafts": 7, **changes}
    section: Any = TypeAdapter(AnySynthesizer).validate_python(tree)
    assert section.voices == "merged"
    return section.build(lab)


def write(one: Synthesizer, seed: int = 0, round_number: int = 1) -> Any:
    return one(Voices(merged=ADAPTER, by_site={}), stream(seed, "synthesise", round_number), round_number)


@every_floor
def test_no_site_is_asked_for_anything(kind: str, codes: str) -> None:
    lab = FakeLab()
    one = build(kind, codes, lab)

    assert one.asks == ReleaseSpec(kind=None)
    material = one.prepare(ADAPTER, (), stream(0, "prepare", 1), 1)
    assert (material.texts, dict(material.vectors)) == (Material().texts, {})
    assert not lab.asked


@every_floor
@settings(max_examples=30, deadline=None)
@given(drafts=st.integers(1, 20), number=st.integers(1, 9), seed=st.integers(0, 99))
def test_drafts_are_even_over_codes_and_say_where_they_come_from(
    kind: str, codes: str, drafts: int, number: int, seed: int
) -> None:
    one = build(kind, codes, FakeLab(), drafts=drafts)

    written = write(one, seed, number)

    texts = {code.id: code.text for code in CODES}
    assert len(written) == drafts
    assert {(d.origin.round, d.origin.method, d.origin.voice) for d in written} == {(number, kind, "")}
    assert [d.origin.stream for d in written] == [str(n) for n in range(drafts)]
    assert all(d.origin.prompt == texts[d.origin.code] and d.response == "" for d in written)
    counts = Counter(d.origin.code for d in written)
    assert max(counts.values()) - min(counts[code.id] for code in CODES) <= 1
    assert [d.id for d in written] == [d.id for d in write(one, seed, number)]
    assert [d.instruction for d in written] != [d.instruction for d in write(one, seed + 1, number)]


def test_the_target_writes_after_codes_without_a_writer(codes: str) -> None:
    lab = FakeLab()

    written = write(build("public_only", codes, lab, max_new_tokens=9, temperature=0.5, top_p=0.25))

    ((wrote, prompts, settings),) = lab.asked
    assert wrote is ADAPTER
    assert prompts == [d.origin.prompt for d in written]
    assert (settings["max_new_tokens"], settings["temperature"], settings["top_p"]) == (9, 0.5, 0.25)


def test_the_bare_model_is_asked_in_chat_form_with_the_same_public_shots(codes: str) -> None:
    lab = FakeLab()

    written = write(build("zero_shot", codes, lab, template="Write {code} Now.", shots=["one", "two"]))

    ((wrote, prompts, _),) = lab.asked
    assert wrote is None
    assert prompts == [
        f"<chat>Write {d.origin.prompt.strip()} Now.\n\nExample: one\n\nExample: two</chat>" for d in written
    ]
    assert all(d.instruction.startswith("text ") for d in written), "without the quotes around it"


def test_braces_of_a_code_or_a_template_are_taken_literally() -> None:
    lab: Any = FakeLab()

    prompt = asked_for(lab, ControlCode(id="x", text="{0} {text}\n"), "{a} {code} {}")

    assert prompt == "<chat>{a} {0} {text} {}</chat>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (' "Yes." ', "Yes."),
        ("\u201cYes.\u201d", "Yes."),
        ("'tis so", "'tis so"),
        ('"A" and "B"', '"A" and "B"'),
        ('"', '"'),
        ("", ""),
    ],
)
def test_one_pair_of_quotes_goes(text: str, expected: str) -> None:
    assert unquoted(text) == expected


@pytest.mark.parametrize("template", ["none", "{code} {code}"])
def test_a_template_without_its_slot_is_refused(template: str, codes: str) -> None:
    with pytest.raises(ValidationError, match="exactly once"):
        build("zero_shot", codes, FakeLab(), template=template)


@every_floor
def test_missing_codes_are_refused(kind: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"server\.synthesizer\.codes: no file"):
        build(kind, "/nowhere/codes.jsonl", FakeLab())


# --- on the tiny model


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


def test_a_named_writer_writes_whatever_the_target_is_and_the_bare_model_looks_at_neither(
    lab: Lab, codes: str, tmp_path: Path
) -> None:
    target = lora_start.initial(
        lora.spec_of(lab.local, LoraSection(rank=2, alpha=4.0, targets=("q_proj",))), stream(0, "a")
    )
    bent = dataclasses.replace(
        target, layers={k: LoraFactors(a=50 * f.a, b=np.ones_like(f.b)) for k, f in target.layers.items()}
    )
    peft_files.save(bent, tmp_path / "start", base_name="tiny-random")

    def texts(adapter: Adapter, kind: str, **changes: Any) -> list[str]:
        one = build(kind, codes, lab, drafts=3, max_new_tokens=6, **changes)
        drafts = one(Voices(merged=adapter, by_site={}), stream(0, "s"), 1)
        return [draft.instruction for draft in drafts]

    named = {"writer": str(tmp_path / "start")}
    assert texts(target, "public_only", **named) == texts(bent, "public_only") != texts(target, "public_only")
    assert texts(target, "zero_shot") == texts(bent, "zero_shot")
    with pytest.raises(ConfigInvalid, match=r"server\.synthesizer\.writer"):
        texts(target, "public_only", writer=str(tmp_path / "nothing"))
