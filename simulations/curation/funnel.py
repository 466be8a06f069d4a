"""From drafts written to lessons: what each filter took, by round, by control code, by voice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulations.curation.evidence import KEPT, UNDECIDED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from simulations.curation.evidence import Evidence, Written

MERGED_VOICE = "merged adapter"
"""Name of the voice of drafts that no single site's release wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Counts of drafts: written = dropped + kept + undecided; `lessons` are those among them that were taught."""

    written: int
    dropped: Mapping[str, int]
    kept: int
    undecided: int
    lessons: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Funnel:
    """The whole run, and its parts."""

    all: Flow
    by_round: Mapping[str, Flow]
    by_code: Mapping[str, Flow]
    by_voice: Mapping[str, Flow]


def funnel(evidence: Evidence) -> Funnel:
    """Return the counts of a run. A filter that dropped nothing is there with 0; names are in order."""
    taught = Counter((lesson.round, lesson.draft_id) for lesson in evidence.lessons)

    def flow(drafts: Sequence[Written]) -> Flow:
        fates = Counter(draft.fate for draft in drafts)
        known = (*evidence.filters, *sorted(set(fates) - {*evidence.filters, KEPT, UNDECIDED}))
        return Flow(
            written=len(drafts),
            dropped={name: fates[name] for name in known},
            kept=fates[KEPT],
            undecided=fates[UNDECIDED],
            lessons=sum(taught[draft.round, draft.id] for draft in drafts),
        )

    def by(key: Callable[[Written], str]) -> dict[str, Flow]:
        groups: dict[str, list[Written]] = {}
        for draft in evidence.drafts:
            groups.setdefault(key(draft), []).append(draft)
        return {name: flow(group) for name, group in sorted(groups.items(), key=lambda item: _number_first(item[0]))}

    return Funnel(
        all=flow(evidence.drafts),
        by_round=by(lambda draft: str(draft.round)),
        by_code=by(lambda draft: draft.code),
        by_voice=by(lambda draft: draft.voice or MERGED_VOICE),
    )


def _number_first(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 0, name)
