"""The lab's own professional model answers the drafts; nothing leaves the server.

Out of scope: judging answers (`judge_then_rewrite`), choosing among several (`self_consistency`).

Source: KnowledgeSG (2410.05725), W_pro writes the responses of the synthetic instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strategies.answering import AnsweringSection, askable, lesson, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Draft, Lesson
    from strategies.lab import ServerModels, TextModel
    from strategies.stages import Distiller


class Professional(AnsweringSection):
    """[server.distiller] kind = "professional"."""

    kind: Literal["professional"]

    def build(self, lab: ServerModels) -> Distiller:
        """Return the stage over the lab's professional."""
        return ProfessionalDistiller(section=self, professional=lab.professional)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfessionalDistiller:
    """A `Distiller` over a local model."""

    section: Professional
    professional: TextModel

    def __call__(self, drafts: Sequence[Draft], rng: np.random.Generator) -> Sequence[Lesson]:
        """Return a lesson for every draft with a usable answer, in order."""
        asked = askable(drafts, self.section)
        answers = write(self.professional, [draft.instruction for draft in asked], self.section, rng)
        name = self.professional.name
        return tuple(lesson(draft, answer, name) for draft, answer in zip(asked, answers, strict=True) if answer)
