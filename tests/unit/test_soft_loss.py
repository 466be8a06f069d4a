"""A position's loss against a teacher's distribution, held to a loop in float64 and to autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fl_app.soft_loss import CHUNK, SoftTargets, mixed_losses
from fl_app.token_loss import Head

HEADS: dict[str, dict[str, Any]] = {
    "plain": {"scale": 1.0, "softcap": None},
    "scaled": {"scale": 0.4, "softcap": None},
    "capped": {"scale": 1.5, "softcap": 3.0},
}


def some_head(width: int, words: int, seed: int, **how: Any) -> Head:
    import torch

    draw = torch.Generator().manual_seed(seed)
    bias = torch.randn(words, generator=draw) if how["softcap"] else None
    return Head(weight=torch.randn(words, width, generator=draw), bias=bias, **how)


def setting(kind: str, *, count: int = 7, temperature: float = 1.0, words: int = 33) -> tuple[Any, Any, Head, Any]:
    """Return student states, targets, the student's head, and a wider teacher's soft targets."""
    import torch

    draw = torch.Generator().manual_seed(5)
    hidden = torch.randn(count, 6, generator=draw)
    targets = torch.randint(0, words, (count,), generator=draw)
    soft = SoftTargets(
        hidden_NE=torch.randn(count, 9, generator=draw),
        head=some_head(9, words, 2, **HEADS["scaled"]),
        hard_N=torch.rand(count, generator=draw),
        soft_N=torch.rand(count, generator=draw),
        temperature=temperature,
    )
    return hidden, targets, some_head(6, words, 1, **HEADS[kind]), soft


def logits_of(state: Any, head: Head) -> list[float]:
    """Return one position's logits, one multiplication at a time."""
    found = []
    for word in range(head.weight.shape[0]):
        value = sum(float(a) * float(b) for a, b in zip(state, head.weight[word], strict=True))
        value = head.scale * (value + (0.0 if head.bias is None else float(head.bias[word])))
        found.append(value if head.softcap is None else head.softcap * math.tanh(value / head.softcap))
    return found


def log_probabilities(logits: list[float], temperature: float) -> list[float]:
    scaled = [one / temperature for one in logits]
    top = max(scaled)
    total = top + math.log(sum(math.exp(one - top) for one in scaled))
    return [one - total for one in scaled]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_position_is_what_a_loop_says(kind: str, temperature: float) -> None:
    hidden, targets, head, soft = setting(kind, temperature=temperature)
    found = mixed_losses(hidden, targets, head, soft)
    divergences = []
    for n in range(len(targets)):
        own = logits_of(hidden[n], head)
        student = log_probabilities(own, temperature)
        teacher = log_probabilities(logits_of(soft.hidden_NE[n], soft.head), temperature)
        divergence = sum(math.exp(t) * (t - s) for t, s in zip(teacher, student, strict=True))
        surprise = -log_probabilities(own, 1.0)[int(targets[n])]
        expected = float(soft.hard_N[n]) * surprise + float(soft.soft_N[n]) * divergence
        assert float(found[n]) == pytest.approx(expected, rel=1e-5)
        divergences.append((divergence, sum(math.exp(s) * (s - t) for t, s in zip(teacher, student, strict=True))))
    # the twin: the other direction of the KL is another number
    assert all(abs(forward - reverse) > 1e-3 * forward for forward, reverse in divergences)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_gradient_is_autograds(kind: str, temperature: float) -> None:
    """More positions than a chunk holds, and a remainder; the reference is plain torch in float64."""
    import torch

    hidden, targets, head, soft = setting(kind, count=CHUNK + 37, temperature=temperature)
    own = hidden.clone().requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(targets))
    (mixed_losses(own, targets, head, soft) * weights).sum().backward()

    def double(states: Any, one: Head) -> Any:
        raw = one.scale * (states @ one.weight.double().t() + (0 if one.bias is None else one.bias.double()))
        return raw if one.softcap is None else one.softcap * torch.tanh(raw / one.softcap)

    reference = hidden.double().requires_grad_()
    logits = double(reference, head)
    taught = double(soft.hidden_NE.double(), soft.head) / temperature
    divergence = torch.nn.functional.kl_div(
        (logits / temperature).log_softmax(1), taught.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    surprise = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    ((soft.hard_N * surprise + soft.soft_N * divergence) * weights).sum().backward()
    assert own.grad is not None
    assert reference.grad is not None
    np.testing.assert_allclose(own.grad.numpy(), reference.grad.numpy(), rtol=2e-4, atol=2e-6)


def test_a_student_that_says_what_the_teacher_says_has_no_loss_and_no_gradient() -> None:
    import torch

    hidden, targets, head, soft = setting("plain")
    same = SoftTargets(hidden_NE=hidden.clone(), head=head, hard_N=soft.hard_N * 0, soft_N=soft.soft_N, temperature=2.0)
    own = hidden.clone().requires_grad_()
    losses = mixed_losses(own, targets, head, same)
    losses.sum().backward()
    assert own.grad is not None
    assert not losses.any()
    assert not own.grad.any()
    moved = mixed_losses(hidden + 0.1 * torch.ones(6), targets, head, same)
    assert (moved > 1e-5).all()  # the twin


def test_a_position_is_the_same_to_the_bit_in_any_company() -> None:
    hidden, targets, head, soft = setting("capped", count=CHUNK + 37)
    some = slice(CHUNK - 20, CHUNK + 9)
    alone = SoftTargets(
        hidden_NE=soft.hidden_NE[some],
        head=soft.head,
        hard_N=soft.hard_N[some],
        soft_N=soft.soft_N[some],
        temperature=1.0,
    )
    one, other = hidden.clone().requires_grad_(), hidden[some].clone().requires_grad_()
    mixed_losses(one, targets, head, soft).sum().backward()
    mixed_losses(other, targets[some], head, alone).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    assert np.array_equal(one.grad[some].numpy(), other.grad.numpy())


def test_no_positions_no_loss() -> None:
    hidden, targets, head, soft = setting("plain", count=0)
    assert mixed_losses(hidden, targets, head, soft).shape == (0,)


def test_soft_targets_do_not_print() -> None:
    soft = SoftTargets(hidden_NE=4242, head=some_head(2, 3, 0, **HEADS["plain"]), hard_N=1, soft_N=1, temperature=1.0)
    assert "4242" not in repr(soft)
