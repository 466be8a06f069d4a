"""Public control codes: (house, topic, what is asked). They are made from the index alone, so they leak nothing.

All combinations are listed, used or not: which codes occur in a house's letters is private.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulations.corpus.formulary import ASKS, Topic

if TYPE_CHECKING:
    from collections.abc import Sequence

HOUSE_NAMES = ("harbour", "court", "farm", "school")
HOUSE_WORDS = {"harbour": "harbour house", "court": "court house", "farm": "hill-farm house", "school": "school house"}
ASKS_WORDS = {
    "dose": "the dose",
    "take": "how to take it",
    "avoid": "what to avoid",
    "storage": "how to store it",
    "warning": "the warning sign",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """One control code; `text` is the prefix a learner trains under and a synthesizer samples from."""

    id: str
    text: str
    topic: str
    house: str
    asks: str


def code_id(house: str, topic: Topic, asks: str) -> str:
    """Return the id of one combination."""
    return f"{house}/{topic.slug}/{asks}"


def build_codes(topics: Sequence[Topic]) -> tuple[Code, ...]:
    """Return all codes, sorted by id."""
    codes: list[Code] = []
    for house in HOUSE_NAMES:
        for topic in topics:
            for asks in ASKS:
                helps = "what helps" if topic.kind == "ailment" else "what it is for"
                wanted = ASKS_WORDS.get(asks, helps)
                text = f"Letter to the {HOUSE_WORDS[house]} about {topic.name}, asking {_for(asks)}{wanted}:\n"
                codes.append(Code(id=code_id(house, topic, asks), text=text, topic=topic.slug, house=house, asks=asks))
    return tuple(sorted(codes, key=lambda code: code.id))


def _for(asks: str) -> str:
    return "for " if asks in ("dose", "warning") else ""
