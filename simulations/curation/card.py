"""The data card: what the texts are, how they were made, what they cost in privacy, and what they are not.

Markdown, with the front matter that dataset hubs read. It is made from the run's summary, its configuration and public
figures; a figure that touched private rows has no place in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fl_app.privacy.statement import of_entry, rounded_up
from fl_app.text import one_line
from simulations.curation.evidence import UNDECIDED
from simulations.report.fields import text_of, tree_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from simulations.curation.curate import Figures
    from simulations.curation.evidence import Evidence

LICENCES = {
    "smollm2-135m-instruct": "Apache-2.0",
    "tiny-random": "none needed: pseudo-random numbers",
}
"""Licences of models that we have looked up; a text written by a model may be bound by the model's licence."""

UNKNOWN = "not known here: look it up before you pass texts on"

LIMITS = (
    "The epsilon covers the sites' rows under the unit above: no public text, code, or training data of the models.",
    "An epsilon bounds what can be learned about one unit. Facts that many rows share may be here, true of somebody.",
    "Answers are a model's. They were not checked by an expert and may be wrong, old or harmful if followed.",
    "Personal data is looked for by pattern: what the patterns do not know passes.",
    "Texts follow the control codes and the filters: counts here do not say how often something was said at the sites.",
)


def card(evidence: Evidence, figures: Figures) -> str:
    """Return the card. Guarantee: a run's stamp stands in it, before anything else that is said."""
    record, flow = evidence.record, figures.funnel.all
    stamp = f"**{record.stamp}**: see below what that means before any use.\n\n" if record.stamp else ""
    size = (
        f"{flow.kept} questions that passed every filter, of {flow.written} drafts; {flow.lessons} of them with an "
        "answer. All written by models."
    )
    sites = [_site(name, tree_of(one)) for name, one in sorted(tree_of(evidence.summary.get("epsilon")).items())]
    parts = [
        "---\nlicense: other\ntags: [synthetic, federated-learning, differential-privacy]\n---",
        f"# Synthetic questions and answers of run {record.run}",
        stamp + size,
        _columns(stamped=bool(record.stamp)),
        _made(evidence, figures),
        "## What the sites spent\n\n" + ("\n".join(sites) or "- not recorded: claim no privacy for these texts"),
        _client_level(tree_of(evidence.summary.get("client_level"))),
        _models(evidence),
        _figures(figures),
        "## Known limits\n\n" + "\n".join(f"- {limit}" for limit in LIMITS),
        _stamp_words(record.stamp),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _columns(*, stamped: bool) -> str:
    stamp = "\n- `stamp`: what must be said wherever a row goes" if stamped else ""
    return (
        "## Columns\n\n- `draft_id`: hash of where a question comes from and of its text\n- `question`, `answer`: "
        "`answer` is empty where none was asked for\n- `code`: the public control code that the question was written "
        "after\n- `round`, `method`, `voice`: `voice` is the site whose release wrote it, empty for the merged one\n"
        f"- `teacher`: who answered{stamp}"
    )


def _made(evidence: Evidence, figures: Figures) -> str:
    server, client = tree_of(evidence.config.get("server")), tree_of(evidence.config.get("client"))
    kinds = {
        part: text_of(tree_of(table.get(part)).get("kind")) or "not recorded"
        for table, part in (
            (client, "learner"),
            (server, "aggregator"),
            (server, "synthesizer"),
            (server, "distiller"),
        )
    }
    size = f"{len(figures.funnel.by_round)} rounds, after {len(figures.funnel.by_code)} control codes"
    steps = [
        f"- sites: learner `{kinds['learner']}`, combined by `{kinds['aggregator']}`",
        f"- questions: `{kinds['synthesizer']}` in {size}",
        f"- answers: `{kinds['distiller']}`",
        f"- configuration digest: `{evidence.record.config_digest}`",
    ]
    lost = "\n".join(f"| {name} | {count} |" for name, count in figures.funnel.all.dropped.items())
    undecided = f"\n| {UNDECIDED} | {figures.funnel.all.undecided} |" if figures.funnel.all.undecided else ""
    table = f"\n\n| filter | dropped |\n|---|---|\n{lost}{undecided}" if lost or undecided else ""
    return "## How they were made\n\n" + "\n".join(steps) + table


def _site(name: str, entry: Mapping[str, Any]) -> str:
    """Return a site's line; an epsilon goes nowhere without everything that must be read with it."""
    site = one_line(name)
    spent = entry.get("spent")
    if entry.get("private") is False or spent == "inf" or not isinstance(spent, int | float):
        return f"- {site}: **no guarantee**: it released without differential privacy, or its epsilon is not known"
    try:
        told = of_entry(entry).words()
    except KeyError as missing:
        return f"- {site}: **withheld**: the statement lacks {missing.args[0]}; claim no privacy for these texts"
    least = "at least " if entry.get("spent_is_lower_bound") else ""
    return f"- {site}: epsilon {least}{rounded_up(float(spent))} of {entry.get('budget')} {told}"


def _client_level(entry: Mapping[str, Any]) -> str:
    if not entry:
        return ""
    try:
        told = f"Epsilon {rounded_up(float(entry['spent']))} of {entry['budget']} {of_entry(entry).words()}"
    except KeyError as missing:
        told = f"Withheld: the statement lacks {missing.args[0]}"
    return (
        f"## Client level, at the server\n\n{told}; counted: {entry.get('scope')}.\n\n"
        f"- Protects {entry.get('protects')}.\n- Does not protect {entry.get('does_not_protect')}."
    )


def _models(evidence: Evidence) -> str:
    rows = [
        f"| {model.role} | {one_line(model.name)} | `{model.sha256[:16]}` | "
        f"{LICENCES.get(model.name.lower(), UNKNOWN)} |"
        for model in evidence.record.models
    ]
    return "## Models\n\n| part | name | content hash | licence |\n|---|---|---|---|\n" + "\n".join(rows)


def _figures(figures: Figures) -> str:
    kept = figures.diversity["kept"]
    lines = [f"- distinct-{order}: {value:.3f}" for order, value in kept.distinct.items() if value is not None]
    if kept.self_bleu is not None:
        lines.append(f"- self-BLEU of {kept.compared} questions: {kept.self_bleu:.1f} (`{kept.settings}`)")
    if figures.mauve is not None and figures.mauve.value is not None:
        one = figures.mauve
        lines.append(
            f"- MAUVE against the public reference: {figures.mauve.value.value:.3f} "
            f"[{figures.mauve.value.low:.3f}, {figures.mauve.value.high:.3f}] over {one.seeds} seeds; "
            f"{one.texts_a_side} texts a side, {one.buckets} buckets, scaling {one.scaling:g}, features {one.features}"
        )
    for name, one in figures.personal.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in one.by_kind.items()) or "none found"
        lines.append(f"- personal data by pattern, {name}: {kinds} in {one.texts} texts")
    return "## Figures\n\n" + "\n".join(lines)


def _stamp_words(stamp: str) -> str:
    if not stamp:
        return ""
    return (
        f"## What the stamp means\n\n`{stamp}` travels with these texts: in this card, in the dataset's description "
        "and in every row. The noise of a simulation comes from a known seed, so whoever knows it can take it away "
        "again: each epsilon above is what the same run would have cost with a secret source of noise. A site without "
        "noise gives no guarantee at all."
    )
