"""Sequences, micro-batches, and one loss per example that depends on nothing but that example."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import lora, lora_start
from fl_app.config import LoraSection
from fl_app.sequences import (
    FrozenPrefix,
    MicroBatch,
    TokenSequence,
    encode,
    example_losses,
    first_adapted_block,
    frozen_states,
    micro_batches,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

REL = 1e-5
TEXTS = [
    ("A cough:", "I cough at night."),
    ("", "hm"),
    ("A rash on the arm:", ""),
    ("Q", "x" * 40),
    ("A cough:", "No."),
]


class Words:
    """A tokenizer of one token per letter: a is 1, b is 2; 90 starts, 99 ends."""

    bos_token_id: int | None = 90
    eos_token_id = 99

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 96 for letter in text]}


class NoStart(Words):
    bos_token_id = None


@pytest.fixture(scope="module")
def model(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> Any:
    return lora.attach(frozen, learned(7))


@pytest.fixture(scope="module")
def examples(frozen: FrozenModel) -> list[TokenSequence]:
    return [encode(frozen.tokenizer, prefix, text, max_tokens=64) for prefix, text in TEXTS]


def by_itself(model: Any, example: TokenSequence) -> float:
    """Return transformers' own loss of one sequence, the prefix masked by its -100."""
    import torch

    ids = torch.tensor([example.ids])
    labels = ids.clone()
    labels[:, : example.loss_from] = -100
    with torch.inference_mode():
        return float(model(input_ids=ids, labels=labels).loss)


def losses(model: Any, examples: list[TokenSequence], limit: int, pad_id: int = 0) -> list[float]:
    import torch

    found: dict[int, float] = {}
    for batch in micro_batches(examples, max_batch_tokens=limit, pad_id=pad_id):
        with torch.inference_mode():
            found |= dict(zip(batch.rows, example_losses(model, batch).tolist(), strict=True))
    return [found[row] for row in range(len(examples))]


@pytest.mark.parametrize(
    ("prefix", "text", "max_tokens", "end", "ids", "loss_from"),
    [
        ("ab", "cd", 8, True, (1, 2, 3, 4, 99), 2),
        ("ab", "cd", 8, False, (1, 2, 3, 4), 2),
        ("ab", "cdef", 5, True, (1, 2, 3, 4, 5), 2),  # cut on the right, the end token first
        ("abcdef", "gh", 4, True, (4, 5, 6, 7), 3),  # the prefix cut on the left: one token of the text is left
        ("abcdef", "", 4, True, (4, 5, 6, 99), 3),
        ("", "ab", 8, True, (90, 1, 2, 99), 1),  # without a prefix the start token carries the first loss
        ("", "", 8, True, (90, 99), 1),
        ("ab", "", 8, False, (1, 2), 2),  # nothing carries loss
    ],
)
def test_encode_by_hand(
    prefix: str, text: str, max_tokens: int, end: bool, ids: tuple[int, ...], loss_from: int
) -> None:
    sequence = encode(Words(), prefix, text, max_tokens=max_tokens, end=end)
    assert (sequence.ids, sequence.loss_from) == (ids, loss_from)


def test_encode_without_a_start_token_starts_with_the_end() -> None:
    assert encode(NoStart(), "", "a", max_tokens=8).ids == (99, 1, 99)


@given(prefix=st.text("abc", max_size=12), text=st.text("abc", max_size=12), max_tokens=st.integers(2, 16))
def test_encode_always_leaves_a_token_with_loss(prefix: str, text: str, max_tokens: int) -> None:
    sequence = encode(Words(), prefix, text, max_tokens=max_tokens)
    assert 1 <= sequence.loss_from < len(sequence.ids) <= max_tokens


def test_fewer_than_two_tokens_are_refused() -> None:
    with pytest.raises(AssertionError):
        encode(Words(), "ab", "c", max_tokens=1)


def test_what_may_be_private_does_not_print() -> None:
    sequence = TokenSequence(ids=(4242, 4343), loss_from=1)
    (batch,) = micro_batches([sequence], max_batch_tokens=8, pad_id=0)
    assert "4242" not in repr(sequence) + str(sequence) + repr(batch)


def test_a_padded_batch_by_hand() -> None:
    rows = [TokenSequence(ids=(5, 6, 7, 8), loss_from=2), TokenSequence(ids=(9, 10), loss_from=1)]
    (batch,) = micro_batches(rows, max_batch_tokens=8, pad_id=77)
    assert batch.rows == (1, 0)
    assert batch.ids_BT.tolist() == [[9, 10, 77, 77], [5, 6, 7, 8]]
    assert batch.mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    # Position t predicts token t + 1: row 1 has loss on tokens 2 and 3, row 0 on token 1; padding has none.
    assert batch.loss_mask_BT.tolist() == [[True, False, False], [False, True, True]]


@given(lengths=st.lists(st.integers(1, 30), max_size=20), limit=st.integers(1, 90))
@settings(deadline=None)
def test_micro_batches_cover_every_row_once_within_the_limit(lengths: list[int], limit: int) -> None:
    rows = [TokenSequence(ids=tuple(range(1, n + 1)), loss_from=1) for n in lengths]
    batches = micro_batches(rows, max_batch_tokens=limit, pad_id=0)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        assert batch.ids_BT.shape == batch.mask_BT.shape == (len(batch.rows), max(lengths[r] for r in batch.rows))
        assert batch.ids_BT.numel() <= limit or len(batch.rows) == 1
        assert batch.mask_BT.sum(1).tolist() == [lengths[row] for row in batch.rows]
        assert batch.loss_mask_BT.sum(1).tolist() == [lengths[row] - 1 for row in batch.rows]


