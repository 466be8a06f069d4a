"""Keeps drafts that the professional itself takes for a question of its domain, by the odds of yes against no.

Likelihoods instead of a sampled verdict: deterministic, one forward pass, and a threshold to move. A small model
prefers one of the two words whatever it is asked; `threshold` is where that is set off (0 is not calibrated).
Judges `instruction` only. Out of scope: whether the answer will be right.

Source: KnowledgeSG (2410.05725), "is this a valid question of the domain", asked there as free text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from fl_app.config import Section
from fl_app.types import Screened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Draft
    from strategies.lab import ServerModels, TextModel
    from strategies.stages import Filter

SLOT = "{text}"


class Domain(Section):
    """[[server.filters]] kind = "domain".

    `question` holds {text} once, where the draft goes; everything else in it is taken literally, braces too.
    `threshold` is in nats: log p(yes) - log p(no) must be larger.
    """

    kind: Literal["domain"]
    question: str
    yes: str = "yes"
    no: str = "no"
    threshold: float = 0.0

    @model_validator(mode="after")
    def _askable(self) -> Domain:
        if self.question.count(SLOT) != 1:
            raise ValueError(f"question must hold {SLOT} exactly once, where the draft goes")
        if not self.yes or not self.no or self.yes == self.no:
            raise ValueError(f"yes and no must be two different words, not {self.yes!r} and {self.no!r}")
        return self

    def build(self, lab: ServerModels) -> Filter:
        """Return the stage over the lab's professional."""
        return DomainFilter(section=self, professional=lab.professional)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainFilter:
    """A `Filter` that asks the professional about one draft at a time."""

    section: Domain
    professional: TextModel

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """Return the drafts whose odds are above the threshold; odds that are not a number are below it."""
        del earlier
        odds = self._log_odds(drafts)
        dropped = {
            draft.id: f"domain: log-odds {score:.2f} <= {self.section.threshold:g}"
            for draft, score in zip(drafts, odds, strict=True)
            if not score > self.section.threshold
        }
        return Screened(kept=tuple(draft for draft in drafts if draft.id not in dropped), dropped=dropped)

    def _log_odds(self, drafts: Sequence[Draft]) -> list[float]:
        """Return log p(yes) - log p(no) of every draft."""
        if not drafts:
            return []
        section, model = self.section, self.professional
        prompts = [model.chat(section.question.replace(SLOT, draft.instruction)) for draft in drafts]
        pairs = model.option_likelihood(prompts, [(section.yes, section.no)] * len(prompts))
        return [yes.log_prob - no.log_prob for yes, no in pairs]
