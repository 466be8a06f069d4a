"""A few lessons and a few dropped drafts of a run, chosen by the hash of their id: by nobody, the same every time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulations.report.fields import parse_line, read_lines, text_of, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SAMPLES = 6
"""Lessons, and dropped drafts, that the page shows: a screenful of each. A choice of layout, not of statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonSample:
    """One lesson, to be read."""

    round: int
    instruction: str
    answer: str
    teacher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DropSample:
    """One draft that a filter dropped, to be read."""

    round: int
    instruction: str
    response: str
    reason: str


def lessons(run: Path) -> tuple[LessonSample, ...]:
    """Return lessons to show, one of each round in turn."""
    groups: dict[str, list[tuple[str, LessonSample]]] = {}
    for folder in _round_folders(run):
        for line in read_lines(folder / "lessons.jsonl"):
            sample = LessonSample(
                round=int(folder.name),
                instruction=text_of(line.get("instruction")),
                answer=text_of(line.get("answer")),
                teacher=text_of(line.get("teacher")),
            )
            groups.setdefault(folder.name, []).append((text_of(line.get("draft_id")), sample))
    return tuple(_spread(groups.values()))


def dropped(run: Path) -> tuple[DropSample, ...]:
    """Return dropped drafts to show, one of each reason in turn."""
    groups: dict[str, list[tuple[str, DropSample]]] = {}
    for folder in _round_folders(run):
        screened = folder / "screened.json"
        verdict = parse_line(screened.read_text(encoding="utf-8", errors="replace")) if screened.is_file() else {}
        reasons = tree_of(verdict.get("dropped"))
        for line in read_lines(folder / "drafts.jsonl"):
            reason = text_of(reasons.get(text_of(line.get("id"))))
            if reason:
                sample = DropSample(
                    round=int(folder.name),
                    instruction=text_of(line.get("instruction")),
                    response=text_of(line.get("response")),
                    reason=reason,
                )
                groups.setdefault(reason, []).append((text_of(line.get("id")), sample))
    return tuple(_spread(groups[reason] for reason in sorted(groups)))


def _spread(groups: Iterable[Sequence[tuple[str, Any]]]) -> list[Any]:
    """Return `SAMPLES` entries, one of each group in turn; within a group by hash of the id, so nobody chose them."""
    decks = [
        sorted(group, key=lambda pair: hashlib.sha256(pair[0].encode(errors="replace")).digest()) for group in groups
    ]
    longest = max(map(len, decks), default=0)
    dealt = [deck[turn][1] for turn in range(longest) for deck in decks if turn < len(deck)]
    return dealt[:SAMPLES]


def _round_folders(run: Path) -> list[Path]:
    folder = run / "rounds"
    if not folder.is_dir():
        return []
    return sorted((entry for entry in folder.iterdir() if entry.name.isdecimal()), key=lambda entry: int(entry.name))
