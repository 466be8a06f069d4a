"""The clip: one example changes a sum by at most C, whatever it says and whoever else is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients import per_example
from clients.per_example import Engine, clipped_sum
from fl_app import lora, sequences
from fl_app.sequences import TokenSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

ENGINES = get_args(Engine)
REL = 1e-5
SLACK = 1 + 1e-5
CLIP = 0.05


def some_examples(count: int, seed: int = 0) -> list[TokenSequence]:
    """Return sequences of 3 to 40 random bytes, a third of which are the prefix."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 41, count)
    return [TokenSequence(ids=tuple(rng.integers(3, 259, n).tolist()), loss_from=max(1, int(n) // 3)) for n in lengths]


@pytest.fixture(scope="module")
def model(frozen: FrozenModel, learned: Make) -> Any:
    return lora.attach(frozen, learned(7))


@pytest.fixture(scope="module")
def loud(frozen: FrozenModel, learned: Make) -> Any:
    """A model whose factors are so large that gradients are far from what training ever sees."""
    found = lora.attach(frozen, learned(7))
    for weight in lora.parameters(found).values():
        weight.data.mul_(30.0)
    return found


def summed(
    model: Any, examples: Sequence[TokenSequence], clip: float = CLIP, engine: Engine = "fused", limit: int = 512
) -> np.ndarray:
    """Return the clipped sum as one float64 vector over all factors."""
    found = clipped_sum(model, examples, clip_norm=clip, max_batch_tokens=limit, pad_id=0, engine=engine)
    return np.concatenate([tensor.ravel() for tensor in found.tensors])


def one_by_one(model: Any, examples: Sequence[TokenSequence]) -> np.ndarray:
    """Return each example's gradient from plain autograd on a batch of one. Shapes: (examples, all coordinates)."""
    import torch

    weights = list(lora.parameters(model).values())
    rows = []
    for example in examples:
        (batch,) = sequences.micro_batches([example], max_batch_tokens=1, pad_id=0)
        gradients = torch.autograd.grad(sequences.example_losses(model, batch).sum(), weights)
        rows.append(np.concatenate([gradient.double().numpy().ravel() for gradient in gradients]))
    return np.array(rows)


def clipped_by_hand(gradients: np.ndarray, clip: float) -> np.ndarray:
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return (gradients * np.minimum(1.0, clip / norms)).sum(axis=0)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


def norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_sum_is_that_of_a_loop(model: Any, engine: Engine, share: float) -> None:
    """`share` of the examples lie within the clip norm and are left alone; the others are scaled down to it."""
    examples = some_examples(12)
    gradients = one_by_one(model, examples)
    norms = np.sort(np.linalg.norm(gradients, axis=1))
    clip = {0.0: norms[0] / 2, 0.5: (norms[5] + norms[6]) / 2, 1.0: norms[-1] * 2}[share]
    expected = clipped_by_hand(gradients, clip)
    assert distance(summed(model, examples, clip, engine), expected) <= REL
    # The twins: neither no clip nor a clip of the sum is near it, unless no example needs any.
    unclipped = gradients.sum(axis=0)
    assert (distance(unclipped, expected) > 0.01) == (share < 1)
    assert (distance(unclipped * min(1, clip / norm(unclipped)), expected) > 0.01) == (norm(unclipped) > clip)


@pytest.mark.parametrize("seed", [5, 6])
def test_both_engines_agree(model: Any, seed: int) -> None:
    examples = some_examples(20, seed)
    assert distance(summed(model, examples, engine="opacus"), summed(model, examples, engine="fused")) <= REL


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_and_order_do_not_matter(model: Any, engine: Engine) -> None:
    examples = some_examples(11)
    expected = summed(model, examples, engine=engine, limit=1)
    for limit in (50, 100, 10_000):
        assert distance(summed(model, examples, engine=engine, limit=limit), expected) <= REL
    assert distance(summed(model, examples[::-1], engine=engine, limit=100), expected) <= REL


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_changes_anybody_elses_contribution(model: Any, engine: Engine) -> None:
    """What one example adds is the same, alone and in any company."""
    own = some_examples(1, seed=1)
    alone = summed(model, own, engine=engine)
    for seed in (2, 3):
        company = some_examples(9, seed)
        added = summed(model, [*company, *own], engine=engine) - summed(model, company, engine=engine)
        assert distance(added, alone) <= 1e-4  # a difference of two float32 sums


@pytest.mark.parametrize("engine", ENGINES)
def test_no_example_exceeds_the_clip(loud: Any, engine: Engine) -> None:
    for example in some_examples(6, seed=4):
        (gradient,) = one_by_one(loud, [example])
        for clip in (norm(gradient) / 1000, norm(gradient) / 1.001):
            assert clip / SLACK <= norm(summed(loud, [example], clip, engine)) <= clip * SLACK


@pytest.mark.parametrize("clip", [CLIP, 1e-6])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e6, 1e15, 1e30, 1e38])
def test_no_scaling_of_a_loss_buys_more_than_the_clip(
    model: Any, clip: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adversarial row may make its loss as steep as it likes, up to overflow: then it adds nothing at all."""
    own, company = some_examples(1, seed=1)[0], some_examples(5, seed=2)
    honest = summed(model, company, clip)
    plain = sequences.example_losses

    def steep(model: Any, batch: Any, _: Any = None) -> Any:
        import torch

        mine = torch.tensor([tuple(ids[: len(own.ids)]) == own.ids for ids in batch.ids_BT.tolist()])
        return torch.where(mine, plain(model, batch) * scale, plain(model, batch))

    monkeypatch.setattr(sequences, "example_losses", steep)
    together = summed(model, [own, *company], clip)
    assert np.isfinite(together).all()
    assert norm(together - honest) <= clip * SLACK + 1e-6 * norm(honest)
    assert norm(summed(model, [own], clip)) <= clip * SLACK


@pytest.mark.parametrize("clip", [1e-6, 1e-5, 3e-5, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("steepness", [1e-30, 1e-19, 1e17, 1e19, 1e30, 3e38])
def test_no_rounding_of_an_extreme_gradient_exceeds_the_clip(model: Any, clip: float, steepness: float) -> None:
    """Norms are taken in float32: one that overflows counts as not finite, one that vanishes is within any clip."""
    import torch

    layout = per_example._Layout.of(model)
    total = np.zeros(layout.size)
    per_example._add_clipped(total, torch.full((3, layout.size), steepness), clip)
    assert norm(total) <= 3 * clip * SLACK
    assert (norm(total) > 0) == (steepness < 1e19)


@pytest.mark.parametrize("shape", [(8, 1024), (8, 1536), (16, 4096), (16, 14336), (3, 5)])
def test_no_order_of_summation_hides_more_than_the_slack(shape: tuple[int, int]) -> None:
    """A few large coordinates and many small ones, each too small to move a float32 sum that has met the large."""
    import torch

    from fl_app.privacy import gaussian

    layout = per_example._Layout(shapes={"m.a": shape}, starts={"m.a": 0}, size=shape[0] * shape[1])
    naive: list[float] = []
    for small in (2.3e-4, 1e-3, 2e-3):
        gradient = torch.full((1, layout.size), 3 * small)
        gradient[0, :64] = 3.0
        total = np.zeros(layout.size)
        per_example._add_clipped(total, gradient, gaussian.usable_clip(1.0))
        assert norm(total) <= gaussian.usable_clip(1.0) * (1 + 2.0**-15)
        naive.append(norm(gradient.double().numpy()) / float(torch.linalg.vector_norm(gradient)))
    if layout.size > 1 << 16:  # the twin: over a whole factor such a gradient would have passed the clip norm
        assert max(naive) > 1 + gaussian.SLACK


def test_the_clip_is_joint_over_all_factors(loud: Any) -> None:
    """The twin: clipping each factor to C by itself gives sqrt(number of factors) times as much."""
    (example,) = some_examples(1, seed=4)
    found = clipped_sum(loud, [example], clip_norm=CLIP, max_batch_tokens=512, pad_id=0).tensors
    per_factor = clipped_by_factor(loud, example)
    assert len(found) == len(per_factor) == 8  # A and B of two maps in two layers
    assert sum(norm(tensor) ** 2 for tensor in found) ** 0.5 <= CLIP * SLACK
    assert sum(norm(part) ** 2 for part in per_factor) ** 0.5 > 2.5 * CLIP
    gradients = [part * norm(tensor) / norm(part) for part, tensor in zip(per_factor, found, strict=True)]
    for tensor, gradient in zip(found, gradients, strict=True):  # and the direction of each factor is its gradient's
        assert np.allclose(tensor, gradient, rtol=1e-3, atol=1e-6 * CLIP)


def clipped_by_factor(model: Any, example: TokenSequence) -> list[np.ndarray]:
    import torch

    (batch,) = sequences.micro_batches([example], max_batch_tokens=1, pad_id=0)
    weights = list(lora.parameters(model).values())
    gradients = torch.autograd.grad(sequences.example_losses(model, batch).sum(), weights)
    return [g.double().numpy() * min(1.0, CLIP / norm(g.double().numpy())) for g in gradients]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_example_without_a_finite_gradient_adds_nothing(
    model: Any, engine: Engine, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, poison = some_examples(7), TokenSequence(ids=tuple(range(3, 40)), loss_from=1)
    expected = summed(model, good, engine=engine)
    plain = sequences.example_losses

    def poisoned(model: Any, batch: Any, _: Any = None) -> Any:
        import torch

        mine = torch.tensor([tuple(ids[: len(poison.ids)]) == poison.ids for ids in batch.ids_BT.tolist()])
        return plain(model, batch) * torch.where(mine, bad, 1.0)

    monkeypatch.setattr(sequences, "example_losses", poisoned)
    assert distance(summed(model, [*good, poison], engine=engine), expected) <= REL
    assert not summed(model, [poison], engine=engine).any()


@pytest.mark.parametrize("engine", ENGINES)
def test_no_examples_and_silent_examples_give_zeros(model: Any, engine: Engine) -> None:
    shapes = [tuple(weight.shape) for weight in lora.parameters(model).values()]
    silent = TokenSequence(ids=(5, 6, 7), loss_from=3)
    for examples in ([], [silent], [silent, silent]):
        found = clipped_sum(model, examples, clip_norm=CLIP, max_batch_tokens=64, pad_id=0, engine=engine).tensors
        assert [tuple(tensor.shape) for tensor in found] == shapes
        assert not any(tensor.any() for tensor in found)


@given(seed=st.integers(0, 2**20), size=st.integers(0, 8), clip=st.sampled_from([1e-4, 0.05, 1.0, 50.0]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neighbours_differ_by_at_most_the_clip(model: Any, seed: int, size: int, clip: float) -> None:
    *shared, extra = some_examples(size + 1, seed)
    larger = summed(model, [extra, *shared], clip)
    smaller = summed(model, shared, clip)
    assert norm(larger - smaller) <= clip * SLACK + 1e-6 * norm(smaller)  # float32 sums of up to eight


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_left_as_it_was(frozen: FrozenModel, learned: Make, engine: Engine) -> None:
    fresh = lora.attach(frozen, learned(7))
    fresh.eval()
    before = lora.read(fresh, alpha=8.0, base="b")
    first = summed(fresh, some_examples(3), engine=engine)
    assert lora.sha256(lora.read(fresh, alpha=8.0, base="b")) == lora.sha256(before)
    assert all(weight.grad is None and getattr(weight, "grad_sample", None) is None for weight in fresh.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in fresh.modules())
    assert np.array_equal(summed(fresh, some_examples(3), engine=engine), first)


def test_sums_and_batches_do_not_print() -> None:
    from clients.per_example import ClippedSum

    assert "4242" not in repr(ClippedSum(tensors=(4242,)))
