"""Every way to make private text, on the same rows at the same budgets, through the whole round: one table.

    PYTHONPATH=. python benchmarks/synthesis.py [--jobs 2] [--minutes 60] [--only finance] [--list]

A cell is (corpus, rows of the site, epsilon, method, seed): one site, the real model, the real apps in one
process, then four looks at what came out.

Finished cells lie in `build/synthesis/cells.jsonl`, and a second call does the others;
with `--minutes` no cell begins after that time. When nothing is left to begin, the cells go into `results.jsonl`.

    mauve       of the kept drafts against real text that no site holds (MiniLM features, three seeds)
    accuracy    a classifier that saw the kept drafts and their codes alone, tested on real text and its labels
    exam        of the target that learned the professional's answers to the kept drafts: multiple choice, or bits per
                byte of free answers where the corpus has no choices

The floors (`public_only`, `zero_shot`) spend nothing and run once per corpus and seed. Nothing private warms up the
start: W_loc is the package's model, and no public text of the private kind is used. Sizes are chosen so that a
cell takes minutes on a CPU, which bears hardest on the decoders: their cost is references x tokens, so they write few
texts.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from cells import DATA, FIRST_LAYER, REAL_DTYPE, REAL_MODEL, ROOT, TARGETS, Table, lines, play, write_lines, write_tree

from fl_app.privacy.accountants import pld
from fl_app.types import BoundedRange, DpReceipt
from strategies.exam import EXAMINED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Coded: TypeAlias = "list[tuple[str, str]]"

WORK = ROOT / "build" / "synthesis"
DELTA = 1e-5
DRAFTS = 180
SMALL = 36
"""Texts a side at which methods are compared by MAUVE, which grows when there are fewer."""
METHODS = (
    "zero_shot",
    "public_only",
    "dp_lora",
    "invisible_ink",
    "private_prediction",
    "epsvec",
    "private_evolution",
    "dp_lora+kernel",
)
FLOORS = ("zero_shot", "public_only")
LAYERS = (18,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Where rows come from: `read` gives (text, code) pairs for the site, and for the test."""

    name: str
    read: Callable[[], tuple[Coded, Coded]]
    code_text: str
    task: str
    professional: str
    exam: dict[str, Any]
    max_new_tokens: int
    max_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement; `rows` and `epsilon` are 0 for a method that no site takes part in."""

    corpus: str
    rows: int
    epsilon: float
    method: str
    seed: int

    @property
    def name(self) -> str:
        """A name that is a folder's."""
        return f"{self.corpus}-{self.rows}-{self.epsilon:g}-{self.method.replace('+', '-')}-{self.seed}"


def _shuffled(items: Coded) -> Coded:
    """Return items in an order that hangs on their text alone."""
    return sorted(items, key=lambda one: hashlib.sha256(json.dumps(one).encode()).hexdigest())


def _finance() -> tuple[Coded, Coded]:
    def of(name: str) -> Coded:
        rows = lines(DATA / "finance" / f"{name}.jsonl")
        return _shuffled([(row["input"], row["output"]) for row in rows if row["source"] in {"sentfin", "tfns"}])

    return of("private"), of("eval")


def _medical() -> tuple[Coded, Coded]:
    def of(name: str) -> Coded:
        rows = lines(DATA / "medical" / f"{name}.jsonl")
        kept = [row for row in rows if row["source"] in {"mts-dialog", "aci-bench", "meqsum"}]
        return _shuffled([(" ".join(row["input"].split()[:60]), row["source"]) for row in kept])

    return of("private"), of("eval")


def _embedded() -> tuple[Coded, Coded]:
    from simulations.corpus.write import write_corpus

    folder = WORK / "formulary"
    write_corpus(folder)
    rows = _shuffled([(row["instruction"], row["house"]) for row in lines(folder / "private.jsonl")])
    return rows[:-600], rows[-600:]


