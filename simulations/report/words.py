"""Figures into words: intervals, sizes, times, and the sentences at the top of the page.

The rule kept here: an epsilon is worded only by `spending`, which has its delta, unit, relation, sampling and
accountant in hand, or goes under a caption made by `statement_words`. It is rounded up, never to nearest.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING

from simulations.report.tables import NOT_MEASURED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulations.report.record import ClientLevel, Measured, Record, SiteBudget, Statement

HARD_SPACE = "\N{NO-BREAK SPACE}"
HEADLINE_METRIC = "choice_accuracy"
METRIC_NAMES = {
    "choice_accuracy": "Exam answered correctly",
    "rouge_l": "ROUGE-L of free answers",
    "bits_per_byte": "Bits per byte",
}
MODEL_NAMES = {
    "base": "Base model",
    "start": "Start (public)",
    "adapter": "DP adapter",
    "professional": "Professional",
}
ABBREVIATIONS = {"pii": "PII"}
STAMP_SIMULATION = "SIMULATION"


def plain(name: str) -> str:
    """Return an identifier as words: near_duplicate -> near duplicate, pii -> PII."""
    return " ".join(ABBREVIATIONS.get(word, word) for word in name.split("_"))


def title(name: str) -> str:
    """Return an identifier as words that begin a line."""
    told = plain(name)
    return told[:1].upper() + told[1:]


def metric_name(metric: str) -> str:
    """Return what the page calls a metric."""
    return METRIC_NAMES.get(metric, title(metric))


def model_name(model: str) -> str:
    """Return what the page calls a model of the exam."""
    if found := re.fullmatch(r"target_round_(\d+)", model):
        return f"Target, round {found[1]}"
    return MODEL_NAMES.get(model, title(model))


def figure(metric: str, value: float) -> str:
    """Return one value of a metric: shares of questions as per cent, everything else with two decimals."""
    return f"{value * 100:.0f}{HARD_SPACE}%" if metric.endswith("accuracy") else f"{value:.2f}"


def bounds(metric: str, score: Measured) -> str:
    """Return a 95 % interval, e.g. `[38, 55]`."""
    if score.low is None or score.high is None:
        return "(no interval)"
    low, high = (figure(metric, bound).removesuffix(f"{HARD_SPACE}%") for bound in (score.low, score.high))
    return f"[{low},{HARD_SPACE}{high}]"


def interval(metric: str, score: Measured | None) -> str:
    """Return value and 95 % interval, e.g. `46 % [38, 55]`."""
    if score is None:
        return NOT_MEASURED
    return f"{figure(metric, score.value)}{HARD_SPACE}{bounds(metric, score)}"


def epsilon_figure(value: float) -> str:
    """Return an epsilon rounded up to two decimals. Only for places that stand under a statement."""
    if math.isinf(value):
        return "infinite"
    return str(Decimal(repr(value)).quantize(Decimal("0.01"), rounding=ROUND_CEILING))


def small(value: float) -> str:
    """Return a short number: 1e-5, 0.91, 8."""
    return re.sub(r"e([+-])0*", r"e\1", f"{value:.4g}").replace("e+", "e")


def relation_words(relation: str) -> str:
    """Return a neighbouring relation in words."""
    return {"add_or_remove_one": "add/remove one"}.get(relation, plain(relation))


def statement_words(statement: Statement) -> str:
    """Return what must be read with an epsilon."""
    return (
        f"at delta {small(statement.delta)}, per {statement.unit}, {relation_words(statement.relation)}, "
        f"{statement.sampling} sampling, {statement.accountant}"
    )


def of_budget(site: SiteBudget) -> str:
    """Return `7.99 of 8`. Only for places that stand under a statement."""
    budget = f" of {small(site.budget)}" if site.budget is not None else ""
    return epsilon_figure(site.spent) + budget


def shared_statement(sites: Sequence[SiteBudget]) -> Statement | None:
    """Return the statement that all sites share, or None."""
    found = {site.statement for site in sites}
    return next(iter(found)) if len(found) == 1 else None


def largest(sites: Sequence[SiteBudget]) -> SiteBudget:
    """Return the site that spent most."""
    return max(sites, key=lambda site: site.spent)


def spending(sites: Sequence[SiteBudget]) -> str:
    """Return the privacy half of the headline, as one sentence."""
    if not sites:
        return f"The privacy cost was {NOT_MEASURED}."
    statement = shared_statement(sites)
    if statement is None:
        return (
            f"The privacy statements of {counted(len(sites), 'site')} differ or are incomplete; see the table of sites."
        )
    most = largest(sites)
    who = "One site" if len(sites) == 1 else f"Each of {len(sites)} sites"
    if math.isinf(most.spent):
        open_sites = sum(math.isinf(site.spent) for site in sites)
        return (
            f"{open_sites} of {counted(len(sites), 'site')} released without differential privacy (infinite epsilon)."
        )
    budgets = {site.budget for site in sites}
    against = f" of {small(most.budget)}" if most.budget is not None and len(budgets) == 1 else ""
    return f"{who} spent at most epsilon {epsilon_figure(most.spent)}{against} {statement_words(statement)}."


def client_level(found: ClientLevel) -> str:
    """Return what the noise at the server cost and bought, as sentences; without its statement nothing is told."""
    if found.budget.statement is None:
        return "Client level, at the server: withheld, its statement is incomplete."
    return (
        f"Client level, at the server: every site spent epsilon {of_budget(found.budget)} "
        f"{statement_words(found.budget.statement)}; counted: {found.scope}. It protects {found.protects}. It does not "
        f"protect {found.does_not_protect}."
    )


def headline_metric(record: Record) -> str | None:
    """Return the metric of the headline: the exam's accuracy, else the first one measured."""
    metrics = list(dict.fromkeys(metric for scores in record.exam.values() for metric in scores))
    return HEADLINE_METRIC if HEADLINE_METRIC in metrics else next(iter(metrics), None)


