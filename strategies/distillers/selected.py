"""A distiller that keeps the best share of another one's lessons, by what the professional itself computes.

Two likelihoods of an answer, per token, rank the lessons of a round:

    reward      log p(answer | instruction) - log p(answer | no instruction): how much the instruction explains.
                exp(-reward) compares perplexities where IFD compares losses: at IFD above 1, reward is below 0
    perplexity  exp(-log p(answer | instruction)): lower is more fluent

A lesson's rank is `reward_share` of its reward's rank and the rest of its perplexity's; the top `keep` of them stay.
What a wrong answer costs the target is not measured, only how the professional would have written.

Source: RewardDS (Wang et al. 2025, 2502.18517): half reward, half perplexity rank, the top eighth. Its reward model is
trained under DP on private rows; ours is the professional, so that nothing more is spent. IFD: Li et al. 2023
(2308.12032), and KnowledgeSG's (2410.05725) evaluation.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app.config import Section
from strategies.distillers.endpoint import Endpoint
from strategies.distillers.judge_then_rewrite import JudgeThenRewrite
from strategies.distillers.professional import Professional
from strategies.distillers.self_consistency import SelfConsistency

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Draft, Lesson
    from strategies.lab import ServerModels, TextModel
    from strategies.stages import Distiller

_log = logging.getLogger(__name__)


class Selected(Section):
    """[server.distiller] kind = "selected", around the distiller of [server.distiller.inner].

    `keep` is a share of the inner distiller's lessons, rounded up; 1 keeps all. `min_reward` is in nats a token: an
    answer that its instruction explains by less is dropped first (0 is IFD's own bound; far below it, none is).
    """

    kind: Literal["selected"]
    inner: Annotated[Professional | Endpoint | JudgeThenRewrite | SelfConsistency, Field(discriminator="kind")]
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    reward_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_reward: float = -1e9

    def build(self, lab: ServerModels) -> Distiller:
        """Return the stage over the inner one and the lab's professional. Raises: what the inner one's does."""
        return SelectingDistiller(section=self, inner=self.inner.build(lab), professional=lab.professional)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the professional computes for a lesson, both per token in nats."""

    reward: float
    surprise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectingDistiller:
    """A `Distiller` around another."""

    section: Selected
    inner: Distiller
    professional: TextModel

    def __call__(self, drafts: Sequence[Draft], rng: np.random.Generator) -> Sequence[Lesson]:
        """Return the best of the inner distiller's lessons, in order. Of equal ranks the earlier lesson stays."""
        lessons = self.inner(drafts, rng)
        if not lessons:
            return ()
        standings = self._standings(lessons)
        fit = [n for n, one in enumerate(standings) if one.reward >= self.section.min_reward]
        by_reward = _ranks([-standings[n].reward for n in fit])
        by_surprise = _ranks([standings[n].surprise for n in fit])
        share = self.section.reward_share
        rank = {n: share * by_reward[i] + (1 - share) * by_surprise[i] for i, n in enumerate(fit)}
        kept = sorted(fit, key=lambda n: (rank[n], n))[: math.ceil(self.section.keep * len(lessons))]
        _log.info("teacher: %d of %d lessons selected", len(kept), len(lessons))
        return tuple(lessons[n] for n in sorted(kept))

    def _standings(self, lessons: Sequence[Lesson]) -> list[Standing]:
        """Return how likely every answer is with its instruction and without. Raises: NotFinite."""
        model = self.professional
        asked = [model.chat(one.instruction) for one in lessons]
        options = [(one.answer,) for one in lessons]
        told = [one for (one,) in model.option_likelihood(asked, options)]
        untold = [one for (one,) in model.option_likelihood([model.chat("")] * len(lessons), options)]
        return [
            Standing(reward=(a.log_prob - b.log_prob) / max(1, a.tokens), surprise=-a.log_prob / max(1, a.tokens))
            for a, b in zip(told, untold, strict=True)
        ]


def _ranks(values: Sequence[float]) -> list[float]:
    """Return each value's place from the lowest, equal values sharing the mean of their places."""
    order = sorted(values)
    first = {value: n for n, value in reversed(list(enumerate(order)))}
    last = {value: n for n, value in enumerate(order)}
    return [(first[value] + last[value]) / 2 for value in values]
