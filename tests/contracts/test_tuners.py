"""Every tuner keeps the promises of `strategies.stages.Tuner`, and teaches what the lessons say."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest

from fl_app import lora, lora_start, models, sequences
from fl_app.config import LoraSection
from fl_app.errors import RoundFailed
from fl_app.seeds import stream
from fl_app.types import Adapter, Lesson, LoraFactors
from strategies.lab import Lab
from strategies.tuners import AnyTuner
from strategies.tuners.sft import Sft
from strategies.tuning import Tuning

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fl_app.models import FrozenModel

LESSONS = tuple(
    Lesson(draft_id=str(index), instruction=instruction, answer=answer, teacher="professional")
    for index, (instruction, answer) in enumerate(
        [
            ("What helps a fever?", "Willow bark."),
            ("And a cough?", "Thyme in warm honey, twice a day."),
            ("My back hurts.", "Rest."),
            ("How do I sleep well?", "Valerian tea in the evening."),
            ("A burn?", "Cold water."),
        ]
    )
)
MEMBERS: tuple[Any, ...] = get_args(get_args(AnyTuner)[0]) if get_args(AnyTuner) else (AnyTuner,)
QUICK = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2}
SECTIONS: dict[str, dict[str, Any]] = {"sft": QUICK, "distil_dp": {**QUICK, "hidden_weight": 0.5}}
"""Per kind, settings under which five short lessons take a second at most."""


def _lab(frozen: FrozenModel, threads: int) -> Lab:
    return Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="Be brief.",
        threads=threads,
        batch_rows=4,
        public_words=frozenset(),
    )


@pytest.fixture(scope="module")
def lab(frozen: FrozenModel) -> Iterator[Lab]:
    one = _lab(frozen, 1)
    yield one
    one.close()


@pytest.fixture(scope="module")
def start(frozen: FrozenModel) -> Adapter:
    section = LoraSection(rank=3, alpha=5.0, targets=("q_proj", "v_proj"))
    return lora_start.initial(lora.spec_of(frozen, section), stream(0, "start"))


@pytest.fixture(params=MEMBERS, ids=lambda member: member.__name__)
def section(request: pytest.FixtureRequest) -> Any:
    (kind,) = get_args(request.param.model_fields["kind"].annotation)
    return request.param(kind=kind, **SECTIONS[kind])


def _loss(lab: Lab, adapter: Adapter, lessons: Sequence[Lesson]) -> float:
    """Return the mean over the lessons of the answer's mean negative log-likelihood, in nats per token."""
    import torch

    tokenizer = lab.local.tokenizer
    examples = [
        sequences.encode(
            tokenizer, models.chat_prompt(tokenizer, lesson.instruction, lab.system), lesson.answer, max_tokens=192
        )
        for lesson in lessons
    ]
    model = lab.trainee(adapter)
    with torch.inference_mode():
        batches = sequences.micro_batches(examples, max_batch_tokens=4096, pad_id=tokenizer.pad_token_id)
        losses = torch.cat([sequences.example_losses(model, batch) for batch in batches])
    return float(losses.mean())


# --- what every member promises


def test_no_lessons_no_change(section: Any, lab: Lab, start: Adapter) -> None:
    tuned = section.build(lab)(start, [], stream(0, "tune", 1))

    assert lora.sha256(tuned) == lora.sha256(start)


def test_base_rank_scaling_and_layers_are_kept(section: Any, lab: Lab, start: Adapter) -> None:
    tuned = section.build(lab)(start, LESSONS, stream(0, "tune", 1))

    lora.check_alike([start, tuned])
    for name, factors in tuned.layers.items():
        assert (factors.a.shape, factors.b.shape) == (start.layers[name].a.shape, start.layers[name].b.shape)
        assert (factors.a.dtype, factors.b.dtype) == (np.float32, np.float32)
    assert lora.sha256(tuned) != lora.sha256(start)


def test_the_start_and_the_base_are_left_as_they_were(section: Any, lab: Lab, start: Adapter) -> None:
    import torch

    before = lora.sha256(start)
    weights = {name: weight.clone() for name, weight in lab.local.model.named_parameters()}

    section.build(lab)(start, LESSONS, stream(0, "tune", 1))

    assert lora.sha256(start) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in lab.local.model.named_parameters())


def test_the_same_generator_gives_the_same_bits(section: Any, lab: Lab, start: Adapter) -> None:
    tune = section.build(lab)

    tuned = tune(start, LESSONS, stream(0, "tune", 1))

    assert lora.sha256(tune(start, LESSONS, stream(0, "tune", 1))) == lora.sha256(tuned)
    assert lora.sha256(tune(start, LESSONS, stream(1, "tune", 1))) != lora.sha256(tuned)


def test_global_random_state_has_no_say(section: Any, lab: Lab, start: Adapter) -> None:
    import torch

    tune = section.build(lab)
    torch.manual_seed(1)
    tuned = tune(start, LESSONS, stream(0, "tune", 1))
    torch.manual_seed(2)

    assert lora.sha256(tune(start, LESSONS, stream(0, "tune", 1))) == lora.sha256(tuned)


