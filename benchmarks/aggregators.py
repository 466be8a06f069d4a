"""Every federated-LoRA method on the same rows, with the same steps: one table.

    PYTHONPATH=. python benchmarks/aggregators.py [--jobs 2] [--minutes 60] [--only finance] [--list]

A cell is (corpus, split, DP or not, method, seed): five sites, the real apps in one process, and the method's own file
in configs/methods, of which only sizes are changed. Finished cells lie in `build/aggregators/cells.jsonl`
(`benchmarks/cells.py`).

    small      a model made for the purpose (`make small-model`) answers a request with a letter of the embedded corpus:
               the whole grid, bits per byte of letters that no site holds
    embedded   SmolLM2-135M-Instruct, the same task: the methods that decide
    finance    SmolLM2-135M-Instruct, the sentiment of headlines: the methods that decide; multiple choice

    iid        rows dealt at random
    shards     rows sorted by label (house, sentiment) and cut into ten; a site holds two pieces (McMahan et al. 2017)

With DP every method spends the same epsilon at the same delta over the same steps. Without, the learner is plain LoRA
with the method's schedule. Learning rates are tuned for each schedule, not for each method, on a seed that is not
reported (`aggregators_rates.py`).

Not here: DP-DyLoRA's noise is a trusted server's and its epsilon a site's, which no record's epsilon compares with;
FedSA-LoRA leaves no model at the server that could sit the exam. Zeroth order has no learner without noise.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import aggregators_figures
import numpy as np
import record
from cells import DATA, FIRST_LAYER, REAL_DTYPE, REAL_MODEL, ROOT, TARGETS, Table, lines, play, write_lines, write_tree

from fl_app import factors
from fl_app.config import read_tree
from fl_app.seeds import stream
from simulations.corpora import CorpusRow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Split: TypeAlias = Literal["iid", "shards"]

WORK = ROOT / "build" / "aggregators"
SITES = 5
EPSILON, DELTA = 8.0, 1e-5
SEEDS = (0, 1, 2)
LOCKED_SEED = 100
"""The seed of all tuning; no cell of the table has it."""
RANK, ALPHA = 8, 16.0
CLIP_NORM = 0.1
"""Below the norms that rows have, so that all are clipped: with AdamW the signal then does not hang on the clip."""
MIXED = {"site-0": 8, "site-1": 8, "site-2": 4, "site-3": 4, "site-4": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A file of configs/methods, and what this table changes in it beside sizes."""

    file: str
    mixed: bool = False
    rank: int = RANK


METHODS = {
    "fedit": Method(file="fedit"),
    "ffa_lora": Method(file="ffa_lora"),
    "flora": Method(file="flora"),
    "fedex_lora": Method(file="fedex_lora"),
    "fed_sb": Method(file="fed_sb"),
    "fed_sb_32": Method(file="fed_sb", rank=32),
    "rolora": Method(file="rolora"),
    "flex_lora": Method(file="flex_lora"),
    "florist": Method(file="florist"),
    "lora_fair": Method(file="lora_fair"),
    "la_lora": Method(file="la_lora"),
    "fedask": Method(file="fedask"),
    "zeroth_order": Method(file="zeroth_order"),
    "flora_mixed": Method(file="flora_mixed_ranks", mixed=True),
    "flex_lora_mixed": Method(file="flex_lora", mixed=True),
    "zero_padding_mixed": Method(file="zero_padding", mixed=True),
}
DECISIVE = ("fedit", "ffa_lora", "flora", "fedex_lora", "fed_sb_32", "rolora")
ALWAYS_NOISY = ("zeroth_order",)

TUNED_BY = {"both": "fedit", "b": "ffa_lora", "rounds": "rolora", "steps": "la_lora", "core": "fed_sb_32"}
"""Schedule -> the method on which its learning rate was tuned; a method that was tuned itself has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a run, of a site's round, and of a row."""

    rounds: int
    steps: int
    batch: int
    """The expected one, of a step at a site."""
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Where rows come from (`read` gives the sites' and the exam's, labels as codes), and what is done with them."""

    read: Callable[[], tuple[list[CorpusRow], list[CorpusRow]]]
    base: Base
    sizes: Sizes
    exam: Mapping[str, Any]
    splits: tuple[Split, ...] = ("shards",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement; a rate of 0 is the table's."""

    corpus: str
    split: Split
    private: bool
    method: str
    seed: int
    rate: float = 0.0

    @property
    def name(self) -> str:
        """A name that is a folder's."""
        told = f"{self.corpus}-{self.split}-{'dp' if self.private else 'plain'}-{self.method}-{self.seed}"
        return f"{told}-{self.rate:g}" if self.rate else told


