"""What a house is made of: how its people write, and how the house answers.

Names in templates. Bound per letter: {topic} (the ailment or remedy), {it} (by name, or a word for it), {symptom};
the patient as {who} (first mention), {he} {him} {his} {have} {am} {do} {s}; per reply all facts of the remedy.
Everything else is looked up in the house's own `words`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """Who is ill, with the forms that sentences need; `who` may hold [NAME]."""

    who: str
    he: str
    him: str
    his: str

    def bound(self, *, introduced: bool, who: str) -> dict[str, str]:
        """Return the names that templates use; before the patient is introduced, `who` stands for the pronouns."""
        if self.he == "I":
            return {"he": "I", "him": "me", "his": "my", "have": "have", "am": "am", "do": "do", "s": "", "es": ""}
        verbs = {"have": "has", "am": "is", "do": "does", "s": "s", "es": "es"}
        if introduced:
            return {"he": self.he, "him": self.him, "his": self.his, **verbs}
        return {"he": who, "him": who, "his": f"{who}'s", **verbs}


SELF = Patient(who="I", he="I", him="me", his="my")


def man(who: str) -> Patient:
    """Return a patient spoken of as he."""
    return Patient(who=who, he="he", him="him", his="his")


def woman(who: str) -> Patient:
    """Return a patient spoken of as she."""
    return Patient(who=who, he="she", him="her", his="her")


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """One house.

    `letters` weighs the layouts of `simulations.corpus.letters`; `asks` weighs the question kinds; `zipf` is the
    exponent of the topics' popularity; the shares are probabilities. `questions` and `replies` are keyed by the asks,
    with `helps` split into `helps_ailment` and `helps_remedy`; `tails` add a second fact and are keyed by that fact.
    """

    name: str
    size: int
    zipf: float
    self_share: float
    closing_share: float
    lower_share: float
    layouts: tuple[float, float, float, float]
    asks: tuple[float, float, float, float, float, float]
    words: Mapping[str, tuple[str, ...]]
    patients: tuple[Patient, ...]
    named_patients: tuple[Patient, ...]
    openings: tuple[str, ...]
    named_openings: tuple[str, ...]
    ailment_statements: tuple[str, ...]
    remedy_statements: tuple[str, ...]
    situations: tuple[str, ...]
    asides: tuple[str, ...]
    questions: Mapping[str, tuple[str, ...]]
    closings: tuple[str, ...]
    signed_closings: tuple[str, ...]
    reach_closings: tuple[str, ...]
    replies: Mapping[str, tuple[str, ...]]
    tails: Mapping[str, tuple[str, ...]]