CORPORA = {
    "finance": Corpus(
        name="finance",
        read=_finance,
        code_text="Financial news headline, {value}:\n",
        task="What is the sentiment of this financial text? Answer negative, neutral or positive.\n{text}",
        professional="build/finance/professional",
        exam={
            "path": str(DATA / "finance" / "eval.jsonl"),
            "sources": ["sentfin", "tfns"],
            "calibrate": True,
            "choice_items": 150,
            "free_items": 0,
        },
        max_new_tokens=24,
        max_tokens=48,
        answer_tokens=6,
    ),
    "medical": Corpus(
        name="medical",
        read=_medical,
        code_text="Health text, {value}:\n",
        task="{text}",
        professional="build/medical/professional",
        exam={
            "path": str(DATA / "medical" / "eval.jsonl"),
            "sources": ["medquad", "k-qa"],
            "join_input": "input_only",
            "choice_items": 0,
            "free_items": 24,
            "max_new_tokens": 1,
        },
        max_new_tokens=40,
        max_tokens=72,
        answer_tokens=60,
    ),
    "embedded": Corpus(
        name="embedded",
        read=_embedded,
        code_text="A letter from the {value}:\n",
        task="{text}",
        professional="simulations/corpus/professional",
        exam={"path": "", "choice_items": 120, "free_items": 0},
        max_new_tokens=40,
        max_tokens=64,
        answer_tokens=48,
    ),
}


def cells() -> list[Cell]:
    """Return every cell, those that decide an ordering first, and those with three seeds."""
    found: list[Cell] = []
    for seed in (0, 1, 2):
        for corpus in CORPORA:
            grid = (
                [(250, 8.0), (2000, 8.0), (250, 1.0), (2000, 1.0)] if corpus == "finance" else [(2000, 8.0), (250, 1.0)]
            )
            if seed and corpus != "finance":
                continue
            found += [Cell(corpus=corpus, rows=0, epsilon=0.0, method=method, seed=seed) for method in FLOORS]
            for rows, epsilon in grid[: 2 if seed else 4]:
                methods = [method for method in METHODS if method not in FLOORS]
                if seed:
                    methods = ["dp_lora", "invisible_ink", "private_prediction"]
                found += [
                    Cell(corpus=corpus, rows=rows, epsilon=epsilon, method=method, seed=seed) for method in methods
                ]
    return sorted(found, key=lambda cell: cell.corpus != "finance" or cell.epsilon == 1.0)


