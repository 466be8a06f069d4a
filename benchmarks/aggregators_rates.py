"""The learning rates of `aggregators.py`: three for each schedule, on a seed that the table does not report.

    PYTHONPATH=. python benchmarks/aggregators_rates.py [--jobs 2] [--only small]

One method stands for each schedule, and Fed-SB for each of its ranks, since a core of more numbers moves further at the
same rate. On the small model each has a rate with DP and one without; on the real one the rate without DP is taken for
both, and for both corpora, since a cell takes minutes there. Rows are dealt at random, so that no split is favoured.
`aggregators.py` reads the best rates from the line that this leaves in `results.jsonl`, and the page shows all of them.
"""

from __future__ import annotations

import sys

from aggregators import ALWAYS_NOISY, LOCKED_SEED, WORK, Cell, cell_of, measure, ready
from cells import Table

USUAL = (3e-3, 1e-2, 3e-2)
GRIDS = {
    "fedit": USUAL,
    "ffa_lora": USUAL,
    "rolora": USUAL,
    "fed_sb_32": USUAL,
    "la_lora": USUAL,
    "fed_sb": (1e-2, 3e-2, 1e-1),
    "zeroth_order": USUAL,
}
LOWER = (1e-3, 3e-3, 1e-2)
REAL = {"fedit": LOWER, "ffa_lora": LOWER, "rolora": LOWER, "fed_sb_32": USUAL}
"""Of the real model, which is wider."""
FOLDER = WORK / "rates"


def cells() -> list[Cell]:
    """Return every cell."""

    def cell(corpus: str, method: str, *, private: bool, rate: float) -> Cell:
        return Cell(corpus=corpus, split="iid", private=private, method=method, seed=LOCKED_SEED, rate=rate)

    small = [
        cell("small", method, private=private, rate=rate)
        for method, rates in GRIDS.items()
        for private in (False, True)
        if private or method not in ALWAYS_NOISY
        for rate in rates
    ]
    real = [cell("embedded", method, private=False, rate=rate) for method, rates in REAL.items() for rate in rates]
    return [*small, *real]


def main() -> int:
    """Command line; returns the exit code."""
    ready()
    return Table(kind="aggregators_rates", work=FOLDER, cells=cells(), measure=measure, cell_of=cell_of).main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
