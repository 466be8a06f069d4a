"""Drops what one voice wrote beyond its share: of the drafts kept, no site holds more than `max_share` / n of them.

n counts the voices with a draft in the input; `origin.voice` names them. A site that writes much that other filters
keep, or all of a topic, would otherwise teach the target more than the others do (a poisoned site's way in: T7).

Cutting one voice makes the whole smaller, and with it what each voice may hold, so the cap is a fixpoint. With c_v
drafts of voice v, keep min(c_v, floor(max_share * T / n)) of each for the greatest T with

    T = sum_v min(c_v, floor(max_share * T / n))

The right side grows with T and is at most sum c_v, so going down from T = sum c_v by it ends at the greatest such T.
T = n satisfies it with >= (every voice wrote, and max_share >= 1), so T >= n and every voice keeps a draft or more: n
is the same on the kept drafts, T satisfies the equation there as well, and a second pass drops nothing.

A voice keeps its first drafts. Shares are of one round: `earlier` is not counted, and rounds that each keep the cap
keep it together while the same sites write.

Out of scope: what a site says within its share; voices of which filters before this one left nothing, see `min_voices`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app.config import Section
from fl_app.types import Screened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Draft
    from strategies.lab import ServerModels
    from strategies.stages import Filter


class SiteShare(Section):
    """[[server.filters]] kind = "site_share", the last filter, with synthesizer.voices = "each_site".

    1.5 is bar B14's share. Two voices of which one may hold max_share / 2 = 0.75 are capped, one alone is not: with
    fewer than `min_voices` left in a round, nothing of it is kept.
    """

    kind: Literal["site_share"]
    max_share: Annotated[float, Field(ge=1)] = 1.5
    min_voices: Annotated[int, Field(ge=1)] = 1

    def build(self, lab: ServerModels) -> Filter:
        """Return the stage; it asks nothing of the lab."""
        del lab
        return SiteShareFilter(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteShareFilter:
    """A `Filter` that counts voices and reads no text."""

    section: SiteShare

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """Return the first drafts of every voice, as many as its share allows."""
        del earlier
        wrote = Counter(draft.origin.voice for draft in drafts)
        if len(wrote) < self.section.min_voices:
            reason = f"site_share: voices left {len(wrote)} < {self.section.min_voices}"
            return Screened(kept=(), dropped={draft.id: reason for draft in drafts})
        most = shares(wrote, max_share=self.section.max_share)
        held: Counter[str] = Counter()
        kept: list[Draft] = []
        dropped: dict[str, str] = {}
        for draft in drafts:
            voice = draft.origin.voice
            if held[voice] < most[voice]:
                held[voice] += 1
                kept.append(draft)
            else:
                dropped[draft.id] = f"site_share: beyond {most[voice]} of {sum(most.values())} drafts"
        return Screened(kept=tuple(kept), dropped=dropped)


def shares(wrote: Mapping[str, int], *, max_share: float) -> dict[str, int]:
    """Return how many drafts each voice keeps: the most for which none exceeds max_share / n of them all.

    Exact: `max_share` is read as the decimal number it was written as.
    """
    part = Fraction(repr(max_share)) / max(len(wrote), 1)
    kept = dict(wrote)
    while True:
        most = int(part * sum(kept.values()))
        cut = {voice: min(count, most) for voice, count in kept.items()}
        if cut == kept:
            return kept
        kept = cut
