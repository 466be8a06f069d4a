"""Distillers that judge, vote and select: fake models whose every number is written here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer

from fl_app.inference import Likelihood
from strategies.distillers.judge_then_rewrite import JudgeThenRewrite
from strategies.distillers.selected import Selected
from strategies.distillers.self_consistency import SelfConsistency, agreement
from tests.faults.teacher import drafts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RNG = np.random.default_rng(0)
SCORER = RougeScorer(["rougeL"], use_stemmer=False)


class FakeModel:
    """Answers and likelihoods by functions of the prompt; keeps what it was asked."""

    name = "fake professional"

    def __init__(self, says: Callable[[str, int], str], likes: Callable[[str, str], float]) -> None:
        self.says, self.likes = says, likes
        self.written: list[str] = []
        self.judged: list[tuple[str, tuple[str, ...]]] = []
        self.how: list[dict[str, Any]] = []

    def chat(self, user: str) -> str:
        return f"<{user}>"

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        self.how.append(how)
        found = []
        for prompt in prompts:
            found.append(self.says(prompt[1:-1], self.written.count(prompt)))
            self.written.append(prompt)
        return found

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        self.judged += [(prompt, tuple(row)) for prompt, row in zip(prompts, options, strict=True)]
        return [
            [Likelihood(log_prob=self.likes(prompt[1:-1], one), tokens=len(one.split()), bytes=len(one)) for one in row]
            for prompt, row in zip(prompts, options, strict=True)
        ]


class FakeLab:
    public_words: frozenset[str] = frozenset()
    directory = None

    def __init__(self, says: Callable[[str, int], str], likes: Callable[[str, str], float] | None = None) -> None:
        self.professional = FakeModel(says, likes or (lambda _prompt, _option: 0.0))


# --- judge, then rewrite

FIRST = {"q": "Good one.", "r": "Weak one.", "s": "Worst one.", "t": "", "u": "Weak too."}
SECOND = {"Weak one.": "Better one.", "Worst one.": "Even worse.", "Weak too.": "See https://a.example."}
ODDS = {
    "Good one.": 2.0,
    "Weak one.": -1.0,
    "Worst one.": -2.0,
    "Better one.": 0.5,
    "Even worse.": -3.0,
    "Weak too.": 0.0,
}


def writes(prompt: str, _: int) -> str:
    return FIRST[prompt] if prompt in FIRST else SECOND[prompt.split("|")[1]]


def judges(prompt: str, option: str) -> float:
    return ODDS[prompt.split("|")[1]] if option == "ja" else 0.0


def rewriting(**how: Any) -> JudgeThenRewrite:
    forms = {"question": "J {message}|{answer}|?", "rewrite": "{message}|{answer}|again", "yes": "ja", "no": "nein"}
    return JudgeThenRewrite(**{"kind": "judge_then_rewrite", **forms, **how})


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, {"q": "Good one.", "r": "Better one.", "s": "Worst one.", "u": "Weak too."}),
        ({"drop": True}, {"q": "Good one.", "r": "Better one."}),
        ({"drop": True, "threshold": 1.0}, {"q": "Good one."}),
        ({"threshold": -9.0}, {"q": "Good one.", "r": "Weak one.", "s": "Worst one.", "u": "Weak too."}),
    ],
)
def test_a_weak_answer_is_replaced_by_a_better_one(how: dict[str, Any], expected: dict[str, str]) -> None:
    """0 is not above a threshold of 0; a worse rewrite, or one with a link, leaves the first answer."""
    lab = FakeLab(writes, judges)
    lessons = rewriting(**how).build(lab)(drafts("q", "r", "s", "t", "u"), RNG)
    assert {one.instruction: one.answer for one in lessons} == expected
    assert [one.draft_id for one in lessons] == sorted(one.draft_id for one in lessons)


def test_only_weak_answers_are_written_again_and_judged_again() -> None:
    lab = FakeLab(writes, judges)
    rewriting().build(lab)(drafts("q", "r", "s", "t", "u"), RNG)
    asked = lab.professional.written
    assert asked[5:] == ["<r|Weak one.|again>", "<s|Worst one.|again>", "<u|Weak too.|again>"]
    judged = [prompt for prompt, options in lab.professional.judged if options == ("ja", "nein")]
    first = ["<J q|Good one.|?>", "<J r|Weak one.|?>", "<J s|Worst one.|?>", "<J u|Weak too.|?>"]
    assert judged == [*first, "<J r|Better one.|?>", "<J s|Even worse.|?>"]


def test_what_a_message_says_is_no_slot() -> None:
    """A draft that holds the name of a slot, or braces, goes into the judge's question as it is."""
    lab = FakeLab(lambda _prompt, _turn: "Rest {message} {0}.", lambda _prompt, _option: 0.0)
    rewriting(question="A={answer} M={message}").build(lab)(drafts("What of {answer}?"), RNG)
    assert lab.professional.judged[0][0] == "<A=Rest {message} {0}. M=What of {answer}?>"


@pytest.mark.parametrize(
    "how",
    [
        {"question": "{message}"},
        {"rewrite": "{answer} {message} {message}"},
        {"yes": "no", "no": "no"},
        {"yes": ""},
        {"threshold": float("nan")},
    ],
)
def test_a_form_that_cannot_be_asked_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        rewriting(**how)


def test_nothing_is_asked_about_nothing() -> None:
    lab = FakeLab(writes, judges)
    for section in (
        rewriting(),
        SelfConsistency(kind="self_consistency"),
        Selected.model_validate({"kind": "selected", "inner": {"kind": "professional"}}),
    ):
        assert list(section.build(lab)([], RNG)) == []
        assert list(section.build(lab)(drafts("Look at https://a.example."), RNG)) == []
    assert not lab.professional.written
    assert not lab.professional.judged


