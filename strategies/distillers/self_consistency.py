"""The professional answers several times; the answer that agrees most with the others becomes the lesson.

    utility(i) = mean over the other answers j of ROUGE-L(i, j);   the lesson holds argmax utility

which is minimum Bayes risk decoding with ROUGE-L as utility and the samples as the reference distribution: an answer
that only one sample gives is taken for a slip. It costs `samples` answers a draft.

Out of scope: an endpoint; its cache keeps one answer a prompt, and several would be paid for.
Source: self-consistency (Wang et al. 2022, 2203.11171), which votes among final answers that can be equal; for free
text the vote is minimum Bayes risk (Kumar & Byrne 2004; Bickel & Doksum 1977, 1.3). ROUGE-L as F1 over lower-case
words, Lin 2004.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app import text
from strategies.answering import AnsweringSection, askable, lesson, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Draft, Lesson
    from strategies.lab import ServerModels, TextModel
    from strategies.stages import Distiller

_log = logging.getLogger(__name__)


class SelfConsistency(AnsweringSection):
    """[server.distiller] kind = "self_consistency".

    `samples` answers a draft, drawn at `temperature` (0 would draw the same one each time, so it must be above).
    A draft whose best answer agrees with the others by less than `min_agreement` makes no lesson.
    """

    kind: Literal["self_consistency"]
    samples: Annotated[int, Field(ge=2, le=64)] = 5
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.7
    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.0

    def build(self, lab: ServerModels) -> Distiller:
        """Return the stage over the lab's professional."""
        return VotingDistiller(section=self, professional=lab.professional)


@dataclass(frozen=True, slots=True, kw_only=True)
class VotingDistiller:
    """A `Distiller` over a local model that answers several times."""

    section: SelfConsistency
    professional: TextModel

    def __call__(self, drafts: Sequence[Draft], rng: np.random.Generator) -> Sequence[Lesson]:
        """Return a lesson for every draft on which enough usable answers agree, in order.

        Answers that are not usable have no vote. One usable answer has nobody to agree with: agreement 0.
        """
        section = self.section
        asked = askable(drafts, self.section)
        messages = [draft.instruction for draft in asked for _ in range(section.samples)]
        answers = write(self.professional, messages, section, rng)
        lessons: list[Lesson] = []
        for n, draft in enumerate(asked):
            usable = [one for one in answers[n * section.samples : (n + 1) * section.samples] if one]
            if not usable:
                continue
            utilities = agreement(usable)
            best = max(range(len(usable)), key=lambda i: (utilities[i], -i))
            if utilities[best] >= section.min_agreement:
                lessons.append(lesson(draft, usable[best], self.professional.name))
        _log.info("teacher: %d lessons of %d drafts, %d answers each", len(lessons), len(drafts), section.samples)
        return tuple(lessons)


def agreement(answers: Sequence[str]) -> list[float]:
    """Return each answer's mean ROUGE-L F1 with the other answers, in [0, 1]; 0 for one that stands alone."""
    tokens = [text.words(one) for one in answers]
    found: list[float] = []
    for i, own in enumerate(tokens):
        others = [_rouge_l(own, other) for j, other in enumerate(tokens) if j != i]
        found.append(sum(others) / len(others) if others else 0.0)
    return found


def _rouge_l(left: Sequence[str], right: Sequence[str]) -> float:
    total = len(left) + len(right)
    return 2 * text.common_subsequence(left, right) / total if total else 0.0
