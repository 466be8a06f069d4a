"""Collects figures of finished runs into `results.jsonl` and makes pages of `docs/` from that file.

    python benchmarks/results.py add runs/<id> [runs/<id> ...]    append one line per run, with the commit
    python benchmarks/results.py table                            write the pages of docs/

Figures are never typed into the documentation; a line here is the only way in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aggregators_table
import numpy as np
import performance
import reliability
import synthesis_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
PAGE = ROOT / "docs" / "results.md"
AUDIT_PAGE = ROOT / "docs" / "audit.md"
PERFORMANCE_PAGE = ROOT / "docs" / "performance.md"
RELIABILITY_PAGE = ROOT / "docs" / "reliability.md"
SYNTHESIS_PAGE = ROOT / "docs" / "synthesis.md"
AGGREGATORS_PAGE = ROOT / "docs" / "aggregators.md"
NAMES = {
    "base": "base model",
    "start": "start (public warm start)",
    "adapter": "sites' merged DP adapter alone",
    "professional": "professional",
    "upper_bound": "non-private: raw rows, pooled",
}
METRICS = {
    "choice_accuracy": "multiple choice",
    "choice_macro_f1": "macro F1",
    "bits_per_byte": "bits per byte (lower is better)",
    "rouge_l": "ROUGE-L",
}


def add(run: Path) -> dict[str, Any]:
    """Append the figures of one run and return them."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    exam = dict(summary["exam"])
    bound = run / "upper_bound.json"
    if bound.is_file():
        exam["upper_bound"] = json.loads(bound.read_text(encoding="utf-8"))["exam"]
    config = (run / "config.toml").read_text(encoding="utf-8")
    seed = int(next(line for line in config.splitlines() if line.startswith("seed = ")).split("=")[1])
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    line = {
        "kind": "run",
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "name": run.name.rsplit("-", 1)[0],
        "seed": seed,
        "exam": exam,
        "epsilon": {
            site: {key: one[key] for key in ("spent", "budget", "delta", "rdp", "by_round", "noise_multiplier")}
            for site, one in summary["epsilon"].items()
        },
        "statement": next(iter(summary["epsilon"].values()))["accountant"],
        "seconds": summary["seconds"],
        "bytes": summary["bytes"],
        "drafts": summary["drafts"],
        "lessons": summary["lessons"],
    }
    with RESULTS.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line, sort_keys=True) + "\n")
    return line


