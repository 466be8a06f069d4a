"""The lab's own professional model answers the drafts; nothing leaves the server.

An answer with a link or a template's mark teaches the target nothing it should know, so it makes no lesson; nor does
an empty one. Out of scope: judging answers.

Source: KnowledgeSG (2410.05725), W_pro writes the responses of the synthetic instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app import text
from fl_app.config import Section
from fl_app.types import Lesson

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Draft
    from strategies.lab import ServerModels, TextModel
    from strategies.stages import Distiller

TOKENS_PER_WORD = 4
"""More tokens than a word of running text takes in any tokenizer we use; an answer of fewer words than
max_new_tokens / 4 therefore ended by the model's own will, with or without a full stop ("positive"). Assumption."""


class Professional(Section):
    """[server.distiller] kind = "professional". temperature 0 is greedy."""

    kind: Literal["professional"]
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

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
        drafts = [draft for draft in drafts if not text.markup(draft.instruction)]
        if not drafts:
            return ()
        model, section = self.professional, self.section
        raw = model.generate(
            [model.chat(draft.instruction) for draft in drafts],
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            rng=rng,
        )
        answers = [self._clean(one) for one in raw]
        return tuple(
            Lesson(
                draft_id=draft.id,
                instruction=draft.instruction,
                answer=answer,
                teacher=model.name,
                prompt=draft.origin.prompt,
            )
            for draft, answer in zip(drafts, answers, strict=True)
            if answer
        )

    def _clean(self, raw: str) -> str:
        """Return the answer without a broken-off end; empty when nothing usable is left."""
        answer = raw.strip()
        finished = text.ends_sentence(answer) or len(answer.split()) * TOKENS_PER_WORD < self.section.max_new_tokens
        answer = answer if finished else text.cut_at_last_sentence(answer)
        return "" if text.markup(answer) else answer
