"""A picture of a partition: how many rows of which label every site has."""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COLOURS = ("#3b6ea5", "#e08e45", "#4f9d79", "#c25b6e", "#8a6fb3", "#c9a63c", "#5fa8b8", "#9c6b4e")
REST = "#b8bec6"
WIDTH, LEFT, RIGHT, TOP, BAR, STEP, LEGEND = 760, 150, 56, 64, 20, 32, 18  # pixels


def plot(sites: Sequence[Mapping[str, Any]], *, stamp: str) -> str:
    """Return an SVG: a bar per site, as long as its rows, in the colours of its labels; rare labels share the last."""
    totals: Counter[str] = sum((Counter(site["labels"]) for site in sites), Counter[str]())
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    names = ranked if len(ranked) <= len(COLOURS) else [*ranked[: len(COLOURS) - 1], "(others)"]
    colour = dict(
        zip(names, (*COLOURS[: len(COLOURS) - 1], REST if "(others)" in names else COLOURS[-1]), strict=False)
    )
    scale = (WIDTH - LEFT - RIGHT) / max(int(site["rows"]) for site in sites)
    parts = [
        f'<text x="16" y="28" class="title">{sum(totals.values()):,} rows at {len(sites)} sites</text>',
        f'<text x="16" y="46" class="quiet">{html.escape(stamp)} · a real federation cannot draw this picture</text>',
    ]
    for index, site in enumerate(sites):
        y = TOP + STEP * index
        name = html.escape(short(site["name"], 20))
        parts.append(f'<text x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{name}</text>')
        counts: Counter[str] = Counter()
        for label, count in site["labels"].items():
            counts[label if label in colour else "(others)"] += count
        x = float(LEFT)
        for label in names:
            width = counts[label] * scale
            if width:
                tip = html.escape(f"{site['name']}: {label}, {counts[label]:,} rows")
                box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}"'
                parts.append(f'<rect {box} fill="{colour[label]}"><title>{tip}</title></rect>')
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}" class="quiet">{site["rows"]:,}</text>')
    bottom = TOP + STEP * len(sites) + 10
    for index, label in enumerate(names):
        x, y = LEFT + 185 * (index % 3), bottom + LEGEND * (index // 3)
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" rx="2" fill="{colour[label]}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 9}" class="quiet">{html.escape(short(label, 24))}</text>')
    height = bottom + LEGEND * ((len(names) + 2) // 3) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, -apple-system, \'Segoe UI\', sans-serif" font-size="13" fill="#1f2933">\n'
        "<style>.title{font-size:16px;font-weight:600}.quiet{font-size:12px;fill:#66717d}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def short(text: str, length: int) -> str:
    """Return a text of at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