def most_draws(span: float, epsilon: float) -> int:
    """Return how many draws of this span fit the budget."""

    def fits(count: int) -> bool:
        receipt = DpReceipt(event=BoundedRange(span=round(span, 9), count=count), unit="record")
        return pld.epsilon([receipt], DELTA) <= epsilon

    low, high = 0, 1
    while high < 1 << 20 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _methods(  # noqa: PLR0911 - a table
    cell: Cell, corpus: Corpus, codes: int, rows: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return learner, synthesizer and further settings of a cell."""
    tokens = corpus.max_new_tokens
    writes = {"codes": "", "drafts": DRAFTS, "max_new_tokens": tokens, "temperature": 0.9, "top_p": 0.95}
    train = {"kind": "dp_lora", "steps": 40, "learning_rate": 3e-3, "learns": "instruction", "micro_batch_tokens": 1024}
    many = rows >= 1000  # noqa: PLR2004
    match cell.method:
        case "zero_shot" | "public_only":
            return {**train, "steps": 1}, {"kind": cell.method, **writes}, {}
        case "dp_lora":
            return train, {"kind": "control_codes", **writes}, {}
        case "dp_lora+kernel":
            kernel = {"embedder": {"kind": "minilm"}, "dim": 4096, "bandwidth": 1.0}
            density = {"kind": "kernel_density", **kernel, "keep": DRAFTS // codes // 2}
            more = {"client.survey": {"noise_multiplier": 4.0 if cell.epsilon > 1 else 30.0, "kernel": kernel}}
            more["server.filters"] = [*_filters(), density]
            return train, {"kind": "control_codes", **writes, "quota": "survey"}, more
        case "invisible_ink":
            per_code, each = (30, 1) if many else (6, 2)
            learner = {
                "kind": "invisible_ink",
                "buckets_per_code": per_code,
                "expected_units": rows / per_code / codes,
                "texts_per_bucket": each,
                "max_new_tokens": tokens,
            }
            return learner, _released(cell), {}
        case "private_prediction":
            per_code = {(True, 8.0): 30, (True, 1.0): 4, (False, 8.0): 3, (False, 1.0): 1}[many, cell.epsilon]
            units = rows / per_code / codes
            count = most_draws(2 * 10.0 / (units * 2.0), cell.epsilon)
            each = max(1, min(math.ceil(count / tokens), 2))
            learner = {
                "kind": "private_prediction",
                "buckets_per_code": per_code,
                "expected_units": units,
                "tokens_per_bucket": max(1, min(count, each * tokens)),
                "texts_per_bucket": each,
                "max_new_tokens": tokens,
                "clip_norm": 10.0,
                "temperature": 2.0,
                "public_top": 1024,
            }
            return learner, _released(cell), {}
        case "epsvec":
            learner = {"kind": "epsvec", "layers": list(LAYERS)}
            return (
                learner,
                {"kind": "epsvec", **writes, "layers": list(LAYERS), "num_negatives": 40, "coefficient": 0.6},
                {},
            )
        case "private_evolution":
            learner = {"kind": "pe_votes", "embedder": {"kind": "minilm"}}
            evolve = {**writes, "kind": "private_evolution", "population": DRAFTS, "keep": DRAFTS // 2}
            del evolve["drafts"]
            return learner, {**evolve, "opening": "zero_shot", "emits": "population"}, {"run.rounds": 3}
        case _:
            raise ValueError(cell.method)


def _released(cell: Cell) -> dict[str, Any]:
    return {"kind": "released_texts", "codes": "", "max_texts": 4000, "learner": cell.method}


def _filters() -> list[dict[str, Any]]:
    return [
        {"kind": "length", "min_words": 3, "max_words": 80},
        {"kind": "near_duplicate", "max_rouge_l": 0.7, "max_bleu": 0.6},
    ]


def write_config(cell: Cell, folder: Path) -> Path:
    """Write the site's rows, the codes and the configuration of a cell."""
    corpus = CORPORA[cell.corpus]
    private, _ = corpus.read()
    kept = private[: min(cell.rows or 60, len(private))]
    folder.mkdir(parents=True, exist_ok=True)
    told = [{"id": f"r{n}", "instruction": text, "output": "", "label": code} for n, (text, code) in enumerate(kept)]
    write_lines(folder / "private.jsonl", told)
    rows = len(kept)
    rate = 0.07 if rows >= 1000 else 0.13  # noqa: PLR2004
    learner, synthesizer, more = _methods(cell, corpus, len({code for _, code in kept}), rows)
    exam = {**corpus.exam, "models": list(EXAMINED) if cell.method == "zero_shot" else ["target"]}
    if cell.corpus == "embedded":
        exam["path"] = str(WORK / "formulary" / "exam.jsonl")
    tree: dict[str, Any] = {
        "run": {"rounds": 1, "seed": cell.seed, "mode": "simulation"},
        "model": {"name": REAL_MODEL, "dtype": REAL_DTYPE},
        "lora": {"rank": 8, "alpha": 16.0, "targets": TARGETS, "first_layer": FIRST_LAYER},
        "client": {"learner": learner, "probe": {"items": 0}},
        "server": {
            "threads": 1,
            "batch_rows": 32,
            "network": {"sites": 1, "poll_s": 0.05, "wait_s": 600.0, "reply_timeout_s": 7200.0},
            "professional": {"name": "professional", "adapter": str(ROOT / corpus.professional)},
            "aggregator": {"kind": "mean_product"},
            "synthesizer": synthesizer,
            "filters": _filters(),
            "distiller": {"kind": "professional", "max_new_tokens": corpus.answer_tokens, "task": corpus.task},
            "tuner": {
                "kind": "sft",
                "epochs": 2,
                "learning_rate": 2e-3,
                "batch_size": 8,
                "micro_batch_tokens": 1024,
                "max_tokens": 144,
            },
            "exam": exam,
        },
        "simulation": {
            "grid": "in-process",
            "corpus": str(folder / "private.jsonl"),
            "code_column": "label",
            "code_text": corpus.code_text,
            "partition": {"kind": "iid", "sites": 1},
            "policy": {
                "epsilon": cell.epsilon or 8.0,
                "delta": DELTA,
                "sample_rate": rate,
                "expected_batch": max(1, round(rate * rows)),
                "max_tokens": corpus.max_tokens,
                "min_noise_multiplier": 0.05,
                "max_noise_multiplier": 2000.0,
                "max_steps_per_round": 100_000,
                "release_kinds": ["adapter", "vector", "histogram", "text"],
            },
        },
    }
    for key, value in more.items():
        place, (*parents, last) = tree, key.split(".")
        for name in parents:
            place = place[name]
        place[last] = value
    return write_tree(tree, folder)


def measure(cell: Cell) -> dict[str, Any]:
    """Return the line of a cell; the texts that a failed one wrote are not looked at."""
    played = play(write_config(cell, WORK / "runs" / cell.name), f"synthesis-{cell.name}")
    found = {} if played.failed else figures(cell, played.directory)
    return {**asdict(cell), **found, **played.costs()}


def figures(cell: Cell, run: Path) -> dict[str, Any]:
    """Return what a finished run comes to."""
    from fl_app import models
    from fl_app.embeddings import MiniLm
    from fl_app.metrics.train_on_synthetic import train_on_synthetic
    from simulations.curation.closeness import mauve

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    kept: list[tuple[str, str]] = []
    written = 0
    for folder in sorted((run / "rounds").iterdir(), key=lambda one: int(one.name)):
        if not (folder / "drafts.jsonl").is_file():  # round 0: the exam before any round
            continue
        drafts = lines(folder / "drafts.jsonl")
        names = set(json.loads((folder / "screened.json").read_text(encoding="utf-8"))["kept"])
        written += len(drafts)
        kept = kept if cell.method != "private_evolution" else []  # the last population is what it found
        kept += [(draft["instruction"], draft["origin"]["code"]) for draft in drafts if draft["id"] in names]
    _, test = CORPORA[cell.corpus].read()
    embed = MiniLm(kind="minilm").build(models.load("tiny-random", "float32"))
    close = mauve([text for text, _ in kept], [text for text, _ in test], embed, cell.seed)
    few = [kept[int(place)][0] for place in np.random.default_rng(cell.seed).permutation(len(kept))[:SMALL]]
    small = mauve(few, [text for text, _ in test], embed, cell.seed)
    line: dict[str, Any] = {
        "written": written,
        "kept": len(kept),
        "mauve": close.value and [close.value.value, close.value.low, close.value.high],
        "mauve_small": small.value and [small.value.value, small.value.low, small.value.high],
        "mauve_ceiling": close.ceiling and close.ceiling.value,
        "seconds": summary["seconds"],
        "bytes": summary["bytes"],
        "spent": {site: one["spent"] for site, one in summary["epsilon"].items()},
    }
    if len({code for _, code in kept}) > 1:
        ours = (embed([text for text, _ in kept]), [code for _, code in kept])
        real = (embed([text for text, _ in test]), [code for _, code in test])
        scores = train_on_synthetic(ours, real, rng=np.random.default_rng(cell.seed))
        line["downstream"] = {name: [one.value, one.low, one.high] for name, one in scores.items()}
    targets = [name for name in summary["exam"] if name.startswith("target_round")]
    for name in [name for name in ("base", "professional", targets[-1]) if name in summary["exam"]]:
        key = "target" if name.startswith("target") else name
        line[f"exam_{key}"] = {metric: [s["value"], s["low"], s["high"]] for metric, s in summary["exam"][name].items()}
    return line


def main() -> int:
    """Command line; returns the exit code."""

    def cell_of(line: Mapping[str, Any]) -> Cell:
        return Cell(**{key: line[key] for key in Cell.__slots__})

    return Table(kind="synthesis", work=WORK, cells=cells(), measure=measure, cell_of=cell_of).main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
