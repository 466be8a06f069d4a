"""Every learner pays exactly what it announced: the steps, the clip and the noise never depend on the rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from clients.learners import AnyLearner
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import lora
from fl_app.errors import PolicyRefusal
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import AdapterRelease, DpReceipt, Gaussian, PoissonGaussian
from tests.privacy.replay import FACTORS, Kept, active, begin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from clients.stages import Learner
    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

STEPS, CLIP, NOISE = 3, 0.01, 1.25
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "dp_lora": [
        {"steps": STEPS, "clip_norm": CLIP},
        {"steps": STEPS, "clip_norm": CLIP, "learns": "answer", "weight_decay": 0.1},
        {"steps": STEPS, "clip_norm": CLIP, "engine": "opacus", "micro_batch_tokens": 64},
    ],
    "dp_ffa_lora": [
        {"steps": STEPS, "clip_norm": CLIP},
        {"steps": STEPS, "clip_norm": CLIP, "engine": "opacus", "learns": "answer"},
    ],
    "dp_rolora": [
        {"steps": STEPS, "clip_norm": CLIP},
        {"steps": STEPS, "clip_norm": CLIP, "engine": "opacus", "learns": "answer"},
    ],
    "dp_la_lora": [
        {"steps": STEPS, "clip_norm": CLIP},
        {"steps": STEPS, "clip_norm": CLIP, "engine": "opacus", "b_learning_rate_factor": 1.0},
    ],
    "dp_lora_sb": [
        {"steps": STEPS, "clip_norm": CLIP},
        {"steps": STEPS, "clip_norm": CLIP, "engine": "opacus", "weight_decay": 0.1},
    ],
    "dp_fedsa_lora": [
        {"steps": STEPS, "clip_norm": CLIP},
        {"steps": STEPS, "clip_norm": CLIP, "engine": "opacus", "learns": "answer"},
    ],
    "dp_distil": [
        {"steps": STEPS, "clip_norm": CLIP, "teacher": {}, "soft_weight": 0.9, "temperature": 2.0},
        {"steps": STEPS, "clip_norm": CLIP, "teacher": {"model": "tiny-random"}, "engine": "opacus"},
        {"steps": STEPS, "clip_norm": CLIP, "teacher": {}, "on_policy": True},
        {"steps": STEPS, "clip_norm": CLIP, "teacher": {}, "on_policy": True, "own_share": 0.5, "learns": "answer"},
    ],
}
SENDS = {"dp_fedsa_lora": "a"}
"""Of these kinds not all that moves is released."""
PLAIN: dict[str, Any] = {"steps": STEPS, "learning_rate": 1e-2}
CASES = [
    pytest.param(kind, options, id=f"{kind}-{n}") for kind, rows in SETTINGS.items() for n, options in enumerate(rows)
]
every_learner = pytest.mark.parametrize(("kind", "options"), CASES)


class CountingNoise:
    """Noise that is the same number everywhere, a sample that is asked for by name, and a count of both."""

    simulated = True

    def __init__(self, *, level: float = 0.0, sampled: Sequence[int] | None = ()) -> None:
        self.level = level
        self.sampled = sampled
        self.shapes: list[tuple[int, ...]] = []
        self.samples: list[tuple[int, float]] = []

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        self.shapes.append(shape)
        return np.full(shape, self.level)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        self.samples.append((count, rate))
        return np.arange(count) if self.sampled is None else np.array(self.sampled, np.int64)


def constants(**changes: Any) -> PublicConstants:
    values = {"sample_rate": 0.5, "expected_batch": 4, "max_tokens": 24, "max_rows_per_unit": 1, "unit": "record"}
    return PublicConstants(**{**values, **changes})


def some_rows(count: int, *, units: Sequence[str] = ()) -> PrivateRows:
    units = units or [str(n) for n in range(count)]
    return PrivateRows(
        [
            PrivateRow(instruction=f"row {n} is mine", output=f"dear {n}", code="cough", unit=units[n])
            for n in range(count)
        ]
    )


def build(kind: str, options: dict[str, Any]) -> Learner:
    section: Any = TypeAdapter(AnyLearner).validate_python({"kind": kind, **options})
    return section.build(1)


@pytest.fixture
def learn(frozen: FrozenModel, learned: Make) -> Callable[..., Adapter]:
    """Return a function that runs a learner from one start and returns the adapter it releases."""

    def run(
        learner: Learner, rows: PrivateRows, noise: Any, told: PublicConstants | None = None, multiplier: float = NOISE
    ) -> Adapter:
        told = told or constants()
        bench = Workbench(model=frozen, codes={"cough": "A cough:"}, noise=noise, system="", drawer=Kept())
        start = begin(learned(5), learner.section.kind)
        release = learner(rows, start, learner.announce(told, multiplier), told, bench)
        assert isinstance(release, AdapterRelease)
        assert release.kind == learner.release_kind
        return release.adapter

    return run


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collect what each AdamW step sees: all factors' gradients as one vector."""
    import torch

    seen: list[np.ndarray] = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            found = [weight.grad for weight in weights if weight.grad is not None]
            seen.append(np.concatenate([gradient.double().numpy().ravel() for gradient in found]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return seen


def test_every_learner_is_tested_here() -> None:
    union = get_args(get_args(AnyLearner)[0])
    # Without AdamW: tests/privacy/test_epsvec.py, test_votes.py and test_zeroth_order.py, and test_writing_learners.py.
    elsewhere = {"zeroth_order", "epsvec", "pe_votes", "private_prediction", "invisible_ink"}
    kinds = {get_args(section.model_fields["kind"].annotation)[0] for section in union}
    assert kinds == {*SETTINGS, "plain_lora", *elsewhere}


@every_learner
def test_the_receipt_says_what_the_round_does(kind: str, options: dict[str, Any]) -> None:
    learner = build(kind, options)
    event = PoissonGaussian(noise_multiplier=NOISE, sample_rate=0.5, steps=STEPS, clip_norm=CLIP)
    expected = DpReceipt(event=event, unit="patient", relation="add_or_remove_one")
    assert learner.announce(constants(unit="patient"), NOISE) == (expected,)
    assert learner.noise is None
    assert (learner.steps, learner.clip_norm, learner.release_kind, learner.private) == (STEPS, CLIP, "adapter", True)


@every_learner
@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": 0.4},
        {"steps": STEPS + 1},
        {"steps": STEPS - 1},
        {"clip_norm": 2 * CLIP},
        "unit",
        "relation",
        "gaussian",
    ],
    ids=str,
)
def test_a_receipt_of_something_else_is_refused(
    kind: str, options: dict[str, Any], change: Any, frozen: FrozenModel, learned: Make
) -> None:
    learner, noise = build(kind, options), CountingNoise()
    (receipt,) = learner.announce(constants(), NOISE)
    if isinstance(change, dict):
        assert isinstance(receipt.event, PoissonGaussian)
        receipt = dataclasses.replace(receipt, event=dataclasses.replace(receipt.event, **change))
    elif change == "gaussian":
        receipt = dataclasses.replace(receipt, event=Gaussian(noise_multiplier=NOISE, clip_norm=CLIP))
    else:
        receipt = dataclasses.replace(receipt, **{change: "other"})
    bench = Workbench(model=frozen, codes={}, noise=noise, system="", drawer=Kept())
    with pytest.raises(PolicyRefusal, match="were not announced by this learner"):
        learner(some_rows(3), learned(5), (receipt,), constants(), bench)
    with pytest.raises(PolicyRefusal, match="were not announced by this learner"):
        learner(some_rows(3), learned(5), (*learner.announce(constants(), NOISE), receipt), constants(), bench)
    assert not noise.samples
    assert not noise.shapes


