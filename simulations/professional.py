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

from fl_app import lora, lora_start, models, peft_files, sequences
from fl_app.config import LoraSection
from fl_app.errors import StillroomError
from fl_app.journal import read_lines
from fl_app.seeds import stream
from fl_app.types import Lesson
from strategies.exam import joined
from strategies.lab import Lab
from strategies.tuners.sft import Sft, SupervisedTuning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.sequences import TokenSequence


def public_lessons(arguments: argparse.Namespace) -> list[Lesson]:
    """Return a seeded choice of the corpus' rows as lessons, with judge lessons when a judge's question is given."""
    lessons = [
        Lesson(
            draft_id=str(row["id"]),
            instruction=joined(row, arguments.join_input),
            answer=str(row["output"]),
            teacher="public",
        )
        for row in _rows(arguments)
        if row.get("output")
    ]
    order = stream(0, "professional", "rows").permutation(len(lessons))[: arguments.rows]
    chosen = [lessons[int(i)] for i in np.sort(order)]
    if arguments.judge:
        count = max(2, len(chosen) // 8)
        chosen += judge_lessons([one.instruction for one in chosen], arguments.judge, count=count)
    return chosen


def judge_lessons(texts: Sequence[str], question: str, *, count: int) -> list[Lesson]:
    """Return `count` lessons that teach yes to public questions and no to the same words in disorder or cut short."""
    rng = stream(0, "professional", "judge")
    lessons: list[Lesson] = []
    for number in range(count):
        text, answer = texts[int(rng.integers(len(texts)))], "yes"
        if number % 2:
            words, answer = text.split(), "no"
            if rng.random() < 0.5:  # noqa: PLR2004
                words = [words[int(i)] for i in rng.permutation(len(words))]
            else:
                words = words[: max(1, len(words) // 4)]
            text = " ".join(words)
        instruction = question.replace("{text}", text)
        lessons.append(Lesson(draft_id=f"judge-{number}", instruction=instruction, answer=answer, teacher="public"))
    return lessons


def public_writing(arguments: argparse.Namespace, tokenizer: Any) -> list[TokenSequence]:
    """Return a seeded choice of the corpus' rows as (control code text, instruction) sequences.

    The code's text is that of `--codes` for the row's code, or `--code-text` with the row's `--code-column` in it.
    """
    texts = {} if arguments.codes is None else {str(row["id"]): str(row["text"]) for row in read_lines(arguments.codes)}
    pairs: list[tuple[str, str]] = []
    for row in _rows(arguments):
        value = str(row.get(arguments.code_column) or "")
        prefix = texts.get(value, "") if texts else arguments.code_text.replace("{value}", value)
        if prefix:
            pairs.append((prefix, joined(row, arguments.join_input)))
    order = stream(0, "start", "rows").permutation(len(pairs))[: arguments.rows]
    chosen = [pairs[int(i)] for i in np.sort(order)]
    return [sequences.encode(tokenizer, *pair, max_tokens=arguments.max_tokens) for pair in chosen]


def _rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = read_lines(arguments.public)
    return [row for row in rows if not arguments.source or row.get("source") in arguments.source]


def train(arguments: argparse.Namespace, console: Console) -> None:
    """Write a PEFT adapter in bfloat16, trained on public text: answers, or with --writes the questions."""
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
    fresh = lora_start.initial(lora.spec_of(frozen, section), stream(0, "professional", "start"))
    tuning, rng = SupervisedTuning(section=tuner, lab=lab), stream(0, "professional", "tune")
    if arguments.writes:
        adapter = tuning.fit(fresh, public_writing(arguments, frozen.tokenizer), rng)
    else:
        adapter = tuning(fresh, public_lessons(arguments), rng)
    lab.close()
    peft_files.save(adapter, arguments.out, base_name=arguments.model, dtype="bfloat16")
    console.print(f"adapter: {arguments.out}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--public", type=Path, required=True, help="JSON lines with instruction, input, output")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", action="append", default=[], help="only rows of this source (repeatable)")
    parser.add_argument("--join-input", choices=["append", "input_only"], default="append")
    parser.add_argument("--judge", default="", help="question of the domain judge, with {text}: learn that as well")
    parser.add_argument("--writes", action="store_true", help="learn to write instructions after control codes")
    parser.add_argument("--codes", type=Path, help="with --writes: control codes as JSON lines with id and text")
    parser.add_argument("--code-column", default="code", help="with --writes: the column that holds a row's code")
    parser.add_argument("--code-text", default="{value}:\n", help="with --writes and no --codes: text of a code")
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
    arguments.judge, arguments.code_text = (
        text.replace("\\n", "\n") for text in (arguments.judge, arguments.code_text)
    )
    try:
        train(arguments, Console(stderr=True))
    except StillroomError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
