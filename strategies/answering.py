"""What every distiller over a local model does with an answer: which drafts are asked, what is usable, the lesson.

An answer with a link or a template's mark teaches the target nothing it should know, so it makes no lesson; nor does
an empty one, and a draft with either is not asked about.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from fl_app import text
from fl_app.config import Section
from fl_app.types import Lesson

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Draft
    from strategies.lab import TextModel

TOKENS_PER_WORD = 4
"""More tokens than a word of running text takes in any tokenizer we use; an answer of fewer words than
max_new_tokens / 4 therefore ended by the model's own will, with or without a full stop ("positive"). Assumption."""


SLOT = "{text}"


class AnsweringSection(Section):
    """How a local model writes. temperature 0 is greedy.

    `task` is what is asked about a draft, which stands at {text}; the lesson's instruction is that task, so
    that a corpus of texts to be judged (headlines, notes) needs no question inside every draft.
    """

    task: str = SLOT
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @field_validator("task")
    @classmethod
    def _has_slot(cls, task: str) -> str:
        if task.count(SLOT) != 1:
            raise ValueError(f"task must hold {SLOT} exactly once, where the draft goes")
        return task


def askable(drafts: Sequence[Draft], section: AnsweringSection) -> list[Draft]:
    """Return the drafts that are put to the professional, in order, each as the task about it."""
    return [
        dataclasses.replace(draft, instruction=section.task.replace(SLOT, draft.instruction))
        for draft in drafts
        if not text.markup(draft.instruction)
    ]


def write(model: TextModel, asked: Sequence[str], section: AnsweringSection, rng: np.random.Generator) -> list[str]:
    """Return the model's usable answer to every message, "" where it has none."""
    if not asked:
        return []
    raw = model.generate(
        [model.chat(message) for message in asked],
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        rng=rng,
    )
    return [_clean(one, section.max_new_tokens) for one in raw]


def lesson(draft: Draft, answer: str, teacher: str) -> Lesson:
    """Return the lesson that an answered draft makes."""
    return Lesson(
        draft_id=draft.id,
        instruction=draft.instruction,
        answer=answer,
        teacher=teacher,
        prompt=draft.origin.prompt,
    )


def _clean(raw: str, max_new_tokens: int) -> str:
    """Return the answer without a broken-off end; empty when nothing usable is left."""
    answer = raw.strip()
    finished = text.ends_sentence(answer) or len(answer.split()) * TOKENS_PER_WORD < max_new_tokens
    answer = answer if finished else text.cut_at_last_sentence(answer)
    return "" if text.markup(answer) else answer