def _letters() -> tuple[list[CorpusRow], list[CorpusRow]]:
    from simulations.corpus.write import write_corpus

    folder = WORK / "formulary"
    if not (folder / "private.jsonl").is_file():
        write_corpus(folder)
    rows = [
        CorpusRow(
            id=one["id"],
            instruction=f"Write a letter from the {one['house']} to the formulary.",
            output=one["instruction"],
            code=one["house"],
        )
        for one in lines(folder / "private.jsonl")
    ]
    rows.sort(key=lambda row: hashlib.sha256(row.output.encode()).hexdigest())
    return rows[:-600], rows[-600:]


def _headlines() -> tuple[list[CorpusRow], list[CorpusRow]]:
    def of(name: str) -> list[CorpusRow]:
        return [
            CorpusRow(
                id=one["id"],
                instruction=f"{one['instruction']}\n{one['input']}",
                output=one["output"],
                code=one["output"],
            )
            for one in lines(DATA / "finance" / f"{name}.jsonl")
            if one["source"] in {"sentfin", "tfns"}
        ]

    return of("private"), of("eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model and the decoder block from which on it is adapted."""

    name: str
    dtype: Literal["float32", "bfloat16"]
    first_layer: int


SMALL = Base(name=str(ROOT / "build" / "small-model"), dtype="float32", first_layer=0)
REAL = Base(name=REAL_MODEL, dtype=REAL_DTYPE, first_layer=FIRST_LAYER)
REAL_SIZES = Sizes(rounds=3, steps=6, batch=16, max_tokens=96)
CORPORA = {
    "small": Corpus(
        read=_letters,
        base=SMALL,
        sizes=Sizes(rounds=5, steps=6, batch=16, max_tokens=80),
        exam={"free_items": 120, "choice_items": 0},
        splits=("iid", "shards"),
    ),
    "finance": Corpus(
        read=_headlines,
        base=REAL,
        sizes=REAL_SIZES,
        exam={"free_items": 60, "choice_items": 100, "calibrate": True},
    ),
    "embedded": Corpus(
        read=_letters,
        base=REAL,
        sizes=REAL_SIZES,
        exam={"free_items": 60, "choice_items": 0},
    ),
}


def cells() -> list[Cell]:
    """Return every cell: seed by seed, and in each the small grid first, so that a table stands early."""
    return [
        Cell(corpus=corpus, split=split, private=private, method=method, seed=seed)
        for seed in SEEDS
        for corpus, one in CORPORA.items()
        for method in (METHODS if corpus == "small" else DECISIVE)
        for split in one.splits
        for private in (False, True)
        if private or method not in ALWAYS_NOISY
    ]


def sharded(rows: list[CorpusRow], seed: int) -> list[str]:
    """Return each row's site: rows sorted by label, cut into two pieces a site, pieces dealt at random."""
    rng = stream(seed, "aggregators", "shards")
    shuffled = rng.permutation(len(rows))
    order = shuffled[np.argsort([rows[int(place)].code for place in shuffled], kind="stable")]
    sites = [""] * len(rows)
    for piece, dealt in zip(np.array_split(order, 2 * SITES), rng.permutation(2 * SITES), strict=True):
        for place in piece:
            sites[int(place)] = f"site-{dealt // 2}"
    return sites


def _exam_items(corpus: Corpus, rows: list[CorpusRow]) -> list[dict[str, Any]]:
    """Return the exam: every row as a free answer and, where labels are the answers, as a choice among them."""
    free: list[dict[str, Any]] = [{"question": row.instruction, "answer": row.output} for row in rows]
    if not corpus.exam["choice_items"]:
        return free
    choices = sorted({row.output for row in rows})
    return [*free, *({**item, "choices": choices} for item in free)]


def write_config(cell: Cell, folder: Path) -> Path:
    """Write the sites' rows, the exam and the configuration of a cell."""
    corpus, method = CORPORA[cell.corpus], METHODS[cell.method]
    base, sizes = corpus.base, corpus.sizes
    train, test = corpus.read()
    folder.mkdir(parents=True, exist_ok=True)
    told = [
        {"id": row.id, "instruction": row.instruction, "output": row.output, "site": site, "code": "row"}
        for row, site in zip(train, sharded(train, cell.seed), strict=True)
    ]
    write_lines(folder / "private.jsonl", told)
    write_lines(folder / "exam.jsonl", _exam_items(corpus, test))

    tree = read_tree(f"configs/methods/{method.file}.toml")
    tree["run"] = {"rounds": sizes.rounds, "seed": cell.seed, "mode": "simulation"}
    tree["model"] = {"name": base.name, "dtype": base.dtype}
    tree["lora"] |= {
        "rank": method.rank,
        "alpha": ALPHA * method.rank / RANK,
        "targets": TARGETS,
        "first_layer": base.first_layer,
    }
    tree["client"]["learner"] = _learner(cell, corpus, tree["client"]["learner"])
    server = tree["server"]
    server |= {"threads": 1, "batch_rows": 32, "accept_non_private": not cell.private}
    server["network"] |= {"sites": SITES, "wait_s": 600.0, "reply_timeout_s": 7200.0}
    server["exam"] = {
        "path": str(folder / "exam.jsonl"),
        "models": ["base", "target"] if cell.method == "fedit" else ["target"],
        "max_new_tokens": 1,
        **corpus.exam,
    }
    server.pop("ranks", None)  # the methods that plan ranks by memory: here each is listed, or the same
    if method.mixed:
        server["ranks"] = {"kind": "listed", "ranks": MIXED}
    rate = SITES * sizes.batch / len(train)
    tree["simulation"] |= {
        "corpus": str(folder / "private.jsonl"),
        "code_column": "code",
        "max_rows_per_site": 0,
        "partition": {"kind": "iid", "sites": SITES} if cell.split == "iid" else {"kind": "column", "column": "site"},
        "policy": {
            "epsilon": EPSILON,
            "delta": DELTA,
            "sample_rate": rate,
            "expected_batch": sizes.batch,
            "max_tokens": sizes.max_tokens,
            "min_noise_multiplier": 0.05,
            "max_noise_multiplier": 100.0,
            "non_private": not cell.private,
        },
    }
    return write_tree(tree, folder)


def _learner(cell: Cell, corpus: Corpus, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the method's learner in this table's sizes, or plain LoRA with its schedule."""
    schedule = factors.schedule_of(own)
    rate = cell.rate or tuned_rate(cell, schedule)
    sizes = {"steps": corpus.sizes.steps, "learning_rate": rate, "learns": "answer", "micro_batch_tokens": 2048}
    if not cell.private:
        return {"kind": "plain_lora", "schedule": schedule, **sizes}
    clip = {} if own["kind"] == "zeroth_order" else {"clip_norm": CLIP_NORM}
    return {**own, **sizes, **clip}


def tuned_rate(cell: Cell, schedule: str) -> float:
    """Return the best rate of `aggregators_rates.py` for a cell: the least bits per byte on the seed of all tuning.

    Raises: LookupError when it was not measured.
    """
    small = cell.corpus == "small"
    scores = aggregators_figures.rate_scores(record.lines("aggregators_rates"))
    for method in (cell.method, TUNED_BY[schedule]):
        found = scores.get(("small" if small else "embedded", method, cell.private and small))
        if found:
            return min(found, key=found.__getitem__)
    raise LookupError(f"{cell.name}: no learning rate was tuned for it; run benchmarks/aggregators_rates.py first")


def ready() -> None:
    """Write what all cells read, before any two of them begin. Raises: FileNotFoundError without the small model."""
    _letters()
    if not (ROOT / "build" / "small-model" / "config.json").is_file():
        raise FileNotFoundError("build/small-model is not there; make it with: make small-model")


def measure(cell: Cell) -> dict[str, Any]:
    """Return the line of a cell. Its rounds and sites are removed when they have been measured: they take gigabytes."""
    folder = WORK / "runs" / cell.name
    played = play(write_config(cell, folder), f"aggregators-{cell.name}")
    found: dict[str, Any] = {}
    if not played.failed:
        found = aggregators_figures.of_run(played.directory, cell.method)
        shutil.rmtree(played.directory / "rounds")
        for place in (ROOT / "build" / "sites").glob(f"{played.directory.name}*"):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return {**asdict(cell), **found, **played.costs()}


def cell_of(line: Mapping[str, Any]) -> Cell:
    """Return the cell of a line."""
    return Cell(**{key: line[key] for key in Cell.__slots__})


def main() -> int:
    """Command line; returns the exit code."""
    ready()
    table = Table(kind="aggregators", work=WORK, cells=cells(), measure=measure, cell_of=cell_of)
    return table.main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
