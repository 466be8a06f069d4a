"""The loss of rows against a teacher, and the tuner that learns by it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import lora, sequences
from fl_app.distillation import DistilLoss, Teacher, Weights, check_pair
from fl_app.errors import ConfigInvalid
from fl_app.models import FrozenModel
from fl_app.seeds import stream
from fl_app.sequences import TokenSequence
from fl_app.types import Lesson
from strategies.lab import Lab
from strategies.tuners.distil_dp import DistilDp
from strategies.tuners.sft import Sft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

LESSONS = tuple(
    Lesson(draft_id=str(n), instruction=asked, answer=said, teacher="professional", prompt=f"Letter {n}:\n")
    for n, (asked, said) in enumerate(
        [("A fever?", "Willow bark."), ("And a cough?", "Thyme in warm honey."), ("A burn?", "Cold water, at once.")]
    )
)
QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 2, "learning_rate": 1e-2}


def some_examples(count: int, seed: int = 0) -> list[TokenSequence]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 41, count)
    return [TokenSequence(ids=tuple(rng.integers(3, 259, n).tolist()), loss_from=max(1, int(n) // 3)) for n in lengths]


def one_batch(examples: Sequence[TokenSequence], pad_id: int = 0) -> Any:
    (batch,) = sequences.micro_batches(examples, max_batch_tokens=10**6, pad_id=pad_id)
    return batch


@pytest.fixture(scope="module")
def wide(frozen: FrozenModel) -> FrozenModel:
    """A wider model over the same tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        **{**frozen.model.config.to_dict(), "hidden_size": 96, "intermediate_size": 96, "head_dim": 24}
    )
    model: Any = LlamaForCausalLM(config)
    model.requires_grad_(requires_grad=False).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return FrozenModel(
        resolved=dataclasses.replace(frozen.resolved, sha256="w" * 64), tokenizer=frozen.tokenizer, model=model
    )


def laboratory(local: FrozenModel, professional: FrozenModel, adapter: Adapter | None = None, threads: int = 1) -> Lab:
    return Lab(
        local=local,
        professional=professional,
        professional_adapter=adapter,
        professional_name="professional",
        system="Be brief.",
        threads=threads,
        batch_rows=4,
        public_words=frozenset(),
    )


@pytest.fixture(scope="module")
def lab(frozen: FrozenModel, learned: Make) -> Iterator[Lab]:
    """A professional that is the local model with an adapter of its own."""
    one = laboratory(frozen, frozen, learned(3))
    yield one
    one.close()


def parts(model: Any, teacher: Any, example: TokenSequence) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, from whole logits of one row in float64: cross entropy, KL at t = 2, and both models' last states."""
    import torch

    ids = torch.tensor([example.ids])
    places = slice(example.loss_from - 1, len(example.ids) - 1)
    with torch.no_grad():
        own, theirs = model(ids, output_hidden_states=True), teacher(ids, output_hidden_states=True)
    student, expert = own.logits[0, places].double(), theirs.logits[0, places].double()
    surprise = torch.nn.functional.cross_entropy(student, ids[0, example.loss_from :], reduction="none")
    p, q = (expert / 2).softmax(1), (student / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    states = [out.hidden_states[-1][0, places].double().numpy() for out in (own, theirs)]
    return surprise.numpy(), divergence.numpy(), states[0], states[1]


@pytest.mark.parametrize("normalise", ["token", "paper"])
def test_a_rows_loss_is_the_mean_over_its_own_tokens(
    frozen: FrozenModel, wide: FrozenModel, learned: Make, normalise: Any
) -> None:
    """Every term by hand, per row; in the paper's form the KL is summed where the cross entropy is averaged."""
    import torch

    model, examples = lora.attach(frozen, learned(7)), some_examples(5)
    projection = torch.from_numpy(np.random.default_rng(1).normal(0, 0.1, (96, 64))).float()
    losses = DistilLoss(
        teacher=Teacher(wide.model),
        weigh=lambda _: Weights(hard=0.75, soft=0.25, hidden=0.5),
        temperature=2.0,
        normalise=normalise,
        projection=projection,
    )
    batch = one_batch(examples)
    found = losses(model, batch).tolist()
    for row, index in enumerate(batch.rows):
        surprise, divergence, own, theirs = parts(model, wide.model, examples[index])
        distance = ((own @ projection.double().numpy().T - theirs) ** 2).mean(1)
        soft = divergence.sum() if normalise == "paper" else divergence.mean()
        expected = 0.75 * surprise.mean() + 0.25 * 4 * soft + 0.5 * distance.mean()  # t^2 = 4
        assert found[row] == pytest.approx(expected, rel=1e-4)


def test_the_square_of_the_temperature_keeps_the_gradients_size(frozen: FrozenModel, learned: Make) -> None:
    """By finite differences: the slope of the whole loss, t^2 included, along its own gradient."""
    import torch

    example = some_examples(1, seed=8)[0]
    teacher = Teacher(lora.attach(frozen, learned(3)))
    losses = DistilLoss(teacher=teacher, weigh=lambda _: Weights(hard=0.0, soft=1.0), temperature=2.0)
    model, batch = lora.attach(frozen, learned(7)), one_batch([example])
    weights = list(lora.parameters(model).values())
    gradients = torch.autograd.grad(losses(model, batch).sum(), weights)
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    values = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=step / norm)
        _, divergence, _, _ = parts(model, teacher._model, example)
        values.append(4 * divergence.mean())
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=step / norm)
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(norm, rel=1e-2)


