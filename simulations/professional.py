"""Trains, on public text, the adapters a run brings along: `make professional`.

    answers     the professional: question -> answer, on rows of a public corpus
    questions   the start of a run: control code -> question, so that sites need few private steps to write letters

Both are tuned by the server's own tuner. Nothing private comes near either.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from fl_app import lora, models, sequences
from fl_app.config import LoraSection
from fl_app.errors import StillroomError
from fl_app.journal import read_lines
from fl_app.seeds import stream
from fl_app.types import Lesson
from strategies.lab import Lab
from strategies.tuners.sft import Sft, SupervisedTuning

if TYPE_CHECKING:
    from fl_app.sequences import TokenSequence


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


def public_writing(source: Path, codes: Path, tokenizer: Any, *, rows: int, seed: int) -> list[TokenSequence]:
    """Return a seeded choice of the corpus' rows that carry a control code as (code text, instruction) sequences."""
    texts = {str(row["id"]): str(row["text"]) for row in read_lines(codes)}
    coded = [row for row in read_lines(source) if row.get("code") in texts]
    order = stream(seed, "start", "rows").permutation(len(coded))[:rows]
    return [
        sequences.encode(tokenizer, texts[coded[int(i)]["code"]], str(coded[int(i)]["instruction"]), max_tokens=96)
        for i in np.sort(order)
    ]


def train(arguments: argparse.Namespace, console: Console) -> None:
    """Write a PEFT adapter in bfloat16, trained on public text: answers by default, with --codes the questions."""
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
    frozen = models.load(arguments.model, "bfloat16")
    lab = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="base",
        system=arguments.system,
        threads=arguments.threads,
        batch_rows=32,
        public_words=frozenset(),
    )
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            console.print(f"step {done} of {total}, {time.monotonic() - began:.0f} s")

    lab.progress = progress
    fresh = lora.initial(lora.spec_of(frozen, section), stream(0, "professional", "start"))
    tuning, rng = SupervisedTuning(section=tuner, lab=lab), stream(0, "professional", "tune")
    if arguments.codes is not None:
        texts = public_writing(arguments.public, arguments.codes, frozen.tokenizer, rows=arguments.rows, seed=0)
        adapter = tuning.fit(fresh, texts, rng)
    else:
        adapter = tuning(fresh, public_lessons(arguments.public, rows=arguments.rows, seed=0), rng)
    lab.close()
    lora.save_peft(adapter, arguments.out, base_name=arguments.model, dtype="bfloat16")
    console.print(f"adapter: {arguments.out}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--public", type=Path, required=True, help="JSON lines with instruction, input, output")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codes", type=Path, help="control codes: learn to write instructions instead of answers")
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
    try:
        train(arguments, Console(stderr=True))
    except StillroomError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
