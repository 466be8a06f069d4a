"""Inline SVG, one function per plot. Colours come from the stylesheet, so a plot follows light, dark and print.

Bars are laid out in per cent of their own width, so their text keeps its size on a telephone; dot plots are small
enough (360 units) to be scaled as a whole. Every plot has a title and a description; every figure in it also stands
in a table beside it, so no plot is the only way to a number.

Out of scope: wording (`words`) and deciding what to draw (`sections`).
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulations.report import words
from simulations.report.tables import Html, clean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from simulations.report.record import Funnel, Measured, RoundRow, SiteBudget

PHASES = ("setup", "broadcast", "train", "aggregate", "synthesise", "filter", "distil", "tune", "exam")
"""Phases in the order in which a round does them; each has its colour in the stylesheet."""

ROW, BAR_TOP, BAR_HEIGHT = 46, 21, 13
"""Pixels of one bar with its line of text: 13 px type above a bar of the same height, then air."""

FULL = 99.6
"""Per cent of the width that the largest bar takes, so that a mark at its end is not cut in half."""

TICKS = 4
"""Intervals on a dot plot's axis at most: more labels than that touch each other at 360 units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear scale from `low` to `high` with a tick every `step`, drawn between `left` and `right`."""

    low: float
    high: float
    step: float
    left: float
    right: float

    def at(self, value: float) -> float:
        """Return where a value stands."""
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def ticks(self) -> list[float]:
        """Return the values of the ticks."""
        return [self.low + index * self.step for index in range(round((self.high - self.low) / self.step) + 1)]


def exam_plot(metric: str, scores: Mapping[str, Measured]) -> Html:
    """Return a dot and a 95 % interval per model, and the line of chance."""
    height_row, top = 27, 8
    bottom = top + height_row * len(scores)
    described = "; ".join(
        f"{words.model_name(model)} {words.interval(metric, score)}" for model, score in scores.items()
    )
    svg = _svg(words.metric_name(metric), f"Value and 95 % interval per model. {described}.")
    svg.set("viewBox", f"0 0 360 {bottom + 22}")
    axis = nice_axis(list(scores.values()), left=112, right=250)
    for tick in axis.ticks():
        _line(svg, (axis.at(tick), top), (axis.at(tick), bottom), "grid")
        _text(svg, (axis.at(tick), bottom + 15), words.figure(metric, tick), "tick", anchor="middle")
    chance = next((score.chance for score in scores.values() if score.chance is not None), None)
    if chance is not None:
        _line(svg, (axis.at(chance), top - 4), (axis.at(chance), bottom), "chance")
    last = [model for model in scores if model.startswith("target_round_")][-1:]
    for index, (model, score) in enumerate(scores.items()):
        middle = top + height_row * (index + 0.5)
        shade = "hero" if model in last else "target" if model.startswith("target_round_") else "other"
        row = ET.SubElement(svg, "g", {"class": shade})
        _text(row, (0, middle + 4), words.model_name(model), "label")
        if score.low is not None and score.high is not None:
            _line(row, (axis.at(score.low), middle), (axis.at(score.high), middle), "whisker")
        ET.SubElement(row, "circle", {"cx": _n(axis.at(score.value)), "cy": _n(middle), "r": "4.5", "class": "dot"})
        _text(row, (360, middle + 4), words.interval(metric, score), "value", anchor="end")
    return _done(svg)


def nice_axis(scores: Sequence[Measured], *, left: float, right: float) -> Axis:
    """Return an axis whose ends are ticks of 1, 2 or 5 times a power of ten and which holds every interval."""
    held = [
        bound for score in scores for bound in (score.value, score.low, score.high, score.chance) if bound is not None
    ]
    low, high = min(held), max(held)
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / TICKS))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= TICKS:
            return Axis(low=first * step, high=max(last, first + 1) * step, step=step, left=left, right=right)
    raise AssertionError(spread)


def epsilon_plot(sites: Sequence[SiteBudget]) -> Html:
    """Return a bar per site, one piece per round, with a mark at its budget and a diamond at the RDP figure."""
    lines: list[str] = []
    for site in sites:
        told = words.statement_words(site.statement) if site.statement else ""
        lines.append(f"{site.site}: epsilon {words.of_budget(site)} {told}")
    svg = _bars("Epsilon spent per site", "; ".join(lines) + ".", len(sites))
    marks = [each for site in sites for each in (site.spent, site.budget, site.rdp) if each is not None]
    scale = FULL / (max((each for each in marks if math.isfinite(each)), default=1.0) or 1.0)
    for index, (site, told) in enumerate(zip(sites, lines, strict=True)):
        row = _row(svg, index, site.site, words.of_budget(site), told)
        if math.isinf(site.spent):
            _bar(row, 0, FULL, "over", "infinite: released without differential privacy")
            continue
        reached = [min(each, site.spent) for each in site.by_round] or [site.spent]
        starts = [0.0, *reached]
        for turn, (start, stop) in enumerate(zip(starts, reached, strict=False)):
            _bar(row, start * scale, (stop - start) * scale, f"turn{turn % 4}", f"after round {turn + 1}: {told}")
        if site.budget is not None and math.isfinite(site.budget):
            x = f"{site.budget * scale:.3f}%"
            ET.SubElement(row, "line", {"x1": x, "x2": x, "y1": "17", "y2": "38", "class": "budget"})
        if site.rdp is not None and math.isfinite(site.rdp):
            place = ET.SubElement(row, "svg", {"x": f"{site.rdp * scale:.3f}%", "y": "27.5", "overflow": "visible"})
            ET.SubElement(place, "path", {"d": "M-5 0L0 -5L5 0L0 5Z", "class": "rdp"})
    return _done(svg)


