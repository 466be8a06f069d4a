"""The zeroth-order learner: one number a step, within the clip whatever a row says, and nothing else of the rows."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from clients import per_example
from clients.learners import AnyLearner, zeroth_order
from clients.per_example import row_losses
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import lora, models, sequences
from fl_app.errors import LedgerRefusal, PolicyRefusal
from fl_app.privacy import gaussian
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import AdapterRelease, DpReceipt, Gaussian, PoissonGaussian
from fl_app.zeroth_order import Walk, decode, encode, replay
from tests.privacy.replay import Recording, begin, rows_of
from tests.privacy.test_layer1_replay import extras, poisoned, pool, some_examples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

__all__ = ["poisoned"]  # a fixture

STEPS, CLIP, NOISE, EXPECTED, EPS = 4, 0.05, 0.25, 4, 0.02
STILL = 1e-30
UNITS = {"record": 1, "patient": 3}
PLACE = {"run": "run-a.d", "site": "harbour"}


@dataclass(frozen=True)
class Observed:
    """One run. `sums`: what was to be noised, step by step. Shape: (steps,)."""

    noise: Any
    sums: np.ndarray
    release: AdapterRelease


def build(number: int = 1, **options: Any) -> Any:
    values = {"kind": "zeroth_order", "steps": STEPS, "clip_norm": CLIP, "perturbation": EPS, **options}
    section: Any = TypeAdapter(AnyLearner).validate_python(values)
    return section.build(number)


def constants(**changes: Any) -> PublicConstants:
    values: dict[str, Any] = {"sample_rate": 0.5, "expected_batch": EXPECTED, "max_tokens": 24, "unit": "record"}
    return PublicConstants(**{"max_rows_per_unit": 1, **values, **changes})


def observe(
    learner: Any, rows: PrivateRows, noise: Any, *, frozen: FrozenModel, start: Adapter, **told: Any
) -> Observed:
    sums: list[float] = []
    plain = gaussian.release

    def release(totals: Any, **options: Any) -> Any:
        ((total,),) = totals
        sums.append(float(total))
        return plain(totals, **options)

    bench = Workbench(model=frozen, codes={"cough": "A cough:"}, noise=noise, system="", **PLACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian, "release", release)
        found = learner(rows, start, learner.announce(constants(**told), NOISE), constants(**told), bench)
    return Observed(noise=noise, sums=np.array(sums), release=found)


def quiet(decisions: Sequence[Sequence[int]]) -> Recording:
    """Return noise of zeros."""
    return Recording(decisions=decisions)


# --- what it promises


def test_the_receipt_says_what_the_round_does() -> None:
    learner = build()
    event = PoissonGaussian(noise_multiplier=NOISE, sample_rate=0.5, steps=STEPS, clip_norm=CLIP)
    assert learner.announce(constants(unit="patient"), NOISE) == (DpReceipt(event=event, unit="patient"),)
    assert (learner.steps, learner.clip_norm, learner.noise) == (STEPS, CLIP, None)
    assert (learner.release_kind, learner.private) == ("adapter", True)


@pytest.mark.parametrize(
    "event",
    [
        PoissonGaussian(noise_multiplier=NOISE, sample_rate=0.4, steps=STEPS, clip_norm=CLIP),
        PoissonGaussian(noise_multiplier=NOISE, sample_rate=0.5, steps=STEPS - 1, clip_norm=CLIP),
        PoissonGaussian(noise_multiplier=NOISE, sample_rate=0.5, steps=STEPS, clip_norm=CLIP / 2),
        Gaussian(noise_multiplier=NOISE, clip_norm=CLIP),
    ],
)
def test_a_receipt_of_something_else_is_refused(event: Any, frozen: FrozenModel, learned: Make) -> None:
    noise = quiet([])
    bench = Workbench(model=frozen, codes={}, noise=noise, system="")
    for receipts in ((DpReceipt(event=event, unit="record"),), ()):
        with pytest.raises(PolicyRefusal, match="were not announced by this learner"):
            build()(rows_of([["a"]]), learned(5), receipts, constants(), bench)
    assert not noise.calls


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_steps_and_noise_never_depend_on_the_rows(count: int, frozen: FrozenModel, learned: Make) -> None:
    noise = quiet([range(count)] * STEPS)
    found = observe(build(), rows_of([[f"row {n}"] for n in range(count)]), noise, frozen=frozen, start=learned(5))
    assert noise.calls == [("sample", 0.5), ("normal", (1,))] * STEPS
    assert noise.counts == [count] * STEPS
    assert found.release.scalars is not None
    assert found.release.scalars.shape == (STEPS,)


def test_an_empty_sample_is_a_noised_step(frozen: FrozenModel, learned: Make) -> None:
    """Without anybody the scalar is the noise over the public normaliser, as its byte says."""
    noise = Recording(decisions=[], rng=np.random.default_rng(0))
    learner = build(clip_norm=16.0)
    found = observe(learner, rows_of([["one"]]), noise, frozen=frozen, start=learned(5))
    assert not found.sums.any()
    drawn = np.array([float(values[0]) for values in noise.normals])
    expected = decode(encode(drawn * NOISE * 16.0 / EXPECTED))
    assert (expected != 0).all()
    assert np.array_equal(found.release.scalars, expected)
    moved = [
        np.abs(factors.b - learned(5).layers[name].b).max() for name, factors in found.release.adapter.layers.items()
    ]
    assert min(moved) > 0
    silent = observe(learner, rows_of([["one"]]), quiet([]), frozen=frozen, start=learned(5))
    assert lora.sha256(silent.release.adapter) == lora.sha256(learned(5))  # the twin: the noise moved it


def test_noise_is_added_to_the_sum_before_the_public_normaliser(frozen: FrozenModel, learned: Make) -> None:
    """Large clip, so that the byte is fine enough to tell: (sum + sigma C) / expected batch."""
    rows = rows_of([["one"], ["two"], ["three"]])
    noise = Recording(decisions=[[0, 1, 2]] * STEPS, outputs=iter([np.ones(1)] * STEPS))
    found = observe(build(clip_norm=8.0, learning_rate=STILL), rows, noise, frozen=frozen, start=learned(5))
    expected = (found.sums + NOISE * 8.0) / EXPECTED
    assert found.release.scalars == pytest.approx(expected, rel=0.033)
    assert (np.abs(found.sums) > 0.1).any()


# --- sensitivity


def neighbours(unit: str, seed: int, frozen: FrozenModel, start: Adapter, only: str = "") -> Any:
    """Give (what D' has more, run on D, run on D', whether the extra unit was drawn), as layer 1 does."""
    rng = np.random.default_rng(seed)
    steps = 8
    learner = build(steps=steps, learning_rate=STILL, micro_batch_tokens=64)
    run = functools.partial(observe, learner, frozen=frozen, start=start, unit=unit, max_rows_per_unit=UNITS[unit])
    shared = pool(rng, unit)
    drawn = [rng.permutation(len(shared))[: rng.integers(0, 4)].tolist() for _ in range(steps)]
    drawn[0] = []
    base = run(rows_of(shared), Recording(decisions=drawn, rng=rng))
    for name, extra in extras(rng, unit, shared).items():
        if only and name != only:
            continue
        with_extra = rng.random(steps) < 0.8
        with_extra[0] = True
        decisions = [
            [*indices, len(shared)] if more else indices for indices, more in zip(drawn, with_extra, strict=True)
        ]
        yield name, base, run(rows_of([*shared, extra]), base.noise.replay(decisions)), with_extra


def check_sensitivity(base: Observed, more: Observed, drawn: np.ndarray) -> np.ndarray:
    moved = np.abs(more.sums - base.sums)
    assert base.noise.calls == more.noise.calls
    assert (moved <= gaussian.usable_clip(CLIP) * (1 + 1e-12)).all(), moved.max() / CLIP
    assert np.array_equal(more.sums[~drawn], base.sums[~drawn])
    return moved[drawn] / gaussian.usable_clip(CLIP)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_neighbour_moves_the_sum_by_the_clip_at_most(
    unit: str, seed: int, frozen: FrozenModel, learned: Make
) -> None:
    shares = {
        name: check_sensitivity(base, more, drawn)
        for name, base, more, drawn in neighbours(unit, seed, frozen, learned(5))
    }
    assert 0.99 < max(map(max, shares.values())) <= 1 + 1e-12
    assert set(shares["infinite"]) == {0.0}
    assert max(shares["not a number"]) <= (UNITS[unit] - 1) / UNITS[unit] * (1 + 1e-12)
    assert min(shares["as steep as can be"]) > 0.99  # 10^6 times as steep as any row


def unclipped(
    losses_of: Any, walk: Any, direction: Any, examples: Any, *, perturbation: float, clip_norm: float
) -> Any:
    del clip_norm
    above = losses_of(walk.beside(direction, perturbation), examples)
    below = losses_of(walk.beside(direction, -perturbation), examples)
    with np.errstate(invalid="ignore"):
        return np.array([((above - below) / (2 * perturbation)).sum()])


@pytest.mark.usefixtures("poisoned")
def test_a_slope_without_a_clip_is_caught(frozen: FrozenModel, learned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twins: a steep row goes past C, and a row that is no number past the sum, where the release stops it."""
    monkeypatch.setattr(zeroth_order, "clipped_slope", unclipped)
    ((_, base, more, drawn),) = neighbours("record", 0, frozen, learned(5), only="as steep as can be")
    with pytest.raises(AssertionError):
        check_sensitivity(base, more, drawn)
    with pytest.raises(LedgerRefusal, match="not finite"):
        list(neighbours("record", 0, frozen, learned(5), only="infinite"))