@every_learner
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_steps_and_noise_never_depend_on_the_rows(
    kind: str, options: dict[str, Any], count: int, learn: Callable[..., Adapter], learned: Make
) -> None:
    noise = CountingNoise(level=1.0)
    learn(build(kind, options), some_rows(count), noise)
    layers = [layer for _, layer in sorted(begin(learned(5), kind).layers.items())]
    shapes = [getattr(layer, FACTORS[one]).shape for step in active(kind, STEPS) for layer in layers for one in step]
    assert noise.samples == [(count, 0.5)] * STEPS
    assert noise.shapes == shapes


@every_learner
def test_an_empty_sample_is_a_noised_step(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter], learned: Make, gradients: list[np.ndarray]
) -> None:
    told = constants(sample_rate=1e-9)
    noise = SimulatedNoise(stream(0, "noise"))
    found = learn(build(kind, options), some_rows(9), noise, told)
    assert len(gradients) == STEPS
    assert all((gradient != 0).mean() > 0.99 for gradient in gradients)
    start = begin(learned(5), kind)
    for name, factors in start.layers.items():
        for letter in "abc" if factors.core is not None else "ab":
            factor = FACTORS[letter]
            moved = (getattr(found.layers[name], factor) != getattr(factors, factor)).mean()
            assert moved > 0.99 if letter in SENDS.get(kind, "".join(active(kind, STEPS))) else moved == 0
    silent = learn(build(kind, {**options, "weight_decay": 0.0}), some_rows(9), CountingNoise(level=0.0), told)
    assert lora.sha256(silent) == lora.sha256(start)  # the twin: without noise nothing would have moved