def test_each_loss_is_the_one_transformers_computes(model: Any, examples: list[TokenSequence]) -> None:
    assert losses(model, examples, 4096) == pytest.approx([by_itself(model, e) for e in examples], rel=REL)


def test_a_loss_is_the_mean_over_its_own_tokens(model: Any, examples: list[TokenSequence]) -> None:
    """By hand: the sum of -log p over the tokens after the prefix, over their number."""
    import torch

    example = examples[0]
    with torch.inference_mode():
        log_p = model(input_ids=torch.tensor([example.ids])).logits[0].float().log_softmax(-1)
    places = range(example.loss_from, len(example.ids))
    total = -sum(float(log_p[place - 1, example.ids[place]]) for place in places)
    assert losses(model, [example], 4096) == pytest.approx([total / len(places)], rel=REL)


def test_a_loss_depends_on_no_other_row_and_no_padding(model: Any, examples: list[TokenSequence]) -> None:
    alone = [losses(model, [example], 4096)[0] for example in examples]
    for limit, pad_id in ((1, 0), (100, 0), (4096, 0), (4096, 200)):
        assert losses(model, examples, limit, pad_id) == pytest.approx(alone, rel=REL)
    assert losses(model, examples[::-1], 4096)[::-1] == pytest.approx(alone, rel=REL)
    stranger = TokenSequence(ids=tuple([250] * 63), loss_from=1)
    assert losses(model, [*examples, stranger], 4096)[:-1] == pytest.approx(alone, rel=REL)


def test_a_batch_wide_token_mean_would_be_another_number(model: Any, examples: list[TokenSequence]) -> None:
    """The twin: what this module exists to avoid is visibly different on the same rows."""
    weights = [len(example.ids) - example.loss_from for example in examples]
    alone = losses(model, examples, 1)
    token_mean = sum(w * value for w, value in zip(weights, alone, strict=True)) / sum(weights)
    assert sum(alone) / len(alone) != pytest.approx(token_mean, rel=1e-3)


def test_the_prefix_carries_no_loss_but_is_read(model: Any, examples: list[TokenSequence]) -> None:
    example = examples[0]
    longer = dataclasses.replace(example, loss_from=1)
    other = dataclasses.replace(example, ids=(200, *example.ids[1:]))
    (own, whole, read) = (losses(model, [e], 4096)[0] for e in (example, longer, other))
    assert own != pytest.approx(whole, rel=1e-4)
    assert own != pytest.approx(read, rel=1e-6)


def test_rows_without_loss_have_loss_zero_and_no_gradient(model: Any) -> None:
    import torch

    rows = [TokenSequence(ids=(5, 6), loss_from=2), TokenSequence(ids=(7,), loss_from=1)]
    for batch in micro_batches(rows, max_batch_tokens=1, pad_id=0):
        found = example_losses(model, batch)
        assert found.tolist() == [0.0]
        assert isinstance(batch, MicroBatch)
        gradients = torch.autograd.grad(found.sum(), list(lora.parameters(model).values()), allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)
    mixed = losses(model, [*rows, TokenSequence(ids=(5, 6, 7), loss_from=1)], 4096)
    assert mixed[:2] == [0.0, 0.0]
    assert mixed[2] > 0


def _top_only(frozen: FrozenModel, seed: int) -> Any:
    """Return a model with adapters in its last block alone, so that the first is frozen."""
    section = LoraSection(rank=2, alpha=4.0, targets=("q_proj", "down_proj"), first_layer=1)
    adapter = lora_start.initial(lora.spec_of(frozen, section), np.random.default_rng(seed))
    model = lora.attach(frozen, adapter)
    assert first_adapted_block(adapter.layers) == 1
    return model


def test_losses_over_frozen_states_are_the_losses(frozen: FrozenModel, examples: list[TokenSequence]) -> None:
    model = _top_only(frozen, 3)
    whole = micro_batches(examples, max_batch_tokens=10_000, pad_id=0)
    prefix = FrozenPrefix(first_block=1)
    for batch in whole:
        prefix.entering(model, batch)
    assert len(prefix.states) == len(examples)

    for batch in micro_batches(examples, max_batch_tokens=80, pad_id=0):
        plain, cached = example_losses(model, batch), example_losses(model, batch, prefix)
        assert cached.tolist() == pytest.approx(plain.tolist(), rel=REL)


def test_frozen_states_of_another_block_are_noticed(frozen: FrozenModel, examples: list[TokenSequence]) -> None:
    """The twin: states taken at the wrong depth give other losses, so the test above can fail."""
    model = _top_only(frozen, 3)
    batch = micro_batches(examples, max_batch_tokens=10_000, pad_id=0)[0]
    states = frozen_states(model, batch, 0, range(len(batch.keys)))
    wrong = FrozenPrefix(first_block=1, states={id(k): states[n, : len(k.ids)] for n, k in enumerate(batch.keys)})

    assert example_losses(model, batch, wrong).tolist() != pytest.approx(
        example_losses(model, batch).tolist(), rel=1e-3
    )


def test_the_first_adapted_block() -> None:
    assert first_adapted_block(["model.layers.7.mlp.up_proj", "model.layers.12.self_attn.q_proj"]) == 7
    assert first_adapted_block(["lm_head", "model.layers.12.self_attn.q_proj"]) == 0
