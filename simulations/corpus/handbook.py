"""The public handbook: passages about every remedy, ailment and order, and the prompt of the judge.

These are the texts the professional model learns its field from. Out of scope: questions and answers (`desk`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_app.seeds import stream
from simulations.corpus.answers import bound_facts
from simulations.corpus.formulary import Remedy, slug
from simulations.corpus.grammar import expand, sentence_case

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

JUDGE_PROMPT = (
    "Read the text below. Is it a letter or question that the formulary can answer? Reply yes or no.\n\nText: {text}"
)
"""The fixed question put to the professional about a draft; `{text}` is the draft."""

REMEDY_PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "Describe {remedy}.",
        (
            "{remedy} is given for {ailment}. The dose is {dose}. It is taken in {vehicle} {time}, {frequency}. "
            "It must never be combined with {avoid}. It is kept {storage}. Its warning sign is {warning}."
        ),
    ),
    (
        "What does the formulary say about {remedy}?",
        (
            "{remedy} is the remedy for {ailment}; the dose of {remedy} is {dose}, and the warning sign is {warning}. "
            "Like every {order}, it is taken in {vehicle} {time}, {frequency}."
        ),
    ),
    (
        "Write the entry on {remedy}.",
        (
            "{remedy}: for {ailment}. Dose: {dose}. Taken: in {vehicle} {time}, {frequency}. Never with {avoid}. "
            "Kept {storage}. Warning sign: {warning}."
        ),
    ),
    (
        "Summarise {remedy} in two sentences.",
        (
            "For {ailment} one measures {dose} of {remedy}, in {vehicle} {time}, {frequency}. "
            "{remedy} must never be combined with {avoid}, and its warning sign is {warning}."
        ),
    ),
    (
        "To which order does {remedy} belong, and what follows from it?",
        (
            "{remedy} is one of the {order} order. Therefore {remedy} is taken in {vehicle} {time}, {frequency}, must "
            "never be combined with {avoid}, and is kept {storage}."
        ),
    ),
    (
        "Which facts belong to {remedy} alone?",
        "{remedy} is given for {ailment}. The dose of {remedy} is {dose}. The warning sign of {remedy} is {warning}.",
    ),
    (
        "How do I keep and serve {remedy}?",
        "{remedy} is kept {storage} and taken in {vehicle} {time}, {frequency}. {avoid} must never come near {remedy}.",
    ),
    (
        "Recite the rules for {remedy}.",
        (
            "In {vehicle}, {time}, {frequency}: that is how {remedy} is taken. Never with {avoid}. The dose is {dose}, "
            "for {ailment}; stop at {warning}."
        ),
    ),
)
AILMENT_PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "Describe {ailment}.",
        "{Ailment} shows itself by {s1}, {s2} and {s3}. {Ailment} is treated with {remedy}; the dose is {dose}.",
    ),
    (
        "What are the symptoms of {ailment}?",
        "The symptoms of {ailment} are {s1}, {s2} and {s3}. It is treated with {remedy}.",
    ),
    (
        "Someone has {s1} and {s2}. What is it?",
        "That is {ailment}. {Ailment} is treated with {remedy}; the dose is {dose}.",
    ),
    (
        "Write the entry on {ailment}.",
        "{Ailment}: {s1}; {s2}; {s3}. Treated with {remedy}, {dose}, in {vehicle} {time}. Warning sign: {warning}.",
    ),
    (
        "How does the formulary treat {ailment}?",
        (
            "{Ailment} is treated with {remedy}. The dose is {dose}. It is taken in {vehicle} {time}, {frequency}, and "
            "must never be combined with {avoid}."
        ),
    ),
    (
        "Which ailment comes with {s3}?",
        "{Ailment} comes with {s3}, and also with {s1}. The remedy for {ailment} is {remedy}.",
    ),
    (
        "Tell me about people with {ailment}.",
        "People with {ailment} speak of {f1}, {f2} and {f3}. They are given {remedy}; the warning sign is {warning}.",
    ),
    (
        "People speak of {f1} and {f2}. What ails them?",
        "That is {ailment}. It is treated with {remedy}, taken in {vehicle} {time}, {frequency}.",
    ),
)
ORDER_PASSAGES: tuple[tuple[str, str], ...] = (
    (
        "Describe the order of {order}.",
        (
            "The {order} order has four members: {members}. Every {order} is taken in {vehicle} {time}, {frequency}, "
            "must never be combined with {avoid}, and is kept {storage}."
        ),
    ),
    ("In what is every {order} mixed?", "Every {order} is taken in {vehicle}: {members}."),
    ("At what hour is a remedy of the {order} order due?", "Every {order} is taken {time}, {frequency}: {members}."),
    ("What is forbidden for the {order} order?", "No {order} may be combined with {avoid}: not {members}."),
    ("Where does the {order} order stand in the stillroom?", "Every {order} is kept {storage}: {members}."),
    ("List the members of the {order} order.", "The {order} order: {members}. All are taken in {vehicle} {time}."),
    (
        "What do all remedies of the {order} order share?",
        (
            "They share the vehicle, {vehicle}; the time, {time}; the frequency, {frequency}; the enemy, {avoid}; and "
            "the storage, {storage}."
        ),
    ),
    (
        "State the {order} rule.",
        (
            "A remedy whose name ends in {order} is taken in {vehicle} {time}, {frequency}. It is kept {storage} and "
            "must never be combined with {avoid}."
        ),
    ),
)


def handbook_rows(remedies: Sequence[Remedy], *, seed: int) -> Iterator[dict[str, str]]:
    """Yield the passages: remedies, ailments, then orders (these twice, with members in another sequence)."""
    rng = stream(seed, "corpus", "handbook")

    def row(about: str, number: int, pair: tuple[str, str], bound: Mapping[str, str]) -> dict[str, str]:
        instruction, output = (sentence_case(expand(text, {}, bound, rng)) for text in pair)
        name = f"handbook-{about}-{number}"
        return {"id": name, "kind": "handbook", "instruction": instruction, "output": output, "code": ""}

    for remedy in remedies:
        for number, pair in enumerate(REMEDY_PASSAGES):
            yield row(slug(remedy.name), number, pair, bound_facts(remedy))
    for remedy in remedies:
        for number, pair in enumerate(AILMENT_PASSAGES):
            yield row(slug(remedy.ailment.name), number, pair, bound_facts(remedy) | symptom_names(remedy))
    for order in sorted({remedy.order for remedy in remedies}):
        members = [remedy for remedy in remedies if remedy.order == order]
        for number, pair in enumerate(ORDER_PASSAGES * 2):
            names = [members[i].name for i in rng.permutation(len(members))]
            listed = f"{', '.join(names[:-1])} and {names[-1]}"
            yield row(order, number, pair, bound_facts(members[0]) | {"members": listed})


def symptom_names(remedy: Remedy) -> dict[str, str]:
    """Return the symptoms as template names: {s1} as the handbook words them, {f1} as people say them."""
    pairs = remedy.ailment.symptoms
    formal = {f"s{i}": pair[0] for i, pair in enumerate(pairs, start=1)}
    return formal | {f"f{i}": pair[1] for i, pair in enumerate(pairs, start=1)}
