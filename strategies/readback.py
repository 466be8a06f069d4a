"""What a phase has written, read back as the values it wrote. JSON tells a float that is not finite as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fl_app import journal, releases
from fl_app.privacy.events import receipt_from_dict
from fl_app.types import ClientLevelCost, CodedText, Draft, Hello, Lesson, Material, Origin, Score

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def drafts(path: Path) -> tuple[Draft, ...]:
    """Return the drafts of a JSON-lines file."""
    return tuple(Draft(**_with(row, origin=Origin(**row["origin"]))) for row in journal.read_lines(path))


def lessons(path: Path) -> tuple[Lesson, ...]:
    """Return the lessons of a JSON-lines file."""
    return tuple(Lesson(**row) for row in journal.read_lines(path))


def write_material(material: Material, folder: Path) -> None:
    """Write what the sites are sent in a round into a folder of its own."""
    journal.write_lines(folder / "texts.jsonl", material.texts)
    releases.save_vectors(material.vectors, folder / "vectors.safetensors")


def material(folder: Path) -> Material:
    """Return what the sites are sent in a round."""
    texts = tuple(CodedText(code=row["code"], text=row["text"]) for row in journal.read_lines(folder / "texts.jsonl"))
    return Material(texts=texts, vectors=releases.load_vectors(folder / "vectors.safetensors"))


def score(told: Mapping[str, Any]) -> Score:
    """Return a score."""
    return Score(**_with(told, **{key: float(told[key]) for key in ("value", "low", "high")}))


def hello(told: Mapping[str, Any]) -> Hello:
    """Return how a site introduced itself."""
    return Hello(**_with(told, spent=float(told["spent"]), targets=tuple(told.get("targets", ()))))


def cost(told: Mapping[str, Any] | None) -> ClientLevelCost | None:
    """Return what a merged adapter cost at the server, if it cost anything."""
    return None if told is None else ClientLevelCost(**_with(told, receipt=receipt_from_dict(told["receipt"])))


def _with(told: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {**told, **changes}
