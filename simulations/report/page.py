"""One self-contained page about one run, fit to be shown to somebody who was not there.

It fetches nothing (its own content security policy forbids it), runs no script, and depends on nothing but the run
directory: the same directory gives the same bytes. Everything that models or sites wrote is escaped.

    python -m simulations.report.page runs/demo-3f2a
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fl_app.errors import RunInvalid
from simulations.report import sections, words
from simulations.report.record import read_run
from simulations.report.style import stylesheet
from simulations.report.tables import NOT_MEASURED, Html, join, tag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simulations.report.record import Record

SECTIONS: tuple[tuple[str, str, Callable[[Record], Html]], ...] = (
    ("exam", "Exam", sections.exam),
    ("privacy", "Privacy spent", sections.privacy),
    ("drafts", "Drafts", sections.funnel),
    ("rounds", "Rounds", sections.rounds),
    ("samples", "Lessons and dropped drafts", sections.samples),
    ("cost", "Time and traffic", sections.cost),
    ("left", "What left each site", sections.departures),
    ("provenance", "Provenance", sections.provenance),
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

SIMULATED = (
    "The noise came from seeded streams, so whoever knows the seed can take it away again. "
    "Each epsilon below is what the same run would have cost with a secret source of noise."
)


def build_report(run: Path) -> Path:
    """Write `report.html` into a run directory, whole or not at all, and return its path.

    Raises:
        RunInvalid: the directory holds no readable summary.
    """
    page = page_of(read_run(run))
    target = run / "report.html"
    handle, name = tempfile.mkstemp(dir=run, prefix=".report-", suffix=".html")
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
        draft.chmod(0o644)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def page_of(record: Record) -> str:
    """Return the whole page."""
    title = f"Stillroom run {record.run}" if record.run else "Stillroom run"
    head = join(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        Html(f"<style>{stylesheet()}</style>"),
    )
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in SECTIONS]
    body = [
        tag(
            "section",
            tag("h2", name, id=f"{anchor}-title"),
            build(record),
            id=anchor,
            aria_labelledby=f"{anchor}-title",
        )
        for anchor, name, build in SECTIONS
    ]
    page = join(
        _stamp(record),
        tag(
            "div",
            _masthead(record),
            tag("nav", *links, aria_label="Sections"),
            tag("main", *body),
            _foot(record),
            class_="wrap",
        ),
    )
    return f'<!doctype html>\n<html lang="en">\n<head>{head.markup}</head>\n<body>{page.markup}</body>\n</html>\n'


def main(arguments: Sequence[str]) -> int:
    """Build the report of one run directory and say where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.report.page", description="Write report.html of a run."
    )
    parser.add_argument("run", type=Path, help="a directory under runs/")
    console = Console(soft_wrap=True)
    try:
        console.print(build_report(parser.parse_args(arguments).run), markup=False, highlight=False)
    except RunInvalid as error:
        console.print(f"no report: {error}", markup=False, highlight=False)
        return 1
    return 0


def _stamp(record: Record) -> Html:
    if not record.stamp:
        return Html("")
    told = SIMULATED if record.stamp.startswith(words.STAMP_SIMULATION) else ""
    return tag(
        "div", tag("div", tag("p", tag("strong", record.stamp), " ", told), class_="wrap"), class_="stamp", role="note"
    )


def _masthead(record: Record) -> Html:
    status = record.status or f"status {NOT_MEASURED}"
    parts = [
        tag(
            "p",
            f"Stillroom, federated learning from private text. Run {record.run or NOT_MEASURED}, {status}.",
            class_="kicker",
        ),
        tag("h1", words.result(record)),
        tag("p", words.spending(record.sites), class_="lead"),
    ]
    if told := words.verdict(record):
        parts.append(tag("p", told, class_="soft"))
    if record.status and record.status != "completed":
        reason = f": {record.failure}" if record.failure else ""
        parts.append(
            tag(
                "p",
                f"This run did not complete ({record.status}){reason}. What it measured before is below.",
                class_="failed",
            )
        )
    return tag("header", *parts, tag("dl", *_tiles(record), class_="tiles"))


def _tiles(record: Record) -> list[Html]:
    """Return the four figures that a hurried reader takes away."""
    metric, target = words.headline_metric(record), words.last_target(record)
    score = record.exam[target].get(metric) if metric and target else None
    base = record.exam.get("base", {}).get(metric) if metric else None
    shared = words.shared_statement(record.sites) if record.sites else None
    return [
        _tile(
            f"Target: {words.metric_name(metric).lower()}" if metric else "Target's exam",
            words.figure(metric, score.value) if metric and score else NOT_MEASURED,
            f"interval {words.bounds(metric, score)}; base model {words.interval(metric, base)}"
            if metric and score
            else "",
        ),
        _tile(
            "Most spent by a site: epsilon",
            words.of_budget(words.largest(record.sites)) if shared else NOT_MEASURED,
            words.statement_words(shared) if shared else "no statement that all sites share",
        ),
        _tile(
            "Lessons taught",
            str(record.lessons) if record.lessons is not None else NOT_MEASURED,
            f"from {record.funnel.written} drafts, {record.funnel.kept} kept" if record.funnel else "",
        ),
        _tile(
            "Time",
            words.time_words(record.seconds.get("total")),
            f"{words.counted(len(record.rounds), 'round')}, {words.counted(len(record.sites), 'site')}",
        ),
    ]


def _tile(name: str, value: str, note: str) -> Html:
    return tag(
        "div", tag("dt", name), tag("dd", value, class_="figure-big"), tag("dd", note, class_="note"), class_="tile"
    )


def _foot(record: Record) -> Html:
    commit = f", of a run at commit {record.commit}" if record.commit else ""
    return tag(
        "footer", tag("p", f"Built from the run directory alone{commit}. This page fetches nothing and runs no script.")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