def test_padding_contributes_nothing(frozen: FrozenModel, learned: Make) -> None:
    """A short row beside a long one, whatever stands behind its end, has the loss and gradient that it has alone."""
    import torch

    model, teacher = lora.attach(frozen, learned(7)), Teacher(lora.attach(frozen, learned(3)))
    losses = DistilLoss(teacher=teacher, weigh=lambda _: Weights(hard=0.5, soft=0.5, hidden=1.0))
    rng = np.random.default_rng(0)
    short, long = (TokenSequence(ids=tuple(rng.integers(3, 259, n).tolist()), loss_from=2) for n in (6, 60))
    weights = list(lora.parameters(model).values())
    found = []
    for batch in (one_batch([short]), one_batch([short, long]), one_batch([short, long], pad_id=200)):
        loss = losses(model, batch)[0]
        found.append([float(loss.detach()), *(g.numpy() for g in torch.autograd.grad(loss, weights))])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-7)


def test_a_row_without_scored_tokens_has_no_loss(frozen: FrozenModel, learned: Make) -> None:
    model = lora.attach(frozen, learned(7))
    losses = DistilLoss(teacher=Teacher(frozen.model), weigh=lambda _: Weights(hard=0.5, soft=0.5))
    assert losses(model, one_batch([TokenSequence(ids=(5, 6, 7), loss_from=3)])).tolist() == [0.0]


def test_a_student_equal_to_its_teacher_has_no_loss(frozen: FrozenModel, learned: Make) -> None:
    teacher = Teacher(lora.attach(frozen, learned(7)))
    losses = DistilLoss(teacher=teacher, weigh=lambda _: Weights(hard=0.0, soft=1.0, hidden=1.0))
    batch = one_batch(some_examples(6))
    assert losses(lora.attach(frozen, learned(7)), batch).detach().numpy() == pytest.approx(np.zeros(6), abs=1e-6)
    assert (losses(lora.attach(frozen, learned(8)), batch) > 1e-3).all()  # the twin


def test_what_a_teacher_says_of_a_row_does_not_depend_on_company_or_memory(frozen: FrozenModel) -> None:
    examples = some_examples(4)
    fresh, keeping, full = Teacher(frozen.model), Teacher(frozen.model), Teacher(frozen.model, most_bytes=0)
    keeping.keep(examples)
    full.keep(examples)
    for _ in range(2):
        for one in examples:
            first = fresh.states(one).numpy()
            assert first.shape == (len(one.ids) - one.loss_from, 64)
            assert np.array_equal(first, keeping.states(one).numpy())
            assert np.array_equal(first, full.states(one).numpy())
    assert keeping.states(examples[0]) is keeping.states(examples[0])  # kept
    assert full.states(examples[0]) is not full.states(examples[0])
    small = Teacher(frozen.model, most_bytes=fresh.states(examples[0]).nbytes)
    for one in examples[:1] * 2:  # room for one, and again for one after another call
        small.keep([one])
        assert small.states(one) is small.states(one)
    assert fresh.states(examples[0]) is not fresh.states(examples[0])


def test_models_of_different_tokens_are_refused(frozen: FrozenModel, wide: FrozenModel) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    check_pair(frozen.model, frozen.tokenizer, wide.model, frozen.tokenizer, where="server.tuner")
    with pytest.raises(ConfigInvalid, match=r"server\.tuner: .*differ in \d+ tokens.*soft_weight = 0"):
        check_pair(frozen.model, frozen.tokenizer, wide.model, other, where="server.tuner")
    import torch

    class Longer(torch.nn.Module):
        def get_output_embeddings(self) -> Any:
            return torch.nn.Linear(64, 300)

    with pytest.raises(ConfigInvalid, match=r"has 259 logits, the teacher 300"):
        check_pair(frozen.model, frozen.tokenizer, Longer(), frozen.tokenizer, where="server.tuner")


# --- the tuner


def tuned(lab: Lab, start: Adapter, **how: Any) -> Adapter:
    section: Any = (DistilDp if how.get("kind", "distil_dp") == "distil_dp" else Sft)(
        **{"kind": "distil_dp", **QUICK, **how}
    )
    return section.build(lab)(start, LESSONS, stream(0, "tune"))


