"""`docs/aggregators.md` from the last `aggregators` and `aggregators_noise` lines of `results.jsonl`.

Every figure is filled in from there, and so is who is best and who is not told apart from it; the sentences around them
say how to read that, and hold whatever the figures are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import record
from aggregators_figures import rate_scores
from over_seeds import Interval, interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMES = {
    "fedit": "FedIT",
    "ffa_lora": "FFA-LoRA",
    "flora": "FLoRA",
    "fedex_lora": "FedEx-LoRA",
    "fed_sb": "Fed-SB, rank 8",
    "fed_sb_32": "Fed-SB, rank 32",
    "rolora": "RoLoRA",
    "flex_lora": "FlexLoRA",
    "florist": "FLoRIST",
    "lora_fair": "LoRA-FAIR",
    "la_lora": "LA-LoRA",
    "fedask": "FedASK",
    "zeroth_order": "zeroth order",
    "flora_mixed": "FLoRA, ranks 8 8 4 4 2",
    "flex_lora_mixed": "FlexLoRA, ranks 8 8 4 4 2",
    "zero_padding_mixed": "zero-padding, ranks 8 8 4 4 2",
}
TASKS = {
    "small": "Small model, letters",
    "embedded": "SmolLM2-135M-Instruct, letters",
    "finance": "SmolLM2-135M-Instruct, sentiment of headlines",
}
SPLITS = {"iid": "rows at random", "shards": "label shards"}
METRICS = {"bits_per_byte": "bits per byte (lower is better)", "choice_accuracy": "multiple choice"}
HIGHER = ("choice_accuracy",)
REFERENCE = "fedit"
TRAFFIC: tuple[str, ...] = (
    "Bytes of adapters in a whole run, all sites together: on the wire, and as the method's closed form says",
    "(`aggregators_figures.closed_form`: four bytes a number, what did not change is not sent again). What is",
    "above 1 are names and headers of arrays, which weigh where arrays are small. FLoRIST's download hangs on the",
    "spectrum, and mixed ranks and zeroth order have no entry here.",
    "",
    "| model | method | up | up / closed form | down | down / closed form |",
    "|---|---|---|---|---|---|",
)
RATES: tuple[str, ...] = (
    "Bits per byte on a seed of its own, rows at random, by learning rate; the least is taken",
    "(`benchmarks/aggregators_rates.py`). Where it stands at an end of its three, a better one may lie beyond.",
    "",
    "| model | tuned on | DP | rate: bits per byte |",
    "|---|---|---|---|",
)
KEPT = 0.9
EXACT = 1e-5
"""Relative errors below are float32's, not the method's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The cells of one corpus, split and kind of privacy: method -> seed -> line."""

    corpus: str
    split: str
    private: bool
    lines: Mapping[str, Mapping[int, Mapping[str, Any]]]

    @property
    def title(self) -> str:
        """How the group is called on the page."""
        return f"{TASKS[self.corpus]}, {SPLITS[self.split]}, {'epsilon 8' if self.private else 'no DP'}"

    @property
    def metrics(self) -> list[str]:
        """Return the metrics of this task, the deciding one first."""
        first = next(iter(next(iter(self.lines.values())).values()))
        return [metric for metric in METRICS if metric in first["exam"]]

    def score(self, method: str, metric: str) -> Interval:
        """Return a method's score over seeds."""
        return interval([line["exam"][metric][0] for line in self.lines[method].values()])

    def difference(self, method: str, other: str, metric: str) -> Interval | None:
        """Return method minus other over the seeds that both have, None without any."""
        mine, theirs = self.lines[method], self.lines.get(other, {})
        seeds = sorted(mine.keys() & theirs.keys())
        pairs = [mine[seed]["exam"][metric][0] - theirs[seed]["exam"][metric][0] for seed in seeds]
        return interval(pairs) if pairs else None

    def best(self, metric: str) -> str:
        """Return the method of the best mean."""
        sign = -1 if metric in HIGHER else 1
        return min(self.lines, key=lambda method: sign * self.score(method, metric).mean)

    def level_with(self, best: str, metric: str) -> list[str]:
        """Return the methods whose difference from the best is not told apart from zero."""
        found = [method for method in self.lines if method != best]
        return [method for method in found if (gap := self.difference(method, best, metric)) is None or not gap.apart]

    def base(self, metric: str) -> Interval | None:
        """Return the score of the base model, which sits the exam in the reference's runs alone."""
        told = [one["exam_base"][metric][0] for one in self.lines.get(REFERENCE, {}).values() if "exam_base" in one]
        return interval(told) if told else None

    def lightest(self, metric: str) -> str | None:
        """Return who sends least up among those that keep nine tenths of what the best gained over the base model.

        None where the base model was not asked, or nothing was gained.
        """
        sign, base = (1 if metric in HIGHER else -1), self.base(metric)
        best = self.score(self.best(metric), metric).mean
        if base is None or not sign * (best - base.mean) > 0:
            return None
        gains = {method: (self.score(method, metric).mean - base.mean) / (best - base.mean) for method in self.lines}
        good = [method for method in self.lines if gains[method] >= KEPT]
        return min(good, key=lambda method: self.bytes(method, "up"))

    def bytes(self, method: str, way: str) -> float:
        """Return the mean bytes of a run, all sites together."""
        return _mean([line["bytes"][way] for line in self.lines[method].values()])


