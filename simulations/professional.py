"""Trains the professional model's adapter on public text: `make professional`.

The professional is the local model (or another) with a LoRA adapter of its own, tuned by the server's own tuner on
rows of a public corpus. Nothing private comes near it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from fl_app import lora, models
from fl_app.config import LoraSection
from fl_app.errors import StillroomError
from fl_app.journal import read_lines
from fl_app.seeds import stream
from fl_app.types import Lesson
from strategies.lab import Lab
from strategies.tuners.sft import Sft, SupervisedTuning


def public_lessons(source: Path, *, rows: int, seed: int) -> list[Lesson]:
    """Return a seeded choice of the corpus' rows as lessons; the input, if any, follows the instruction."""
    lessons = [
        Lesson(
            draft_id=str(row["id"]),
            instruction="\n".join(part for part in (str(row["instruction"]), str(row.get("input", ""))) if part),
            answer=str(row["output"]),
            teacher="public",
        )
        for row in read_lines(source)
        if row.get("output")
    ]
    order = stream(seed, "professional", "rows").permutation(len(lessons))[:rows]
    return [lessons[int(i)] for i in np.sort(order)]


def train_professional(
    source: Path, out: Path, *, model: str, system: str, lora_section: LoraSection, tuner: Sft, rows: int, threads: int
) -> None:
    """Write a PEFT adapter in bfloat16 (a few MB), trained on `rows` rows of `source`."""
    console = Console(stderr=True)
    frozen = models.load(model, "bfloat16")
    lab = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="base",
        system=system,
        threads=threads,
        batch_rows=32,
        public_words=frozenset(),
    )
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            console.print(f"step {done} of {total}, {time.monotonic() - began:.0f} s")

    lab.progress = progress
    start = lora.initial(lora.spec_of(frozen, lora_section), stream(0, "professional", "start"))
    lessons = public_lessons(source, rows=rows, seed=0)
    adapter = SupervisedTuning(section=tuner, lab=lab)(start, lessons, stream(0, "professional", "tune"))
    lab.close()
    lora.save_peft(adapter, out, base_name=model, dtype="bfloat16")
    console.print(f"{len(lessons)} public rows -> {out}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--public", type=Path, required=True, help="JSON lines with instruction, input, output")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--system", default="")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--first-layer", type=int, default=10)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    section = LoraSection(
        rank=arguments.rank, alpha=2.0 * arguments.rank, targets=targets, first_layer=arguments.first_layer
    )
    tuner = Sft(
        kind="sft",
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
        micro_batch_tokens=2048,
    )
    try:
        train_professional(
            arguments.public,
            arguments.out,
            model=arguments.model,
            system=arguments.system,
            lora_section=section,
            tuner=tuner,
            rows=arguments.rows,
            threads=arguments.threads,
        )
    except StillroomError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
