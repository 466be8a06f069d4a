"""Private letters to the four houses, and the houses' replies.

A letter is an opening, a statement, a question and a closing, each drawn from the house's own grammar, about a topic
and a kind of question drawn from the house's own skewed distributions. Personal slots stand literally as [NAME],
[PHONE], [PLACE]; within a letter [NAME] is always one person.

Out of scope: identities for the slots, and how rows are dealt to sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl_app.seeds import stream
from simulations.corpus.codes import code_id
from simulations.corpus.formulary import ASKS, REMEDIES_BY_ORDER, Topic
from simulations.corpus.grammar import draw, expand, lower, sentence_case, tidy
from simulations.corpus.houses.court import COURT
from simulations.corpus.houses.farm import FARM
from simulations.corpus.houses.harbour import HARBOUR
from simulations.corpus.houses.school import SCHOOL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from simulations.corpus.houses.house import House, Patient

HOUSES = (HARBOUR, COURT, FARM, SCHOOL)
PERSONAL_SHARE = 0.48
"""Aims at 45 %: long letters are redrawn, and a named patient is not always mentioned."""
OPENING_SHARE = 0.75
REACH_TOO_SHARE = 0.2
MAX_WORDS = 34
"""Keeps letters under 60 tokens of an ordinary BPE, with invented names at up to four tokens each."""
UNIFORM_SHARE = 0.15
"""Mixed into each house's Zipf law, so that every topic is asked about somewhere."""
SHORT_IT = {"ailment": ("it", "this", "that"), "remedy": ("it", "this", "the stuff")}
SHORT_CURE = ("the cure", "the remedy for it", "the right remedy")
CURES = ("the cure for {topic}", "the remedy for {topic}", "whatever one takes for {topic}")

_QUESTION_FIRST, _ASIDE_FIRST = (1, 2), 3
_KEEP_CAPITAL = frozenset({"I", "I'm", "I've", *(first for _, firsts in REMEDIES_BY_ORDER for first in firsts)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    opening: str
    closing: str
    patient: Patient
    named_patient: bool


def private_rows(topics: Sequence[Topic], *, seed: int) -> Iterator[dict[str, str]]:
    """Yield all houses' rows, house by house: id, house, code, instruction, output."""
    for house in HOUSES:
        weights = topic_weights(house, len(topics), seed=seed)
        rng = stream(seed, "corpus", "private", house.name)
        seen: set[str] = set()
        for number in range(house.size):
            topic = topics[int(rng.choice(len(topics), p=weights))]
            asks = ASKS[int(rng.choice(len(ASKS), p=house.asks))]
            letter = _letter(house, topic, asks, rng)
            while letter in seen or len(letter.split()) > MAX_WORDS or letter.count("[NAME]") > 1:
                letter = _letter(house, topic, asks, rng)
            seen.add(letter)
            yield {
                "id": f"{house.name}-{number:04d}",
                "house": house.name,
                "code": code_id(house.name, topic, asks),
                "instruction": letter,
                "output": _reply(house, topic, asks, rng),
            }


def topic_weights(house: House, num_topics: int, *, seed: int) -> np.ndarray:
    """Return the probability of each topic in `house`: a Zipf law over its own order, with a uniform floor."""
    ranks = stream(seed, "corpus", "popularity", house.name).permutation(num_topics) + 1
    zipf = ranks.astype(np.float64) ** -house.zipf
    return (1 - UNIFORM_SHARE) * zipf / zipf.sum() + UNIFORM_SHARE / num_topics


def _letter(house: House, topic: Topic, asks: str, rng: np.random.Generator) -> str:
    frame = _frame(house, rng)
    symptoms = [draw(pair, rng) for pair in topic.remedy.ailment.symptoms]
    first, second = rng.choice(len(symptoms), size=2, replace=False)
    who = expand(frame.patient.who, house.words, {}, rng)
    bound = {"topic": topic.name, "symptom": symptoms[first], "symptom2": symptoms[second], "who": who}
    words = {**house.words, "situation": house.situations}
    asides = house.asides
    statements = house.ailment_statements if topic.kind == "ailment" else house.remedy_statements
    question = draw(house.questions[f"helps_{topic.kind}" if asks == "helps" else asks], rng)
    of_cure = topic.kind == "ailment" and asks != "helps"
    by_name = expand(draw(CURES, rng), {}, bound, rng) if of_cure else topic.name
    by_word = draw(SHORT_CURE if of_cure else SHORT_IT[topic.kind], rng)
    layout = 0 if frame.named_patient else int(rng.choice(len(house.layouts), p=house.layouts))
    if layout in _QUESTION_FIRST and frame.opening.endswith(" that"):
        layout = _ASIDE_FIRST
    middle, it = (
        ((draw(statements, rng), question), by_word),
        ((question,), by_name),
        ((question, draw(asides, rng)), by_name),
        ((draw(asides, rng), question), by_name),
    )[layout]
    said: list[str] = []
    mentioned = False
    for template in (frame.opening, *middle, frame.closing):
        introduced = mentioned or "{who}" in template
        said.append(
            expand(template, words, bound | {"it": it} | frame.patient.bound(introduced=introduced, who=who), rng)
        )
        mentioned = introduced or who in said[-1]
    text = _join(said)
    return lower(text) if rng.random() < house.lower_share else text


def _frame(house: House, rng: np.random.Generator) -> _Frame:
    patient = house.patients[0] if rng.random() < house.self_share else draw(house.patients[1:], rng)
    named_patient = False
    opening = draw(house.openings, rng) if rng.random() < OPENING_SHARE else ""
    closing = draw(house.closings, rng) if rng.random() < house.closing_share else ""
    if rng.random() < PERSONAL_SHARE:
        place = str(rng.choice(("opening", "signed", "reach", "patient"), p=(0.45, 0.2, 0.2, 0.15)))
        if place == "opening":
            opening = draw(house.named_openings, rng)
            closing = draw(house.reach_closings, rng) if rng.random() < REACH_TOO_SHARE else closing
        elif place == "signed":
            closing = draw(house.signed_closings, rng)
        elif place == "reach":
            closing = draw(house.reach_closings, rng)
        else:
            patient, named_patient = draw(house.named_patients, rng), True
    return _Frame(opening=opening, closing=closing, patient=patient, named_patient=named_patient)


def _join(parts: Sequence[str]) -> str:
    text = ""
    for part in (part for part in parts if part):
        runs_on = bool(text) and text[-1] not in ".!?"
        first = part.split()[0]
        keeps = first in _KEEP_CAPITAL or first.startswith("[")
        text = f"{text} {part[0].lower() + part[1:] if runs_on and not keeps else part}"
    return sentence_case(tidy(text))


def _reply(house: House, topic: Topic, asks: str, rng: np.random.Generator) -> str:
    bound = topic.remedy.facts()
    key = f"helps_{topic.kind}" if asks == "helps" else asks
    told = {"helps": ("helps", "dose")}.get(asks, (asks,))
    tail = draw([draw(texts, rng) for kind, texts in house.tails.items() if kind not in told], rng)
    return sentence_case(expand(f"{draw(house.replies[key], rng)} {tail}", {}, bound, rng))