def test_rows_clipped_one_by_one_are_caught_where_a_unit_has_three(frozen: FrozenModel, learned: Make) -> None:
    run = functools.partial(
        observe, build(learning_rate=STILL, steps=8), frozen=frozen, start=learned(5), unit="patient"
    )
    told = {"max_rows_per_unit": 3}
    one, three = rows_of([["x y"]]), rows_of([["x y"] * 3])
    base, more = (run(rows, quiet([[0]] * 8), **told) for rows in (one, three))
    assert np.abs(more.sums).max() <= gaussian.usable_clip(CLIP) * (1 + 1e-12)
    assert np.abs(more.sums) == pytest.approx(3 * np.abs(base.sums))
    assert np.abs(run(three, quiet([[0]] * 8)).sums).max() > 1.1 * CLIP  # the twin


# --- what is computed


def test_a_slope_is_the_difference_of_two_losses(frozen: FrozenModel, learned: Make) -> None:
    """By adapters attached at w +- eps z, and transformers' own loss."""
    import torch

    start, texts = learned(5), ["one", "another row"]
    learner = build(steps=1, clip_norm=16.0, learning_rate=STILL)
    found = observe(learner, rows_of([[text] for text in texts]), quiet([[0, 1]]), frozen=frozen, start=start)
    walk = Walk(start, **PLACE, round_number=1, learning_rate=1.0, schedule="both")
    direction = walk.direction(0)
    expected = 0.0
    for text in texts:
        losses = []
        for shift in (EPS, -EPS):
            beside = walk.beside(direction, shift)
            layers = {
                name: dataclasses.replace(one, a=beside[f"{name}.a"], b=beside[f"{name}.b"])
                for name, one in start.layers.items()
            }
            model = lora.attach(frozen, dataclasses.replace(start, layers=layers))
            one = sequences.encode(frozen.tokenizer, "A cough:", text, max_tokens=24)
            labels = torch.tensor([[-100] * one.loss_from + list(one.ids[one.loss_from :])])
            with torch.no_grad():
                losses.append(float(model(input_ids=torch.tensor([one.ids]), labels=labels).loss))
        expected += (losses[0] - losses[1]) / (2 * EPS)
    assert abs(expected) > 0.05
    assert found.sums[0] == pytest.approx(expected, rel=1e-2, abs=2e-4)


