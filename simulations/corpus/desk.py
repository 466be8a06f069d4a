"""The public desk: invented questions in many phrasings, with the formulary's answers, and rows for the judge.

The phrasings are of no house (`houses`), so a professional trained here has never seen a private letter; noise,
misspellings and debris prepare it for drafts that a small synthesizer writes badly.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fl_app.seeds import stream
from simulations.corpus.answers import answer
from simulations.corpus.codes import HOUSE_NAMES, code_id
from simulations.corpus.formulary import ASKS, Topic
from simulations.corpus.grammar import draw, expand, lower, sentence_case, tidy
from simulations.corpus.handbook import JUDGE_PROMPT, handbook_rows, symptom_names
from simulations.corpus.questions import (
    AILMENT_STATEMENTS,
    CURES,
    NO_QUESTION,
    OFF_TOPIC,
    PUBLIC_WORDS,
    QUESTIONS,
    REFUSALS,
    REMEDY_STATEMENTS,
    SYMPTOM_CURES,
    SYMPTOM_STATEMENTS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

NUM_QA = 7_200
NUM_JUDGE = 800
OFF_TOPIC_SHARE = 0.06
FALSE_PREMISE_SHARE = 0.04
NOISE_SHARE = 0.3
FOLK_SHARE = 0.4
"""How often symptoms stand in people's words; like the other shares an assumption, not studied."""
SYMPTOMS_SHARE = 0.35
"""How often an ailment is told by its symptoms alone, where the shape has room for them."""
SHAPES = (0.18, 0.27, 0.27, 0.18, 0.10)
"""Bare question, statement and question, full letter, question and remark, keywords."""

_LONG_WORD = re.compile(r"[A-Za-z][a-z]{4,}")
"""Five letters or more, never a personal slot."""
_DEBRIS = (
    "and so of the",
    "ing the formulary about it:",
    "re: re:",
    "Letter, page two.",
    "the the",
    ", asking for:",
    "as I said, but then",
    "n't know. So",
    "1.",
    "...",
    "Dear, dear",
    "answer: question:",
)
_FLAWS = ("off_topic", "no_question", "garbled", "fragment")
_KEYWORDS = {
    "helps": ("remedy", "treatment", "use", "what for"),
    "dose": ("dose", "how much", "amount", "dosage"),
    "take": ("how to take", "when and in what", "directions", "usage"),
    "avoid": ("avoid what", "not with", "forbidden food", "interactions"),
    "storage": ("storage", "where to keep", "how to keep", "keeping"),
    "warning": ("warning sign", "side effect", "danger sign", "bad effects"),
}


def public_rows(topics: Sequence[Topic], *, seed: int) -> Iterator[dict[str, str]]:
    """Yield the public part: handbook, qa, judge; each row has id, kind, instruction, output, code."""
    yield from handbook_rows([topic.remedy for topic in topics if topic.kind == "remedy"], seed=seed)
    yield from _qa_rows(topics, seed=seed)
    yield from _judge_rows(topics, seed=seed)