def last_target(record: Record) -> str | None:
    """Return the name of the last target that sat the exam."""
    targets = [model for model in record.exam if model.startswith("target_round_")]
    return targets[-1] if targets else None


def result(record: Record) -> str:
    """Return the exam half of the headline, as one sentence."""
    metric, target = headline_metric(record), last_target(record)
    if metric is None:
        return f"The exam was {NOT_MEASURED}."
    others = [
        f"{words} {interval(metric, record.exam[model][metric])}"
        for model, words in (("base", "the base model"), ("professional", "the professional"))
        if metric in record.exam.get(model, {})
    ]
    if target is None or metric not in record.exam[target]:
        beside = ", ".join(others)
        return f"The target was {NOT_MEASURED}{f'; {beside}' if beside else ''}."
    score = interval(metric, record.exam[target][metric])
    verb = f"answers {score} of the exam" if metric == HEADLINE_METRIC else f"scores {score} in {metric_name(metric)}"
    done = int(target.removeprefix("target_round_"))
    sentence = f"Target {verb} after {counted(done, 'round')}"
    return sentence + "".join(f"{'; ' if not index else ', '}{other}" for index, other in enumerate(others)) + "."


def verdict(record: Record) -> str:
    """Return how far the exam carries the result; nothing when it cannot be said.

    Two 95 % intervals that do not meet are a sound sign of a difference; two that meet leave it open.
    """
    metric, target = headline_metric(record), last_target(record)
    if metric is None or target is None:
        return ""
    after, before = record.exam[target].get(metric), record.exam.get("base", {}).get(metric)
    if (
        after is None
        or before is None
        or after.low is None
        or after.high is None
        or before.low is None
        or before.high is None
    ):
        return ""
    gain = after.value - before.value if after.higher_is_better else before.value - after.value
    apart = after.low > before.high or before.low > after.high
    if apart and gain > 0:
        told = "The intervals of target and base do not meet: the gain is larger than the exam's own uncertainty."
    elif apart:
        told = "The target is worse than the base model, by more than the exam's own uncertainty."
    else:
        told = "The intervals of target and base meet: this exam alone does not show that the target differs."
    if after.chance is not None and after.low <= after.chance <= after.high:
        told += f" The target cannot be told from guessing ({figure(metric, after.chance)})."
    return told


def size_words(count: int | None) -> str:
    """Return a number of bytes in decimal units."""
    if count is None:
        return NOT_MEASURED
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":  # noqa: PLR2004 - decimal units
            return f"{value:.0f}{HARD_SPACE}B" if unit == "B" else f"{value:.2f}{HARD_SPACE}{unit}"
        value /= 1000
    raise AssertionError(count)


def time_words(seconds: float | None) -> str:
    """Return a duration: 0.1 s, 41 s, 4 min 40 s, 2 h 05 min."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 10:  # noqa: PLR2004 - below ten seconds a decimal is worth reading
        return f"{seconds:.1f}{HARD_SPACE}s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}{HARD_SPACE}h {minutes:02d}{HARD_SPACE}min"
    return f"{minutes}{HARD_SPACE}min {rest:02d}{HARD_SPACE}s" if minutes else f"{whole}{HARD_SPACE}s"


def counted(count: int, name: str) -> str:
    """Return `1 site`, `4 sites`."""
    return f"{count} {name}{'s' if count != 1 else ''}"