@every_learner
def test_same_noise_same_adapter(kind: str, options: dict[str, Any], learn: Callable[..., Adapter]) -> None:
    import torch

    def run(seed: int) -> str:
        return lora.sha256(learn(build(kind, options), some_rows(9), SimulatedNoise(stream(seed, "noise"))))

    first = run(0)
    torch.manual_seed(1)
    assert run(0) == first
    assert run(1) != first


@every_learner
def test_rows_move_the_adapter(kind: str, options: dict[str, Any], learn: Callable[..., Adapter]) -> None:
    """The twin of the clip tests: a learner that ignored its rows would pass them all."""
    learner = build(kind, options)
    some = learn(learner, some_rows(9), CountingNoise(sampled=None))
    other = learn(learner, some_rows(4), CountingNoise(sampled=None))
    assert lora.sha256(some) != lora.sha256(other)


@every_learner
def test_base_rank_and_scaling_are_kept_and_the_start_is_not_touched(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter], learned: Make
) -> None:
    before = lora.sha256(learned(5))
    found = learn(build(kind, options), some_rows(5), SimulatedNoise(stream(0, "noise")))
    lora.check_alike([begin(learned(5), kind), found])
    assert all(f.a.dtype == f.b.dtype == np.float32 for f in found.layers.values())
    assert all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in found.layers.values())
    assert lora.sha256(learned(5)) == before


@every_learner
def test_the_noise_has_the_scale_of_the_receipt(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter], gradients: list[np.ndarray]
) -> None:
    """First gradient of an empty sample: noise_multiplier * clip_norm / expected_batch, in every coordinate."""
    learn(build(kind, options), some_rows(9), CountingNoise(level=1.0), constants(expected_batch=5))
    scale = NOISE * CLIP / 5
    assert gradients[0] == pytest.approx(np.full_like(gradients[0], scale), rel=2e-6)  # the lattice, and float32
    gradients.clear()
    noise = SimulatedNoise(stream(0, "noise"))
    long = build(kind, {**options, "steps": 40})
    learn(long, some_rows(9), noise, constants(expected_batch=5, sample_rate=1e-9))
    # n standard normals: the standard deviation is known to 1/sqrt(2 n), 1.4 % of 2560; five of those. The twins are
    # the scales of four usual mistakes: no clip norm, no multiplier, no normaliser, the square root of the normaliser.
    drawn = np.concatenate(gradients)
    found, slack = drawn.std(), 5 / (2 * drawn.size) ** 0.5
    assert found == pytest.approx(scale, rel=slack)
    for mistake in (NOISE / 5, CLIP / 5, NOISE * CLIP, NOISE * CLIP / 5**0.5):
        assert found != pytest.approx(mistake, rel=slack)


@every_learner
def test_noise_is_added_to_the_sum_before_the_public_normaliser(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter], gradients: list[np.ndarray]
) -> None:
    learner, rows = build(kind, options), some_rows(6)
    learn(learner, rows, CountingNoise(level=0.0, sampled=None), constants(expected_batch=5))
    learn(learner, rows, CountingNoise(level=1.0, sampled=None), constants(expected_batch=5))
    signal, noisy = gradients[0], gradients[STEPS]
    assert np.linalg.norm(signal) > CLIP / 5  # more than any one row's: it is the sum of six
    assert np.linalg.norm(signal) <= 6 * CLIP / 5 * (1 + 1e-5)
    assert noisy - signal == pytest.approx(np.full_like(signal, NOISE * CLIP / 5), abs=2e-8)


@every_learner
def test_one_rows_contribution_is_at_most_the_clip(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter], gradients: list[np.ndarray]
) -> None:
    learner, rows = build(kind, options), some_rows(5)
    for sampled in ([0, 1, 2, 3], [0, 1, 2, 3, 4]):
        learn(learner, rows, CountingNoise(sampled=sampled), constants(expected_batch=1))
    difference = np.linalg.norm(gradients[STEPS] - gradients[0])
    assert CLIP * 0.9 <= difference <= CLIP * (1 + 1e-4)  # the clip is small: every row reaches it


