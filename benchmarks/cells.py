"""Runs a table that takes hours: cell by cell, each in a process of its own, and again from where it stopped.

    table = Table(kind="synthesis", work=..., cells=cells(), measure=measure, cell_of=...)
    table.main(__doc__)             [--jobs 2] [--minutes 60] [--only finance] [--list]

Finished cells are lines of `<work>/cells.jsonl`; a second call does the others, in the order of the table, and with
`--minutes` no cell begins after that time. Then all finished cells go into `results.jsonl` as one line,
unless its last line of the kind says the same.
A cell plays the real apps (`play`), so that what it measured is what a user would get.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REAL_MODEL = "smollm2-135m-instruct"
REAL_DTYPE: Literal["bfloat16"] = "bfloat16"
FIRST_LAYER = 20
"""The decoder block from which on the real model is adapted."""
LOG_END = 400
"""Characters of a failed cell's log that its line keeps."""


class Cell(Protocol):
    """One measurement of a table."""

    @property
    def name(self) -> str:
        """A name of its own, which is also that of a folder."""
        ...


CellT = TypeVar("CellT", bound=Cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A run that ended: where it lies, what it cost, and the end of its log when it failed.

    `cpu_s` is the processor time of its process, which a machine that does other things as well does not stretch.
    """

    directory: Path
    wall_s: float
    cpu_s: float
    failed: str = ""

    def costs(self) -> dict[str, Any]:
        """Return what the line of a cell says of its run, failed or not."""
        told: dict[str, Any] = {"wall_s": round(self.wall_s), "cpu_s": round(self.cpu_s, 1)}
        return told | ({"failed": self.failed} if self.failed else {"run": self.directory.name})


def play(config: Path, name: str) -> Played:
    """Play a configuration in a process of its own, and return how that went; its log lies beside the file."""
    run = f"{name}-{int(time.time())}"
    words = [sys.executable, "-m", "simulations.launch", "--config", str(config), "--run", run]
    log = config.with_name("log")
    began = time.monotonic()
    with log.open("w") as said:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Played(
        directory=ROOT / "runs" / run,
        wall_s=time.monotonic() - began,
        cpu_s=usage.ru_utime + usage.ru_stime,
        failed=log.read_text(encoding="utf-8")[-LOG_END:] or "no word" if process.returncode else "",
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tree(tree: Mapping[str, Any], folder: Path) -> Path:
    """Write a configuration tree into a folder and return the file."""
    import tomli_w

    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Generic[CellT]):
    """All cells of a table, in the order in which they are begun.

    `measure` gives the line of a cell: its own fields, and what was found; a failed one says why and is not repeated.
    `cell_of` gives the cell of such a line.
    """

    kind: str
    work: Path
    cells: Sequence[CellT]
    measure: Callable[[CellT], dict[str, Any]]
    cell_of: Callable[[Mapping[str, Any]], CellT]

    def main(self, doc: str | None) -> int:
        """Command line; returns the exit code."""
        parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
        parser.add_argument("--jobs", type=int, default=2)
        parser.add_argument("--minutes", type=float, default=math.inf)
        parser.add_argument("--only", default="", help="begin only cells whose name holds this")
        parser.add_argument("--list", action="store_true", help="say what is left, and stop")
        arguments = parser.parse_args()
        self.work.mkdir(parents=True, exist_ok=True)
        file = self.work / "cells.jsonl"
        done = {self.cell_of(line).name for line in (lines(file) if file.is_file() else [])}
        left = [cell for cell in self.cells if cell.name not in done and arguments.only in cell.name]
        sys.stdout.write(f"{len(done)} cells done, {len(left)} left\n")
        if arguments.list:
            sys.stdout.write("".join(f"{cell.name}\n" for cell in left))
            return 0
        until = time.monotonic() + 60 * arguments.minutes

        def work(cell: CellT) -> None:
            if time.monotonic() > until:
                return
            line = {**self.measure(cell), "commit": record.commit()}
            with file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line, sort_keys=True) + "\n")
            sys.stdout.write(f"{cell.name}: {line['wall_s']} s{', failed' if 'failed' in line else ''}\n")
            sys.stdout.flush()

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(work, left))
        found = lines(file) if file.is_file() else []
        told = record.lines(self.kind)
        if found and not (told and told[-1]["cells"] == found):
            line = record.append({"kind": self.kind, "cells": found})
            sys.stdout.write(json.dumps(line) + "\n")
        return 0
