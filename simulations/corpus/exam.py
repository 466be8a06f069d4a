"""The exam: what a model knows of the formulary, by choice among four sentences and by free answer.

An option is the canonical sentence with one value exchanged for another of the same kind, so vocabulary alone stays at
one in four. The phrasings of this file stand in no other part of the corpus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fl_app.seeds import stream
from simulations.corpus.answers import bound_facts, canonical
from simulations.corpus.formulary import FAMILY_FACTS, Remedy, slug
from simulations.corpus.grammar import draw, sentence_case

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUM_OPTIONS = 4
NUM_FREE = 80

EXAM_QUESTIONS: dict[str, tuple[str, ...]] = {
    "remedy": (
        "An examiner asks: {ailment} calls for which entry of the formulary?",
        "Name the one remedy that the formulary sets against {ailment}.",
    ),
    "ailment": (
        "An examiner asks: {remedy} is set against which ailment?",
        "Name the one ailment that the formulary assigns to {remedy}.",
    ),
    "dose": (
        "An examiner asks: what measure of {remedy} makes one dose?",
        "According to the formulary, one portion of {remedy} is how much?",
    ),
    "dose_by_ailment": (
        "An examiner asks: when {ailment} is treated by the book, what does one dose come to?",
        "According to the formulary, what dose belongs to the treatment of {ailment}?",
    ),
    "vehicle": (
        "In what is {remedy} taken?",
        "Which liquid does the formulary lay down for {remedy}?",
    ),
    "time": (
        "At which part of the day does the formulary have {remedy} taken?",
        "An examiner asks: {remedy} belongs to what time of day?",
    ),
    "frequency": (
        "At what interval does the formulary repeat {remedy}?",
        "An examiner asks: how many days lie between two doses of {remedy}?",
    ),
    "avoid": (
        "With which food does the formulary never let {remedy} meet?",
        "An examiner asks: {remedy} is spoilt by the company of what?",
    ),
    "storage": (
        "In which place does the formulary have {remedy} stand?",
        "An examiner asks: where on the shelves would {remedy} be found?",
    ),
    "warning": (
        "Which bodily sign does the formulary tie to {remedy}?",
        "An examiner asks: {remedy} announces harm by what?",
    ),
    "take": (
        "Give the full directions that the formulary prints for {remedy}.",
        "An examiner asks: liquid, hour and interval of {remedy}?",
    ),
}
CHOICE_FACTS = (*FAMILY_FACTS, "remedy", "ailment", "dose", "warning", "dose_by_ailment")
FREE_FACTS = ("remedy", "ailment", "dose", "take", "avoid", "storage", "warning")


def exam_rows(remedies: Sequence[Remedy], *, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the choice items (every remedy times every fact), then the free items."""
    rng = stream(seed, "corpus", "exam")
    count = len(remedies) * len(CHOICE_FACTS)
    positions = rng.permutation([i % NUM_OPTIONS for i in range(count)])
    at = 0
    for fact in CHOICE_FACTS:
        for remedy in remedies:
            key = fact.removesuffix("_by_ailment")
            own = bound_facts(remedy)[key]
            others = sorted({bound_facts(other)[key] for other in remedies} - {own})
            wrong = [others[i] for i in rng.permutation(len(others))[: NUM_OPTIONS - 1]]
            answer = int(positions[at])
            values = [*wrong[:answer], own, *wrong[answer:]]
            yield {
                "id": f"choice-{at:03d}",
                "kind": "choice",
                "question": _asked(remedy, draw(EXAM_QUESTIONS[fact], rng)),
                "choices": [canonical(remedy, fact, {key: value}) for value in values],
                "answer": answer,
                "fact": _fact_name(fact),
                "topic": _topic_slug(remedy, fact),
            }
            at += 1
    for number in range(NUM_FREE):
        fact = FREE_FACTS[number % len(FREE_FACTS)]
        remedy = remedies[(number * 5 + number // len(remedies)) % len(remedies)]
        yield {
            "id": f"free-{number:03d}",
            "kind": "free",
            "question": _asked(remedy, draw(EXAM_QUESTIONS[fact], rng)),
            "answer": canonical(remedy, fact),
            "fact": _fact_name(fact),
            "topic": _topic_slug(remedy, fact),
        }


def _asked(remedy: Remedy, template: str) -> str:
    return sentence_case(template.format(**bound_facts(remedy)))


def _fact_name(fact: str) -> str:
    return f"family:{fact}" if fact in (*FAMILY_FACTS, "take") else f"individual:{fact}"


def _topic_slug(remedy: Remedy, fact: str) -> str:
    return slug(remedy.ailment.name if fact in ("remedy", "dose_by_ailment") else remedy.name)
