"""Layer 3 of the proof: an attacker who sees every noised sum guesses coins no better than the claimed epsilon allows.

Few runs here, so that they stand in `make test`; `make audit` makes 20 healthy ones and 10 of each fault.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from clients.per_example import clipped_sum
from fl_app import lora, sequences
from fl_app.privacy.calibrate import noise_multiplier
from fl_app.seeds import stream
from simulations.attacks import canaries
from simulations.attacks.canaries import FAULTS
from simulations.attacks.one_run import OneRun, ceiling, lower_bound_of, p_value
from simulations.attacks.stages import AttackResult, Evidence

if TYPE_CHECKING:
    from fl_app.models import FrozenModel
    from simulations.attacks.canaries import Canaries

COUNT, RANK, DELTA = 2000, 16, 1e-5
CLAIMED = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def found(frozen: FrozenModel) -> Canaries:
    return canaries.make(frozen, stream(0, "canaries"), count=COUNT, rank=RANK)


def noise_for(epsilon: float) -> float:
    """Return the noise multiplier whose receipt says `epsilon`."""
    return noise_multiplier(
        [], sample_rate=1.0, steps=1, rounds=1, clip_norm=1.0, unit="record", epsilon=epsilon, delta=DELTA,
        floor=0.5, ceiling=20.0,
    )  # fmt: skip


def attacked(found: Canaries, epsilon: float, run: int, **options: object) -> AttackResult:
    rng = stream(run, "one-run", str(epsilon))
    evidence = canaries.evidence(found, rng, noise_multiplier=noise_for(epsilon), **options)  # type: ignore[arg-type]
    return OneRun(kind="one_run", delta=DELTA).build()(evidence, rng)


# --- the arithmetic, against closed forms and a mechanism whose epsilon is known


def test_the_golden_numbers() -> None:
    """All 100 right at 5 %: logit(0.05^(1/100)); with delta and with 1,000 canaries from 2305.08846 by the spec."""
    closed = 0.05**0.01
    assert lower_bound_of(100, 100, 100, delta=0.0, significance=0.05) == pytest.approx(
        math.log(closed / (1 - closed)), abs=2e-4
    )
    assert round(lower_bound_of(100, 100, 100, delta=0.0, significance=0.05), 3) == 3.493
    assert round(lower_bound_of(100, 100, 100, delta=1e-5, significance=0.05), 3) == 3.490
    assert round(ceiling(1000, (1000,), delta=1e-5, significance=0.05), 2) == 5.78


def test_more_right_guesses_prove_more_and_none_prove_nothing() -> None:
    bounds = [lower_bound_of(1000, 100, right, delta=1e-5, significance=0.05) for right in range(0, 101, 5)]
    assert bounds == sorted(bounds)
    assert bounds[:11] == [0.0] * 11
    assert bounds[-1] > 3.4
    for epsilon, larger in itertools.pairwise((0.0, 0.5, 1.0, 4.0)):
        assert p_value(1000, 100, 70, epsilon=epsilon, delta=0.0) <= p_value(1000, 100, 70, epsilon=larger, delta=0.0)
    assert p_value(10, 10, 0, epsilon=1.0, delta=0.1) == 1.0
    assert ceiling(1000, (100, 200), delta=0.0, significance=0.05) < ceiling(1000, (200,), delta=0.0, significance=0.05)


def test_a_delta_costs_what_the_theorem_says() -> None:
    """m = r = v = 2 at epsilon 0: P[Bin = 2] = 1/4, P[1] = 1/2, P[0] = 1/4; alpha = max(1/2, 3/8)."""
    assert p_value(2, 2, 2, epsilon=0.0, delta=0.0) == pytest.approx(0.25)
    assert p_value(2, 2, 2, epsilon=0.0, delta=0.01) == pytest.approx(0.25 + 2 * 2 * 0.01 * 0.5)


@pytest.mark.parametrize(("truth", "covered"), [(1.0, True), (1.5, False)])
def test_randomised_response_is_covered(truth: float, covered: bool) -> None:
    """1,000 coins told through randomised response of epsilon `truth`: the bound keeps to a claim of 1, or does not."""
    rng = np.random.default_rng(0)
    right = rng.binomial(1000, 1 / (1 + math.exp(-truth)), 100)
    kept = sum(lower_bound_of(1000, 1000, int(v), delta=0.0, significance=0.05) <= 1.0 for v in right)
    assert kept >= 93 if covered else kept <= 7


# --- the engine


@pytest.mark.parametrize("epsilon", CLAIMED)
@pytest.mark.parametrize("run", range(2))
def test_the_bound_keeps_to_the_claim(found: Canaries, epsilon: float, run: int) -> None:
    result = attacked(found, epsilon, run)
    assert result.lower_bound <= epsilon
    assert result.accuracy > 0.5  # the twin of the whole test: the attack does see something
    assert result.lower_bound < result.ceiling


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("run", range(2))
def test_every_fault_is_caught_at_a_claim_of_two(found: Canaries, fault: str, run: int) -> None:
    result = attacked(found, 2.0, run, fault=FAULTS[fault])
    assert 2.0 < result.lower_bound <= result.ceiling


def test_unseen_against_unseen_is_chance(found: Canaries) -> None:
    results = [attacked(found, 2.0, run, unseen=True) for run in range(4)]
    accuracy = np.mean([result.accuracy for result in results])
    assert abs(accuracy - 0.5) < 4 * 0.5 / math.sqrt(4 * COUNT)
    assert all(result.lower_bound < 0.1 for result in results)
    assert attacked(found, 2.0, 0).accuracy > 0.5 + 4 * 0.5 / math.sqrt(COUNT)  # the twin


def test_ties_are_broken_by_chance() -> None:
    """Equal scores for all, and an `included` that is sorted: an order that kept ties would be right throughout."""
    included = np.arange(1000) >= 500
    blind = Evidence(matches=np.zeros(1000), gram=np.eye(1000), noise_multiplier=1.0, included=included)
    result = OneRun(kind="one_run").build()(blind, np.random.default_rng(0))
    assert abs(result.accuracy - 0.5) < 4 * 0.5 / math.sqrt(1000)


def test_the_attacker_knows_the_engines_gradients(found: Canaries) -> None:
    """The attack is only as strong as its gradients, and they were not made by the engine."""
    tokenizer = found.frozen.tokenizer
    encoded = [sequences.encode(tokenizer, "", row.instruction, max_tokens=canaries.TOKENS) for row in found.rows[:3]]
    model = lora.attach(found.frozen, found.start)
    summed = clipped_sum(model, encoded, clip_norm=found.clip_norm, max_batch_tokens=512, pad_id=0)
    engine = np.concatenate([tensor.ravel() for tensor in summed.tensors])
    ours = found.gradients[:3].sum(axis=0) * found.clip_norm
    assert np.linalg.norm(engine - ours) < 1e-4 * np.linalg.norm(ours)
    assert np.linalg.norm(engine - found.gradients[1:4].sum(axis=0)) > 0.5 * np.linalg.norm(ours)  # the twin


def test_looking_at_the_optimizer_ends(found: Canaries) -> None:
    import torch

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 2.0])
    with canaries.steps_seen() as seen:
        torch.optim.SGD([weight], lr=0.1).step()
    torch.optim.SGD([weight], lr=0.1).step()
    assert [vector.tolist() for vector in seen] == [[1.0, 2.0]]


def test_evidence_repeats_and_differs_by_its_stream(found: Canaries) -> None:
    first, again, other = (
        canaries.evidence(found, stream(seed, "one-run"), noise_multiplier=2.0, unseen=True) for seed in (5, 5, 6)
    )
    assert np.array_equal(first.matches, again.matches)
    assert np.array_equal(first.included, again.included)
    assert not np.array_equal(first.included, other.included)
