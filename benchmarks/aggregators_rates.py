"""The learning rates of `aggregators.py`: three for each schedule, on a seed that the table does not report.

    PYTHONPATH=. python benchmarks/aggregators_rates.py [--jobs 2] [--only small]

One method stands for each schedule. On the small model each schedule has a rate with DP and one without; on the real
one the rate without DP is taken for both, and for both corpora, since a cell takes minutes there. All is rows at
random, so that no split is favoured. The best rates are printed, and written by hand into `aggregators.RATES`.
"""

from __future__ import annotations

import sys
from typing import Any

from aggregators import ALWAYS_NOISY, LOCKED_SEED, WORK, Cell, cell_of, measure
from cells import Table, lines

GRIDS = {
    "fedit": (3e-3, 1e-2, 3e-2),
    "ffa_lora": (3e-3, 1e-2, 3e-2),
    "rolora": (3e-3, 1e-2, 3e-2),
    "la_lora": (3e-3, 1e-2, 3e-2),
    "fed_sb_32": (1e-2, 3e-2, 1e-1),
    "zeroth_order": (1e-3, 1e-2, 1e-1),
}
REAL = ("fedit", "ffa_lora", "rolora", "fed_sb_32")
REAL_SHARE = 0.3
"""Rates of the real model are looked for in the same grids times this."""
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
    real = [
        cell("embedded", method, private=False, rate=round(rate * REAL_SHARE, 6))
        for method in REAL
        for rate in GRIDS[method]
    ]
    return [*small, *real]


def best(found: list[dict[str, Any]]) -> list[str]:
    """Return one line for each corpus, method and kind of privacy: rates, bits per byte, and the least."""
    told: list[str] = []
    groups = dict.fromkeys((one["corpus"], one["method"], one["private"]) for one in found if "failed" not in one)
    for key in groups:
        same = [one for one in found if (one["corpus"], one["method"], one["private"]) == key and "failed" not in one]
        scores = {one["rate"]: one["exam"]["bits_per_byte"][0] for one in same}
        shown = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in sorted(scores.items()))
        told.append(
            f"{key[0]} {key[1]} {'DP' if key[2] else 'no DP'}: {min(scores, key=scores.__getitem__):g} ({shown})"
        )
    return told


def main() -> int:
    """Command line; returns the exit code."""
    table = Table(kind="aggregators_rates", work=FOLDER, cells=cells(), measure=measure, cell_of=cell_of)
    code = table.main(__doc__)
    if (FOLDER / "cells.jsonl").is_file():
        sys.stdout.write("".join(f"{line}\n" for line in best(lines(FOLDER / "cells.jsonl"))))
    return code


if __name__ == "__main__":
    sys.exit(main())