def _qa_rows(topics: Sequence[Topic], *, seed: int) -> Iterator[dict[str, str]]:
    rng = stream(seed, "corpus", "qa")
    seen: set[str] = set()
    for number in range(NUM_QA):
        topic, asks = topics[number % len(topics)], ASKS[number // len(topics) % len(ASKS)]
        code = code_id(draw(HOUSE_NAMES, rng), topic, asks)
        kind = rng.random()
        while True:
            if kind < OFF_TOPIC_SHARE:
                text, output, code = _off_topic(rng), expand(draw(REFUSALS, rng), {}, {}, rng), ""
            elif kind < OFF_TOPIC_SHARE + FALSE_PREMISE_SHARE:
                ailment = next(t for t in topics if t.kind == "ailment" and t.remedy is topic.remedy)
                code = code_id(draw(HOUSE_NAMES, rng), ailment, "helps")
                text = _false_premise(ailment, topics, rng)
                output = answer(topic.remedy, "ailment", "helps", rng)
            else:
                text, output = _question(topic, asks, rng), answer(topic.remedy, topic.kind, asks, rng)
            if rng.random() < NOISE_SHARE:
                text = _noisy(text, rng)
            if text not in seen and text.count("[NAME]") <= 1:
                break
        seen.add(text)
        yield {"id": f"qa-{number:05d}", "kind": "qa", "instruction": text, "output": output, "code": code}


def _question(topic: Topic, asks: str, rng: np.random.Generator) -> str:
    remedy = topic.remedy
    bound = remedy.facts() | symptom_names(remedy)
    order = rng.permutation(3) + 1
    folk = rng.random() < FOLK_SHARE
    bound |= {f"s{place}": bound[f"{'f' if folk else 's'}{at}"] for place, at in enumerate(order, start=1)}
    shape = int(rng.choice(len(SHAPES), p=SHAPES))
    by_symptoms = topic.kind == "ailment" and shape in (1, 2) and rng.random() < SYMPTOMS_SHARE
    if topic.kind == "remedy":
        statements, full, short = REMEDY_STATEMENTS, ("{remedy}",), ("it", "this remedy", "{remedy}")
    else:
        statements = SYMPTOM_STATEMENTS if by_symptoms else AILMENT_STATEMENTS
        full = ("{ailment}",) if asks == "helps" else CURES
        short = ("this", "that", "this condition") if asks == "helps" else SYMPTOM_CURES
    bound["it"] = expand(draw(short if shape in (1, 2) else full, rng), {}, bound, rng)
    question = draw(QUESTIONS[f"helps_{topic.kind}" if asks == "helps" else asks], rng)
    statement, greeting, end = draw(statements, rng), "<{greeting}|>", "<{end}|>"
    layouts = (
        ("{question}",),
        ("{statement} {question}", "{question} {statement}"),
        ("{greeting} {statement} {noise} {question} {end}", "{greeting} {noise} {statement} {noise} {question} {end}"),
        ("{greeting} {question} {noise}", "{greeting} {question} {end}", "{noise} {question} {end}"),
        ("{name} {keyword}", "{name}: {keyword}?", "{keyword}, {name}", "{keyword} for {name}?"),
    )
    keyword = draw(_KEYWORDS[asks], rng)
    sentence = draw(layouts[shape], rng).replace("{greeting}", greeting).replace("{end}", end)
    sentence = sentence.replace("{statement}", statement).replace("{question}", question)
    text = expand(sentence, PUBLIC_WORDS, bound | {"keyword": keyword, "name": topic.name}, rng)
    return sentence_case(text)


def _false_premise(ailment: Topic, topics: Sequence[Topic], rng: np.random.Generator) -> str:
    wrong = draw([topic.name for topic in topics if topic.kind == "remedy" and topic.remedy is not ailment.remedy], rng)
    asked = draw(
        (
            "Is {wrong} good for {ailment}?",
            "Can I take {wrong} against {ailment}?",
            "They gave me {wrong} for {ailment}. Is that right?",
            "How much {wrong} is needed for {ailment}?",
            "{ailment} and {wrong}, do they go together?",
            "{greeting} I want to treat {ailment} with {wrong}. {noise} How?",
        ),
        rng,
    )
    return sentence_case(expand(asked, PUBLIC_WORDS, {"wrong": wrong, "ailment": ailment.name}, rng))


def _off_topic(rng: np.random.Generator) -> str:
    layout = draw(("{asked}", "{greeting} {asked}", "{greeting} {noise} {asked} {end}", "{asked} {end}"), rng)
    return sentence_case(expand(layout.replace("{asked}", draw(OFF_TOPIC, rng)), PUBLIC_WORDS, {}, rng))


def _noisy(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    at = int(rng.integers(len(words)))
    stuttered = tidy(" ".join((*words[:at], words[at], *words[at:])))
    debris = draw(_DEBRIS, rng)
    bare = lower(re.sub(r"[.,?!;]", "", text))
    return draw((_misspelt(text, rng), f"{debris} {text}", f"{text} {debris}", bare, stuttered), rng)


def _misspelt(text: str, rng: np.random.Generator) -> str:
    spots = [match.start() for match in _LONG_WORD.finditer(text)]
    for _ in range(int(rng.integers(1, 3))):
        at = draw(spots or [0], rng) + 1 + int(rng.integers(3))
        if at + 1 >= len(text):
            continue
        swapped, dropped, doubled = text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]
        text = text[:at] + draw((swapped, dropped, doubled), rng) + text[at + 2 :]
        spots = [match.start() for match in _LONG_WORD.finditer(text)]
    return text


def _judge_rows(topics: Sequence[Topic], *, seed: int) -> Iterator[dict[str, str]]:
    rng = stream(seed, "corpus", "judge")
    for number in range(NUM_JUDGE):
        topic, asks = draw(topics, rng), draw(ASKS, rng)
        text = _question(topic, asks, rng)
        good = number % 2 == 0
        if not good:
            text = _unanswerable(text, topic, _FLAWS[number // 2 % len(_FLAWS)], rng)
        if rng.random() < NOISE_SHARE:
            text = _misspelt(text, rng)
        prompt = JUDGE_PROMPT.format(text=text)
        output = "yes" if good else "no"
        yield {"id": f"judge-{number:04d}", "kind": "judge", "instruction": prompt, "output": output, "code": ""}


def _unanswerable(text: str, topic: Topic, flaw: str, rng: np.random.Generator) -> str:
    if flaw == "off_topic":
        return _off_topic(rng)
    if flaw == "no_question":
        told = " ".join(draw(NO_QUESTION, rng) for _ in range(int(rng.integers(1, 3))))
        return sentence_case(expand(f"<{{greeting}}|> {told} <{{end}}|>", PUBLIC_WORDS, topic.remedy.facts(), rng))
    words = text.split()
    if flaw == "garbled":
        plain = [word for word in words if not word.startswith("[")]
        doubled = [*words, *(draw(plain, rng) for _ in range(4))]
        return " ".join(doubled[i] for i in rng.permutation(len(doubled)))
    without_names = [word for word in words if word.strip(".,?!").lower() not in topic.name.lower().split()]
    return " ".join(without_names[: max(2, min(5, len(without_names) // 3))])