def groups_of(cells: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the groups in the order of the tasks, methods in the order of their names here."""
    good = [one for one in cells if "failed" not in one]
    found: list[Group] = []
    for corpus in TASKS:
        for split in SPLITS:
            for private in (False, True):
                key = (corpus, split, private)
                same = [one for one in good if (one["corpus"], one["split"], one["private"]) == key]
                told = {
                    method: {one["seed"]: one for one in same if one["method"] == method}
                    for method in NAMES
                    if any(one["method"] == method for one in same)
                }
                if told:
                    found.append(Group(corpus=corpus, split=split, private=private, lines=told))
    return found


def page() -> str:
    """Return the page; without any measurement, one that says so."""
    head = [
        "# Federated LoRA, measured",
        "",
        "Made by `python benchmarks/results.py table` from `benchmarks/results.jsonl` (`make bench-aggregators`). Five",
        "sites, every method with the same rows, steps and batch; how cells were sized: `benchmarks/aggregators.py`.",
        "Learning rates are tuned for each schedule (which factors learn when) on a seed that is not shown. Epsilon is",
        "by PLD at delta 1e-5 per record, add or remove one, at every site; simulated sites: seeded noise.",
        "",
        "Brackets: 95 % over seeds (Student). The difference is from FedIT on the same seeds; *apart* says that its",
        "interval leaves zero out. No correction is made for how many methods are compared: among twenty that are the",
        "same, one is expected to be apart. Bits per byte decide, of letters or of the answers to headlines, since",
        "multiple choice over a hundred items moves by its own chance; much of what is gained there is the form of",
        "an answer. Error: |carried on - exact weighted sum| / |exact sum|, first and last round, mean over seeds;",
        "below 1e-5 it is float32's. CPU seconds are of the whole run's process, exam included.",
        "What each method is, and what travels: [federated.md](federated.md).",
        "",
    ]
    lines = record.lines("aggregators")
    if not lines:
        return "\n".join([*head, "Nothing measured yet.", ""])
    cells = lines[-1]["cells"]
    groups = groups_of(cells)
    body: list[str] = ["## Which one, and when", "", *_choice(groups), ""]
    for group in groups:
        body += [f"## {group.title}", "", *_group(group), ""]
    body += ["## Traffic", "", *_traffic(groups), "", "## Noise in the product", "", *_noise(), ""]
    body += ["## Learning rates", "", *_rates(), ""]
    failed = [one for one in cells if "failed" in one]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in cells))
    body += [f"{len(cells)} cells, {len(failed)} of them failed. Commits {commits}.", ""]
    return "\n".join([*head, *body])


def _choice(groups: Sequence[Group]) -> list[str]:
    out = [
        "Score first. In each row the best mean, and who is not told apart from it on these seeds: between those, the",
        "score decides nothing, and traffic, exactness and what a method leaves at the server do.",
        "The last column is who sends least up among those that keep nine tenths of what the best gained over the base",
        "model: whom to take where the line is narrow.",
        "",
        "| task | best mean | score | not told apart from it | least sent, nine tenths kept |",
        "|---|---|---|---|---|",
    ]
    for group in groups:
        metric = group.metrics[0]
        best = group.best(metric)
        level = ", ".join(NAMES[method] for method in group.level_with(best, metric)) or "nobody"
        light = group.lightest(metric)
        told = f"{NAMES[light]}, {group.bytes(light, 'up') / 1e6:.3g} MB" if light else "-"
        out.append(f"| {group.title} | {NAMES[best]} | {group.score(best, metric)} | {level} | {told} |")
    errors = _errors(groups)
    exact = [NAMES[method] for method in NAMES if method in errors and errors[method] < EXACT]
    worst = max(errors, key=errors.__getitem__)
    out += [
        "",
        f"- Exact in every round of every cell: {', '.join(exact) or 'none'}. The largest error of a round is",
        f"  {errors[worst]:.2g} ({NAMES[worst]}). Whether exactness shows in the score is what the rows above",
        "  say: where a method that is not exact is best or not told apart from the best, it did not.",
    ]
    out += [
        "- Sites of different ranks: the tables show FLoRA, FlexLoRA and zero-padding with the same five ranks.",
        "  Zero-padding averages what a small site does not have with nothing; it is here as the mistake to know.",
        "- One model at the server is what all of these leave. FedSA-LoRA does not (each site keeps its own b), and",
        "  DP-DyLoRA protects a whole site under a trusted server: choose those for what they are, not by this table.",
    ]
    return out


def _errors(groups: Sequence[Group]) -> dict[str, float]:
    """Return the largest error of any round, by method."""
    found: dict[str, float] = {}
    for group in groups:
        for method, told in group.lines.items():
            values = [error for line in told.values() for error in line["error"] if error is not None]
            found[method] = max([found.get(method, 0.0), *values])
    return found


def _group(group: Group) -> list[str]:
    shown = group.metrics
    head = ["method", *(METRICS[metric] for metric in shown), "minus FedIT", "error", "MB up", "MB down", "CPU s"]
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for method, told in group.lines.items():
        gap = None if method == REFERENCE else group.difference(method, REFERENCE, shown[0])
        difference = "-" if gap is None else f"{gap}{' apart' if gap.apart else ''}"
        lines = list(told.values())
        cells = [
            NAMES[method],
            *(str(group.score(method, metric)) for metric in shown),
            difference,
            _first_and_last([line["error"] for line in lines]),
            *(f"{group.bytes(method, way) / 1e6:.3g}" for way in ("up", "down")),
            f"{_mean([line['cpu_s'] for line in lines]):.0f}",
        ]
        out.append(f"| {' | '.join(cells)} |")
    scores = [group.base(metric) for metric in shown]
    if all(scores):
        out.append(f"| base model | {' | '.join(map(str, scores))} | | | | | |")
    spent = [value for told in group.lines.values() for line in told.values() for value in line["epsilon"]]
    if group.private:
        low, high = min(map(float, spent)), max(map(float, spent))
        out += ["", f"Spent by a site: {low:.3f} to {high:.3f}."]
    return out


def _first_and_last(errors: Sequence[Sequence[float | None]]) -> str:
    ends = [[error for one in errors if (error := one[place]) is not None] for place in (0, -1)]
    return " to ".join(f"{_mean(values):.1e}" if values else "-" for values in ends)


def _traffic(groups: Sequence[Group]) -> list[str]:
    out = list(TRAFFIC)
    seen: set[tuple[str, str]] = set()
    for group in groups:
        for method, told in group.lines.items():
            line = next(iter(told.values()))
            model = "small" if group.corpus == "small" else "SmolLM2-135M"
            if line["closed_form"] is None or (model, method) in seen:
                continue
            seen.add((model, method))
            ways = [
                f"{line['bytes'][way]:,} | {line['bytes'][way] / line['closed_form'][way]:.3f}"
                for way in ("up", "down")
            ]
            out.append(f"| {model} | {NAMES[method]} | {' | '.join(ways)} |")
    return out


def _noise() -> list[str]:
    lines = record.lines("aggregators_noise")
    if not lines:
        return ["Nothing measured yet."]
    told = lines[-1]
    out = [
        "Energy of the merged product's error when every number that a site trains takes Gaussian noise of deviation",
        f"{told['deviation']:g}, rank {told['rank']}, in units of (alpha / r x deviation)^2: drawn through the",
        "aggregators themselves, and by formula (`benchmarks/aggregators_noise.py`). This is Fed-SB's and FFA-LoRA's",
        "published advantage in kind: noise enters once, and for cores in r^2 numbers instead of r d_out. Averaging",
        "products exactly keeps more of the noise that a and b make of each other than averaging the factors does.",
        "",
        "| shapes of | sites | what is averaged | drawn | formula | of the factors' |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[tuple[str, int], float] = {}
    for row in told["rows"]:
        most = first.setdefault((row["model"], row["sites"]), row["drawn"])
        model = "small model" if row["model"] == "small" else "SmolLM2-135M"
        out.append(
            f"| {model} | {row['sites']} | {row['case']} | {row['drawn']:,.0f} +- {1.96 * row['error']:,.0f} | "
            f"{row['formula']:,.0f} | {row['drawn'] / most:.3f} |"
        )
    return out


def _rates() -> list[str]:
    out = list(RATES)
    for (corpus, method, private), scores in rate_scores(record.lines("aggregators_rates")).items():
        least = min(scores, key=scores.__getitem__)
        told = [
            f"**{rate:g}: {score:.3f}**" if rate == least else f"{rate:g}: {score:.3f}"
            for rate, score in sorted(scores.items())
        ]
        model = "small model" if corpus == "small" else "SmolLM2-135M"
        out.append(f"| {model} | {NAMES[method]} | {'yes' if private else 'no'} | {', '.join(told)} |")
    return out


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
