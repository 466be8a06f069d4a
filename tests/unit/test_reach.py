"""The cap on an update: no step of AdamW leaves it, whatever the gradients; and it is no larger than it has to be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.dp_steps import DpStepsSection
from clients.learners import AnyLearner
from clients.learners.plain_lora import PlainLora
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import factors, zeroth_order
from fl_app.errors import ConfigInvalid
from fl_app.privacy.noise import SecureNoise
from strategies import reach
from strategies.reach import bounds, norm, read_cap
from tests.privacy.replay import FACTORS, Kept, begin

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter


def _descend(start: np.ndarray, gradients: np.ndarray, *, lr: float, decay: float = 0.0) -> np.ndarray:
    """Return where torch's AdamW, as the learners call it, takes `start` with these gradients."""
    import torch

    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay, fused=True)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
    return weight.detach().numpy()


def _gradients(kind: str, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Return gradients that drive AdamW as far as we know how, of shape (steps, 2, 3)."""
    t = np.arange(steps)
    shape = {
        "constant": np.ones(steps),
        "the worst for one step": (reach.BETA_1 / reach.BETA_2) ** (steps - 1 - t.astype(float)),
        "growing": 1.5 ** t.clip(max=90),
        "once at the end": (t == steps - 1).astype(float),
        "once at first": (t == 0).astype(float),
        "noise": rng.normal(size=steps),
        "heavy noise": rng.standard_cauchy(size=steps) ** 3,
        "turning": (-1.0) ** t,
    }[kind]
    return shape[:, None, None] * np.ones((steps, 2, 3))


KINDS = ["constant", "the worst for one step", "growing", "once at the end", "once at first", "noise", "heavy noise"]


@pytest.mark.parametrize("kind", [*KINDS, "turning"])
@pytest.mark.parametrize("steps", [1, 2, 7, 60, 400])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_no_gradients_carry_a_factor_beyond_the_cap(kind: str, steps: int, size: float) -> None:
    rng = np.random.default_rng(steps)
    start = rng.normal(size=(2, 3)).astype(np.float32)
    learner = {"kind": "dp_lora", "steps": steps, "learning_rate": 0.01, "weight_decay": 0.1}

    end = _descend(start, _gradients(kind, steps, rng) * size, lr=0.01, decay=0.1)

    assert norm(end - start) <= read_cap(learner).of_round(1).of("a", start)


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 20), lr=st.floats(1e-8, 1.0), decay=st.floats(0.0, 3.0))
@settings(max_examples=200, deadline=None)
def test_nor_do_any_others(seed: int, steps: int, lr: float, decay: float) -> None:
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(4, 5)).astype(np.float32)
    gradients = rng.normal(size=(steps, 4, 5)) * 10 ** rng.uniform(-15, 15, size=(steps, 1, 1))
    learner = {"kind": "dp_lora", "steps": steps, "learning_rate": lr, "weight_decay": decay}

    end = _descend(start, gradients, lr=lr, decay=decay)

    assert norm(end - start) <= read_cap(learner).of_round(1).of("b", start)


def test_the_cap_is_not_far_above_what_can_be_reached() -> None:
    """One step reaches all of it, save the slack; for a hundred, growing gradients reach a half."""
    start = np.zeros((2, 3), np.float32)
    for steps, kind, share in ((1, "constant", 0.98), (100, "growing", 0.4)):
        end = _descend(start, _gradients(kind, steps, np.random.default_rng(0)), lr=0.01)
        cap = read_cap({"kind": "dp_lora", "steps": steps, "learning_rate": 0.01}).of_round(1).of("a", start)
        assert share * cap <= norm(end) <= cap


def test_the_usual_bound_of_one_rate_a_step_would_reject_the_honest() -> None:
    """The twin that must fail: lr x steps x sqrt(numel) is exceeded by gradients that grow."""
    end = _descend(np.zeros((2, 3), np.float32), _gradients("growing", 100, np.random.default_rng(0)), lr=0.01)

    assert norm(end) > 0.01 * 100 * math.sqrt(6)


def test_steps_by_hand() -> None:
    """c_1 = 1; c_2 = (0.1 / 0.19) sqrt(1.999) sqrt(1 + 0.81 / 0.999) = 1.001358."""
    assert bounds(1) == pytest.approx(1.0)
    assert bounds(2) == pytest.approx(2.001358, abs=1e-6)
    assert bounds(1_000_000) / 1_000_000 == pytest.approx(7.27, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "decay", "steps", "share"),
    [(0.1, 0.0, 5, 0.0), (0.1, 1.0, 2, 0.19), (1.0, 1.0, 3, 1.0), (1.0, 1.5, 3, 2.0), (1.0, 2.5, 3, math.inf)],
)
def test_weight_decay_by_hand(rate: float, decay: float, steps: int, share: float) -> None:
    cap = read_cap({"kind": "dp_lora", "steps": steps, "learning_rate": rate, "weight_decay": decay}).of_round(1)

    assert cap.reaches["a"].decay == pytest.approx(share)


def test_a_frozen_factor_may_not_move_at_all() -> None:
    cap = read_cap({"kind": "dp_ffa_lora", "steps": 3}).of_round(1)

    assert cap.of("a", np.ones((2, 2), np.float32)) == 0.0
    assert cap.of("b", np.ones((2, 2), np.float32)) > 0.0


# --- it knows the learners there are


def kind_of(section: Any) -> str:
    return get_args(section.model_fields["kind"].annotation)[0]


def _sections() -> list[Any]:
    """The learners that send an adapter."""
    return [one for one in get_args(get_args(AnyLearner)[0]) if "steps" in one.model_fields]


def test_every_learner_is_known_with_its_own_defaults() -> None:
    fields = reach._Learner.model_fields

    assert {kind_of(section) for section in _sections()} == {*factors.OF_KIND, *factors.CHOOSE}
    for section in _sections():
        kind = kind_of(section)
        assert fields["learning_rate"].default == section.model_fields["learning_rate"].default
        if kind != "zeroth_order":
            assert fields["weight_decay"].default == section.model_fields["weight_decay"].default
            assert issubclass(section, DpStepsSection | PlainLora)  # all that end their steps with AdamW
        if "b_learning_rate_factor" in section.model_fields:
            assert reach.B_FACTORS[kind] == section.model_fields["b_learning_rate_factor"].default
        if "schedule" in section.model_fields:
            assert section.model_fields["schedule"].default == "both"
    assert {*reach.B_FACTORS} == {kind_of(s) for s in _sections() if "b_learning_rate_factor" in s.model_fields}


@pytest.mark.parametrize("table", [{}, {"kind": "dp_lora"}, {"kind": "dp_adafactor", "steps": 1}])
def test_a_learner_that_is_not_known_has_no_cap(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid, match=r"client\.learner"):
        read_cap(table)


MOVES = {
    "dp_lora": ("ab", "ab"),
    "dp_ffa_lora": ("b", "b"),
    "dp_rolora": ("b", "a"),
    "dp_la_lora": ("ab", "ab"),
    "dp_lora_sb": ("c", "c"),
    "dp_fedsa_lora": ("a", "a"),
    "dp_distil": ("ab", "ab"),
    "plain_lora": ("ab", "ab"),
    "zeroth_order": ("ab", "ab"),
}
"""The first letters of what the uploads of rounds 1 and 2 may differ in from the broadcast."""


@pytest.mark.parametrize("kind", list(MOVES))
@pytest.mark.parametrize("multiplier", [0.8, 1e4])
@pytest.mark.parametrize("number", [1, 2])
def test_what_a_learner_releases_is_below_the_cap_at_any_noise(
    kind: str, multiplier: float, number: int, frozen: FrozenModel, learned: Callable[[int], Adapter]
) -> None:
    (section,) = [one for one in _sections() if kind_of(one) == kind]
    learner = section(kind=kind, steps=5, learning_rate=0.05).build(number)
    constants = PublicConstants(sample_rate=0.5, expected_batch=2, max_tokens=24, max_rows_per_unit=1, unit="record")
    rows = PrivateRows([PrivateRow(instruction=f"row {n}", output="yes", code="c", unit=str(n)) for n in range(4)])
    bench = Workbench(model=frozen, codes={"c": "A cough:"}, noise=SecureNoise(), system="", drawer=Kept())
    start = begin(learned(3), kind)

    release = learner(rows, start, learner.announce(constants, multiplier), constants, bench)

    cap = read_cap({"kind": kind, "steps": 5, "learning_rate": 0.05}).of_round(number)
    assert cap.trains == tuple(FACTORS[letter] for letter in MOVES[kind][number - 1])
    assert cap.by_scalars == (kind == "zeroth_order")
    for layer, began in start.layers.items():
        for factor in ("a", "b", "core") if kind == "dp_lora_sb" else ("a", "b"):
            moved = norm(getattr(release.adapter.layers[layer], factor) - getattr(began, factor))
            assert moved <= cap.of(factor, getattr(began, factor))
            assert (moved > 0) == (factor[0] in MOVES[kind][number - 1])


def test_turns_by_steps_are_counted_and_b_is_faster() -> None:
    """Five steps: b has three of them, at twice the rate, and a two."""
    table = {"kind": "dp_la_lora", "steps": 5, "learning_rate": 0.1}
    found = read_cap(table).of_round(1).reaches
    assert found["a"].coordinate == pytest.approx(0.1 * bounds(2))
    assert found["b"].coordinate == pytest.approx(0.2 * bounds(3))
    found = read_cap({**table, "b_learning_rate_factor": 0.5}).of_round(1).reaches
    assert found["b"].coordinate == pytest.approx(0.05 * bounds(3))
    assert "a" not in read_cap({**table, "steps": 1}).of_round(1).reaches


def test_a_schedule_of_ones_own_choice_is_heard() -> None:
    table = {"kind": "plain_lora", "steps": 3, "schedule": "core"}
    assert read_cap(table).of_round(1).trains == ("core",)
    with pytest.raises(ConfigInvalid, match="schedule = 'all'"):
        read_cap({**table, "schedule": "all"})


def test_zeroth_order_steps_reach_as_far_as_the_largest_byte_goes() -> None:
    """Every scalar the largest, every direction the same: the walk is straight, and just below the cap."""
    table = {"kind": "zeroth_order", "steps": 4, "learning_rate": 0.01}
    cap = read_cap(table).of_round(1)
    z = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    moved = norm(4 * 0.01 * zeroth_order.LARGEST * z)
    assert 0.95 * cap.of("a", np.zeros_like(z)) <= moved <= cap.of("a", np.zeros_like(z))
    assert moved * 1.05 > cap.of("a", np.zeros_like(z))  # the twin: five hundredths more are too far
