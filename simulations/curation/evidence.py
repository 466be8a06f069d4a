"""The texts of a run directory as values: every draft with its fate, every lesson, and what the run says of itself.

Out of scope: judging them. A file that is not there means that the run stopped before it; a torn line is passed over,
as in the run's report.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fl_app.errors import RunInvalid
from fl_app.journal import STAMP
from simulations.report.fields import parse_line, read_lines, text_of, tree_of
from simulations.report.record import read_run

if TYPE_CHECKING:
    from pathlib import Path

    from simulations.report.record import Record

KEPT, UNDECIDED = "kept", "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One draft. `fate` is KEPT, the name of the filter that dropped it, or UNDECIDED when none has judged it."""

    id: str
    round: int
    code: str
    voice: str
    method: str
    text: str
    response: str
    fate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """One lesson: a kept draft and the professional's answer."""

    round: int
    draft_id: str
    question: str
    answer: str
    teacher: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """A run as the curation sees it. `filters` in the order of the configuration; `config` is its resolved tree."""

    record: Record
    summary: dict[str, Any]
    config: dict[str, Any]
    filters: tuple[str, ...]
    drafts: tuple[Written, ...]
    lessons: tuple[Taught, ...]

    @property
    def kept(self) -> tuple[Written, ...]:
        """The drafts that passed every filter."""
        return tuple(draft for draft in self.drafts if draft.fate == KEPT)


def read(run: Path) -> Evidence:
    """Return the texts of a run.

    Raises: RunInvalid when there is no readable summary or configuration, or when the run was a simulation and its
    summary does not carry the stamp that says so.
    """
    record = read_run(run)
    path = run / "config.toml"
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RunInvalid(
            f"{path}: {error}; curation needs the configuration that a run leaves in its directory"
        ) from None
    _check_stamp(run, record, config)
    drafts: list[Written] = []
    lessons: list[Taught] = []
    for folder in _rounds(run):
        drafts += _drafts(folder)
        lessons += _lessons(folder)
    filters = [text_of(tree_of(one).get("kind")) for one in tree_of(config.get("server")).get("filters", [])]
    return Evidence(
        record=record,
        summary=parse_line((run / "summary.json").read_text(encoding="utf-8")),
        config=config,
        filters=tuple(dict.fromkeys(filters)),
        drafts=tuple(drafts),
        lessons=tuple(lessons),
    )


def _check_stamp(run: Path, record: Record, config: dict[str, Any]) -> None:
    """Raise `RunInvalid` when the run must carry a stamp that its summary does not hold."""
    simulated = tree_of(config.get("run")).get("mode") != "production"
    open_sites = [budget.site for budget in record.sites if math.isinf(budget.spent)]
    if (simulated and STAMP not in record.stamp) or (open_sites and not record.stamp):
        why = "is not of mode production" if simulated else f"spent an infinite epsilon at {', '.join(open_sites)}"
        raise RunInvalid(
            f"{run / 'summary.json'} has the stamp {record.stamp!r}, and the run {why}: a stamp is not to be taken "
            "off; restore the summary that the run wrote"
        )


def _rounds(run: Path) -> list[Path]:
    folder = run / "rounds"
    if not folder.is_dir():
        return []
    return sorted((entry for entry in folder.iterdir() if entry.name.isdecimal()), key=lambda entry: int(entry.name))


def _drafts(folder: Path) -> list[Written]:
    screened = folder / "screened.json"
    verdict = parse_line(screened.read_text(encoding="utf-8", errors="replace")) if screened.is_file() else {}
    dropped, kept = tree_of(verdict.get("dropped")), set(map(str, verdict.get("kept", [])))
    found: list[Written] = []
    for line in read_lines(folder / "drafts.jsonl"):
        origin, name = tree_of(line.get("origin")), text_of(line.get("id"))
        reason = text_of(dropped.get(name)).split(":")[0]
        found.append(
            Written(
                id=name,
                round=int(folder.name),
                code=text_of(origin.get("code")),
                voice=text_of(origin.get("voice")),
                method=text_of(origin.get("method")),
                text=text_of(line.get("instruction")),
                response=text_of(line.get("response")),
                fate=reason or (KEPT if name in kept else UNDECIDED),
            )
        )
    return found


def _lessons(folder: Path) -> list[Taught]:
    return [
        Taught(
            round=int(folder.name),
            draft_id=text_of(line.get("draft_id")),
            question=text_of(line.get("instruction")),
            answer=text_of(line.get("answer")),
            teacher=text_of(line.get("teacher")),
        )
        for line in read_lines(folder / "lessons.jsonl")
    ]