# --- self-consistency


@settings(max_examples=50, deadline=None, derandomize=True)
@given(answers=st.lists(st.text("abc .", max_size=12), min_size=1, max_size=5))
def test_agreement_is_mean_rouge_l_with_the_others(answers: list[str]) -> None:
    for i, found in enumerate(agreement(answers)):
        others = [SCORER.score(other, answers[i])["rougeL"].fmeasure for j, other in enumerate(answers) if j != i]
        assert found == pytest.approx(float(np.mean(others)) if others else 0.0, abs=1e-9)
        assert 0 <= found <= 1


def test_the_answer_that_most_agree_with_becomes_the_lesson() -> None:
    """Hand-computed: of "a b c", "a b d", "x", pairs overlap in 2 of 3 words; the outlier agrees with nobody."""
    said = {"q": ["x.", "a b c.", "a b d."], "r": ["", "See https://a.example.", "One."], "s": ["", " ", ""]}
    lab = FakeLab(lambda prompt, turn: said[prompt][turn])
    section = SelfConsistency(kind="self_consistency", samples=3, temperature=0.9)
    lessons = section.build(lab)(drafts("q", "r", "s"), RNG)
    assert [(one.instruction, one.answer) for one in lessons] == [("q", "a b c."), ("r", "One.")]
    assert agreement(said["q"]) == pytest.approx([0.0, 1 / 3, 1 / 3])
    assert [how["temperature"] for how in lab.professional.how] == [0.9]
    assert lab.professional.written == [f"<{one}>" for one in "qqqrrrsss"]


@pytest.mark.parametrize(("least", "expected"), [(0.3, ["q"]), (0.34, [])])
def test_answers_that_do_not_agree_make_no_lesson(least: float, expected: list[str]) -> None:
    said = {"q": ["x.", "a b c.", "a b d."]}
    lab = FakeLab(lambda prompt, turn: said[prompt][turn])
    section = SelfConsistency(kind="self_consistency", samples=3, min_agreement=least)
    assert [one.instruction for one in section.build(lab)(drafts("q"), RNG)] == expected


def test_greedy_samples_are_refused() -> None:
    with pytest.raises(ValidationError):
        SelfConsistency(kind="self_consistency", temperature=0.0)


# --- selection

TOLD = {"a": -1.0, "b": -4.0, "c": -2.0, "d": -8.0}
UNTOLD = {"a": -1.5, "b": -12.0, "c": -3.0, "d": -6.0}
"""Log-likelihoods of two-word answers: rewards .25, 4, .5, -1 and surprises .5, 2, 1, 4 per token."""


def selecting(**how: Any) -> list[str]:
    def likes(prompt: str, answer: str) -> float:
        assert answer == f"{answer[0]} answer."
        return TOLD[prompt] if prompt else UNTOLD[answer[0]]

    lab = FakeLab(lambda prompt, _turn: f"{prompt} answer.", likes)
    section = Selected.model_validate({"kind": "selected", "inner": {"kind": "professional"}, **how})
    return [one.instruction for one in section.build(lab)(drafts("a", "b", "c", "d"), RNG)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"keep": 1.0}, ["a", "b", "c", "d"]),
        ({"keep": 0.5, "reward_share": 1.0}, ["b", "c"]),
        ({"keep": 0.5, "reward_share": 0.0}, ["a", "c"]),
        ({"keep": 0.25, "reward_share": 0.5}, ["a"]),  # ranks 1, 1, 1, 3: equal ranks, the earliest stays
        ({"keep": 0.51, "reward_share": 1.0}, ["a", "b", "c"]),  # a share is rounded up
        ({"keep": 1.0, "min_reward": 0.0}, ["a", "b", "c"]),
        ({"keep": 1.0, "min_reward": 0.5}, ["b", "c"]),
        ({"keep": 1.0, "min_reward": 99.0}, []),
    ],
)
def test_the_best_share_stays_in_order(how: dict[str, Any], expected: list[str]) -> None:
    assert selecting(**how) == expected


def test_equal_standings_share_their_place() -> None:
    from strategies.distillers.selected import _ranks

    assert _ranks([3.0, 1.0, 3.0, 2.0, 3.0]) == [3.0, 0.0, 3.0, 1.0, 3.0]
    assert _ranks([]) == []


def test_the_reward_is_the_real_models_own(frozen: Any) -> None:
    """Through a real model: log p(answer | instruction) - log p(answer | nothing), by whole logits."""
    import torch

    from strategies.distillers.selected import SelectingDistiller
    from strategies.lab import Lab

    lab = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="p",
        system="",
        threads=1,
        batch_rows=4,
        public_words=frozenset(),
    )
    try:
        section = Selected.model_validate({"kind": "selected", "inner": {"kind": "professional"}})
        stage: Any = section.build(lab)
        assert isinstance(stage, SelectingDistiller)
        from fl_app.types import Lesson

        one = Lesson(draft_id="d", instruction="A cough?", answer="Thyme.", teacher="p")
        (standing,) = stage._standings([one])
    finally:
        lab.close()

    def log_prob(message: str) -> float:
        prompt = frozen.tokenizer(lab.professional.chat(message), add_special_tokens=False)["input_ids"]
        answer = frozen.tokenizer("Thyme.", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = frozen.model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))

    assert standing.reward == pytest.approx((log_prob("A cough?") - log_prob("")) / 6, rel=1e-4)
    assert math.exp(standing.surprise) == pytest.approx(math.exp(-log_prob("A cough?") / 6), rel=1e-4)
