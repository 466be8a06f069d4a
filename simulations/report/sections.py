"""The sections of the page, in the order in which they are read. Each takes the record and returns its markup.

A part the run does not know becomes one quiet line, `not measured`; an epsilon
without its full statement is withheld.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from simulations.report import plots, words
from simulations.report.tables import NOT_MEASURED, Cell, Html, details, join, missing, table, tag

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from simulations.report.record import Departure, Measured, Record, RoundRow, SiteBudget

WITHHELD = "withheld: its statement is incomplete"
EXCERPT = 520
"""Characters of a draft or answer that the page shows: about eight lines of a card."""

SHORT_HASH = 12
SECRET_LINE = re.compile(r"""(?im)^(\s*["']?(?:[\w.-]*_)?(?:api_?key|token|password|secret)["']?\s*=\s*)\S.*$""")


def exam(record: Record) -> Html:
    """What every model answered, one plot per metric, then all figures."""
    metrics = list(dict.fromkeys(metric for scores in record.exam.values() for metric in scores))
    if not metrics:
        return missing("Exam")
    figures: list[Html] = []
    for metric in metrics:
        scores = {model: found[metric] for model, found in record.exam.items() if metric in found}
        figures.append(
            tag(
                "figure",
                tag("h3", words.metric_name(metric)),
                plots.exam_plot(metric, scores),
                tag("figcaption", _reading(metric, scores)),
            )
        )
    rows = [
        [words.model_name(model), *(_score(metric, scores.get(metric)) for metric in metrics)]
        for model, scores in record.exam.items()
    ]
    head = ["Model", *(words.metric_name(metric) for metric in metrics)]
    return join(
        tag("p", "Public questions that no site holds. A dot is the value, a line its 95 % interval."),
        tag("div", *figures, class_="plots"),
        table("Value, 95 % interval and number of items", head, rows, range(1, len(head))),
    )


def privacy(record: Record) -> Html:
    """What every site spent, against its budget, with everything that must be read with it."""
    if not record.sites:
        return missing("Epsilon per site")
    stated = [site for site in record.sites if site.statement is not None]
    parts: list[Html] = []
    shared = words.shared_statement(stated) if stated else None
    if stated:
        told = (
            f"Epsilon {words.statement_words(shared)}."
            if shared
            else "Statements differ between sites: read each with its row below."
        )
        turns = max(len(site.by_round) for site in stated)
        marks = [*(_swatch(shade, text) for shade, text in _turns(turns)), _mark("budget", "budget")]
        if any(site.rdp is not None for site in stated):
            marks.append(_mark("rdp", "RDP, for comparison only"))
        parts.append(
            tag("figure", tag("figcaption", told), plots.epsilon_plot(stated), tag("ul", *marks, class_="key"))
        )
    head = [
        "Site",
        "Spent",
        "Budget",
        "Delta",
        "Unit",
        "Neighbours",
        "Sampling",
        "Accountant",
        "RDP beside",
        "Mechanisms",
    ]
    parts.append(
        table(
            "Epsilon per site; the accountant's figure binds, rounded up",
            head,
            [_site(site) for site in record.sites],
            (1, 2, 3, 8),
        )
    )
    if record.client_level is not None:
        parts.append(tag("p", words.client_level(record.client_level)))
    return join(*parts)


def funnel(record: Record) -> Html:
    """From drafts written to drafts kept."""
    if record.funnel is None:
        return missing("Drafts")
    found = record.funnel
    share = f" ({found.kept / found.written * 100:.0f}{words.HARD_SPACE}%)" if found.written else ""
    lessons = f" {record.lessons} became lessons." if record.lessons is not None else ""
    rows: list[list[Cell]] = [["Written", str(found.written), ""]]
    for reason, count in found.dropped.items():
        rows.append([words.title(reason), f"\N{MINUS SIGN}{count}", _share(count, found.written)])
    rest = found.written - found.kept - sum(found.dropped.values())
    if rest:
        rows.append(
            [
                tag("span", "Not accounted for", class_="alert"),
                f"\N{MINUS SIGN}{rest}" if rest > 0 else f"+{-rest}",
                _share(abs(rest), found.written),
            ]
        )
    rows.append(["Kept", str(found.kept), _share(found.kept, found.written)])
    return join(
        tag("p", f"{found.kept} of {found.written} drafts were kept{share}.{lessons}"),
        tag(
            "div",
            tag("figure", plots.funnel_plot(found)),
            table("Drafts by outcome", ["Outcome", "Drafts", "Share"], rows, (1, 2)),
            class_="pair",
        ),
    )


def rounds(record: Record) -> Html:
    """One row per round: who took part, what came of it."""
    if not record.rounds:
        return missing("Rounds")
    metric = words.headline_metric(record)
    head = ["Round", "Sites used", "Refused, rejected or silent", "Written", "Kept", "Target's exam", "Time"]
    rows: list[list[Cell]] = []
    for row in record.rounds:
        score = record.exam.get(f"target_round_{row.round}", {}).get(metric or "")
        rows.append(
            [
                str(row.round),
                ", ".join(row.used) or "none",
                _absent(row),
                str(row.funnel.written) if row.funnel else NOT_MEASURED,
                str(row.funnel.kept) if row.funnel else NOT_MEASURED,
                words.interval(metric, score) if metric else NOT_MEASURED,
                words.time_words(sum(row.seconds.values()) if row.seconds else None),
            ]
        )
    return table("Rounds as the server saw them", head, rows, (3, 4, 5, 6))


def samples(record: Record) -> Html:
    """A few lessons and a few dropped drafts, to be judged by eye."""
    lessons = [
        tag(
            "article",
            tag("h4", f"Round {each.round}, answered by {each.teacher or 'an unnamed teacher'}"),
            _excerpt(each.instruction, "question"),
            _excerpt(each.answer, "answer"),
        )
        for each in record.lesson_samples
    ]
    dropped = [
        tag(
            "article",
            tag("h4", f"Round {each.round}, dropped: ", tag("span", words.plain(each.reason), class_="reason")),
            _excerpt(each.instruction, "question"),
            _excerpt(each.response, "answer") if each.response else "",
        )
        for each in record.drop_samples
    ]
    return join(
        tag(
            "p",
            "Written by models, chosen by the hash of their id: by nobody, and the same each time the page is built.",
        ),
        tag("h3", "Lessons"),
        tag("div", *lessons, class_="cards") if lessons else missing("Lessons"),
        tag("h3", "Dropped drafts"),
        tag("div", *dropped, class_="cards") if dropped else missing("Dropped drafts"),
    )


def cost(record: Record) -> Html:
    """Seconds per phase, bytes per site."""
    return join(tag("div", _time(record), _traffic(record), class_="pair"))


def departures(record: Record) -> Html:
    """What left each site, and under which guarantee."""
    if not record.left_site:
        return missing("Releases")
    statements = {site.site: site for site in record.sites}
    head = ["Site", "Round", "What", "Bytes", "Mechanism", "Guarantee", "SHA-256"]
    rows: list[list[Cell]] = [
        [
            each.site or NOT_MEASURED,
            str(each.round) if each.round is not None else NOT_MEASURED,
            each.kind or NOT_MEASURED,
            words.size_words(each.size),
            _event(each.event) if each.event else NOT_MEASURED,
            _guarantee(each, statements.get(each.site)),
            _short(each.sha256),
        ]
        for each in record.left_site
    ]
    return join(
        tag(
            "p",
            "Every release the server received, the mechanism that made it, and what the site's releases up to then "
            "add up to. To check it, compare these lines with the site's own ledger.",
        ),
        table("Releases in order of arrival", head, rows, (1, 3)),
    )


def provenance(record: Record) -> Html:
    """Which code, configuration, models and artefacts this page is about."""
    rows: list[list[Cell]] = [["Commit", _code(record.commit)], ["Configuration digest", _code(record.config_digest)]]
    rows += [
        [f"{words.title(each.role)} model", join(each.name or NOT_MEASURED, " ", _code(each.sha256))]
        for each in record.models
    ]
    if not record.models:
        rows.append(["Models", NOT_MEASURED])
    artefacts: list[list[Cell]] = [[name, _code(found)] for name, found in record.hashes.items()]
    config = SECRET_LINE.sub(r'\1"(masked)"', record.config)
    return join(
        table("Identity of the run", ["What", "Value"], rows),
        details(
            f"Artefacts and their hashes ({len(artefacts)})",
            table("SHA-256 of every artefact", ["Artefact", "Hash"], artefacts),
        )
        if artefacts
        else missing("Artefact hashes"),
        details("Resolved configuration", tag("pre", config, tabindex="0"))
        if config
        else missing("Resolved configuration"),
    )


def _reading(metric: str, scores: Mapping[str, Measured]) -> str:
    first = next(iter(scores.values()))
    told = "Higher is better." if first.higher_is_better else "Lower is better."
    chance = next((score.chance for score in scores.values() if score.chance is not None), None)
    return told + (f" Dashed: guessing, {words.figure(metric, chance)}." if chance is not None else "")


def _score(metric: str, score: Measured | None) -> str:
    count = f", n = {score.count}" if score is not None and score.count is not None else ""
    return words.interval(metric, score) + count


def _site(site: SiteBudget) -> list[Cell]:
    told = site.statement
    noise = "; ".join(site.mechanisms) or ", ".join(words.small(each) for each in site.noise_multiplier) or NOT_MEASURED
    if told is None:
        blank = NOT_MEASURED
        return [site.site, tag("span", WITHHELD, class_="alert"), *([blank] * 7), noise]
    over = math.isinf(site.spent) or (site.budget is not None and site.spent > site.budget)
    spent = words.epsilon_figure(site.spent)
    return [
        site.site,
        tag("span", f"{spent}, over budget" if site.budget is not None else spent, class_="alert") if over else spent,
        words.small(site.budget) if site.budget is not None else NOT_MEASURED,
        words.small(told.delta),
        told.unit,
        words.relation_words(told.relation),
        told.sampling,
        told.accountant,
        words.epsilon_figure(site.rdp) if site.rdp is not None else NOT_MEASURED,
        noise,
    ]


def _turns(count: int) -> list[tuple[str, str]]:
    """Return the shades of a bar that grows round by round, two in turn."""
    if count <= 1:
        return [("turn0", "spent")]
    return [("turn0", "first round"), ("turn1", "second round" if count == 2 else "second round, then in turn")]  # noqa: PLR2004


def _absent(row: RoundRow) -> str:
    told = [f"{site} refused ({words.plain(code)})" for site, code in row.refused.items()]
    told += [f"{site} rejected ({words.plain(reason)})" for site, reason in row.rejected.items()]
    told += [f"{site} silent" for site in row.silent]
    return ", ".join(told) or "none"


def _time(record: Record) -> Html:
    phases = {phase: spent for phase, spent in record.seconds.items() if phase != "total"}
    if not phases and not any(row.seconds for row in record.rounds):
        return tag("div", tag("h3", "Time"), missing("Seconds per phase"))
    shown = phases or {
        phase: sum(row.seconds.get(phase, 0.0) for row in record.rounds)
        for row in record.rounds
        for phase in row.seconds
    }
    rows: list[list[Cell]] = [[phase.capitalize(), words.time_words(shown[phase])] for phase in plots.in_order(shown)]
    total = record.seconds.get("total")
    if total is not None:
        rest = total - sum(phases.values())
        if rest > 0:
            rows.append(["Outside these phases", words.time_words(rest)])
        rows.append(["Whole run", words.time_words(total)])
    timed = {phase for row in record.rounds for phase in row.seconds} or set(shown)
    keys = [_swatch(plots.phase_shade(phase), phase) for phase in plots.in_order(dict.fromkeys(timed, 0.0))]
    return tag(
        "div",
        tag("h3", "Time"),
        tag("figure", plots.seconds_plot(record.rounds, record.seconds), tag("ul", *keys, class_="key")),
        table("Time per phase, all rounds", ["Phase", "Time"], rows, (1,)),
    )


def _traffic(record: Record) -> Html:
    sites = sorted({*record.bytes_up, *record.bytes_down})
    if not sites:
        return tag("div", tag("h3", "Traffic"), missing("Bytes per site"))
    most = max([*record.bytes_up.values(), *record.bytes_down.values(), 1])
    rows: list[list[Cell]] = [
        [
            site,
            *(
                cell
                for found in (record.bytes_up.get(site), record.bytes_down.get(site))
                for cell in _bytes(found, most)
            ),
        ]
        for site in sites
    ]
    return tag(
        "div", tag("h3", "Traffic"), table("Bytes per site, all rounds", ["Site", "Up", "", "Down", ""], rows, (1, 3))
    )


def _bytes(count: int | None, most: int) -> Sequence[Cell]:
    told = words.size_words(count)
    return [told, plots.meter(count / most, told) if count is not None else ""]


def _guarantee(each: Departure, site: SiteBudget | None) -> Cell:
    if not each.guarantee:
        return NOT_MEASURED
    if site is None or site.statement is None:
        return tag("span", WITHHELD, class_="alert")
    return f"{each.guarantee}; {site.statement.sampling} sampling, {site.statement.accountant}"


def _share(count: int, whole: int) -> str:
    return f"{count / whole * 100:.0f}{words.HARD_SPACE}%" if whole else ""


def _excerpt(text: str, role: str) -> Html:
    rest = len(text) - EXCERPT
    shown = text if rest <= 0 else text[:EXCERPT].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    more = tag("span", f" ({rest} more characters)", class_="soft") if rest > 0 else ""
    return tag("p", shown.strip() or "(empty)", more, class_=role, dir="auto")


def _code(text: str) -> Cell:
    return tag("code", text) if text else NOT_MEASURED


def _event(text: str) -> Html:
    """Return a mechanism event that may be broken after its name."""
    name, parenthesis, rest = text.partition("(")
    return tag("code", name + parenthesis, Html("<wbr>"), rest)


def _short(digest: str) -> Cell:
    return tag("code", digest[:SHORT_HASH], title=digest) if digest else NOT_MEASURED


def _swatch(shade: str, text: str) -> Html:
    square = Html(
        f'<svg width="11" height="11" aria-hidden="true"><rect width="11" height="11" class="{shade}"/></svg>'
    )
    return tag("li", square, text)


def _mark(shade: str, text: str) -> Html:
    shape = (
        '<path d="M1 6L6 1L11 6L6 11Z" class="rdp"/>'
        if shade == "rdp"
        else '<line x1="6" x2="6" y1="0" y2="12" class="budget"/>'
    )
    return tag("li", Html(f'<svg width="12" height="12" aria-hidden="true">{shape}</svg>'), text)