@pytest.mark.parametrize("rehearse", [0.0, 1.0])
def test_without_soft_labels_it_is_supervised_tuning_to_the_bit(lab: Lab, learned: Make, rehearse: float) -> None:
    plain = tuned(lab, learned(5), kind="sft", rehearse=rehearse)
    assert lora.sha256(tuned(lab, learned(5), soft_weight=0.0, rehearse=rehearse)) == lora.sha256(plain)
    assert lora.sha256(tuned(lab, learned(5), soft_weight=0.1, rehearse=rehearse)) != lora.sha256(plain)
    assert lora.sha256(tuned(lab, learned(5), soft_weight=0.0, hidden_weight=0.1)) != lora.sha256(plain)


def gap(lab: Lab, adapter: Adapter) -> float:
    """Return the mean KL of a target to the professional over the lessons' answers."""
    from strategies.tuning import encode

    section = DistilDp(kind="distil_dp")
    answers = encode(section, lab, LESSONS, stream(0, "gap")).answers
    losses = DistilLoss(teacher=Teacher(lab.professional.model), weigh=lambda _: Weights(hard=0.0, soft=1.0))
    return float(losses(lab.trainee(adapter), one_batch(answers)).mean().detach())


def test_soft_labels_bring_the_target_nearer_to_the_professional(lab: Lab, learned: Make) -> None:
    before = gap(lab, learned(5))
    hard, soft = (tuned(lab, learned(5), epochs=12, soft_weight=weight) for weight in (0.0, 1.0))
    assert gap(lab, soft) < 0.7 * before
    assert gap(lab, soft) < 0.7 * gap(lab, hard)  # the twin: one-hot answers do not


def test_the_teacher_is_left_as_it_was_and_has_no_gradient(lab: Lab, learned: Make) -> None:
    import torch

    teacher = lab.professional.model
    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    tuned(lab, learned(5), hidden_weight=1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_rehearsed_instructions_are_not_the_professionals_affair(lab: Lab, learned: Make) -> None:
    """With answers at weight soft = 1, the only cross entropy left is that of the rehearsed instructions."""
    asked: list[Any] = []
    losses = DistilLoss.__call__

    def watched(self: DistilLoss, model: Any, batch: Any, frozen: Any = None) -> Any:
        asked.extend((bytes(key.ids[:3]), self.weigh(key)) for key in batch.keys)
        return losses(self, model, batch, frozen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistilLoss, "__call__", watched)
        tuned(lab, learned(5), soft_weight=1.0, rehearse=1.0, epochs=1, batch_size=6)
    letters = bytes(lab.local.tokenizer("Letter")["input_ids"][:3])
    assert len(asked) == 6
    assert {weights for start, weights in asked if start == letters} == {Weights()}
    assert {weights for start, weights in asked if start != letters} == {Weights(hard=0.0, soft=1.0)}


def test_a_wider_professional_needs_a_projection_that_is_learned_and_dropped(
    frozen: FrozenModel, wide: FrozenModel, learned: Make
) -> None:
    found = []
    for threads in (1, 2):
        lab = laboratory(frozen, wide, threads=threads)
        try:
            found.append(tuned(lab, learned(5), hidden_weight=2.0, rehearse=1.0))
            without = tuned(lab, learned(5), rehearse=1.0)
        finally:
            lab.close()
    lora.check_alike([learned(5), *found])
    assert lora.sha256(found[0]) == lora.sha256(found[1])
    assert lora.sha256(found[0]) != lora.sha256(without)


def test_the_projection_learns(frozen: FrozenModel, wide: FrozenModel, learned: Make) -> None:
    from strategies import tuning

    fitted: list[Any] = []
    fit = tuning.Tuning.fit

    def watched(self: Any, *arguments: Any) -> Any:
        fitted.append((self.beside[0].detach().clone(), self.beside[0]))
        return fit(self, *arguments)

    lab = laboratory(frozen, wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.Tuning, "fit", watched)
        tuned(lab, learned(5), hidden_weight=2.0)
    lab.close()
    ((before, after),) = fitted
    assert before.shape == (96, 64)
    assert (before != after).float().mean() > 0.9


def test_a_professional_of_other_tokens_is_refused_before_anything_is_learned(
    frozen: FrozenModel, learned: Make
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    lab = laboratory(frozen, FrozenModel(resolved=frozen.resolved, tokenizer=other, model=frozen.model))
    try:
        with pytest.raises(ConfigInvalid, match="one vocabulary"):
            DistilDp(kind="distil_dp").build(lab)
        DistilDp(kind="distil_dp", soft_weight=0.0).build(lab)  # nobody is asked
    finally:
        lab.close()
