"""What every tuner does with its lessons: encode, batch, descend. Tuners say what the loss of a lesson is.

A step takes `batch_size` lessons; its micro-batches run side by side on the lab's threads and their gradients are
summed in a fixed order, so the result does not depend on the number of threads. A step whose gradient is not finite
is left out and counted; too many of them, and the round has no target.

The next round's sites start from the target. A target that learned answers alone writes answers where letters are
asked, so with `rehearse` it also keeps writing instructions after their public control codes: both are synthetic text.

Source: AdamW, Loshchilov & Hutter 2017. trl's SFTTrainer is not used because its result depends on global random
state and on the number of workers (DECISIONS.md).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from fl_app import lora, models, sequences
from fl_app.config import Section
from fl_app.errors import RoundFailed
from fl_app.sequences import FrozenPrefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.sequences import MicroBatch, TokenSequence
    from fl_app.types import Adapter, Lesson
    from strategies.lab import Lab

    Losses = Callable[[Any, MicroBatch, FrozenPrefix | None], Any]

SKIPPABLE = 0.1
"""Share of steps that may be left out: a rare lesson that overflows, not a model that is broken (assumption)."""

_log = logging.getLogger(__name__)


class TuningSection(Section):
    """What the sections of all tuners share. Linear warm-up over `warmup` of the steps, then cosine to a tenth.

    `rehearse` is the share of lessons whose instruction the target also learns to write after its control code.
    """

    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    batch_size: Annotated[int, Field(ge=1)] = 16
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 1024
    max_tokens: Annotated[int, Field(ge=8)] = 192
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    rehearse: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """Lessons as token sequences: `answers` after their chat prompts, `rehearsed` instructions after their codes."""

    answers: tuple[TokenSequence, ...]
    rehearsed: tuple[TokenSequence, ...]


def encode(section: TuningSection, lab: Lab, lessons: Sequence[Lesson], rng: np.random.Generator) -> Encoded:
    """Return the lessons as what is learned from them; `rng` says which are rehearsed."""
    tokenizer, system = lab.local.tokenizer, lab.system
    answers = tuple(
        sequences.encode(
            tokenizer,
            models.chat_prompt(tokenizer, lesson.instruction, system),
            lesson.answer,
            max_tokens=section.max_tokens,
        )
        for lesson in lessons
    )
    coded = [lesson for lesson in lessons if lesson.prompt]
    chosen = rng.permutation(len(coded))[: round(section.rehearse * len(coded))]
    rehearsed = tuple(
        sequences.encode(tokenizer, lesson.prompt, lesson.instruction, max_tokens=section.max_tokens)
        for lesson in (coded[int(index)] for index in chosen)
    )
    return Encoded(answers=answers, rehearsed=rehearsed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuning:
    """The descent. `losses` gives a micro-batch's rows their losses, (B,), `sequences.example_losses` when None.

    `beside` are parameters that are trained beside the adapter and not returned; their gradient is clipped by itself.
    """

    section: TuningSection
    lab: Lab
    losses: Losses | None = None
    beside: tuple[Any, ...] = ()

    def fit(self, adapter: Adapter, examples: Sequence[TokenSequence], rng: np.random.Generator) -> Adapter:
        """Return the adapter tuned on token sequences; without any, the same one.

        Raises: RoundFailed when too many gradients, or the result, are not finite: the last good target then stays.
        """
        if not examples:
            return adapter
        import torch

        model = self.lab.trainee(adapter)
        frozen = self._frozen(model, adapter, examples)
        weights = list(lora.parameters(model).values())
        groups = [{"params": list(group)} for group in (weights, self.beside) if group]
        optimizer = torch.optim.AdamW(groups, lr=self.section.learning_rate, weight_decay=self.section.weight_decay)
        per_epoch = math.ceil(len(examples) / self.section.batch_size)
        total = per_epoch * self.section.epochs
        order: list[int] = []
        skipped = 0
        for step in range(total):
            if step % per_epoch == 0:
                order = [int(i) for i in rng.permutation(len(examples))]
            start = (step % per_epoch) * self.section.batch_size
            chosen = [examples[i] for i in order[start : start + self.section.batch_size]]
            learning = [*weights, *self.beside]
            gradients = self._gradients(model, frozen, learning, chosen, self.lab.local.tokenizer.pad_token_id)
            for weight, gradient in zip(learning, gradients, strict=True):
                weight.grad = gradient / len(chosen)
            norm = torch.nn.utils.clip_grad_norm_(weights, self.section.max_grad_norm)
            if self.beside:
                norm = norm + torch.nn.utils.clip_grad_norm_(self.beside, self.section.max_grad_norm)
            if not torch.isfinite(norm):
                skipped += 1
                self._check_skipped(skipped, float(norm), step, total)
                continue
            for group in optimizer.param_groups:
                group["lr"] = self.section.learning_rate * self._schedule(step, total)
            optimizer.step()
            self.lab.progress(step + 1, total)
        tuned = lora.read(model, alpha=adapter.alpha, base=adapter.base)
        if not all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in tuned.layers.values()):
            raise RoundFailed(f"tuner: weights are not finite after {total} steps; lower learning_rate")
        return tuned

    @staticmethod
    def _check_skipped(skipped: int, norm: float, step: int, total: int) -> None:
        """Count a step left out. Raises: RoundFailed when they are more than `SKIPPABLE` of all."""
        told = f"tuner: gradient norm {norm} at step {step + 1} of {total}"
        if skipped > SKIPPABLE * total:
            raise RoundFailed(f"{told}, {skipped} steps without a usable gradient; lower learning_rate")
        _log.warning("%s: the step is left out, %d so far", told, skipped)

    def _frozen(self, model: Any, adapter: Adapter, examples: Sequence[TokenSequence]) -> FrozenPrefix | None:
        """Return the states below the first adapted block, computed once, when that pays and can be done."""
        first = sequences.first_adapted_block(adapter.layers)
        if self.section.epochs == 1 or not sequences.can_be_cut(model, first):
            return None
        frozen = FrozenPrefix(first_block=first)
        pad_id = self.lab.local.tokenizer.pad_token_id
        batches = sequences.micro_batches(examples, max_batch_tokens=self.section.micro_batch_tokens, pad_id=pad_id)
        self.lab.side_by_side(lambda batch: frozen.entering(model, batch), batches)
        return frozen

    def _gradients(
        self, model: Any, frozen: FrozenPrefix | None, weights: list[Any], chosen: Sequence[Any], pad_id: int
    ) -> list[Any]:
        """Return the sum over `chosen` of the gradients of their losses; zeros for what has no part in them."""
        import torch

        def one(batch: MicroBatch) -> Any:
            losses = self.losses or sequences.example_losses
            total = losses(model, batch, frozen).sum()
            return torch.autograd.grad(total, weights, materialize_grads=bool(self.beside))

        batches = sequences.micro_batches(chosen, max_batch_tokens=self._cut(chosen), pad_id=pad_id)
        parts = self.lab.side_by_side(one, batches)
        return [torch.stack(list(column)).sum(0) for column in zip(*parts, strict=True)]

    def _cut(self, chosen: Sequence[Any]) -> int:
        """Return padded tokens per micro-batch: at most the configured number, and at least two batches a step."""
        half = math.ceil(len(chosen) / 2) * max(len(sequence.ids) for sequence in chosen)
        return min(self.section.micro_batch_tokens, half)

    def _schedule(self, step: int, total: int) -> float:
        warm = max(1, int(self.section.warmup * total))
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
