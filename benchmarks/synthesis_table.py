"""`docs/synthesis.md` from the last `synthesis` and `distil_ppl` lines of `results.jsonl`."""

from __future__ import annotations

import math
from typing import Any

import distil_table
import record

NAMES = {
    "zero_shot": "bare model, asked in words",
    "public_only": "bare model after the code",
    "dp_lora": "DP-LoRA, then sampling",
    "dp_lora+kernel": "DP-LoRA, quota and density from a survey",
    "invisible_ink": "InvisibleInk at the site",
    "private_prediction": "private prediction at the site",
    "epsvec": "dataset vectors (EPSVec)",
    "private_evolution": "Private Evolution, 3 rounds",
}
FLOORS = ("zero_shot", "public_only")


def page() -> str:
    """Return the page; without any measurement, one that says so."""
    head = [
        "# Ways to make private text, measured",
        "",
        "Made by `python benchmarks/results.py table` from `benchmarks/results.jsonl` (`make bench-synthesis`, `make",
        "bench-distil`). What the columns are, and how cells were sized: `benchmarks/synthesis.py`.",
        "One site; SmolLM2-135M-Instruct, bf16; epsilon by PLD at delta 1e-5 per record, add or remove one. Simulated",
        "sites: seeded noise. An interval is 95 % over test items (Wilson, bootstrap), the widest over seeds;",
        "two methods whose intervals overlap are not told apart here. MAUVE grows when there are fewer texts:",
        "compare it at 36 a side, where the decoders write no more; its brackets are over draws of texts. A cell that",
        "was paused on the way has no minutes.",
        "",
    ]
    lines = record.lines("synthesis")
    body = ["Nothing measured yet.", ""]
    if lines:
        cells = lines[-1]["cells"]
        body = []
        for corpus in dict.fromkeys(one["corpus"] for one in cells):
            body += [f"## {corpus}", "", *_corpus([one for one in cells if one["corpus"] == corpus]), ""]
        failed = [one for one in cells if "failed" in one]
        body += [f"{len(cells)} cells, {len(failed)} of them failed.", ""] if failed else []
    distilled = ["## Distillation: perplexity of a small student", "", *distil_table.table()]
    return "\n".join([*head, *body, *distilled]) + "\n"


def _corpus(cells: list[dict[str, Any]]) -> list[str]:
    good = [one for one in cells if "failed" not in one]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in cells))
    out = [
        f"Commits {commits}.",
        "",
        "| rows | epsilon | method | kept / written | MAUVE | MAUVE, 36 a side | downstream | exam | minutes | MB up |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = sorted({(one["rows"], one["epsilon"]) for one in good})
    for rows, epsilon in groups:
        for method, name in NAMES.items():
            same = [one for one in good if (one["rows"], one["epsilon"], one["method"]) == (rows, epsilon, method)]
            if same:
                out.append(_row(rows, epsilon, name, same))
    for key, told in (("exam_base", "base model"), ("exam_professional", "professional")):
        found = [one for one in good if key in one]
        if found:
            out.append(f"| | | {told} | | | | | {_exam(found, key)} | | |")
    return out


def _row(rows: int, epsilon: float, name: str, cells: list[dict[str, Any]]) -> str:
    seeds = f" ({len(cells)} seeds)" if len(cells) > 1 else ""
    kept = f"{_mean([one['kept'] for one in cells]):.0f} / {_mean([one['written'] for one in cells]):.0f}"
    timed = [one["wall_s"] / 60 for one in cells if one["wall_s"] is not None]
    minutes = f"{_mean(timed):.1f}" if timed else "-"
    up = _mean([sum(one["bytes"]["up"].values()) / 1e6 for one in cells])
    spent = f"{epsilon:g}" if epsilon else "0"
    return (
        f"| {rows or '-'} | {spent} | {name}{seeds} | {kept} | {_interval([one.get('mauve') for one in cells])} | "
        f"{_interval([one.get('mauve_small') for one in cells])} | "
        f"{_interval([one.get('downstream', {}).get('accuracy') for one in cells])} | {_exam(cells, 'exam_target')} | "
        f"{minutes} | {up:.2f} |"
    )


def _exam(cells: list[dict[str, Any]], key: str) -> str:
    metric = "choice_accuracy" if "choice_accuracy" in cells[0][key] else "bits_per_byte"
    told = _interval([one[key].get(metric) for one in cells])
    return told + (" bits/byte" if metric == "bits_per_byte" else "")


def _interval(values: list[list[float] | None]) -> str:
    """Return the mean over seeds with the lowest and highest end; '-' where there is no figure."""
    found = [one for one in values if one]
    if not found:
        return "-"
    mean = _mean([one[0] for one in found])
    return f"{mean:.2f} [{min(one[1] for one in found):.2f}, {max(one[2] for one in found):.2f}]"


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
