"""A run directory as values: whatever it does not say, or says in a form we do not know, is None or empty.

    summary.json          the figures; without it there is no report (`RunInvalid`)
    journal.jsonl         only asked why a run failed
    rounds/<n>/           drafts, verdicts and lessons, only to show a few of them
    config.toml           shown as it is

A run that failed, or was made by an older version, has fewer figures. It still has a report, so nothing below raises
for a missing part. Out of scope: judging a figure, formatting it (`words`), drawing it (`plots`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_app.errors import RunInvalid
from simulations.report import samples
from simulations.report.fields import Tree, count_of, finite_of, list_of, number_of, read_lines, text_of, tree_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from simulations.report.samples import DropSample, LessonSample

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure of the exam. `low` and `high` bound it at 95 %; `chance` is what guessing reaches."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    higher_is_better: bool = True
    chance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What must stand beside every epsilon."""

    delta: float
    unit: str
    relation: str
    sampling: str
    accountant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteBudget:
    """What one site spent. Without a `statement` its epsilon is not shown."""

    site: str
    spent: float
    budget: float | None
    statement: Statement | None
    rdp: float | None
    by_round: tuple[float, ...]
    noise_multiplier: tuple[float, ...]
    mechanisms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLevel:
    """What the merged adapters cost every site at the server; `budget.site` names the cohort."""

    budget: SiteBudget
    scope: str
    protects: str
    does_not_protect: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Funnel:
    """Drafts written, kept, and dropped by reason in the order of the filters."""

    written: int
    kept: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round as the server saw it."""

    round: int
    used: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    rejected: Mapping[str, str] = field(default_factory=dict[str, str])
    silent: tuple[str, ...] = ()
    funnel: Funnel | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """One release that left one site."""

    site: str
    round: int | None
    kind: str
    size: int | None
    sha256: str
    event: str
    guarantee: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelUsed:
    """A model of the run and the hash of its content."""

    role: str
    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything the page knows about a run."""

    run: str
    stamp: str
    status: str
    failure: str
    config_digest: str
    commit: str
    models: tuple[ModelUsed, ...]
    exam: Mapping[str, Mapping[str, Measured]]
    sites: tuple[SiteBudget, ...]
    seconds: Mapping[str, float]
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    funnel: Funnel | None
    rounds: tuple[RoundRow, ...]
    left_site: tuple[Departure, ...]
    hashes: Mapping[str, str]
    lessons: int | None
    client_level: ClientLevel | None = None
    lesson_samples: tuple[LessonSample, ...] = ()
    drop_samples: tuple[DropSample, ...] = ()
    config: str = ""


def read_run(run: Path) -> Record:
    """Return what a run directory says.

    Raises:
        RunInvalid: there is no readable summary of a schema we know.
    """
    summary = _read_summary(run)
    config = run / "config.toml"
    return read_summary(
        summary,
        failure=_failure(run),
        lesson_samples=samples.lessons(run),
        drop_samples=samples.dropped(run),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    )


def read_summary(
    summary: Tree,
    *,
    failure: str = "",
    lesson_samples: tuple[LessonSample, ...] = (),
    drop_samples: tuple[DropSample, ...] = (),
    config: str = "",
) -> Record:
    """Return the figures of a summary; parts of another shape than expected count as absent."""
    size, drafts = tree_of(summary.get("bytes")), tree_of(summary.get("drafts"))
    models = {role: tree_of(model) for role, model in tree_of(summary.get("models")).items()}
    return Record(
        run=text_of(summary.get("run")),
        stamp=text_of(summary.get("stamp")),
        status=text_of(summary.get("status")),
        failure=failure,
        config_digest=text_of(summary.get("config_digest")),
        commit=text_of(summary.get("commit")),
        models=tuple(
            ModelUsed(role=role, name=text_of(model.get("name")), sha256=text_of(model.get("sha256")))
            for role, model in models.items()
        ),
        exam=_exam(tree_of(summary.get("exam"))),
        sites=tuple(
            budget
            for site, spent in sorted(tree_of(summary.get("epsilon")).items())
            if (budget := _budget(site, spent))
        ),
        seconds=_values(summary.get("seconds"), finite_of),
        bytes_up=_values(size.get("up"), count_of),
        bytes_down=_values(size.get("down"), count_of),
        funnel=_funnel(drafts),
        rounds=_rounds(summary, drafts),
        left_site=tuple(_departure(entry) for entry in map(tree_of, list_of(summary.get("left_site"))) if entry),
        hashes=_values(summary.get("hashes"), lambda value: text_of(value) or None),
        lessons=count_of(summary.get("lessons")),
        client_level=_client_level(tree_of(summary.get("client_level"))),
        lesson_samples=lesson_samples,
        drop_samples=drop_samples,
        config=config,
    )


def rank_of_model(name: str) -> tuple[int, int, str]:
    """Return a sort key: base, start, adapter, targets by round, professional, anything else by name."""
    if found := re.fullmatch(r"target_round_(\d+)", name):
        return (3, int(found[1]), name)
    return ({"base": 0, "start": 1, "adapter": 2, "professional": 4}.get(name, 5), 0, name)


def _values(value: object, read: Callable[[object], Any]) -> dict[str, Any]:
    found = {key: read(entry) for key, entry in tree_of(value).items()}
    return {key: entry for key, entry in found.items() if entry is not None}


