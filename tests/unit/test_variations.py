"""Variations: what a model is asked, what is made of its answer, and that a text never gets lost."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.seeds import stream
from fl_app.types import CodedText
from strategies.variations import TONES, VariationSection

if TYPE_CHECKING:
    from collections.abc import Sequence

CODES = {"skin": "About the skin:\n", "lung": "About the lung:\n"}
WORDS = ["my", "skin", "is", "red", "and", "it", "itches", "at", "night", "what", "can", "I", "do"]
PARENT = CodedText(code="skin", text=" ".join(WORDS))


class Writer:
    """Answers every prompt with the same text, and remembers the prompts."""

    name = "writer"

    def __init__(self, answer: str = " new words") -> None:
        self.answer = answer
        self.prompts: list[str] = []
        self.settings: dict[str, Any] = {}

    def chat(self, user: str) -> str:
        return f"<chat>{user}</chat>"

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self.prompts = list(prompts)
        self.settings = settings
        return [self.answer for _ in prompts]

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> Any:
        raise AssertionError


def vary(writer: Writer, parents: Sequence[CodedText], seed: int = 0, **changes: Any) -> list[CodedText]:
    return VariationSection(**changes).vary(writer, parents, CODES, stream(seed, "vary"))


@settings(max_examples=60, deadline=None)
@given(text=st.text("abc \n", max_size=30), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_continue_keeps_a_beginning_and_never_all(text: str, share: float, seed: int) -> None:
    writer, parent = Writer(), CodedText(code="skin", text=text)

    (found,) = vary(writer, [parent], seed, kind="continue", mask_share=share)

    kept = writer.prompts[0].removeprefix(CODES["skin"]).split()
    words = text.split()
    assert writer.prompts[0].startswith(CODES["skin"])
    assert kept == words[: len(kept)]
    assert len(kept) < max(1, len(words))
    assert found == CodedText(code="skin", text=" ".join([*kept, "new words"]))


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_share_that_is_given_up_is_the_configured_one(share: float) -> None:
    """300 texts of 40 words: mean share within 4 standard errors, (0.2 * 0.8 / 12,000)^.5 = 0.0037 each."""
    writer, parent = Writer(), CodedText(code="lung", text="word " * 40)

    vary(writer, [parent] * 300, kind="continue", mask_share=share)
    kept = sum(prompt.count("word") for prompt in writer.prompts)
    vary(writer, [parent] * 300, kind="fill", mask_share=share)
    blanks = sum(len(re.findall(r"(?<= )_(?= |<)", prompt.partition("Message:")[2])) for prompt in writer.prompts)

    assert kept / 12_000 == pytest.approx(1 - share, abs=4 * 0.0037)
    assert blanks / 12_000 == pytest.approx(share, abs=4 * 0.0037)


def test_rephrase_and_fill_ask_in_chat_form_for_about_the_own_length() -> None:
    for kind in ("rephrase", "fill"):
        writer = Writer('"A new message."\n\nAnd a remark.')

        found = vary(writer, [PARENT] * 40, kind=kind, length_std=3.0)

        assert all(prompt.startswith("<chat>") and prompt.endswith("</chat>") for prompt in writer.prompts)
        asked = [int(re.findall(r"about (\d+) words", prompt)[0]) for prompt in writer.prompts]
        assert len(set(asked)) > 3
        assert sum(asked) / 40 == pytest.approx(len(WORDS), abs=4 * 3 / 40**0.5)
        assert {one.text for one in found} == {"A new message."}
        assert {one.code for one in found} == {"skin"}


def test_rephrasing_uses_every_tone_and_the_whole_text() -> None:
    writer = Writer()

    vary(writer, [PARENT] * 100, kind="rephrase")

    assert all(PARENT.text in prompt for prompt in writer.prompts)
    assert {tone for tone in TONES if any(f"in a {tone} tone" in prompt for prompt in writer.prompts)} == set(TONES)


def test_without_noise_the_asked_length_is_the_own_one() -> None:
    writer = Writer()

    vary(writer, [PARENT], kind="rephrase", length_std=0.0)

    assert f"about {len(WORDS)} words" in writer.prompts[0]


@pytest.mark.parametrize("kind", ["continue", "rephrase", "fill"])
def test_where_the_model_writes_nothing_the_parent_stays(kind: str) -> None:
    assert vary(Writer("  \n\n "), [PARENT] * 20, kind=kind) == [PARENT] * 20


def test_parents_keep_their_codes_and_their_order_and_may_repeat() -> None:
    parents = [PARENT, CodedText(code="lung", text="a b c d e f g h i j k"), PARENT]

    found = vary(Writer(), parents)

    assert [one.code for one in found] == ["skin", "lung", "skin"]
    assert len({one.text for one in vary(Writer(), [PARENT] * 20)}) > 3


def test_the_sampling_keys_reach_the_model() -> None:
    writer = Writer()

    vary(writer, [PARENT], max_new_tokens=7, temperature=0.3, top_p=0.2)

    assert {key: writer.settings[key] for key in ("max_new_tokens", "temperature", "top_p")} == {
        "max_new_tokens": 7,
        "temperature": 0.3,
        "top_p": 0.2,
    }