def test_the_number_of_threads_does_not_matter(section: Any, lab: Lab, frozen: FrozenModel, start: Adapter) -> None:
    pair = _lab(frozen, 2)
    try:
        hashes = {lora.sha256(section.build(one)(start, LESSONS, stream(0, "tune", 1))) for one in (lab, pair)}
    finally:
        pair.close()

    assert len(hashes) == 1


def test_a_loss_that_is_no_number_fails_the_round(section: Any, lab: Lab, start: Adapter) -> None:
    name = next(iter(start.layers))
    spoiled = LoraFactors(a=start.layers[name].a, b=np.full_like(start.layers[name].b, np.nan))
    adapter = dataclasses.replace(start, layers={**start.layers, name: spoiled})

    with pytest.raises(RoundFailed, match="nan"):
        section.build(lab)(adapter, LESSONS, stream(0, "tune", 1))


# --- supervised fine-tuning


@pytest.fixture(scope="module")
def taught(lab: Lab, start: Adapter) -> Adapter:
    section = Sft(kind="sft", epochs=30, batch_size=4, learning_rate=2e-2)
    return section.build(lab)(start, LESSONS, stream(0, "tune", 1))


def test_tuning_on_a_few_lessons_lowers_their_loss(lab: Lab, start: Adapter, taught: Adapter) -> None:
    before, after = _loss(lab, start, LESSONS), _loss(lab, taught, LESSONS)

    assert after < before - 1.0


def test_tuning_at_next_to_no_learning_rate_leaves_the_loss(lab: Lab, start: Adapter) -> None:
    """The twin of the test above: what lowers the loss is the steps, not the way it is measured."""
    section = Sft(kind="sft", epochs=2, batch_size=4, learning_rate=1e-12)
    idle = section.build(lab)(start, LESSONS, stream(0, "tune", 1))

    assert abs(_loss(lab, idle, LESSONS) - _loss(lab, start, LESSONS)) < 1e-5


def test_the_loss_is_on_the_answer_alone(lab: Lab, start: Adapter, taught: Adapter) -> None:
    """Lessons whose instruction is what the others answer: had the instruction carried loss, they would be easy."""
    asked = [dataclasses.replace(lesson, instruction="Say it.", answer=lesson.instruction) for lesson in LESSONS]

    learned = _loss(lab, start, LESSONS) - _loss(lab, taught, LESSONS)
    on_the_instructions = _loss(lab, start, asked) - _loss(lab, taught, asked)

    assert on_the_instructions < learned - 1.0


@pytest.mark.parametrize("micro_batch_tokens", [16, 60, 4096])
def test_how_a_step_is_cut_changes_rounding_alone(lab: Lab, start: Adapter, micro_batch_tokens: int) -> None:
    """One step of all lessons: the gradient is their mean, however they are cut into micro-batches."""
    whole, cut = (
        Sft(kind="sft", epochs=1, batch_size=5, learning_rate=1e-3, micro_batch_tokens=tokens).build(lab)
        for tokens in (1_000_000, micro_batch_tokens)
    )

    one, other = whole(start, LESSONS, stream(0, "tune", 1)), cut(start, LESSONS, stream(0, "tune", 1))

    for name in start.layers:
        np.testing.assert_allclose(one.layers[name].b, other.layers[name].b, atol=1e-5)


def test_progress_counts_the_steps(lab: Lab, start: Adapter) -> None:
    told: list[tuple[int, int]] = []
    lab.progress = lambda done, total: told.append((done, total))
    try:
        Sft(kind="sft", epochs=2, batch_size=2).build(lab)(start, LESSONS, stream(0, "tune", 1))
    finally:
        lab.progress = lambda _done, _total: None

    assert told == [(step, 6) for step in range(1, 7)]


def test_the_schedule_warms_up_and_falls_to_a_tenth(lab: Lab) -> None:
    """Hand-computed for 20 steps, a fifth of them warm-up: quarters up to 1, then half a cosine down to 0.1."""
    tuner: Any = Tuning(section=Sft(kind="sft", warmup=0.2), lab=lab)
    rates = [tuner._schedule(step, 20) for step in range(20)]

    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[12] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 <= rates[19] < 0.12


def test_rehearsal_teaches_to_write_the_instruction_too(lab: Lab, start: Adapter) -> None:
    """With `rehearse` the instruction after its code becomes likelier; without it, this much it does not."""
    coded = [dataclasses.replace(lesson, prompt=f"Letter number {i}:\n") for i, lesson in enumerate(LESSONS)]
    written = [dataclasses.replace(lesson, instruction=lesson.prompt, answer=lesson.instruction) for lesson in coded]

    def writing(adapter: Adapter) -> float:
        import torch

        examples = [
            sequences.encode(lab.local.tokenizer, one.instruction, one.answer, max_tokens=192) for one in written
        ]
        batches = sequences.micro_batches(examples, max_batch_tokens=4096, pad_id=lab.local.tokenizer.pad_token_id)
        with torch.inference_mode():
            model = lab.trainee(adapter)
            return float(torch.cat([sequences.example_losses(model, batch) for batch in batches]).mean())

    def tuned(share: float) -> Adapter:
        section = Sft(kind="sft", epochs=8, batch_size=4, learning_rate=1e-2, rehearse=share)
        return section.build(lab)(start, coded, stream(0, "rehearse"))

    assert writing(tuned(1.0)) < writing(tuned(0.0)) - 0.1
