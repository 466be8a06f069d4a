"""Watch a run: follow its journal and draw it in the terminal, or write a line per phase where there is none.

    follow(run, done=...)    until done() says so
    final_table(summary)     the figures at the end

The journal is the only source, so a run may be watched from another process, and watching cannot disturb it.
An epsilon is shown only under its statement: delta, unit, relation, sampling and accountant, which `run_started` or
the site's own event carries. Until one does, the table shows the share of the budget and no epsilon.

Out of scope: keeping the figures (`simulations.report`), judging a run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from simulations.report import words
from simulations.report.fields import count_of, finite_of, list_of, number_of, parse_line, text_of, tree_of
from simulations.report.plots import in_order
from simulations.report.record import SiteBudget, Statement, read_summary, statement_of
from simulations.report.tables import NOT_MEASURED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

LOOK_EVERY_S = 0.2
"""Seconds between two looks at the journal: quick enough for the eye, nothing for the machine."""

STATE_STYLES = {"trained": "green", "refused": "yellow", "rejected": "red", "silent": "dim"}


@dataclass(slots=True, kw_only=True)
class SiteView:
    """One site as the journal has told of it so far."""

    state: str = "waiting"
    code: str = ""
    spent: float | None = None
    budget: float | None = None
    statement: Statement | None = None
    bytes_up: int = 0


@dataclass(slots=True, kw_only=True)
class RunView:
    """A run as the journal has told of it so far."""

    run: str = ""
    model: str = ""
    stamp: str = ""
    rounds: int = 0
    rounds_done: int = 0
    round: int = 0
    phase: str = ""
    phase_done: int = 0
    phase_total: int = 0
    elapsed: float = 0.0
    written: int = 0
    kept: int = 0
    exam: str = ""
    status: str = "starting"
    reason: str = ""
    statement: Statement | None = None
    sites: dict[str, SiteView] = field(default_factory=dict[str, SiteView])

    def take(self, event: Mapping[str, Any]) -> Text | None:
        """Apply one event; return the line that a log shall show for it, if any. Unknown events pass by."""
        self.elapsed = max(self.elapsed, finite_of(event.get("t")) or 0.0)
        self.round = count_of(event.get("round")) or self.round
        match event.get("event"):
            case "run_started":
                return self._start(event)
            case "round_started":
                self.phase = ""
                for site in self.sites.values():
                    site.state, site.code = "waiting", ""
            case "phase_started" | "phase_progress":
                self.phase = text_of(event.get("phase")) or self.phase
                self.phase_done, self.phase_total = count_of(event.get("done")) or 0, count_of(event.get("total")) or 0
            case "phase_finished":
                return self._finish_phase(event)
            case "site":
                self._site(event)
            case "round_finished":
                return self._finish_round(event)
            case "run_finished":
                self.status, self.phase = "finished", ""
                return Text(f"run {_plain(self.run)} finished after {words.time_words(self.elapsed)}")
            case "run_failed":
                told = (text_of(event.get(key)) for key in ("reason", "message", "error"))
                self.status, self.phase, self.reason = "failed", "", next(filter(None, told), "no reason given")
                return Text(f"run {_plain(self.run)} failed: {_plain(self.reason)}")
            case _:
                pass
        return None

    def _start(self, event: Mapping[str, Any]) -> Text:
        self.run, self.stamp = text_of(event.get("run")), text_of(event.get("stamp"))
        self.model, self.status = text_of(event.get("model")), "running"
        self.rounds, self.statement = count_of(event.get("rounds")) or 0, statement_of(event)
        for name in map(text_of, list_of(event.get("sites"))):
            self.sites.setdefault(name, SiteView())
        planned = count_of(event.get("sites")) or len(self.sites)
        about = [f"{words.counted(self.rounds, 'round')}, {words.counted(planned, 'site')}", self.model, self.stamp]
        return Text(f"run {_plain(self.run)}: {'; '.join(_plain(part) for part in about if part)}")

    def _site(self, event: Mapping[str, Any]) -> None:
        name = text_of(event.get("site"))
        if not name:
            return
        site = self.sites.setdefault(name, SiteView())
        site.state, site.code = text_of(event.get("state")) or site.state, text_of(event.get("code"))
        if (spent := number_of(event.get("epsilon"))) is not None:
            site.spent = spent
        if (budget := number_of(event.get("budget"))) is not None:
            site.budget = budget
        site.statement = statement_of(event) or site.statement or self.statement
        site.bytes_up += count_of(event.get("bytes")) or 0

    def _finish_phase(self, event: Mapping[str, Any]) -> Text:
        name = text_of(event.get("phase")) or self.phase
        told = f"{_where(self)}{name}  {words.time_words(finite_of(event.get('seconds')))}"
        if name == "train" and self.sites:
            states = [site.state for site in self.sites.values()]
            told += "  " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        self.phase, self.phase_done, self.phase_total = "", 0, 0
        return Text(_plain(told))

    def _finish_round(self, event: Mapping[str, Any]) -> Text:
        self.rounds_done = max(self.rounds_done + 1, self.round)
        written, kept = count_of(event.get("drafts_written")) or 0, count_of(event.get("drafts_kept")) or 0
        self.written, self.kept = self.written + written, self.kept + kept
        for name, spent in tree_of(event.get("epsilon")).items():
            site = self.sites.setdefault(name, SiteView())
            site.spent = number_of(spent) if number_of(spent) is not None else site.spent
            site.statement = site.statement or self.statement
        self.exam = _exam(event.get("exam"))
        told = f"{_where(self)}finished  drafts kept {kept}, dropped {written - kept}"
        told += f"  exam {self.exam}" if self.exam else ""
        return Text(told + "".join(f"\n    {line}" for line in _spending(self)))


def follow(run: Path, *, done: Callable[[], bool], console: Console | None = None) -> None:
    """Show a run until `done` says that it is over, and what the journal told last.

    The journal need not exist yet, and its last line may be half written. On a terminal this is one picture that
    changes; elsewhere (CI, a file) it is one line per finished phase.
    """
    console = console or Console()
    tail, view = _Tail(run / "journal.jsonl"), RunView()
    if not console.is_terminal:
        _follow_lines(tail, view, done, console)
        return
    spinner = Spinner("dots")
    with Live(console=console, auto_refresh=False, transient=False) as live:
        heard, since = -1.0, time.monotonic()
        over = False
        while not over:
            over = done()
            for event in tail.new_events():
                view.take(event)
            if view.elapsed != heard:
                heard, since = view.elapsed, time.monotonic()
            running = view.status == "running" and not over
            elapsed = view.elapsed + (time.monotonic() - since if running else 0.0)
            live.update(picture(view, elapsed=elapsed, spinner=spinner), refresh=True)
            if not over:
                time.sleep(LOOK_EVERY_S)


def picture(view: RunView, *, elapsed: float, spinner: Spinner) -> RenderableType:
    """Return the whole picture of a run: header, rounds, phase, sites, drafts."""
    head = Text.assemble((f"Stillroom run {_plain(view.run)}" if view.run else "Waiting for the journal", "bold"))
    head.append(f"  {_plain(view.model)}" if view.model else "")
    head.append(f"  {_plain(view.stamp)}" if view.stamp else "", style="bold yellow")
    bars = Table.grid(padding=(0, 1))
    bars.add_row(
        Text(f"round {min(max(view.round, 1), view.rounds) if view.rounds else view.round}/{view.rounds or '?'}"),
        ProgressBar(total=max(view.rounds, 1), completed=view.rounds_done, width=30),
        Text(words.time_words(elapsed), style="dim"),
    )
    parts: list[RenderableType] = [head, bars, _phase(view, spinner)]
    if view.sites:
        parts.append(_site_table(view))
    if view.written:
        exam = f"  exam {view.exam}" if view.exam else ""
        parts.append(Text(f"drafts kept {view.kept}, dropped {view.written - view.kept}, of {view.written}{exam}"))
    return Group(*parts)


def final_table(summary: Mapping[str, Any]) -> RenderableType:
    """Return the figures of a finished run: exam per model, epsilon per site with its statement, seconds per phase."""
    record = read_summary(dict(summary))
    metrics = list(dict.fromkeys(metric for scores in record.exam.values() for metric in scores))
    exam = _table("Exam, 95 % intervals", ["Model", *(words.metric_name(metric) for metric in metrics)])
    for model, scores in record.exam.items():
        _add(exam, [words.model_name(model), *(words.interval(metric, scores.get(metric)) for metric in metrics)])
    privacy = _table("Privacy spent", ["Site", "Epsilon spent of budget"])
    shared = words.shared_statement(record.sites) if record.sites else None
    for site in record.sites:
        told = "withheld: its statement is incomplete"
        if site.statement is not None:
            told = words.of_budget(site) + ("" if shared else f" {words.statement_words(site.statement)}")
        _add(privacy, [site.site, told])
    seconds = _table("Time", ["Phase", "Time"])
    for phase in in_order(record.seconds):
        _add(seconds, [phase, words.time_words(record.seconds[phase])])
    _add(seconds, ["whole run", words.time_words(record.seconds.get("total"))])
    parts: list[RenderableType] = [Text(_plain(record.stamp), style="bold yellow")] if record.stamp else []
    parts.append(exam if metrics else Text(f"Exam: {NOT_MEASURED}"))
    parts.append(privacy if record.sites else Text(f"Epsilon per site: {NOT_MEASURED}"))
    parts += [Text(f"epsilon {words.statement_words(shared)}", style="dim")] if shared else []
    parts += [Text(_plain(words.client_level(record.client_level)))] if record.client_level else []
    return Group(*parts, seconds)


class _Tail:
    """The complete lines that a growing file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._torn = b""

    def new_events(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._read:  # A shorter file is another file: the run was started again.
                    self._read, self._torn = 0, b""
                file.seek(self._read)
                gained = file.read()
        except FileNotFoundError:
            return []
        self._read += len(gained)
        *lines, self._torn = (self._torn + gained).split(b"\n")
        return [event for line in lines if (event := parse_line(line.decode("utf-8", "replace")))]


def _follow_lines(tail: _Tail, view: RunView, done: Callable[[], bool], console: Console) -> None:
    over = False
    while not over:
        over = done()
        for event in tail.new_events():
            line = view.take(event)
            if line is not None:
                console.print(line, soft_wrap=True)
        if not over:
            time.sleep(LOOK_EVERY_S)


def _table(title: str, head: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for name in head:
        table.add_column(Text(_plain(name)))
    return table


def _add(table: Table, cells: Sequence[str]) -> None:
    """Add a row of plain text: names are written by others and might hold rich's markup."""
    table.add_row(*(Text(_plain(cell)) for cell in cells))


def _phase(view: RunView, spinner: Spinner) -> RenderableType:
    if view.status == "failed":
        return Text(f"failed: {_plain(view.reason)}", style="bold red")
    if view.status == "finished":
        return Text("finished", style="bold green")
    counts = f" {view.phase_done}/{view.phase_total}" if view.phase_total else ""
    spinner.update(text=Text(f"{_plain(view.phase) or view.status}{counts}"))
    return spinner


def _site_table(view: RunView) -> RenderableType:
    shared = {site.statement for site in view.sites.values() if site.spent is not None}
    statement = next(iter(shared)) if len(shared) == 1 else None
    heading = "Epsilon spent of budget" if statement else "Budget spent"
    table = Table("Site", "State", heading, "Up", box=None, pad_edge=False, header_style="dim")
    for name, site in sorted(view.sites.items()):
        state = f"{site.state} ({words.plain(site.code)})" if site.code else site.state
        spent = _share(site)
        if statement and (budget := _budget(name, site)):
            spent = words.of_budget(budget)
        up = words.size_words(site.bytes_up) if site.bytes_up else ""
        table.add_row(Text(_plain(name)), Text(_plain(state), style=STATE_STYLES.get(site.state, "")), spent, up)
    if statement is None:
        return table
    return Group(table, Text(f"epsilon {words.statement_words(statement)}", style="dim"))


def _spending(view: RunView) -> Sequence[str]:
    """Return a line on privacy for a log: the most that a site has spent, and its statement."""
    sites = [budget for name, site in view.sites.items() if (budget := _budget(name, site))]
    if not sites:
        return []
    if words.shared_statement(sites) is None:
        shares = [share for site in view.sites.values() if (share := _share(site))]
        return [f"privacy budget spent by site: {', '.join(shares)}"] if shares else []
    return [words.spending(sites)]


def _budget(name: str, site: SiteView) -> SiteBudget | None:
    if site.spent is None:
        return None
    return SiteBudget(
        site=_plain(name),
        spent=site.spent,
        budget=site.budget,
        statement=site.statement,
        rdp=None,
        by_round=(),
        noise_multiplier=(),
    )


def _share(site: SiteView) -> str:
    if site.spent is None or not site.budget:
        return ""
    return f"{site.spent / site.budget * 100:.0f}{words.HARD_SPACE}%"


def _exam(value: object) -> str:
    """Return an exam value, told as a number or as a score."""
    number = finite_of(value)
    if number is None:
        number = finite_of(tree_of(value).get("value"))
    return words.figure(words.HEADLINE_METRIC, number) if number is not None else ""


def _where(view: RunView) -> str:
    return f"round {view.round}/{view.rounds or '?'}  " if view.round else ""


def _plain(text: str) -> str:
    """Return text without characters that would steer a terminal."""
    return "".join(
        each if each.isprintable() or each == words.HARD_SPACE else "\N{REPLACEMENT CHARACTER}" for each in text
    )
