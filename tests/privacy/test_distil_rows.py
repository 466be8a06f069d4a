"""Private distillation: with a teacher, and in the student's own words, a row still changes a sum by at most C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest

from clients import rollouts
from clients.learners.dp_distil import Course, DpDistil
from clients.per_example import Engine, clipped_sum
from clients.private_rows import PrivateRow, PrivateRows
from clients.rollouts import continued
from clients.stages import PublicConstants, Workbench
from fl_app import lora, peft_files, sequences
from fl_app.config import LoraSection
from fl_app.distillation import DistilLoss, Teacher, Weights
from fl_app.errors import ConfigInvalid, ModelMissing
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.sequences import TokenSequence
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fl_app.models import FrozenModel

    Make = Callable[[int], Adapter]

ENGINES = get_args(Engine)
SLACK = 1 + 1e-5
CLIP = 0.02
END = 2


def some_examples(count: int, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 41, count)
    return [TokenSequence(ids=tuple(rng.integers(3, 259, n).tolist()), loss_from=max(1, int(n) // 3)) for n in lengths]


@pytest.fixture(scope="module")
def model(frozen: FrozenModel, learned: Make) -> Any:
    return lora.attach(frozen, learned(7))


@pytest.fixture(scope="module")
def losses(frozen: FrozenModel, learned: Make) -> DistilLoss:
    return DistilLoss(
        teacher=Teacher(lora.attach(frozen, learned(3))),
        weigh=lambda one: Weights(hard=0.0, soft=1.0) if one.loss_from % 2 else Weights(hard=0.6, soft=0.4),
        temperature=2.0,
    )


def summed(
    model: Any, examples: Sequence[TokenSequence], losses: Any, clip: float = CLIP, engine: Engine = "fused"
) -> np.ndarray:
    found = clipped_sum(model, examples, clip_norm=clip, max_batch_tokens=512, pad_id=0, engine=engine, losses=losses)
    return np.concatenate([tensor.ravel() for tensor in found.tensors])


def one_by_one(model: Any, examples: Sequence[TokenSequence], losses: Any) -> np.ndarray:
    """Return each example's gradient from plain autograd on a batch of one. Shapes: (examples, all coordinates)."""
    import torch

    weights = list(lora.parameters(model).values())
    rows = []
    for example in examples:
        (batch,) = sequences.micro_batches([example], max_batch_tokens=1, pad_id=0)
        gradients = torch.autograd.grad(losses(model, batch, None).sum(), weights)
        rows.append(np.concatenate([gradient.double().numpy().ravel() for gradient in gradients]))
    return np.array(rows)


def clipped_by_hand(gradients: np.ndarray, clip: float) -> np.ndarray:
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    return (gradients * np.minimum(1.0, clip / norms)).sum(axis=0)


