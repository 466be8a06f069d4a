"""Makes a small language model for measurements: `make small-model`, a few minutes on one core.

A tiny random model shows that wiring holds, and nothing about methods: there is nothing in it to adapt. This one has
read public text, so that an adapter on it learns as on a real model, at a thousandth of the price. What comes out is a
folder that `fl_app.models.resolve` takes as any other.

    tokenizer   byte-level BPE, trained on the same text
    model       a Llama: 4 blocks of 160, about 1.2 million parameters outside the embedding
    text        public questions and answers in our chat template, joined and cut into pieces of equal length

The same files and seed give the same bytes, on one machine and one version of torch. Nothing private comes near it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from fl_app import models
from fl_app.errors import ConfigInvalid, StillroomError
from fl_app.journal import read_lines
from fl_app.seeds import stream
from strategies.exam import joined

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

WARM_SHARE = 0.1
"""Of the steps, how many the rate rises; then it falls along a cosine. As usual for small models, not studied."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes of the model and of its training. The defaults are those of the benchmarks: what they say hangs on them."""

    vocabulary: int = 1536
    hidden: int = 160
    mlp: int = 448
    layers: int = 4
    heads: int = 4
    steps: int = 500
    piece_tokens: int = 128
    batch_pieces: int = 16
    learning_rate: float = 3e-3
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A public question and its answer."""

    question: str
    answer: str


def dialogues_of(rows: Sequence[dict[str, Any]]) -> list[Dialogue]:
    """Return the rows that have an answer, in their order."""
    return [Dialogue(question=joined(row, "append"), answer=str(row["output"])) for row in rows if row.get("output")]


def trained_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Return a byte-level BPE of at most `vocabulary` pieces."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers import models as kinds

    core: Any = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(models.SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return models.chat_tokenizer(core)


def pieces_of(dialogues: Sequence[Dialogue], tokenizer: Any, recipe: Recipe) -> npt.NDArray[np.int64]:
    """Return the dialogues in chat form, shuffled and joined, as pieces of equal length.

    Shapes: (pieces, piece_tokens). Raises: ConfigInvalid when there is not enough text for one piece.
    """
    encoded: list[npt.NDArray[np.int64]] = []
    for place in stream(recipe.seed, "small-model", "dialogues").permutation(len(dialogues)):
        one = dialogues[int(place)]
        text = models.chat_prompt(tokenizer, one.question) + one.answer + tokenizer.eos_token + "\n"
        encoded.append(np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64))
    tokens = np.concatenate([np.empty(0, np.int64), *encoded])
    count = len(tokens) // recipe.piece_tokens
    if not count:
        raise ConfigInvalid(f"{len(dialogues)} rows with an answer are {len(tokens)} tokens; give more public text")
    return tokens[: count * recipe.piece_tokens].reshape(count, recipe.piece_tokens)


def make(rows: Sequence[dict[str, Any]], out: Path, recipe: Recipe, progress: Callable[[int, float], None]) -> None:
    """Write the model of these public rows under `out`; `progress` hears the loss of each step, in nats a token."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    dialogues = dialogues_of(rows)
    tokenizer = trained_tokenizer([f"{one.question}\n{one.answer}" for one in dialogues], recipe.vocabulary)
    model = models.blank_llama(
        vocabulary=len(tokenizer), hidden=recipe.hidden, mlp=recipe.mlp, layers=recipe.layers, heads=recipe.heads
    )
    models.draw_weights(model, stream(recipe.seed, "small-model", "weights"), scale=0.6)
    _train(model, pieces_of(dialogues, tokenizer, recipe), recipe, progress)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _train(model: Any, pieces: npt.NDArray[np.int64], recipe: Recipe, progress: Callable[[int, float], None]) -> None:
    """Take the recipe's steps; every piece comes once before any comes again."""
    import torch

    rng = stream(recipe.seed, "small-model", "order")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=BETAS, weight_decay=0.01)
    waiting = np.empty(0, np.int64)
    model.train()
    for step in range(recipe.steps):
        while len(waiting) < recipe.batch_pieces:
            waiting = np.concatenate([waiting, rng.permutation(len(pieces))])
        batch, waiting = waiting[: recipe.batch_pieces], waiting[recipe.batch_pieces :]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate_of(step, recipe.steps)
        told = torch.from_numpy(pieces[batch])
        loss = model(input_ids=told, labels=told).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, float(loss.detach()))
    model.eval()


def rate_of(step: int, steps: int) -> float:
    """Return the share of the full learning rate at a step counted from 0: a straight rise, then a cosine to 0."""
    warm = max(1, round(WARM_SHARE * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--public", type=Path, action="append", required=True, help="JSON lines with an output")
    parser.add_argument("--kind", default="", help="of rows that say their kind, only those of this one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    console, began = Console(stderr=True), time.monotonic()

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0 or step == arguments.steps:
            console.print(
                f"step {step} of {arguments.steps}, {loss:.3f} nats a token, {time.monotonic() - began:.0f} s"
            )

    try:
        rows = [row for path in arguments.public for row in read_lines(path)]
        kept = [row for row in rows if not arguments.kind or row.get("kind", arguments.kind) == arguments.kind]
        make(kept, arguments.out, Recipe(steps=arguments.steps, seed=arguments.seed), progress)
    except StillroomError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 2
    console.print(f"model: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