def table() -> str:
    """Return the page: one section per name, one row per model, mean and range over seeds, pooled interval."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    runs = [line for line in lines if line["kind"] == "run"]
    page = [
        "# Results",
        "",
        "Made by `python benchmarks/results.py table` from `benchmarks/results.jsonl`; one line there per run with its",
        "commit. Each cell: mean over seeds, and in brackets the lowest and highest end of the single runs' 95 %",
        "intervals (Wilson for shares, bootstrap over items for the rest). Simulated sites: seeded noise.",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        page += ["", f"## {name}", "", *_section([run for run in runs if run["name"] == name])]
    return "\n".join(page) + "\n"


def audit_page() -> str:
    """Return the page of the last audit: what was proved, how far such a proof reaches, and who killed each mutant."""
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.strip()]
    audits = [line for line in lines if line["kind"] == "audit"]
    page = [
        "# Audit of the DP engine",
        "",
        "Made by `python benchmarks/results.py table` from the last line that `make audit` left in",
        "`benchmarks/results.jsonl`. The layers are `tests/privacy/test_layer*.py`; mutants are mistakes planted in",
        "copies of our own source (`benchmarks/mutants.toml`), and each has a layer that must see it.",
        "",
    ]
    names = [line for line in lines if line["kind"] == "names"]
    told = _audit(audits[-1]) if audits else ["No audit has been recorded yet."]
    return "\n".join([*page, *told, "", "## Planted names", "", *_names(names)]) + "\n"


def _audit(last: dict[str, Any]) -> list[str]:
    told = last["setting"]
    summary = (
        f"Commit {last['commit']}, {last['cpu_seconds']} seconds of processor time ({last['seconds']} by the clock). "
        f"Mutants killed by the layer that must: {last['mutants_killed']} of {last['mutants']}. "
        "Without a mutant all layers pass: "
        f"{'yes' if last['control_passes'] else 'NO'}."
    )
    setting = (
        f"{told['canaries']} canaries, {told['coordinates']} coordinates, delta {told['delta']:g}, significance "
        f"{told['significance']:g}, {' or '.join(map(str, told['guesses']))} guesses. View: {told['view']}. With every "
        f"guess right the bound would be {last['ceiling']:.2f}: nothing above that can be proved this way, and nothing "
        "here speaks for a claim above 2."
    )
    claims = [
        f"| {claim} | {one['runs']} | {one['lower_bound_mean']:.2f} | {one['lower_bound_max']:.2f} | "
        f"{one['accuracy_mean']:.1%} |"
        for claim, one in last["by_claim"].items()
    ]
    power = [
        f"| {fault} | {one['caught']} of {one['runs']} | {one['lower_bound_mean']:.2f} |"
        for fault, one in last["power"].items()
    ]
    mutants = [
        f"| {one['mutant']} | {one['layer'] or 'nobody'} | `{one['test']}` |"
        for one in sorted(last["verdicts"], key=lambda one: one["layer"])
    ]
    return [
        summary,
        "",
        "## One-run audit",
        "",
        setting,
        "",
        "| claimed epsilon | runs | lower bound, mean | largest | canaries guessed right |",
        "|---|---|---|---|---|",
        *claims,
        "",
        f"Power at a claim of {last['claimed']:g}: how often the bound exceeds it.",
        "",
        "| engine | caught | lower bound, mean |",
        "|---|---|---|",
        *power,
        "",
        "## Mutants",
        "",
        "| mistake planted in our source | killed by layer | first test that failed |",
        "|---|---|---|",
        *mutants,
    ]


ATTACKED = {
    "reference": "before any private row",
    "releases": "what each site sent, last round",
    "merged": "last aggregate",
    "target": "target",
    "without_privacy": "the same rows, learned without privacy",
}


def _names(lines: list[dict[str, Any]]) -> list[str]:
    """Return the section of the last attack on planted names."""
    if not lines:
        return ["No attack has been recorded yet (`make attack RUN=runs/<id> ARGS=--record`)."]
    last = lines[-1]
    sizes, written = last["sizes"], last["written"]
    spent = [float(one) for one in last["spent"].values()]
    what = (
        "`make attack RUN=runs/<id>`: names invented for the purpose and planted in sites' rows. Which of "
        f"{sizes['candidates']} stands in the row (chance {last['chance']:.0%}), and does it come out of "
        f"{sizes['draws']} continuations of the row; in brackets 95 % (Wilson). A rate near chance proves no privacy, "
        "which epsilon claims and the layers test; the last row is what this attack can do."
    )
    where = (
        f"Run {last['run']}, commit {last['commit']}; sites spent epsilon {min(spent):.2f} to {max(spent):.2f}. "
        f"{last['targets']} names attacked; {last['beyond_cut']} more stand where no learner reads. In drafts and "
        f"answers, letter for letter: {written['planted']} planted names, {written['planted_nowhere']} that were "
        "planted nowhere."
    )
    head = "| model | among candidates | of those that the reference misses | from its own words |"
    out = [what, "", where, "", head, "|---|---|---|---|"]
    for name, words in ATTACKED.items():  # records are sorted by key
        told = last["models"].get(name, {})
        keys = ("inference", "inference_reference_misses", "reconstruction")
        out.append(f"| {words} | {' | '.join(_share(told.get(key)) for key in keys)} |")
    return out


def _share(told: dict[str, Any] | None) -> str:
    return f"{told['right']} / {told['count']} [{told['low']:.0%}, {told['high']:.0%}]" if told else "-"


def _section(runs: list[dict[str, Any]]) -> list[str]:
    latest = list({run["seed"]: run for run in runs}.values())
    metrics = [metric for metric in METRICS if any(metric in run["exam"].get("base", {}) for run in latest)]
    rounds = sorted({model for run in latest for model in run["exam"] if model.startswith("target_round_")})
    order = ["base", "start", "adapter", *rounds, "professional", "upper_bound"]
    head = ["model", *(METRICS[metric] for metric in metrics)]
    out = [
        f"Seeds {', '.join(str(run['seed']) for run in latest)}; commits {', '.join(run['commit'] for run in latest)}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for model in order:
        if any(model in run["exam"] for run in latest):
            label = NAMES.get(model, model.replace("target_round_", "target after round "))
            out.append(f"| {label} | {' | '.join(_cell(latest, model, metric) for metric in metrics)} |")
    seconds = {phase: _mean([run["seconds"].get(phase, 0.0) for run in latest]) for phase in latest[0]["seconds"]}
    drafts = [run["drafts"] for run in latest]
    out += [
        "",
        "Epsilon per site (of its budget, at its delta; per record, add or remove one, Poisson sampling, "
        f"{latest[0]['statement']}): "
        + "; ".join(
            f"{site} {one['spent']:.3f} of {one['budget']:g} at {one['delta']:g} (after each round "
            f"{', '.join(f'{value:.3f}' for value in one['by_round'])}; noise {one['noise_multiplier'][0]:g})"
            for site, one in latest[0]["epsilon"].items()
        )
        + ".",
        "",
        f"Drafts written {_mean([d['written'] for d in drafts]):.0f}, kept {_mean([d['kept'] for d in drafts]):.0f}. "
        "Seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items()) + ".",
    ]
    return out


def _cell(runs: list[dict[str, Any]], model: str, metric: str) -> str:
    found = [run["exam"][model][metric] for run in runs if metric in run["exam"].get(model, {})]
    if not found:
        return ""
    low, high = min(one["low"] for one in found), max(one["high"] for one in found)
    return f"{_mean([one['value'] for one in found]):.3f} [{low:.3f}, {high:.3f}]"


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("add").add_argument("runs", type=Path, nargs="+")
    actions.add_parser("table")
    arguments = parser.parse_args()
    if arguments.action == "add":
        for run in arguments.runs:
            print(json.dumps(add(run), sort_keys=True))
    else:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(table(), encoding="utf-8")
        AUDIT_PAGE.write_text(audit_page(), encoding="utf-8")
        PERFORMANCE_PAGE.write_text(performance.page(), encoding="utf-8")
        RELIABILITY_PAGE.write_text(reliability.page(), encoding="utf-8")
        SYNTHESIS_PAGE.write_text(synthesis_table.page(), encoding="utf-8")
        AGGREGATORS_PAGE.write_text(aggregators_table.page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
