"""The DP engine on the packaged model: exact in float32, and no less private in bfloat16."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import per_example
from fl_app import lora, lora_start, models, sequences
from fl_app.config import LoraSection
from strategies import ranks

if TYPE_CHECKING:
    from fl_app.sequences import TokenSequence

pytestmark = pytest.mark.model

NAME = "smollm2-135m-instruct"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXTS = (
    "A letter about a cough:\nPray tell us how much of the syrup a child may take.",
    "A letter about a fever:\nHow long must it steep?",
    "A letter about ringing in one ear:\nThe physicians speak of it at the hunt, and we beg you state the measure.",
    "A letter about warts:\nIs there a cure?",
    "A letter about a lame horse:\nWho sells the ointment, and is it dear? My neighbour swears by it, and I do not.",
)


@functools.cache
def adapted(dtype: str) -> Any:
    """Return the model with an adapter on all linear maps of all layers that has learned something."""
    frozen = models.load(NAME, dtype)  # type: ignore[arg-type]
    spec = lora.spec_of(frozen, LoraSection(rank=8, alpha=16.0, targets=ALL))
    rng = np.random.default_rng(0)
    start = lora_start.initial(spec, rng)
    for factors in start.layers.values():
        factors.b[:] = rng.normal(0, 0.01, factors.b.shape)
    return lora.attach(frozen, start)


def rows() -> list[TokenSequence]:
    tokenizer = models.load(NAME, "float32").tokenizer
    parts = [text.split("\n") for text in TEXTS]
    return [sequences.encode(tokenizer, f"{code}\n", letter, max_tokens=64) for code, letter in parts]


def summed(model: Any, examples: list[TokenSequence], clip: float, **options: Any) -> np.ndarray:
    found = per_example.clipped_sum(model, examples, clip_norm=clip, max_batch_tokens=512, pad_id=2, **options)
    return np.concatenate([tensor.ravel() for tensor in found.tensors])


def by_loop(model: Any, examples: list[TokenSequence]) -> np.ndarray:
    """Return each example's gradient by peft's layers, transformers' loss and autograd."""
    import torch

    weights = list(lora.parameters(model).values())
    gradients = []
    for example in examples:
        labels = torch.tensor([[-100] * example.loss_from + list(example.ids[example.loss_from :])])
        loss = model(input_ids=torch.tensor([example.ids]), labels=labels).loss
        parts = torch.autograd.grad(loss, weights)
        gradients.append(np.concatenate([part.double().numpy().ravel() for part in parts]))
    return np.array(gradients)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return by_loop(adapted("float32"), rows())


@pytest.mark.parametrize("engine", ["fused", "opacus"])
def test_float32_is_the_loop(reference: np.ndarray, engine: str) -> None:
    norms = np.linalg.norm(reference, axis=1, keepdims=True)
    clip = float(np.median(norms))
    expected = (reference * np.minimum(1, clip / norms)).sum(0)
    assert distance(summed(adapted("float32"), rows(), clip, engine=engine), expected) <= 1e-5
    assert distance(reference.sum(0), expected) > 1e-2


def test_bfloat16_points_the_same_way(reference: np.ndarray) -> None:
    """What bfloat16 costs in direction and length; measured .999 and within 2 %, the bounds leave room."""
    found = summed(adapted("bfloat16"), rows(), 1e9)
    whole = reference.sum(0)
    cosine = float(found @ whole / np.linalg.norm(found) / np.linalg.norm(whole))
    assert cosine > 0.99
    assert 0.9 < np.linalg.norm(found) / np.linalg.norm(whole) < 1.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nobody_moves_anybody_else_by_a_bit(dtype: str) -> None:
    """The effect of rounding on sensitivity is none: a row adds its own clipped gradient, and nothing else moves."""
    model, clip = adapted(dtype), 0.1
    *company, mine = rows()
    alone = summed(model, [mine], clip)
    assert clip * (1 - 1e-4) <= np.linalg.norm(alone) <= clip * (1 + 1e-5)
    assert np.abs(summed(model, [mine, *company], clip) - summed(model, company, clip) - alone).max() <= 1e-15
    twice = summed(model, [mine, mine], clip)
    assert np.abs(twice - 2 * alone).max() <= 1e-15


@pytest.mark.parametrize(("targets", "measured_mb"), [(ALL, 3457), (("q_proj", "v_proj"), 2872)])
def test_the_planner_asks_for_a_little_more_than_a_step_takes(targets: tuple[str, ...], measured_mb: int) -> None:
    """Peaks of `benchmarks/dp_step.py` at 8 x 128 tokens in float32 (results.jsonl, e5a5c13)."""
    frozen = models.load(NAME, "float32")
    spec = lora.spec_of(frozen, LoraSection(rank=8, alpha=16.0, targets=targets))

    planned = ranks.training_bytes(frozen, spec, 8 * 128) >> 20

    assert measured_mb <= planned <= 1.1 * measured_mb
