"""The kept questions and their answers on disk: a `datasets` dataset, the same rows as JSON lines, and the card.

A run's stamp goes into every row, into the dataset's description and into the card; a write that would lose it is
refused, and so is a folder that somebody else made.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from fl_app import journal
from fl_app.errors import RunInvalid

if TYPE_CHECKING:
    from pathlib import Path

    from simulations.curation.evidence import Evidence

CARD, LINES, FOLDER = "README.md", "data.jsonl", "dataset"
COLUMNS = ("draft_id", "question", "answer", "code", "round", "method", "voice", "teacher")


def rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Return a row per kept draft, in order; one that was not taught has an empty answer and teacher."""
    taught = {(lesson.round, lesson.draft_id): lesson for lesson in evidence.lessons}
    found: list[dict[str, Any]] = []
    for draft in evidence.kept:
        lesson = taught.get((draft.round, draft.id))
        # A lesson's question is what the filters left of the draft, which a filter may have masked.
        values = (
            draft.id,
            lesson.question if lesson else draft.text,
            lesson.answer if lesson else draft.response,
            draft.code,
            draft.round,
            draft.method,
            draft.voice,
            lesson.teacher if lesson else "",
        )
        row: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
        found.append({**row, "stamp": evidence.record.stamp} if evidence.record.stamp else row)
    return found


def write(evidence: Evidence, card: str, target: Path) -> Path:
    """Write card, JSON lines and dataset into `target`, whole or not at all, and return it.

    What an earlier call wrote there is replaced.

    Raises: RunInvalid when the card lacks the run's stamp, or `target` holds what no such call wrote.
    """
    import datasets

    stamp = evidence.record.stamp
    if stamp and stamp not in card:
        raise RunInvalid(f"the card does not hold the stamp {stamp!r}; texts of this run do not go out without it")
    if target.exists() and {entry.name for entry in target.iterdir()} - {CARD, LINES, FOLDER}:
        raise RunInvalid(f"{target} holds other files than a dataset; give a new directory")
    draft = target.with_name(f".{target.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        lines = rows(evidence)
        journal.write_lines(draft / LINES, lines)
        journal.write_text(draft / CARD, card)
        strings = {name: datasets.Value("int64" if name == "round" else "string") for name in COLUMNS}
        if stamp:
            strings["stamp"] = datasets.Value("string")
        features = datasets.Features(strings)
        told = datasets.DatasetInfo(description=f"{stamp}\n\n{card}" if stamp else card, features=features)
        made = datasets.Dataset.from_dict(
            {name: [line[name] for line in lines] for name in strings}, features=features, info=told
        )
        datasets.disable_progress_bars()
        made.save_to_disk(str(draft / FOLDER))
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
