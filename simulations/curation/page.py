"""The curation as one self-contained page in the style of the run's report: no fetches, no script, all escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulations.curation.evidence import UNDECIDED
from simulations.report import plots, sections, words
from simulations.report import record as records
from simulations.report.page import POLICY
from simulations.report.style import stylesheet
from simulations.report.tables import Cell, Html, details, join, missing, table, tag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from simulations.curation.closeness import Spread
    from simulations.curation.copies import Copies
    from simulations.curation.curate import Figures
    from simulations.curation.evidence import Evidence
    from simulations.curation.funnel import Flow

MANY = 12
"""Rows beyond which a table opens on demand: about a screen."""


def page_of(evidence: Evidence, figures: Figures, stamp: str) -> str:
    """Return the whole page under `stamp`."""
    parts: list[tuple[str, str, Callable[[], Html]]] = [
        ("funnel", "From drafts to lessons", lambda: _funnel(figures)),
        ("diversity", "Diversity", lambda: _diversity(figures)),
        ("closeness", "Closeness to public text", lambda: _closeness(figures)),
        ("copies", "Near copies of public text", lambda: _copies(figures.public_copies, "kept drafts", "public")),
        ("personal", "Personal data, by pattern", lambda: _personal(figures)),
        ("privacy", "What the sites spent", lambda: sections.privacy(evidence.record)),
        ("samples", "A few lessons", lambda: _samples(evidence)),
    ]
    if figures.private_copies is not None:
        parts.insert(4, ("rows", "Near copies of the sites' rows", lambda: _rows(figures)))
    title = f"Curation of run {evidence.record.run or 'without a name'}"
    head = join(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        Html(f"<style>{stylesheet()}</style>"),
    )
    body = [
        tag("section", tag("h2", name, id=f"{anchor}-title"), build(), id=anchor, aria_labelledby=f"{anchor}-title")
        for anchor, name, build in parts
    ]
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in parts]
    strip = tag("div", tag("div", tag("p", tag("strong", stamp)), class_="wrap"), class_="stamp", role="note")
    page = join(
        strip if stamp else "",
        tag(
            "div",
            _masthead(title, figures),
            tag("nav", *links, aria_label="Sections"),
            tag("main", *body),
            tag("footer", tag("p", "Built from the run directory and a public reference. Fetches nothing.")),
            class_="wrap",
        ),
    )
    return f'<!doctype html>\n<html lang="en">\n<head>{head.markup}</head>\n<body>{page.markup}</body>\n</html>\n'


def _masthead(title: str, figures: Figures) -> Html:
    flow = figures.funnel.all
    return tag(
        "header",
        tag("p", f"Stillroom. {title}.", class_="kicker"),
        tag("h1", f"{flow.kept} of {flow.written} drafts would be released, {flow.lessons} of them with an answer."),
        tag("p", "What would be released, looked at before it is released.", class_="lead"),
    )


def _funnel(figures: Figures) -> Html:
    found = figures.funnel
    if not found.all.written:
        return tag("p", "No draft was written: there is nothing to release.")
    drawn = records.Funnel(written=found.all.written, kept=found.all.kept, dropped=found.all.dropped)
    return join(
        tag("div", tag("figure", plots.funnel_plot(drawn)), class_="pair"),
        _flows("By round", "Round", found.by_round),
        _flows("By voice", "Voice", found.by_voice),
        _flows("By control code", "Code", found.by_code),
    )


def _flows(caption: str, name: str, flows: Mapping[str, Flow]) -> Html:
    filters = list(dict.fromkeys(one for flow in flows.values() for one in flow.dropped))
    undecided = any(flow.undecided for flow in flows.values())
    head = [name, "Written", *(words.title(one) for one in filters), *([UNDECIDED] * undecided), "Kept", "Lessons"]
    rows: list[list[Cell]] = [
        [
            key or "none",
            str(flow.written),
            *(str(flow.dropped.get(one, 0)) for one in filters),
            *([str(flow.undecided)] * undecided),
            str(flow.kept),
            str(flow.lessons),
        ]
        for key, flow in flows.items()
    ]
    shown = table(caption, head, rows, range(1, len(head)))
    return details(f"{caption} ({len(rows)})", shown) if len(rows) > MANY else shown


def _diversity(figures: Figures) -> Html:
    head = ["Texts", "Count", "Mean words", "Distinct-1", "Distinct-2", "Distinct-3", "Self-BLEU", "Compared"]
    rows: list[list[Cell]] = [
        [
            words.title(name),
            str(one.texts),
            _number(one.mean_words, 1),
            *(_number(value, 3) for value in one.distinct.values()),
            _number(one.self_bleu, 1),
            str(one.compared),
        ]
        for name, one in figures.diversity.items()
    ]
    settings = next((one.settings for one in figures.diversity.values() if one.settings), "")
    return join(
        tag(
            "p",
            "Distinct n-grams over all n-grams: higher is more varied. BLEU of each text against the others: 100 means "
            "that all are the same. Both move with the number of texts and their length.",
        ),
        table("Diversity of what was written, kept and answered", head, rows, range(1, len(head))),
        tag("p", f"sacrebleu: {settings}", class_="note") if settings else "",
    )


def _closeness(figures: Figures) -> Html:
    found = figures.mauve
    if found is None:
        return missing("MAUVE (give a public reference and features)")
    settings = (
        f"{found.texts_a_side} texts a side, {found.buckets} buckets, scaling {found.scaling:g}, "
        f"{found.explained_variance:.0%} of variance kept before clustering, features {found.features}, "
        f"{found.seeds} seeds: mean and range."
    )
    if found.value is None:
        return join(tag("p", f"MAUVE: not measured: {found.why}.", class_="missing"), tag("p", settings, class_="note"))
    rows: list[list[Cell]] = [["Kept drafts against the reference", *_spread(found.value)]]
    if found.ceiling is not None:
        rows.append(["Reference against itself, disjoint halves", *_spread(found.ceiling)])
    return join(table("MAUVE", ["Texts", "Mean", "Range over seeds"], rows, (1, 2)), tag("p", settings, class_="note"))


def _spread(one: Spread) -> list[Cell]:
    return [f"{one.value:.3f}", f"[{one.low:.3f}, {one.high:.3f}]"]


def _copies(found: Copies | None, drafts: str, corpus: str) -> Html:
    if found is None:
        return missing(f"Near copies (give {corpus} texts)")
    told = f"{found.drafts} {drafts} against {found.rows} {corpus} texts; runs of fewer than 5 words are not looked at."
    rows: list[list[Cell]] = [
        ["Longest run, words", str(found.longest), str(found.beyond_public)],
        *(
            [f"Drafts with a run of {mark} words or more", str(count), str(found.at_least_beyond_public[mark])]
            for mark, count in found.at_least.items()
        ),
        ["Drafts that are one run from end to end", str(found.whole), ""],
        ["Share of 5-word runs that stand there", _number(found.overlap, 3), ""],
    ]
    if corpus == "public":
        return join(tag("p", told), table("Runs of words shared", ["", "Count"], [row[:2] for row in rows], (1,)))
    near: list[list[Cell]] = [
        [one.draft, str(one.words), str(one.longest), str(one.beyond_public)] for one in found.nearest
    ]
    return join(
        tag("p", told),
        table("Runs of words shared", ["", "All runs", "Not in public text"], rows, (1, 2)),
        table("Drafts to look at first", ["Draft", "Words", "Longest run", "Not in public text"], near, (1, 2, 3)),
    )


def _rows(figures: Figures) -> Html:
    return join(
        tag(
            "p",
            "This section read the sites' private rows and adds no noise. It is for the data holder's eyes only, and "
            "stands in no card, dataset or other report. Counts alone: no text of a row is on this page.",
            class_="failed",
        ),
        _copies(figures.private_copies, "drafts, kept or not,", "private"),
    )


def _personal(figures: Figures) -> Html:
    kinds = sorted({kind for one in figures.personal.values() for kind in one.by_kind})
    head = ["Texts", "Read", *(words.title(kind) for kind in kinds)]
    rows: list[list[Cell]] = [
        [words.title(name), str(one.texts), *(str(one.by_kind.get(kind, 0)) for kind in kinds)]
        for name, one in figures.personal.items()
    ]
    told = "" if kinds else " Nothing was found."
    return join(
        tag("p", f"The engine of the filter `pii`, over questions and answers. What it does not know passes.{told}"),
        table("Texts with personal data", head, rows, range(1, len(head))),
    )


def _samples(evidence: Evidence) -> Html:
    if not evidence.record.lesson_samples:
        return missing("Lessons")
    return sections.samples(evidence.record)


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