def distance(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


# --- with a teacher


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_sum_is_that_of_a_loop(model: Any, losses: DistilLoss, engine: Engine, share: float) -> None:
    examples = some_examples(12)
    gradients = one_by_one(model, examples, losses)
    norms = np.sort(np.linalg.norm(gradients, axis=1))
    clip = {0.0: norms[0] / 2, 0.5: (norms[5] + norms[6]) / 2, 1.0: norms[-1] * 2}[share]
    found = summed(model, examples, losses, clip, engine)
    assert distance(found, clipped_by_hand(gradients, clip)) <= 1e-4
    plain = one_by_one(model, examples, sequences.example_losses)  # the twin: the loss matters
    assert distance(found, clipped_by_hand(plain, clip)) > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_no_row_exceeds_the_clip(model: Any, losses: DistilLoss, engine: Engine) -> None:
    for example in some_examples(5, seed=4):
        (gradient,) = one_by_one(model, [example], losses)
        for clip in (np.linalg.norm(gradient) / 1000, np.linalg.norm(gradient) / 1.01):
            assert clip / SLACK <= np.linalg.norm(summed(model, [example], losses, clip, engine)) <= clip * SLACK


@pytest.mark.parametrize("keeps", [False, True])
def test_a_row_moves_a_sum_by_its_own_gradient_and_nothing_else(
    frozen: FrozenModel, learned: Make, model: Any, losses: DistilLoss, keeps: bool
) -> None:
    """In float64 bits, whether the teacher keeps what it said or not, and whoever is met first."""
    own, company = some_examples(2, seed=1), some_examples(9, seed=2)
    if keeps:
        losses.teacher.keep([*company, *own])
    apart = summed(model, own, losses) + summed(model, company, losses)
    together = summed(model, [*own, *company], losses)
    assert np.abs(together - apart).max() <= 1e-13
    nearby = summed(model, [*some_examples(2, seed=5), *company], losses)
    assert np.abs(nearby - apart).max() > 1e-5  # the twin


def test_other_arithmetic_is_asked_about_anew(model: Any, losses: DistilLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether rows keep apart is not taken over from one loss to another."""
    from clients import per_example

    asked: list[None] = []
    monkeypatch.setattr(per_example, "_gradients_keep_apart", lambda *_: asked.append(None) or True)
    verdicts: dict[Any, bool] = {}
    monkeypatch.setattr(per_example, "_verdicts", lambda: verdicts)
    for one in (None, losses, losses, None):
        summed(model, some_examples(1), one)
    assert len(asked) == 2


# --- in the student's own words


def write(model: Any, examples: Sequence[TokenSequence], seed: bytes = b"s", share: float = 0.5) -> list[TokenSequence]:
    return continued(model, examples, prompt_share=share, seed=seed, end_id=END)


def ids(examples: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
    return [one.ids for one in examples]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_the_beginning_of_a_row_stays_and_the_rest_is_new(model: Any, share: float) -> None:
    examples = some_examples(20)
    for old, new in zip(examples, write(model, examples, share=share), strict=True):
        text = len(old.ids) - old.loss_from
        kept = min(int(share * text), text - 1)
        assert new.loss_from == old.loss_from + kept
        assert new.ids[: new.loss_from] == old.ids[: new.loss_from]
        assert new.loss_from < len(new.ids) <= len(old.ids)
        assert len(new.ids) == len(old.ids) or new.ids[-1] == END
        assert END not in new.ids[new.loss_from : -1]


def test_a_row_without_text_stays_as_it_is(model: Any) -> None:
    silent = TokenSequence(ids=(5, 6, 7), loss_from=3)
    assert write(model, [silent]) == [silent]
    assert write(model, []) == []


@pytest.mark.parametrize("apart", [True, False])
def test_a_continuation_is_the_rows_own_affair(model: Any, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in company, in another order, decoded by itself: the same words. Another seed: others."""
    if not apart:
        monkeypatch.setattr(rollouts, "_rows_keep_apart", lambda _: False)
    examples = some_examples(24)
    together = ids(write(model, examples))
    assert ids(write(model, examples[::-1])) == together[::-1]
    assert [ids(write(model, [one]))[0] for one in examples] == together
    assert ids(write(model, examples, seed=b"t")) != together


def test_this_machine_decodes_rows_apart_and_the_question_can_be_answered_no(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rollouts._probe(model, 259, model.get_input_embeddings().weight.dtype)
    plain = rollouts._Decoder.logits

    def coupled(self: Any) -> Any:
        found = plain(self)
        return found + 1e-7 * found.mean()

    monkeypatch.setattr(rollouts._Decoder, "logits", coupled)
    assert not rollouts._probe(model, 259, model.get_input_embeddings().weight.dtype)


def test_the_decoder_sees_what_the_model_sees(model: Any) -> None:
    """Left padding, positions and the cache change nothing but rounding: against whole forward passes."""
    import torch

    prompts, said = [(5, 6, 7, 8), (9,) * 11], [[20, 21], [30, 31]]
    steps = rollouts._Decoder(model, prompts, width=16, height=16)
    for step in range(3):
        logits = steps.logits()
        for row, prompt in enumerate(prompts):
            whole = torch.tensor([[*prompt, *said[row][:step]]])
            with torch.inference_mode():
                expected = model(input_ids=whole).logits[0, -1].float()
            np.testing.assert_allclose(logits[row].numpy(), expected.numpy(), rtol=1e-3, atol=1e-4)
        steps.say([said[row][step] if row < 2 and step < 2 else 0 for row in range(16)])


def test_words_are_drawn_from_the_students_distribution() -> None:
    """Chi-square at 8 words, 20 000 draws: below the 99.9 % point of 7 degrees; the twin draws at temperature 0.9."""
    import torch

    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.2])
    rng = np.random.default_rng(0)

    def statistic(temperature: float) -> float:
        drawn = [rollouts._drawn(logits / temperature, rng) for _ in range(20_000)]
        expected = logits.double().softmax(0).numpy() * len(drawn)
        return float(((np.bincount(drawn, minlength=8) - expected) ** 2 / expected).sum())

    assert statistic(1.0) < 24.3
    assert statistic(0.9) > 24.3


# --- the learner


def constants() -> PublicConstants:
    return PublicConstants(sample_rate=0.5, expected_batch=4, max_tokens=24, max_rows_per_unit=1, unit="record")


def rows(count: int = 9) -> PrivateRows:
    return PrivateRows(
        [
            PrivateRow(instruction=f"row {n} is mine, all of it", output=f"dear {n}", code="cough", unit=str(n))
            for n in range(count)
        ]
    )


class AllRows:
    """Everybody is sampled, and no noise is added."""

    simulated = True

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        return np.arange(count)


def bench_of(frozen: FrozenModel, noise: Any) -> Workbench:
    return Workbench(model=frozen, codes={"cough": "A cough:"}, noise=noise, system="")


def section(**how: Any) -> DpDistil:
    given = {"kind": "dp_distil", "steps": 1, "clip_norm": CLIP, "teacher": {}, **how}
    return DpDistil.model_validate(given)


def learn(frozen: FrozenModel, start: Adapter, told: DpDistil, noise: Any = None, count: int = 9) -> Adapter:
    learner = told.build(1)
    receipt = learner.announce(constants(), 1.0)
    release: Any = learner(rows(count), start, receipt, constants(), bench_of(frozen, noise or AllRows()))
    return release.adapter


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    import torch

    seen: list[np.ndarray] = []

    class Watched(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            weights = self.param_groups[0]["params"]
            seen.append(np.concatenate([weight.grad.double().numpy().ravel() for weight in weights]))
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    return seen


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_step_is_the_clipped_sum_of_the_rows_own_losses(
    frozen: FrozenModel, learned: Make, gradients: list[np.ndarray], on_policy: bool
) -> None:
    """Rebuilt from outside: continuations, losses from whole logits' autograd, clip, sum, normaliser."""
    from clients.units import encoded_units

    told = section(on_policy=on_policy, soft_weight=0.7)
    learn(frozen, learned(5), told)
    bench = bench_of(frozen, AllRows())
    examples = [one for unit in encoded_units(rows(), told.learns, constants(), bench) for one in unit]
    student = lora.attach(frozen, learned(5))
    if on_policy:
        seed = lora.sha256(learned(5)).encode() + b" 0 "
        examples = continued(student, examples, prompt_share=0.5, seed=seed, end_id=END)
    weights = Weights(hard=0.0, soft=1.0) if on_policy else Weights(hard=1 - 0.7, soft=0.7)
    losses = DistilLoss(teacher=Teacher(frozen.model), weigh=lambda _: weights)
    expected = clipped_by_hand(one_by_one(student, examples, losses), CLIP) / 4
    assert distance(gradients[0], expected) < 1e-3  # the lattice, float32, and the clip's slack


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_neighbour_moves_every_sum_by_the_clip_at_most(
    frozen: FrozenModel, learned: Make, gradients: list[np.ndarray], on_policy: bool
) -> None:
    """Steps too small to move a weight, so that each is a first step; the ninth row is who D' has more."""
    told = section(on_policy=on_policy, steps=3, learning_rate=1e-30, clip_norm=0.002)
    for count in (9, 8):
        learn(frozen, learned(5), told, count=count)
    moved = [np.linalg.norm(gradients[n] - gradients[3 + n]) * 4 for n in range(3)]
    assert all(0.9 * 0.002 <= one <= 0.002 * (1 + 1e-3) for one in moved)  # the lattice and float32
    assert (np.abs(gradients[0] - gradients[1]).max() > 1e-9) == on_policy  # other words in every step


@pytest.mark.parametrize("on_policy", [False, True])
def test_it_brings_the_student_nearer_to_its_teacher(frozen: FrozenModel, learned: Make, on_policy: bool) -> None:
    from clients.units import encoded_units

    bench = bench_of(frozen, AllRows())
    examples = [one for unit in encoded_units(rows(), "instruction", constants(), bench) for one in unit]
    losses = DistilLoss(teacher=Teacher(frozen.model), weigh=lambda _: Weights(hard=0.0, soft=1.0))

    def gap(adapter: Adapter) -> float:
        (batch,) = sequences.micro_batches(examples, max_batch_tokens=10**6, pad_id=0)
        return float(losses(lora.attach(frozen, adapter), batch).mean().detach())

    how = {"steps": 12, "learning_rate": 1e-2, "clip_norm": 10.0, "soft_weight": 1.0}
    found = learn(frozen, learned(5), section(on_policy=on_policy, **how))
    assert gap(found) < 0.6 * gap(learned(5))


def test_a_share_of_the_rows_keeps_its_words(frozen: FrozenModel, learned: Make) -> None:
    """Chosen anew in every step, by the row and the step alone."""
    student, bench = lora.attach(frozen, learned(5)), bench_of(frozen, AllRows())
    examples = some_examples(60)
    course = Course(section(on_policy=True, own_share=0.3), learned(5), bench)
    shares: list[set[int]] = []
    for step in range(3):
        texts = course.texts(student, examples, step)
        shares.append({n for n, (old, new) in enumerate(zip(examples, texts, strict=True)) if old is not new})
        hards = [course.losses.weigh(one).hard for one in texts]
        assert hards == [0.0 if n in shares[-1] else pytest.approx(0.6) for n in range(60)]
    assert all(6 <= len(share) <= 32 for share in shares)  # 18 expected, standard deviation 3.5
    assert len({frozenset(share) for share in shares}) == 3
    again = course.texts(student, examples[:7], 1)
    assert {n for n in range(7) if again[n] is not examples[n]} == {n for n in shares[1] if n < 7}
    everyone = Course(section(on_policy=True), learned(5), bench).texts(student, examples, 0)
    assert all(old is not new for old, new in zip(examples, everyone, strict=True))


@pytest.mark.parametrize("on_policy", [False, True])
def test_nothing_computed_of_words_that_change_is_kept(
    frozen: FrozenModel, on_policy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States below the first adapted block are kept by identity, which a continuation has only for a step."""
    made: list[Any] = []
    plain = sequences.FrozenPrefix

    def watched(**how: Any) -> Any:
        made.append(plain(**how))
        return made[-1]

    spec = lora.spec_of(frozen, LoraSection(rank=2, alpha=4.0, targets=("q_proj",), first_layer=1))
    rng = np.random.default_rng(0)
    layers = {
        name: LoraFactors(
            a=rng.normal(0, 0.1, (2, d_in)).astype(np.float32), b=rng.normal(0, 0.1, (d_out, 2)).astype(np.float32)
        )
        for name, (d_in, d_out) in spec.shapes.items()
    }
    monkeypatch.setattr(sequences, "FrozenPrefix", watched)
    told = section(on_policy=on_policy, steps=3)
    learn(frozen, Adapter(layers=layers, alpha=4.0, base=spec.base), told, SimulatedNoise(stream(0, "n")))
    assert bool(made) != on_policy


def test_a_teacher_that_is_not_here_is_found_out_before_anything_is_reserved(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="no-such-model"):
        section(teacher={"model": "no-such-model"}).build(1).announce(constants(), 1.0)
    with pytest.raises(ConfigInvalid, match=r"teacher\.adapter: no PEFT adapter"):
        section(teacher={"adapter": str(tmp_path)}).build(1).announce(constants(), 1.0)


def test_a_teachers_adapter_is_read_from_its_folder(
    frozen: FrozenModel, learned: Make, tmp_path: Path, gradients: list[np.ndarray]
) -> None:
    """A student equal to its teacher has nothing to learn from it; equal to the base, it has."""
    peft_files.save(learned(3), tmp_path, base_name="tiny-random")
    for teacher in ({"adapter": str(tmp_path)}, {}):
        learn(frozen, learned(3), section(teacher=teacher, soft_weight=1.0))
    assert np.linalg.norm(gradients[0]) < 1e-3 * np.linalg.norm(gradients[1])