def _read_summary(run: Path) -> Tree:
    path = run / "summary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunInvalid(
            f"{path} cannot be read ({error.strerror}); a report needs the summary that a run writes when it ends"
        ) from error
    except ValueError as error:
        raise RunInvalid(f"{path} is not JSON: {error}; run the experiment again or restore the file") from error
    summary = tree_of(found)
    if not summary:
        raise RunInvalid(f"{path} holds no JSON object with figures; run the experiment again or restore the file")
    if summary.get("schema", SCHEMA) != SCHEMA:
        raise RunInvalid(
            f"{path} has schema {summary['schema']!r}; this report reads {SCHEMA}: use the version that wrote it"
        )
    return summary


def _exam(exam: Tree) -> dict[str, dict[str, Measured]]:
    found = {
        model: {metric: score for metric, entry in tree_of(exam[model]).items() if (score := _measured(tree_of(entry)))}
        for model in sorted(exam, key=rank_of_model)
    }
    return {model: scores for model, scores in found.items() if scores}


def _measured(entry: Tree) -> Measured | None:
    value = finite_of(entry.get("value"))
    if value is None:
        return None
    low, high = finite_of(entry.get("low")), finite_of(entry.get("high"))
    bounded = low is not None and high is not None and low <= value <= high
    return Measured(
        value=value,
        low=low if bounded else None,
        high=high if bounded else None,
        count=count_of(entry.get("count")),
        higher_is_better=entry.get("higher_is_better") is not False,
        chance=finite_of(entry.get("chance")),
    )


def _budget(site: str, value: object) -> SiteBudget | None:
    entry = tree_of(value)
    spent = number_of(entry.get("spent"))
    if spent is None:
        return None
    return SiteBudget(
        site=site,
        spent=spent,
        budget=number_of(entry.get("budget")),
        statement=statement_of(entry),
        rdp=number_of(entry.get("rdp")),
        by_round=tuple(found for each in list_of(entry.get("by_round")) if (found := number_of(each)) is not None),
        noise_multiplier=tuple(
            found for each in list_of(entry.get("noise_multiplier")) if (found := finite_of(each)) is not None
        ),
        mechanisms=tuple(text_of(each) for each in list_of(entry.get("mechanisms"))),
    )


def _client_level(entry: Tree) -> ClientLevel | None:
    budget = _budget("every site", entry)
    if budget is None:
        return None
    return ClientLevel(
        budget=budget,
        scope=text_of(entry.get("scope")),
        protects=text_of(entry.get("protects")),
        does_not_protect=text_of(entry.get("does_not_protect")),
    )


def statement_of(entry: Mapping[str, Any]) -> Statement | None:
    """Return the statement that an entry carries, or None when any part of it is missing."""
    delta = finite_of(entry.get("delta"))
    unit, relation = text_of(entry.get("unit")), text_of(entry.get("relation"))
    sampling, accountant = text_of(entry.get("sampling")), text_of(entry.get("accountant"))
    if delta is None or not (unit and relation and sampling and accountant):
        return None
    return Statement(delta=delta, unit=unit, relation=relation, sampling=sampling, accountant=accountant)


def _funnel(entry: Tree) -> Funnel | None:
    written, kept = count_of(entry.get("written")), count_of(entry.get("kept"))
    if written is None or kept is None:
        return None
    return Funnel(written=written, kept=kept, dropped=_values(entry.get("dropped"), count_of))


def _rounds(summary: Tree, drafts: Tree) -> tuple[RoundRow, ...]:
    """Join the three per-round lists; a figure of a round that no list numbers belongs to its position."""
    told = [tree_of(entry) for entry in list_of(summary.get("rounds"))]
    seconds, funnels = list_of(summary.get("seconds_by_round")), list_of(drafts.get("by_round"))
    rows: list[RoundRow] = []
    for index in range(max(len(told), len(seconds), len(funnels))):
        entry = told[index] if index < len(told) else {}
        rows.append(
            RoundRow(
                round=count_of(entry.get("round")) or index + 1,
                used=tuple(text_of(site) for site in list_of(entry.get("used"))),
                refused=_values(entry.get("refused"), str),
                rejected=_values(entry.get("rejected"), str),
                silent=tuple(text_of(site) for site in list_of(entry.get("silent"))),
                funnel=_funnel(tree_of(funnels[index])) if index < len(funnels) else None,
                seconds=_values(seconds[index], finite_of) if index < len(seconds) else {},
            )
        )
    return tuple(rows)


def _departure(entry: Tree) -> Departure:
    return Departure(
        site=text_of(entry.get("site")),
        round=count_of(entry.get("round")),
        kind=text_of(entry.get("kind")),
        size=count_of(entry.get("bytes")),
        sha256=text_of(entry.get("sha256")),
        event=text_of(entry.get("event")),
        guarantee=text_of(entry.get("guarantee")),
    )


def _failure(run: Path) -> str:
    """Return why the run failed, in the journal's words."""
    for line in reversed(read_lines(run / "journal.jsonl")):
        if line.get("event") == "run_failed":
            return next((text_of(line[key]) for key in ("reason", "message", "error") if text_of(line.get(key))), "")
    return ""
