"""The small model: it learns its text, repeats to the bit, and is a model like any other afterwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import models
from fl_app.errors import ConfigInvalid
from simulations import small_model
from simulations.small_model import Recipe

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = Recipe(
    vocabulary=300, hidden=32, mlp=64, layers=2, heads=2, steps=12, piece_tokens=32, batch_pieces=4, learning_rate=1e-2
)
ROWS = [
    {"id": f"r{n}", "instruction": f"Where is jar {n} kept?", "output": f"Jar {n} is on shelf {n % 3}."}
    for n in range(40)
]


def made(out: Path, recipe: Recipe = RECIPE) -> list[float]:
    losses: list[float] = []
    small_model.make(ROWS, out, recipe, lambda _, loss: losses.append(loss))
    return losses


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    out = tmp_path_factory.mktemp("small") / "model"
    return out, made(out)


def test_it_starts_at_chance_and_learns(first: tuple[Path, list[float]]) -> None:
    _, losses = first
    assert len(losses) == RECIPE.steps
    assert losses[0] == pytest.approx(math.log(RECIPE.vocabulary), abs=0.3)
    assert losses[-1] < losses[0] - 1.0


def test_the_same_seed_gives_the_same_model_and_another_another(
    first: tuple[Path, list[float]], tmp_path: Path
) -> None:
    made(tmp_path / "again")
    made(tmp_path / "other", Recipe(**{**{f: getattr(RECIPE, f) for f in Recipe.__slots__}, "seed": 1}))
    hashes = [models.resolve(str(place)).sha256 for place in (first[0], tmp_path / "again", tmp_path / "other")]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_it_loads_by_its_folder_and_asks_in_our_template(first: tuple[Path, list[float]]) -> None:
    frozen = models.load(str(first[0]), "float32")
    prompt = models.chat_prompt(frozen.tokenizer, "Where?")
    assert prompt.endswith("<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n")
    ids: list[int] = frozen.tokenizer.encode(prompt, add_special_tokens=False)
    assert frozen.tokenizer.decode(ids) == prompt
    assert ids.count(1) == 3  # system, user, assistant: each begins with one token
    assert max(ids) < RECIPE.vocabulary
    blocks = [name for name, _ in frozen.model.named_modules() if name.endswith("q_proj")]
    assert len(blocks) == RECIPE.layers


def test_pieces_hold_every_dialogue_once_in_another_order() -> None:
    dialogues = small_model.dialogues_of([*ROWS, {"instruction": "no answer", "output": ""}])
    assert len(dialogues) == len(ROWS)
    tokenizer = small_model.trained_tokenizer([one.answer for one in dialogues], 300)
    pieces = small_model.pieces_of(dialogues, tokenizer, RECIPE)
    assert pieces.shape[1] == RECIPE.piece_tokens
    text: Any = tokenizer.decode(pieces.ravel())
    told = [text.find(one.answer + "<|im_end|>") for one in dialogues]
    assert sum(place < 0 for place in told) <= 1  # the last may be cut
    assert told != sorted(told)


def test_too_little_text_is_refused() -> None:
    tokenizer = small_model.trained_tokenizer(["a"], 300)
    with pytest.raises(ConfigInvalid, match="0 rows with an answer are 0 tokens"):
        small_model.pieces_of([], tokenizer, RECIPE)


def test_the_rate_rises_to_one_and_falls_to_nothing() -> None:
    rates = [small_model.rate_of(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 1e-3
