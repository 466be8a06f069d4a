"""What a run would release, looked at before it is released.

    make curate RUN=runs/<id> [REFERENCE=public.jsonl] [ROWS=build/sites/<id>] [FEATURES=minilm]

Into `<run>/curation/`, from the run directory and the public reference alone:

    report.json  report.html      every figure, and the page for people
    release/                      the dataset: README.md (the card), data.jsonl, dataset/

With ROWS, the sites' own rows are searched for what the drafts share with them. That reads private rows and adds no
noise, so it is for the data holder alone and lies apart, in `<run>/curation_holder/`, which only its owner can enter:

    report.json  report.html      the same, and what rows and drafts share
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fl_app import journal, models
from fl_app.errors import ConfigInvalid, RunInvalid, StillroomError
from fl_app.seeds import stream
from simulations.curation import card, closeness, copies, dataset, diversity, evidence, page, personal
from simulations.curation import funnel as funnels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from simulations.curation.closeness import Closeness, Features
    from simulations.curation.copies import Copies
    from simulations.curation.diversity import Diversity
    from simulations.curation.evidence import Evidence
    from simulations.curation.funnel import Funnel
    from simulations.curation.personal import Personal

SCHEMA = 1
TEXT_COLUMNS = ("instruction", "input", "output", "text")
HOLDER_STAMP = "FOR THE DATA HOLDER ONLY - READS PRIVATE ROWS, NOT PRIVATE"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Figures:
    """All figures of a curation. `private_copies` is None but in what the data holder keeps."""

    funnel: Funnel
    diversity: Mapping[str, Diversity]
    personal: Mapping[str, Personal]
    public_copies: Copies | None
    mauve: Closeness | None
    private_copies: Copies | None = None


def figures_of(
    found: Evidence, *, reference: Sequence[Mapping[str, Any]] = (), features: Features | None = None, seed: int = 0
) -> Figures:
    """Return what can be said without a private row. `reference` are public rows with the columns of a corpus."""
    questions, answers = [draft.text for draft in found.kept], [lesson.answer for lesson in found.lessons]
    sets = {"written": [draft.text for draft in found.drafts], "kept": questions, "answers": answers}
    public = texts_of(reference)
    asked = [str(row["instruction"]) for row in reference if isinstance(row.get("instruction"), str)] or public
    return Figures(
        funnel=funnels.funnel(found),
        diversity={name: diversity.diversity(texts, stream(seed, "curation", name)) for name, texts in sets.items()},
        personal={
            "questions": personal.scan(questions, public),
            "answers": personal.scan(answers, public),
        },
        public_copies=copies.scan(found.kept, public) if public else None,
        mauve=closeness.mauve(questions, asked, features, seed) if features is not None and asked else None,
    )


def with_private_rows(
    figures: Figures, found: Evidence, rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> Figures:
    """Return the figures with what every draft, kept or not, shares with private rows. For the data holder alone."""
    return replace(figures, private_copies=copies.scan(found.drafts, texts_of(rows), texts_of(reference)))


def texts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts of rows, each column apart."""
    return [text for row in rows for column in TEXT_COLUMNS if isinstance(text := row.get(column), str) and text]


def private_rows(place: Path) -> list[dict[str, Any]]:
    """Return the rows of all sites under a directory (`<place>/<site>/rows.jsonl`), or of one file.

    Raises: RunInvalid when there are none; no message quotes a row.
    """
    files = [place] if place.is_file() else sorted(place.glob("*/rows.jsonl"))
    found = [row for file in files for row in journal.read_lines(file)]
    if not found:
        raise RunInvalid(f"{place}: no rows.jsonl with rows in it; give a file, or the directory of the sites")
    return found


def features_of(kind: str, found: Evidence) -> Features | None:
    """Return the features named by `kind`: "minilm", "local" (mean states of the run's local model), or "none".

    Raises: ConfigInvalid when this version has no embeddings, ModelMissing when the model is not on this machine.
    """
    if kind == "none":
        return None
    if importlib.util.find_spec("fl_app.embeddings") is None:
        raise ConfigInvalid(f"features {kind!r}: this version has no fl_app.embeddings; use --features none")
    embeddings: Any = importlib.import_module("fl_app.embeddings")
    name = next((model.name for model in found.record.models if model.role == "local"), "")
    section: Any = embeddings.MiniLm(kind="minilm") if kind == "minilm" else embeddings.LocalStates(kind="local")
    return section.build(models.load(name, "float32") if kind == "local" else None)


def write(run: Path, found: Evidence, figures: Figures) -> Path:
    """Write report, page, card and dataset of a run and return their directory."""
    if figures.private_copies is not None:
        raise RunInvalid("these figures hold what private rows told; only `write_for_holder` may write them")
    folder = run / "curation"
    _report(folder, found, figures, found.record.stamp)
    dataset.write(found, card.card(found, figures), folder / "release")
    return folder


def write_for_holder(run: Path, found: Evidence, figures: Figures) -> Path:
    """Write the report that read private rows, into a directory that only its owner can enter, and return it."""
    folder = run / "curation_holder"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    _report(folder, found, figures, "; ".join(filter(None, (HOLDER_STAMP, found.record.stamp))))
    return folder


def _report(folder: Path, found: Evidence, figures: Figures, stamp: str) -> None:
    tree = {"schema": SCHEMA, "run": found.record.run, "stamp": stamp, **asdict(figures)}
    journal.write_json(folder / "report.json", tree)
    journal.write_text(folder / "report.html", page.page_of(found, figures, stamp))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="public rows, JSON lines")
    parser.add_argument("--rows", type=Path, help="private rows: the directory of the sites, or a file")
    parser.add_argument("--features", choices=("minilm", "local", "none"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        found = evidence.read(arguments.run)
        reference = journal.read_lines(arguments.reference) if arguments.reference else []
        features = features_of(arguments.features, found)
        figures = figures_of(found, reference=reference, features=features, seed=arguments.seed)
        console.print(f"curation: {write(arguments.run, found, figures)}", markup=False)
        if arguments.rows:
            figures = with_private_rows(figures, found, private_rows(arguments.rows), reference)
            folder = write_for_holder(arguments.run, found, figures)
            console.print(f"{HOLDER_STAMP}: {folder}", markup=False)
    except (StillroomError, FileNotFoundError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
