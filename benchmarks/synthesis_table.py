"""`docs/synthesis.md` from the last `synthesis` and `distil_ppl` lines of `results.jsonl`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import distil_table
import record
from over_seeds import Interval, interval

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
        "compare it at 36 a side, where the decoders write no more; its brackets are over draws of texts. CPU minutes",
        "are of the run's process; cells from before that was measured have none.",
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
        "| rows | epsilon | method | kept / written | MAUVE | MAUVE, 36 a side | downstream | exam | CPU min | MB up |",
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
    return [*out, *_differences(good)]


FIGURES: dict[str, Callable[[Mapping[str, Any]], list[float] | None]] = {
    "MAUVE, 36 a side": lambda cell: cell.get("mauve_small"),
    "downstream": lambda cell: cell.get("downstream", {}).get("accuracy"),
    "exam": lambda cell: cell["exam_target"].get("choice_accuracy"),
}


def _differences(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what seeds say of the order, where methods have several: who is best, and who is told apart from it."""
    out: list[str] = []
    several = [one for one in cells if one["method"] not in FLOORS]
    for rows, epsilon in sorted({(one["rows"], one["epsilon"]) for one in several}):
        here = [one for one in several if (one["rows"], one["epsilon"]) == (rows, epsilon)]
        for figure, of in FIGURES.items():
            by_method = {method: _by_seed(here, method, of) for method in NAMES}
            known = {method: found for method, found in by_method.items() if len(found) > 1}
            if len(known) < 2:  # noqa: PLR2004 - nothing to compare
                continue
            best = max(known, key=lambda method: _mean(list(known[method].values())))
            gaps = {method: _gap(known[best], found) for method, found in known.items() if method != best}
            apart, level = (
                [f"{NAMES[method]} ({gap})" for method, gap in gaps.items() if gap.apart is told]
                for told in (True, False)
            )
            out.append(
                f"| {rows} | {epsilon:g} | {figure} | {NAMES[best]} | {'; '.join(apart) or '-'} | "
                f"{'; '.join(level) or '-'} |"
            )
    if not out:
        return []
    return [
        "",
        "Over seeds, for methods that have several: the best mean, and by how much the others are below it (95 %,",
        "Student over seeds). What is not told apart is noise as far as these seeds go.",
        "",
        "| rows | epsilon | figure | best mean | below it | not told apart |",
        "|---|---|---|---|---|---|",
        *out,
    ]


def _by_seed(
    cells: Sequence[Mapping[str, Any]], method: str, of: Callable[[Mapping[str, Any]], list[float] | None]
) -> dict[int, float]:
    return {one["seed"]: value[0] for one in cells if one["method"] == method and (value := of(one))}


def _gap(best: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    """Return best minus other over the seeds that both have; with one in common, that is one seed."""
    return interval([best[seed] - other[seed] for seed in sorted(best.keys() & other.keys())] or [math.nan])


def _row(rows: int, epsilon: float, name: str, cells: list[dict[str, Any]]) -> str:
    seeds = f" ({len(cells)} seeds)" if len(cells) > 1 else ""
    kept = f"{_mean([one['kept'] for one in cells]):.0f} / {_mean([one['written'] for one in cells]):.0f}"
    timed = [one["cpu_s"] / 60 for one in cells if "cpu_s" in one]
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