@pytest.mark.parametrize("options", [{}, {"schedule": "b"}, {"schedule": "steps"}, {"schedule": "core"}], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_the_release_is_made_of_its_scalars_alone(
    options: dict[str, Any], number: int, frozen: FrozenModel, learned: Make
) -> None:
    start = begin(learned(5), "dp_lora_sb" if options.get("schedule") == "core" else "zeroth_order")
    learner = build(number, clip_norm=4.0, learning_rate=0.01, **options)
    noise = SimulatedNoise(stream(1, "noise"))
    release = observe(learner, rows_of([["one"], ["two"]]), noise, frozen=frozen, start=start).release
    assert release.scalars is not None
    place: dict[str, Any] = {**PLACE, "round_number": number, "learning_rate": 0.01}
    schedule = options.get("schedule", "both")
    travelled = decode(encode(release.scalars))
    assert np.array_equal(travelled, release.scalars)
    assert lora.sha256(replay(start, travelled, **place, schedule=schedule)) == lora.sha256(release.adapter)
    assert lora.sha256(release.adapter) != lora.sha256(start)
    other = replay(start, travelled, **{**place, "site": "school"}, schedule=schedule)
    assert lora.sha256(other) != lora.sha256(release.adapter)  # the twin: the place is heard


def test_it_learns_its_rows(frozen: FrozenModel, learned: Make) -> None:
    """Without noise to speak of, loss on the rows falls; with the sign turned it would rise."""
    texts = ["aaaa aaaa", "aaa aa"]
    rows = PrivateRows([PrivateRow(instruction=t, output="", code="cough", unit=str(n)) for n, t in enumerate(texts)])
    learner = build(steps=60, clip_norm=16.0, learning_rate=3e-4, perturbation=1e-2)
    found = observe(learner, rows, quiet([[0, 1]] * 60), frozen=frozen, start=learned(5), expected_batch=2)
    examples = [sequences.encode(frozen.tokenizer, "A cough:", text, max_tokens=24) for text in texts]

    def loss(adapter: Adapter) -> float:
        model = lora.attach(frozen, adapter)
        return float(row_losses(model, examples, max_batch_tokens=64, pad_id=0).mean())

    assert loss(found.release.adapter) < loss(learned(5)) - 0.05
    turned = replay(learned(5), -found.release.scalars, **PLACE, round_number=1, learning_rate=3e-4, schedule="both")
    assert loss(turned) > loss(learned(5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_row_has_the_same_loss_in_every_company(dtype: Any, first: int, learned: Make) -> None:
    adapter = learned(7)
    kept = {name: one for name, one in adapter.layers.items() if f".{first}." in name or first == 0}
    model = lora.attach(models.load("tiny-random", dtype), dataclasses.replace(adapter, layers=kept))

    def losses(examples: Any) -> np.ndarray:
        frozen = sequences.FrozenPrefix(first_block=first) if first else None
        return row_losses(model, examples, max_batch_tokens=64, pad_id=0, frozen=frozen)

    rng = np.random.default_rng(3)
    for length in (2, 16, 17, 40):
        (own,) = some_examples(rng, [length])
        (alone,) = losses([own])
        for size in (1, 5, 12):
            company = some_examples(rng, rng.integers(2, 41, size).tolist())
            together = losses([*company, own])
            assert together[-1] == alone
            assert np.array_equal(together[:-1], losses(company))
            assert len(set(together)) == size + 1


def test_a_loss_that_looks_at_its_company_is_computed_alone(
    frozen: FrozenModel, learned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is asked for losses too: a kernel that rounds by company would be found, and rows kept apart."""
    own = sequences.example_losses
    heights: list[int] = []

    def by_company(model: Any, batch: Any, *rest: Any) -> Any:
        heights.append(batch.ids_BT.shape[0])
        return own(model, batch, *rest) * (1 + 1e-6 * batch.ids_BT.shape[0])

    per_example._verdicts.cache_clear()
    monkeypatch.setattr(sequences, "example_losses", by_company)
    model = lora.attach(frozen, learned(7))
    examples = some_examples(np.random.default_rng(0), [12] * 6)
    row_losses(model, examples, max_batch_tokens=512, pad_id=0)
    assert heights[-6:] == [1] * 6
    per_example._verdicts.cache_clear()
