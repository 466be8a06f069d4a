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
from fl_app.errors import ConfigInvalid
from fl_app.privacy.noise import SecureNoise
from strategies import reach
from strategies.reach import UpdateCap, bounds, norm, read_cap

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

    assert norm(end - start) <= read_cap(learner).of("a", start)


@given(seed=st.integers(0, 2**32), steps=st.integers(1, 20), lr=st.floats(1e-8, 1.0), decay=st.floats(0.0, 3.0))
@settings(max_examples=200, deadline=None)
def test_nor_do_any_others(seed: int, steps: int, lr: float, decay: float) -> None:
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(4, 5)).astype(np.float32)
    gradients = rng.normal(size=(steps, 4, 5)) * 10 ** rng.uniform(-15, 15, size=(steps, 1, 1))
    learner = {"kind": "dp_lora", "steps": steps, "learning_rate": lr, "weight_decay": decay}

    end = _descend(start, gradients, lr=lr, decay=decay)

    assert norm(end - start) <= read_cap(learner).of("b", start)


def test_the_cap_is_not_far_above_what_can_be_reached() -> None:
    """One step reaches all of it, save the slack; for a hundred, growing gradients reach a half."""
    start = np.zeros((2, 3), np.float32)
    for steps, kind, share in ((1, "constant", 0.98), (100, "growing", 0.4)):
        end = _descend(start, _gradients(kind, steps, np.random.default_rng(0)), lr=0.01)
        cap = read_cap({"kind": "dp_lora", "steps": steps, "learning_rate": 0.01}).of("a", start)
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
    cap = read_cap({"kind": "dp_lora", "steps": steps, "learning_rate": rate, "weight_decay": decay})

    assert cap.decay == pytest.approx(share)


def test_a_frozen_factor_may_not_move_at_all() -> None:
    cap = read_cap({"kind": "dp_ffa_lora", "steps": 3})

    assert cap.of("a", np.ones((2, 2), np.float32)) == 0.0
    assert cap.of("b", np.ones((2, 2), np.float32)) > 0.0


# --- it knows the learners there are


def _sections() -> list[Any]:
    """The learners that send an adapter."""
    return [one for one in get_args(get_args(AnyLearner)[0]) if "steps" in one.model_fields]


def test_every_learner_is_known_with_its_own_defaults() -> None:
    fields = reach._Learner.model_fields

    assert {get_args(section.model_fields["kind"].annotation)[0] for section in _sections()} == {*reach.TRAINS}
    for section in _sections():
        for name in ("learning_rate", "weight_decay"):
            assert fields[name].default == section.model_fields[name].default
        assert issubclass(section, DpStepsSection | PlainLora)  # all that end their steps with AdamW


@pytest.mark.parametrize("table", [{}, {"kind": "dp_lora"}, {"kind": "dp_adafactor", "steps": 1}])
def test_a_learner_that_is_not_known_has_no_cap(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigInvalid, match=r"client\.learner"):
        read_cap(table)


@pytest.mark.parametrize("kind", list(reach.TRAINS))
@pytest.mark.parametrize("multiplier", [0.8, 1e4])
def test_what_a_learner_releases_is_below_the_cap_at_any_noise(
    kind: str, multiplier: float, frozen: FrozenModel, learned: Callable[[int], Adapter]
) -> None:
    (section,) = [one for one in _sections() if get_args(one.model_fields["kind"].annotation) == (kind,)]
    learner = section(kind=kind, steps=5, learning_rate=0.05).build(1)
    constants = PublicConstants(sample_rate=0.5, expected_batch=2, max_tokens=24, max_rows_per_unit=1, unit="record")
    rows = PrivateRows([PrivateRow(instruction=f"row {n}", output="yes", code="c", unit=str(n)) for n in range(4)])
    bench = Workbench(model=frozen, codes={"c": "A cough:"}, noise=SecureNoise(), system="")
    start = learned(3)

    release = learner(rows, start, learner.announce(constants, multiplier), constants, bench)

    cap: UpdateCap = read_cap({"kind": kind, "steps": 5, "learning_rate": 0.05})
    for layer, began in start.layers.items():
        for factor in ("a", "b"):
            moved = norm(getattr(release.adapter.layers[layer], factor) - getattr(began, factor))
            assert moved <= cap.of(factor, getattr(began, factor))
            assert (moved > 0) == (factor in reach.TRAINS[kind])
