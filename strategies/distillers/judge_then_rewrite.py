"""The professional answers, judges its answer, and writes a weak one again with the first before its eyes.

    draft -> answer -> log-odds of yes against no -> below the threshold: rewrite -> judged again -> the better one

The verdict is a likelihood, not sampled text: deterministic, one forward pass, and a threshold to move (a small model
prefers one word whatever it is asked; `threshold` sets that off, 0 is not calibrated). A rewrite replaces the first
answer only where the same judge likes it better, so rewriting never lowers what the judge measures. Whether the judge
is right is another matter: it is the writer.

Out of scope: an endpoint, whose likelihoods we do not see.
Source: Self-Refine (Madaan et al. 2023, 2303.17651): feedback and refinement by one model. Ours differs in a verdict
by likelihood instead of written feedback, in one refinement, and in keeping the better of the two.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from strategies.answering import AnsweringSection, askable, lesson, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Draft, Lesson
    from strategies.lab import ServerModels, TextModel
    from strategies.stages import Distiller

MESSAGE, ANSWER = "{message}", "{answer}"
QUESTION = (
    "A message and an answer to it.\nMessage: {message}\nAnswer: {answer}\n"
    "Does the answer say what the message asks for, correctly and completely? Reply with yes or no."
)
REWRITE = "{message}\n\nA first attempt at an answer was: {answer}\nWrite a better answer."

_log = logging.getLogger(__name__)


class JudgeThenRewrite(AnsweringSection):
    """[server.distiller] kind = "judge_then_rewrite".

    `question` and `rewrite` hold {message} and {answer} once each; everything else in them is taken literally.
    `threshold` is in nats: an answer with log p(yes) - log p(no) not above it is written again. With `drop` a draft
    whose better answer is not above it either makes no lesson.
    """

    kind: Literal["judge_then_rewrite"]
    question: str = QUESTION
    rewrite: str = REWRITE
    yes: str = "yes"
    no: str = "no"
    threshold: float = 0.0
    drop: bool = False

    @model_validator(mode="after")
    def _askable(self) -> JudgeThenRewrite:
        for name in ("question", "rewrite"):
            form = getattr(self, name)
            if form.count(MESSAGE) != 1 or form.count(ANSWER) != 1:
                raise ValueError(f"{name} must hold {MESSAGE} and {ANSWER} exactly once each")
        if not self.yes or not self.no or self.yes == self.no:
            raise ValueError(f"yes and no must be two different words, not {self.yes!r} and {self.no!r}")
        return self

    def build(self, lab: ServerModels) -> Distiller:
        """Return the stage over the lab's professional."""
        return RewritingDistiller(section=self, professional=lab.professional)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritingDistiller:
    """A `Distiller` over a local model that reads its own answers once."""

    section: JudgeThenRewrite
    professional: TextModel

    def __call__(self, drafts: Sequence[Draft], rng: np.random.Generator) -> Sequence[Lesson]:
        """Return a lesson for every draft with a usable answer, in order; the better of two where it was judged weak.

        A first answer that is not usable has no attempt to improve on and makes no lesson.
        """
        section, model = self.section, self.professional
        asked = askable(drafts, self.section)
        first = write(model, [draft.instruction for draft in asked], section, rng)
        answered = [(draft, answer) for draft, answer in zip(asked, first, strict=True) if answer]
        odds = self._log_odds(answered)
        weak = [n for n, score in enumerate(odds) if not score > section.threshold]
        prompts = [_filled(section.rewrite, answered[n][0].instruction, answered[n][1]) for n in weak]
        second = [(answered[n][0], text) for n, text in zip(weak, write(model, prompts, section, rng), strict=True)]
        usable = [(n, pair) for n, pair in zip(weak, second, strict=True) if pair[1]]
        better = 0
        for (n, pair), score in zip(usable, self._log_odds([pair for _, pair in usable]), strict=True):
            if score > odds[n]:
                answered[n], odds[n] = pair, score
                better += 1
        _log.info("teacher: %d answers, %d judged weak, %d of them better rewritten", len(answered), len(weak), better)
        return tuple(
            lesson(draft, answer, model.name)
            for (draft, answer), score in zip(answered, odds, strict=True)
            if score > section.threshold or not section.drop
        )

    def _log_odds(self, answered: Sequence[tuple[Draft, str]]) -> list[float]:
        """Return log p(yes) - log p(no) of every answer."""
        if not answered:
            return []
        section, model = self.section, self.professional
        prompts = [model.chat(_filled(section.question, draft.instruction, answer)) for draft, answer in answered]
        pairs = model.option_likelihood(prompts, [(section.yes, section.no)] * len(prompts))
        return [yes.log_prob - no.log_prob for yes, no in pairs]


def _filled(form: str, message: str, answer: str) -> str:
    """Return a form with both slots filled; what stands in a message or an answer is no slot."""
    head, tail = form.split(MESSAGE)
    if ANSWER in head:
        return head.replace(ANSWER, answer) + message + tail
    return head + message + tail.replace(ANSWER, answer)
