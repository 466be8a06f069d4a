"""What the private rows would teach without privacy: the upper bound beside a run's target, and nothing to release.

Pools the rows of all sites, fine-tunes the local model on message -> reply with the run's own tuner, and gives it the
run's own exam. Only a simulation can do this; the result is not private, is never broadcast, and says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clients.private_rows import read_private_rows
from fl_app import journal
from fl_app.config import shared
from fl_app.errors import StillroomError
from fl_app.seeds import stream
from fl_app.types import Lesson
from strategies.config import build_pipeline, read_server

STAMP = "NOT PRIVATE: trained on raw rows, for comparison only"


def upper_bound(run: Path, sites: Path, *, rows: int, epochs: int) -> dict[str, Any]:
    """Return the exam scores of a model tuned on at most `rows` raw rows, and write them to `run`/upper_bound.json."""
    tree = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    tree["run"]["directory"] = str(run / "upper_bound")
    tree["server"]["tuner"]["epochs"] = epochs
    tree["server"]["aggregator"] = {"kind": "mean_factors"}  # nothing is merged, so no ledger is asked for rounds
    settings = shared(tree)
    pipeline = build_pipeline(tree, settings, read_server(tree), run=f"{run.name}-upper-bound")
    lessons = [
        Lesson(draft_id=str(number), instruction=row.instruction, answer=row.output, teacher="the site's own reply")
        for folder in sorted(sites.glob("[0-9]*"))
        for number, row in enumerate(
            read_private_rows(folder / "rows.jsonl", unit="record", max_rows_per_unit=1).examples
        )
        if row.output
    ]
    order = stream(settings.run.seed, "upper bound").permutation(len(lessons))[:rows]
    chosen = [lessons[int(i)] for i in np.sort(order)]
    rng = stream(settings.run.seed, "upper bound", "tune")
    tuned = pipeline.stages.tuner(pipeline.start, chosen, rng)
    scores = pipeline.exam.score(pipeline.lab.local_with(tuned, "upper bound"))
    pipeline.lab.close()
    result: dict[str, Any] = {
        "stamp": STAMP,
        "rows": len(chosen),
        "epochs": epochs,
        "exam": {name: asdict(score) for name, score in scores.items()},
    }
    journal.write_json(run / "upper_bound.json", result)
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--sites", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        result = upper_bound(arguments.run, arguments.sites, rows=arguments.rows, epochs=arguments.epochs)
    except StillroomError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 2
    Console().print(json.dumps(result, sort_keys=True), soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
