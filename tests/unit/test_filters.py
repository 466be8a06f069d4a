"""Filters on cases worked out by hand, and the fast duplicate search against the plain one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu

from fl_app import text
from fl_app.errors import ConfigInvalid
from fl_app.types import Draft, Origin, Screened
from strategies.filters.domain import Domain
from strategies.filters.length import Length
from strategies.filters.near_duplicate import NearDuplicate
from strategies.filters.pii import Pii, PiiFilter

if TYPE_CHECKING:
    from collections.abc import Sequence


def draft(number: int | str, instruction: str, response: str = "", code: str = "c") -> Draft:
    origin = Origin(round=1, method="m", code=code, stream=str(number))
    return Draft(id=f"d{number}", instruction=instruction, response=response, origin=origin)


class _Lab:
    public_words = frozenset(
        {"the", "harbour", "house", "clinic", "customer", "service", "spanish", "crohn", "disease"}
    )
    professional: Any = None


# length


def length_reason(instruction: str, *, code: str = "c", **options: Any) -> str:
    stage = Length(kind="length", **options).build(_Lab())
    return stage([draft(0, instruction, code=code)], []).dropped.get("d0", "")


@pytest.mark.parametrize(
    ("instruction", "options", "reason"),
    [
        ("How much syrup daily?", {}, "length: 4 words < 5"),
        ("How much of it daily?", {}, ""),
        ("one two three four five six", {"max_words": 5}, "length: 6 words > 5"),
        ("take it at night and take it at night and take it at night", {}, "loop: 4 words repeated 3 times"),
        ("take it at night and take it at night please", {}, ""),
        ("what helps against a \x07 bad cough", {}, "unprintable: a control or replacement character"),
        ("what helps against a \u200bbad cough", {}, "unprintable: a control or replacement character"),
        ("what helps against\n\ta bad cough", {}, ""),
        ("### Instruction: what helps against cough", {}, "echo: a control code or template mark"),
        ("what helps against cough <|im_end|> now", {}, "echo: a control code or template mark"),
        (
            "Letter to the farm house about cough",
            {"echoes": ["letter to the"]},
            "echo: a control code or template mark",
        ),
        ("my cough lasts since last week", {"require_question": True}, "no question: nothing is asked"),
        ("please say something about my cough", {"require_question": True}, ""),
        ("what helps against a bad cou", {"require_end": True}, "unfinished: no sentence end"),
        ('she said "what helps against it?"', {"require_end": True}, ""),
    ],
)
def test_length(instruction: str, options: dict[str, Any], reason: str) -> None:
    assert length_reason(instruction, **options) == reason


def test_length_knows_the_drafts_own_code_unless_it_is_a_word() -> None:
    assert length_reason("farm/cough/dose what helps against it", code="farm/cough/dose").startswith("echo")
    assert length_reason("what helps against a bad cough", code="cough") == ""


def test_length_refuses_an_empty_range() -> None:
    with pytest.raises(ValidationError, match="nothing would be kept"):
        Length(kind="length", min_words=9, max_words=8)
    with pytest.raises(ValidationError, match="empty text"):
        Length(kind="length", echoes=[""])


# near_duplicate


def near(drafts: Sequence[Draft], earlier: Sequence[Draft], **options: float) -> Screened:
    return NearDuplicate(kind="near_duplicate", **options).build(_Lab())(drafts, earlier)


def test_near_duplicate_by_hand() -> None:
    # 5 of 6 words in common, in order: F1 = 2 * 5 / (6 + 6) = 0.833
    drafts = [draft(0, "what helps against a bad cough"), draft(1, "what helps against a dry cough")]
    result = near(drafts, [], max_bleu=1.0)
    assert [one.id for one in result.kept] == ["d0"]
    assert result.dropped == {"d1": "near_duplicate: rouge_l 0.83 with d0"}
    assert not near(drafts, [], max_rouge_l=0.84, max_bleu=1.0).dropped


def test_near_duplicate_names_the_closest() -> None:
    earlier = [draft("a", "what helps against a dry cough"), draft("b", "what helps against one bad cough at night")]
    result = near([draft(0, "what helps against one bad cough at noon")], earlier)
    assert result.dropped == {"d0": "near_duplicate: rouge_l 0.88 with db"}  # 7 of 8 words


def test_near_duplicate_by_bleu_alone() -> None:
    # The two halves change places: ROUGE-L sees one half only, 5 of 10 words; BLEU sees all words, 8 of 9 bigrams,
    # 6 of 8 trigrams and 4 of 7 runs of four: (8/9 * 6/8 * 4/7) ** (1/4) = 0.785.
    one, two = "a b c d e", "f g h i j"
    result = near([draft(0, f"{one} {two}"), draft(1, f"{two} {one}")], [])
    assert result.dropped == {"d1": "near_duplicate: bleu 0.79 with d0"}
    assert math.isclose((8 / 9 * 6 / 8 * 4 / 7) ** 0.25, 0.785, abs_tol=1e-3)


def test_near_duplicate_sees_case_and_marks_as_nothing_and_wordless_texts_as_equal() -> None:
    result = near([draft(0, "What helps?"), draft(1, "what, helps!"), draft(2, "?"), draft(3, "...")], [])
    assert result.dropped == {
        "d1": "near_duplicate: same words 1.00 with d0",
        "d3": "near_duplicate: same words 1.00 with d2",
    }


def test_a_dropped_draft_does_not_drop_others() -> None:
    texts = ["a b c d e f g h", "a b c d e f x y", "a b c d z w x y"]  # each shares 6, the outer two share 4 of 8
    result = near([draft(i, one) for i, one in enumerate(texts)], [], max_rouge_l=0.7, max_bleu=1.0)
    assert [one.id for one in result.kept] == ["d0", "d2"]


class _OurWords:
    def tokenize(self, passage: str) -> list[str]:
        return text.words(passage)


SCORER = RougeScorer(["rougeL"], tokenizer=_OurWords())


def plainly_kept(drafts: Sequence[Draft], earlier: Sequence[Draft], max_rouge_l: float, max_bleu: float) -> list[str]:
    """Return what the definition keeps: every pair, measured by the libraries."""
    kept = list(earlier)
    for one in drafts:
        own = text.words(one.instruction)
        for other in kept:
            theirs = text.words(other.instruction)
            rouge = SCORER.score(other.instruction, one.instruction)["rougeL"].fmeasure
            bleu = sentence_bleu(" ".join(own), [" ".join(theirs)], tokenize="none").score / 100
            if own == theirs or rouge > max_rouge_l or bleu > max_bleu:
                break
        else:
            kept.append(one)
    return [one.id for one in kept[len(earlier) :]]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.lists(st.sampled_from("abcdef"), max_size=9).map(" ".join), min_size=1, max_size=8),
    split=st.integers(0, 4),
    max_rouge_l=st.sampled_from([0.0, 0.31, 0.52, 0.71, 1.0]),
    max_bleu=st.sampled_from([0.0, 0.23, 0.41, 0.61, 1.0]),
)
def test_the_fast_search_finds_what_the_libraries_find(
    texts: list[str], split: int, max_rouge_l: float, max_bleu: float
) -> None:
    drafts = [draft(i, one) for i, one in enumerate(texts)]
    earlier, batch = drafts[:split], drafts[split:]
    result = near(batch, earlier, max_rouge_l=max_rouge_l, max_bleu=max_bleu)
    assert [one.id for one in result.kept] == plainly_kept(batch, earlier, max_rouge_l, max_bleu)


def test_near_duplicate_is_fast_enough_for_a_round() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    share = 1 / np.arange(1, 3001)
    drafts = [draft(i, " ".join(rng.choice(vocabulary, 50, p=share / share.sum()))) for i in range(2300)]
    start = time.process_time()
    result = near(drafts[2000:], drafts[:2000])
    assert time.process_time() - start < 5  # measured 0.5 s
    assert len(result.kept) == 300


# domain


@dataclass(frozen=True)
class _FakeLikelihood:
    log_prob: float
    tokens: int = 1
    bytes: int = 3


class _Judge:
    """Says the odds of a table; remembers what it was asked."""

    name = "judge"

    def __init__(self, odds: dict[str, float]) -> None:
        self.odds = odds
        self.prompts: list[str] = []

    def chat(self, user: str) -> str:
        return f"<{user}>"

    def option_likelihood(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]]
    ) -> list[list[_FakeLikelihood]]:
        self.prompts += prompts
        assert all(list(row) == ["yes", "no"] for row in options)
        return [[_FakeLikelihood(self.odds[p] - 3), _FakeLikelihood(-3.0)] for p in prompts]


def test_domain_keeps_what_is_above_the_threshold() -> None:
    judge = _Judge({"<A {x} or B? {q}>": 0.5, "<A {x} or B? tax>": -1.234, "<A {x} or B? nan>": math.nan})
    lab = _Lab()
    lab.professional = judge
    section = Domain(kind="domain", question="A {x} or B? {text}")
    result = section.build(lab)([draft(0, "{q}"), draft(1, "tax"), draft(2, "nan")], [draft(3, "earlier")])
    assert [one.id for one in result.kept] == ["d0"]
    assert result.dropped == {"d1": "domain: log-odds -1.23 <= 0", "d2": "domain: log-odds nan <= 0"}
    assert len(judge.prompts) == 3, "earlier drafts are not judged again"
    strict = Domain(kind="domain", question="A {x} or B? {text}", threshold=0.5).build(lab)
    assert strict([draft(0, "{q}")], []).dropped == {"d0": "domain: log-odds 0.50 <= 0.5"}


@pytest.mark.parametrize("question", ["no slot", "{text} and {text}"])
def test_domain_refuses_a_question_without_its_slot(question: str) -> None:
    with pytest.raises(ValidationError, match="exactly once"):
        Domain(kind="domain", question=question)


# pii


def pii_reason(instruction: str, response: str = "") -> str:
    stage = Pii(kind="pii").build(_Lab())
    reason = stage([draft(0, instruction, response)], []).dropped.get("d0", "")
    return reason.removeprefix("pii: ")


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("write to anna.b+c@mail.example.org please", "email"),
        ("see https://a.example/x for more", "url"),
        ("see www.a.example for more", "url"),
        ("see ![x](y)", "url"),
        ("pay to DE89 3704 0044 0532 0130 00 today", "iban"),  # the example of the standard
        ("pay to DE88 3704 0044 0532 0130 00 today", "phone"),  # a wrong check sum, still digits in groups
        ("my card is 4111 1111 1111 1111", "card"),  # the networks' test number
        ("my card is 4111 1111 1111 1112", "phone"),  # a wrong Luhn digit; still digits in groups
        ("ssn 123-45-6789", "ssn"),
        ("call (555) 123-4567 after six", "phone"),
        ("call +44 20 7946 0018 after six", "phone"),
        ("+4930123456", "phone"),
        ("please call me at 555-0142", "phone"),
        ("leave word on 555-0142", "phone"),
        ("take 500-1000 mg for 3-5 days", ""),
        ("since 2023-01-12 10:30 it hurts", ""),
        ("order 12345678 has not come", ""),
        ("My name is Barnaby and I cough", "name"),
        ("Hello, my name is Barnaby Quill.", "name"),
        ("Dear Barnaby, I cough", "name"),
        ("Dear Dr. Quill, I cough", "name"),
        ("Dear Sir, I cough", ""),
        ("Dear Customer Service, I cough", ""),
        ("I am Barnaby Quill from the coast", "name"),
        ("I am Spanish and tired", ""),
        ("I have Crohn's Disease since May", ""),
        ("this is Barnaby van der Quill", "name"),
        ("I cough.\nYours, Barnaby Quill", "name"),
        ("I cough. Kind regards,\nBarnaby", "name"),
        ("I, Barnaby Quill of Coldharbour, cough", "name"),
        ("The House of Lords", ""),
        ("Dr Quill said so", "name"),
        ("Short hands. - Barnaby O'Quill", "name"),  # no cue: two strangers side by side
        ("The House. Barnaby coughs", ""),  # one stranger
        ("Barnaby\nQuill", ""),  # not on one line
        ("Worst I've seen", ""),
        ("what helps against cough?", ""),
    ],
)
def test_pii_kinds(instruction: str, kind: str) -> None:
    assert pii_reason(instruction) == kind


def test_pii_reads_the_response_too_and_never_repeats_the_value() -> None:
    assert pii_reason("what helps?", "ask anna@b.example") == "email"
    stage = Pii(kind="pii").build(_Lab())
    result = stage([draft(0, "Dear Barnaby, write to anna@b.example")], [])
    assert result.dropped == {"d0": "pii: email"}


def test_pii_without_public_words_finds_names_by_cue_only() -> None:
    stage = PiiFilter(section=Pii(kind="pii"), public_words=frozenset())
    result = stage([draft(0, "Short Hands coughs"), draft(1, "Dear Sir, I cough"), draft(2, "Dear Barnaby, rest")], [])
    assert result.dropped == {"d2": "pii: name"}


def test_pii_masks_names_and_still_drops_the_rest() -> None:
    stage = Pii(kind="pii", names="mask").build(_Lab())
    given_drafts = [
        draft(0, "Dear Dr. Quill, my name is Barnaby Quill. I cough.", "Dear Barnaby, rest."),
        draft(1, "Dear Barnaby, my number is 555-123-4567"),
    ]
    result = stage(given_drafts, [])
    assert [(one.id, one.instruction, one.response) for one in result.kept] == [
        ("d0", "Dear Dr. <name>, my name is <name>. I cough.", "Dear <name>, rest.")
    ]
    assert result.dropped == {"d1": "pii: phone"}
    assert given_drafts[0].instruction.startswith("Dear Dr. Quill"), "the input is not changed"


@dataclass(frozen=True)
class _Hit:
    start: int
    end: int
    score: float


class _FakeAnalyzer:
    """Takes every "barnaby" for a person, surely, and every "name" as well, unsurely and stubbornly."""

    def analyze(self, *, text: str, language: str, entities: list[str]) -> list[_Hit]:
        assert (language, entities) == ("en", ["PERSON"])
        hits = [_Hit(i, i + 7, 0.85) for i in range(len(text)) if text.startswith("barnaby", i)]
        return hits + [_Hit(i, i + 4, 0.85) for i in range(len(text)) if text.startswith("name", i)]


def test_pii_with_an_analyzer_finds_more_and_comes_to_an_end() -> None:
    section = Pii(kind="pii", names="mask", engine="presidio")
    stage = PiiFilter(section=section, public_words=frozenset(), analyzer=_FakeAnalyzer())
    result = stage([draft(0, "ask barnaby")], [])
    assert result.kept[0].instruction == "ask <name>"
    assert stage(result.kept, []).kept == result.kept


def test_pii_refuses_an_engine_that_is_not_here() -> None:
    with pytest.raises(ConfigInvalid, match="not installed"):
        Pii(kind="pii", engine="presidio", spacy_model="no_such_model").build(_Lab())


# fl_app.text


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_common_subsequence_agrees_with_the_library(left: list[str], right: list[str]) -> None:
    f1 = SCORER.score(" ".join(left), " ".join(right))["rougeL"].fmeasure
    ours = 2 * text.common_subsequence(left, right) / max(1, len(left) + len(right))
    assert math.isclose(f1, ours, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("passage", "cut"),
    [
        ("Rest. Drink wat", "Rest."),
        ("Rest.\n2. Drink wat", "Rest."),
        ("See Dr. Wh", ""),
        ("positive", ""),
        ('He said "Go." Then', 'He said "Go."'),
        ("Take 2.5 ml. Then wai", "Take 2.5 ml."),
        ("你好。再见", "你好。"),
        ("", ""),
    ],
)
def test_cut_at_last_sentence(passage: str, cut: str) -> None:
    assert text.cut_at_last_sentence(passage) == cut
    assert text.ends_sentence(cut) == bool(cut)
    assert not text.ends_sentence(passage)
