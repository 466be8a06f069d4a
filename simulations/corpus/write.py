"""Writes the corpus: public.jsonl, private.jsonl, exam.jsonl, codes.jsonl. Same seed, same bytes.

python -m simulations.corpus.write --out DIR [--seed N]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulations.corpus.codes import build_codes
from simulations.corpus.desk import public_rows
from simulations.corpus.exam import exam_rows
from simulations.corpus.formulary import build_formulary, build_topics
from simulations.corpus.letters import private_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def write_corpus(root: Path, *, seed: int = 0) -> None:
    """Write the four files under `root`, which is made if need be; existing files are replaced."""
    remedies = build_formulary()
    topics = build_topics(remedies)
    root.mkdir(parents=True, exist_ok=True)
    _write(root / "public.jsonl", public_rows(topics, seed=seed))
    _write(root / "private.jsonl", private_rows(topics, seed=seed))
    _write(root / "exam.jsonl", exam_rows(remedies, seed=seed))
    _write(root / "codes.jsonl", (dataclasses.asdict(code) for code in build_codes(topics)))


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in sorted(rows, key=lambda row: row["id"])]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the embedded corpus.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_corpus(arguments.out, seed=arguments.seed)
