"""Drops drafts that are not a well-formed instruction: too short, too long, looping, echoing, cut off, unprintable.

Judges `instruction` only; the response of a draft is replaced by the professional's answer. What counts as an ask is
English. Out of scope: meaning (`domain`), copies (`near_duplicate`), personal data (`pii`).

Source: Self-Instruct (2212.10560) heuristics by length and keyword; the loop and echo checks are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from fl_app import text
from fl_app.config import Section
from fl_app.types import Screened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fl_app.types import Draft
    from strategies.lab import ServerModels
    from strategies.stages import Filter

LOOP_WORDS = 4
LOOP_TIMES = 3
"""A run of 4 words that occurs 3 times is a decoding loop; two occurrences happen in honest lists. Assumption."""

HEADING = "### "
"""Opens a field of the Alpaca template; in an instruction it is an echo, in an answer an honest heading."""

_ASK = re.compile(
    r"\?|\b(?:please|how|what|why|when|where|which|who|whom|whose|can (?:you|i|we)|could (?:you|i|we)|should (?:i|we)|"
    r"would you|will you|tell|explain|describe|list|write|give|suggest|recommend|advise|help|classify|summari[sz]e|"
    r"translate|compare|name|find|i (?:want|need|wish|would like) to)\b",
    re.IGNORECASE,
)


class Length(Section):
    """[[server.filters]] kind = "length".

    `require_question`: the text holds a question mark or a word of asking. `require_end`: its last sentence is
    finished. `echoes`: texts that never belong into an instruction, such as the fixed words of the control codes;
    they come on top of the marks of common templates.
    """

    kind: Literal["length"]
    min_words: Annotated[int, Field(ge=1)] = 5
    max_words: Annotated[int, Field(ge=1)] = 300
    require_question: bool = False
    require_end: bool = False
    echoes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} > max_words {self.max_words}: nothing would be kept")
        if "" in self.echoes:
            raise ValueError("echoes holds an empty text, which every draft contains")
        return self

    def build(self, lab: ServerModels) -> Filter:
        """Return the stage; it asks nothing of the lab."""
        del lab
        return LengthFilter(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthFilter:
    """A `Filter` that looks at one draft at a time."""

    section: Length

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """Return the well-formed drafts; see the module for what is not."""
        del earlier
        dropped = {draft.id: fault for draft in drafts if (fault := next(self._faults(draft), ""))}
        return Screened(kept=tuple(draft for draft in drafts if draft.id not in dropped), dropped=dropped)

    def _faults(self, draft: Draft) -> Iterator[str]:
        """Yield what is wrong with the draft, the plainest first."""
        section, instruction = self.section, draft.instruction
        tokens = text.words(instruction)
        if len(tokens) < section.min_words:
            yield f"length: {len(tokens)} words < {section.min_words}"
        if len(tokens) > section.max_words:
            yield f"length: {len(tokens)} words > {section.max_words}"
        if not all(mark.isprintable() or mark in "\n\t" for mark in instruction) or "\ufffd" in instruction:
            yield "unprintable: a control or replacement character"
        if _echoes(instruction, (HEADING, *section.echoes), draft.origin.code):
            yield "echo: a control code or template mark"
        if most := _most_repeated(tokens):
            yield f"loop: {LOOP_WORDS} words repeated {most} times"
        if section.require_question and not _ASK.search(instruction):
            yield "no question: nothing is asked"
        if section.require_end and not text.ends_sentence(instruction):
            yield "unfinished: no sentence end"


def _echoes(instruction: str, marks: tuple[str, ...], code: str) -> bool:
    """Return whether a template's mark, a listed one, or the draft's own code unless a plain word, is in the text."""
    lowered = instruction.lower()
    spelled_out = bool(code) and not code.isalnum()
    listed = any(mark.lower() in lowered for mark in marks)
    return listed or text.holds_template_mark(instruction) or (spelled_out and code.lower() in lowered)


def _most_repeated(tokens: list[str]) -> int:
    """Return how often the commonest run of words occurs when that is a loop, else 0."""
    counts = Counter(text.ngrams(tokens, LOOP_WORDS))
    most = max(counts.values(), default=0)
    return most if most >= LOOP_TIMES else 0
