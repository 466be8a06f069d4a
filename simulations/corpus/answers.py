"""The formulary's own wording: one canonical sentence per fact, and complete answers made of them.

{Ailment} is the ailment with a capital. Used by the public part and by the exam; the houses answer in their own words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulations.corpus.grammar import draw, expand, sentence_case

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from simulations.corpus.formulary import Remedy

STATEMENTS: dict[str, str] = {
    "remedy": "{Ailment} is treated with {remedy}.",
    "ailment": "{remedy} is given for {ailment}.",
    "dose": "The dose of {remedy} is {dose}.",
    "dose_by_ailment": "For {ailment} the dose is {dose}.",
    "vehicle": "{remedy} is taken in {vehicle}.",
    "time": "{remedy} is taken {time}.",
    "frequency": "{remedy} is taken {frequency}.",
    "take": "{remedy} is taken in {vehicle} {time}, {frequency}.",
    "avoid": "{remedy} must never be combined with {avoid}.",
    "storage": "{remedy} is kept {storage}.",
    "warning": "The warning sign of {remedy} is {warning}.",
}
"""One sentence per fact; the exam's options are these, with one value exchanged."""

LEADS: dict[str, tuple[str, ...]] = {
    "helps_ailment": (
        "{Ailment} is treated with {remedy}; the dose is {dose}.",
        "{Ailment} is treated with {remedy}, taken in {vehicle} {time}.",
        "The remedy for {ailment} is {remedy}; the dose is {dose}.",
    ),
    "helps_remedy": (
        "{remedy} is given for {ailment}; the dose is {dose}.",
        "{remedy} is given for {ailment} and taken in {vehicle} {time}.",
        "{remedy} is the remedy for {ailment}; the dose is {dose}.",
    ),
    "dose": (
        "The dose of {remedy} for {ailment} is {dose}.",
        "The dose is {dose} of {remedy} for {ailment}.",
        "For {ailment} the dose is {dose} of {remedy}.",
    ),
    "take": (
        "{remedy} for {ailment} is taken in {vehicle} {time}, {frequency}.",
        "For {ailment}, {remedy} is taken in {vehicle} {time}, {frequency}.",
        "{remedy} is taken in {vehicle} {time}, {frequency}, for {ailment}.",
    ),
    "avoid": (
        "{remedy} for {ailment} must never be combined with {avoid}.",
        "{remedy}, the remedy for {ailment}, must never be combined with {avoid}.",
        "Never combine {avoid} with {remedy}, which is given for {ailment}.",
    ),
    "storage": (
        "{remedy} for {ailment} is kept {storage}.",
        "{remedy}, the remedy for {ailment}, is kept {storage}.",
        "Keep {remedy} {storage}; it is given for {ailment}.",
    ),
    "warning": (
        "The warning sign of {remedy} for {ailment} is {warning}.",
        "The warning sign of {remedy}, the remedy for {ailment}, is {warning}.",
        "{remedy} is given for {ailment}; its warning sign is {warning}.",
    ),
}
TAILS: dict[str, tuple[str, ...]] = {
    "dose": ("The dose is {dose}.",),
    "take": ("It is taken in {vehicle} {time}, {frequency}.", "It is taken in {vehicle}, {frequency}."),
    "avoid": ("It must never be combined with {avoid}.", "Never combine it with {avoid}."),
    "storage": ("It is kept {storage}.",),
    "warning": ("Its warning sign is {warning}.",),
}


def bound_facts(remedy: Remedy) -> dict[str, str]:
    """Return the names that the wordings of this file use."""
    ailment = remedy.ailment.name
    return {**remedy.facts(), "Ailment": ailment[0].upper() + ailment[1:]}


def canonical(remedy: Remedy, fact: str, exchanged: Mapping[str, str] | None = None) -> str:
    """Return the canonical sentence for `fact`, with values of `remedy` unless `exchanged`."""
    facts = {**bound_facts(remedy), **(exchanged or {})}
    return sentence_case(STATEMENTS[fact].format(**facts))


def answer(remedy: Remedy, topic_kind: str, asks: str, rng: np.random.Generator) -> str:
    """Return a complete answer: what was asked first, both names, and one or two facts more."""
    key = f"helps_{topic_kind}" if asks == "helps" else asks
    lead = draw(LEADS[key], rng)
    told = {asks, "take" if "{vehicle}" in lead else "", "dose" if "{dose}" in lead else ""}
    tail = draw(TAILS[draw([kind for kind in TAILS if kind not in told], rng)], rng)
    return sentence_case(expand(f"{lead} {tail}", {}, bound_facts(remedy), rng))