def funnel_plot(funnel: Funnel) -> Html:
    """Return the drafts that were left after each filter, and what it took away."""
    steps = [*funnel.dropped.items()]
    rest = funnel.written - funnel.kept - sum(funnel.dropped.values())
    if rest > 0:
        steps.append(("not accounted for", rest))
    told = ", ".join(f"{words.plain(reason)} {count}" for reason, count in steps)
    svg = _bars(
        "From drafts written to drafts kept",
        f"{funnel.written} written; dropped: {told}; {funnel.kept} kept.",
        len(steps) + 2,
    )
    scale = FULL / max(funnel.written, 1)
    left = funnel.written
    _bar(_row(svg, 0, "Written", str(left), ""), 0, left * scale, "flow", f"{left} written")
    for index, (reason, count) in enumerate(steps, start=1):
        left = max(left - count, 0)
        row = _row(svg, index, words.title(reason), f"\N{MINUS SIGN}{count}", "")
        _bar(row, 0, left * scale, "still", f"{left} left")
        _bar(row, left * scale, count * scale, "lost", f"{count} dropped: {words.plain(reason)}")
    _bar(_row(svg, len(steps) + 1, "Kept", str(funnel.kept), ""), 0, funnel.kept * scale, "hero", f"{funnel.kept} kept")
    return _done(svg)


def seconds_plot(rounds: Sequence[RoundRow], whole: Mapping[str, float]) -> Html:
    """Return where the time went, a stacked bar per round; a bar for the whole run when rounds were not timed."""
    timed = [(f"Round {row.round}", row.seconds) for row in rounds if row.seconds]
    if not timed:
        timed = [("Whole run", {phase: spent for phase, spent in whole.items() if phase != "total"})]
    told = "; ".join(f"{name} {words.time_words(sum(spent.values()))}" for name, spent in timed)
    svg = _bars("Seconds per phase", f"{told}.", len(timed))
    scale = FULL / (max(sum(spent.values()) for _, spent in timed) or 1.0)
    for index, (name, spent) in enumerate(timed):
        row = _row(svg, index, name, words.time_words(sum(spent.values())), "")
        start = 0.0
        for phase in in_order(spent):
            _bar(row, start, spent[phase] * scale, phase_shade(phase), f"{phase} {words.time_words(spent[phase])}")
            start += spent[phase] * scale
    return _done(svg)


def meter(share: float, told: str) -> Html:
    """Return a thin bar for a table cell."""
    svg = _svg(told, told)
    svg.set("class", "meter")
    svg.set("height", "8")
    ET.SubElement(svg, "rect", {"x": "0", "y": "0", "width": "100%", "height": "8", "rx": "2", "class": "still"})
    ET.SubElement(
        svg,
        "rect",
        {"x": "0", "y": "0", "width": _percent(min(share, 1) * 100), "height": "8", "rx": "2", "class": "flow"},
    )
    return _done(svg)


def in_order(phases: Mapping[str, float]) -> list[str]:
    """Return phases in the order of a round, unknown ones last."""
    return [phase for phase in PHASES if phase in phases] + sorted(set(phases) - set(PHASES) - {"total"})


def phase_shade(phase: str) -> str:
    """Return the class that colours a phase."""
    return f"ph-{phase}" if phase in PHASES else "ph-more"


def _svg(title: str, described: str) -> ET.Element:
    svg = ET.Element("svg", {"role": "img", "width": "100%"})
    ET.SubElement(svg, "title").text = clean(title)
    ET.SubElement(svg, "desc").text = clean(described)
    return svg


def _bars(title: str, described: str, count: int) -> ET.Element:
    svg = _svg(title, described)
    svg.set("class", "bars")
    svg.set("height", str(ROW * count))
    return svg


def _row(svg: ET.Element, index: int, label: str, value: str, told: str) -> ET.Element:
    row = ET.SubElement(svg, "svg", {"y": str(ROW * index), "width": "100%", "height": str(ROW), "overflow": "visible"})
    if told:
        ET.SubElement(row, "title").text = clean(told)
    _text(row, (0, 14), label, "label")
    _text(row, ("100%", 14), value, "value", anchor="end")
    return row


def _bar(parent: ET.Element, start: float, width: float, shade: str, told: str) -> None:
    if width <= 0:
        return
    place = {
        "x": _percent(start),
        "y": str(BAR_TOP),
        "width": _percent(width),
        "height": str(BAR_HEIGHT),
        "class": shade,
    }
    ET.SubElement(ET.SubElement(parent, "rect", place), "title").text = clean(told)


def _line(parent: ET.Element, start: tuple[float, float], stop: tuple[float, float], shade: str) -> None:
    (x1, y1), (x2, y2) = start, stop
    ET.SubElement(parent, "line", {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": shade})


def _text(parent: ET.Element, at: tuple[float | str, float], text: str, shade: str, *, anchor: str = "start") -> None:
    x, y = at
    place = {"x": x if isinstance(x, str) else _n(x), "y": _n(y), "class": shade, "text-anchor": anchor}
    ET.SubElement(parent, "text", place).text = clean(text)


def _percent(value: float) -> str:
    return f"{value:.3f}%"


def _n(value: float) -> str:
    return f"{value:.2f}"


def _done(svg: ET.Element) -> Html:
    return Html(ET.tostring(svg, encoding="unicode"))
