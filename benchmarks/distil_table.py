"""The perplexity table of `docs/` from the last `distil_ppl` line of `results.jsonl`."""

from __future__ import annotations

import math
from typing import Any

import record

NAMES = {
    "teacher": ("teacher, public", "none"),
    "dp_teacher": ("teacher, DP-LoRA", "epsilon"),
    "student": ("student, healed on public text", "none"),
    "non_private": ("student, plain LoRA", "infinite"),
    "dp_sgd": ("student, DP-LoRA", "epsilon"),
    "distil_dp_hard": ("DistilDP, words alone", "epsilon"),
    "distil_dp_soft": ("DistilDP, words and distributions", "epsilon"),
    "dpkd": ("DPKD, teacher and student at half each", "epsilon"),
    "dp_opd": ("DP-OPD, public teacher, own words", "epsilon"),
}
"""In the table's order; a teacher of half the budget is an ingredient of DPKD and has no row."""


def table() -> list[str]:
    """Return the lines of the section; without any measurement, a line that says so."""
    lines = record.lines("distil_ppl")
    if not lines:
        return ["Nothing measured yet."]
    line = lines[-1]
    setting, texts, cells = line["setting"], line["texts"], line["cells"]
    seeds = sorted({one["seed"] for one in cells})
    spent = sum(one["cpu_seconds"] for one in cells)
    rows = [_row(label, cost, [one for one in cells if one["cell"] == name]) for name, (label, cost) in NAMES.items()]
    told = (
        f"Commit {line['commit']}, seeds {', '.join(map(str, seeds))}, {spent} seconds of processor time. Private: "
        f"{texts['private']} headlines; test: {texts['test']} others. Epsilon {setting['epsilon']:g} at delta "
        f"{setting['delta']:g} per record, add or remove one, Poisson rate {setting['sample_rate']:g}, "
        f"{setting['steps']} steps, PLD. Interval: 95 %, bootstrap over test headlines, lowest and highest over seeds."
    )
    return [
        told,
        "",
        "| model | epsilon | PPL, joined text | PPL, single headlines |",
        "|---|---|---|---|",
        *(row for row in rows if row),
    ]


def _row(label: str, cost: str, cells: list[dict[str, Any]]) -> str:
    """Return a row over all seeds; empty when there is no cell."""
    if not cells:
        return ""
    epsilon = f"{cells[0]['epsilon']:g}" if cost == "epsilon" else cost
    stream, single = (_mean([one[key] for one in cells]) for key in ("stream", "headline"))
    low, high = min(one["low"] for one in cells), max(one["high"] for one in cells)
    return f"| {label} | {epsilon} | {stream:.1f} | {single:.1f} [{low:.1f}, {high:.1f}] |"


def _mean(values: list[float]) -> float:
    """Return the geometric mean: perplexities are exponentials of what is averaged."""
    return math.exp(sum(math.log(one) for one in values) / len(values))