@every_learner
def test_a_units_rows_share_one_clip(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter], gradients: list[np.ndarray]
) -> None:
    learner = build(kind, options)
    told = constants(expected_batch=1, max_rows_per_unit=2, unit="patient")
    same = PrivateRows([PrivateRow(instruction="mine", output="dear", code="cough", unit=unit) for unit in "aabc"])
    noise = CountingNoise(sampled=[0])
    learn(learner, same, noise, told)
    assert noise.samples[0] == (3, 0.5)  # three patients are sampled from, not four rows
    joint = np.linalg.norm(gradients[0])
    assert CLIP * 0.9 <= joint <= CLIP * (1 + 1e-5)  # two equal rows, each at C / 2: together C
    gradients.clear()
    learn(learner, same, CountingNoise(sampled=[1]), told)
    assert np.linalg.norm(gradients[0]) <= CLIP / 2 * (1 + 1e-5)
    gradients.clear()
    # The twin: under max_rows_per_unit = 1 each row would be clipped to C, and the unit would reach 2 C.
    learn(learner, same, CountingNoise(sampled=[0]), dataclasses.replace(told, max_rows_per_unit=1))
    assert np.linalg.norm(gradients[0]) > 1.8 * CLIP


@every_learner
def test_rows_without_text_or_code_are_learned_from_without_harm(
    kind: str, options: dict[str, Any], learn: Callable[..., Adapter]
) -> None:
    odd = [("", "", ""), ("x" * 500, "y" * 500, "cough"), ("a", "", "unknown"), ("\u200b\U0001f600", "ü", "cough")]
    rows = PrivateRows([PrivateRow(instruction=i, output=o, code=c, unit=str(n)) for n, (i, o, c) in enumerate(odd)])
    found = learn(build(kind, options), rows, CountingNoise(sampled=None, level=1.0))
    assert all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in found.layers.values())


def plain(frozen: FrozenModel, start: Adapter, rows: PrivateRows, noise: Any, **options: Any) -> Adapter:
    bench = Workbench(model=frozen, codes={"cough": "A cough:"}, noise=noise, system="")
    return build("plain_lora", {**PLAIN, **options})(rows, start, (), constants(), bench).adapter


def test_plain_lora_promises_nothing(frozen: FrozenModel, learned: Make) -> None:
    learner, noise = build("plain_lora", PLAIN), CountingNoise()
    assert learner.announce(constants(), NOISE) == ()
    assert (learner.private, learner.clip_norm) == (False, float("inf"))
    receipt = build("dp_lora", SETTINGS["dp_lora"][0]).announce(constants(), NOISE)
    with pytest.raises(PolicyRefusal, match="plain LoRA has none"):
        learner(
            some_rows(3), learned(5), receipt, constants(), Workbench(model=frozen, codes={}, noise=noise, system="")
        )
    assert not noise.samples


def test_plain_lora_is_dp_lora_without_clip_and_noise(
    frozen: FrozenModel, learned: Make, learn: Callable[..., Adapter], gradients: list[np.ndarray]
) -> None:
    """Same sampler, loss, normaliser and steps: with a clip that nothing reaches and no noise the steps agree."""
    options = {"steps": STEPS, "clip_norm": 50.0, "learning_rate": PLAIN["learning_rate"]}
    learn(build("dp_lora", options), some_rows(9), CountingNoise(sampled=None))
    plain(frozen, learned(5), some_rows(9), CountingNoise(sampled=None))
    private, open_ones = gradients[:STEPS], gradients[STEPS:]
    assert len(open_ones) == STEPS
    # the first step is the same sum, but for the lattice that belongs to a clip norm of 50
    assert np.linalg.norm(open_ones[0] - private[0]) < 1e-3 * np.linalg.norm(private[0])
    clipped = {**options, "clip_norm": CLIP}
    gradients.clear()
    learn(build("dp_lora", clipped), some_rows(9), CountingNoise(sampled=None))
    assert np.linalg.norm(gradients[0]) < 0.5 * np.linalg.norm(open_ones[0])  # the twin: a clip would be seen


def test_plain_lora_learns_its_rows(frozen: FrozenModel, learned: Make) -> None:
    found = plain(frozen, learned(5), some_rows(9), CountingNoise(sampled=None), steps=5)
    lora.check_alike([learned(5), found])
    noise = CountingNoise(sampled=None)
    plain(frozen, learned(5), some_rows(9), noise)
    assert noise.samples == [(9, 0.5)] * STEPS
    assert not noise.shapes
    assert lora.sha256(found) != lora.sha256(learned(5))
