"""DP-AdamW on LoRA factors: the steps that every private adapter learner takes; learners say which factors move when.

    sample units -> clipped sum -> noise on the sum -> public normaliser -> AdamW

Per step: Poisson-sample units at the public rate, clip each one's gradient jointly over all active factors, add
Gaussian noise to the sum, divide by the public expected batch, take an AdamW step. The number of steps is a public
constant; an empty sample is a step of noise alone. Optimizer state is fresh in every round and made of noised
gradients only; nothing else of a step leaves this function.

Which factors are active is public (`fl_app.factors`). A factor that is not gets no gradient, so no share of the clip,
no noise, no decay, and its optimizer state does not move. The receipt is the same whichever they are: the noise is as
large as the clip norm says in every coordinate, and how many coordinates there are does not enter it.

A privacy unit that is a column with up to k rows is sampled as a whole, and each of its rows is clipped to C / k:
the unit's contribution stays within C.

Source: Abadi et al. 2016 (1607.00133) with AdamW on the noised mean (McMahan et al. 2018, 1812.06210); ours differs in
the public normaliser and step count, which theirs derive from the data, and in noise on a lattice
(`fl_app.privacy.gaussian`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

import numpy as np
from pydantic import Field

from clients.per_example import Engine, clipped_sum, trained
from clients.units import Learns, encoded_units
from fl_app import factors, lora, sequences
from fl_app.config import Section
from fl_app.errors import AdapterMismatch, PolicyRefusal
from fl_app.privacy import gaussian
from fl_app.types import AdapterRelease, DpReceipt, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from clients.per_example import RowLosses
    from clients.private_rows import PrivateRows
    from clients.stages import PublicConstants, Workbench
    from fl_app.sequences import TokenSequence
    from fl_app.types import Adapter, Factor, Floats, ReleaseKind, Schedule


class DpStepsSection(Section):
    """What the sections of all private adapter learners share.

    `micro_batch_tokens` splits the work and changes no result; `engine` chooses who forms per-example gradients.
    `clip_norm` is bounded because norms are float32: below 1e-19 they vanish, and what has no norm is not clipped.
    """

    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 512
    learns: Learns = "instruction"
    engine: Engine = "fused"


class Guidance(Protocol):
    """What a learner goes by besides its rows' own words: another loss for a row, perhaps on another text.

    Guarantee: loss and text of a row are functions of that row and of what is public, so that clip, sampling, noise
    and receipt stay what they are.
    """

    @property
    def losses(self) -> RowLosses:
        """The loss of every row."""
        ...

    @property
    def rewrites(self) -> bool:
        """Whether `texts` gives other sequences than it gets, so that nothing computed of them may be kept."""
        ...

    def meet(self, known: Sequence[TokenSequence]) -> None:
        """Take note of all sequences of this round; they live as long as it does."""
        ...

    def texts(self, model: Any, examples: Sequence[TokenSequence], step: int) -> Sequence[TokenSequence]:
        """Return what the losses of a step are taken on: one sequence for each example, in order."""
        ...


class NoisySteps(Protocol):
    """What a table says of its noisy steps: how many of them, and the bound on a unit's contribution to one."""

    @property
    def steps(self) -> int:
        """Steps of a round."""
        ...

    @property
    def clip_norm(self) -> float:
        """Bound on one unit's contribution to one step."""
        ...


def receipt(section: NoisySteps, constants: PublicConstants, noise: float) -> DpReceipt:
    """Return what a round of noisy sums over Poisson samples costs."""
    event = PoissonGaussian(
        noise_multiplier=noise,
        sample_rate=constants.sample_rate,
        steps=section.steps,
        clip_norm=section.clip_norm,
    )
    return DpReceipt(event=event, unit=constants.unit)


def announced(receipts: tuple[DpReceipt, ...], section: NoisySteps, constants: PublicConstants) -> PoissonGaussian:
    """Return the mechanism of a round's receipts. Raises: PolicyRefusal when they are not those of `receipt`."""
    event = receipts[0].event if receipts else None
    if not isinstance(event, PoissonGaussian) or receipts != (receipt(section, constants, event.noise_multiplier),):
        raise PolicyRefusal(f"receipts {receipts} were not announced by this learner")
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class DpAdapterLearner:
    """A `Learner` that moves the factors of a `schedule` in a round and leaves the others as they came, to the bit.

    `b_learning_rate_factor` is how much faster b learns than the others. `finish` is what becomes of each noised
    gradient before AdamW sees it; it sees nothing else, so it is post-processing.
    `guide` gives what else it goes by; without it, the loss is that of the rows' own words. `ready` raises when
    something it needs is not here; it is asked before a receipt is announced, so that nothing is reserved in vain.
    """

    section: DpStepsSection
    schedule: Schedule
    round_number: int
    b_learning_rate_factor: float = 1.0
    finish: Callable[[Floats], Floats] | None = None
    guide: Callable[[Adapter, Workbench], Guidance] | None = None
    ready: Callable[[], None] | None = None
    release_kind: ReleaseKind = "adapter"
    private: bool = True
    noise: float | None = None

    @property
    def steps(self) -> int:
        """Noisy steps of one round."""
        return self.section.steps

    @property
    def clip_norm(self) -> float:
        """L2 bound on one unit's contribution to one step."""
        return self.section.clip_norm

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the receipt of one round. Raises: what `ready` does."""
        if self.ready:
            self.ready()
        return (receipt(self.section, constants, noise),)

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> AdapterRelease:
        """Return the trained adapter.

        Guarantee: `receipts`, for units of `constants.unit`, under add-or-remove of one unit.
        Raises: PolicyRefusal when the receipts are not those that this learner announced.
        """
        event = announced(receipts, self.section, constants)
        guidance = self.guide(start, bench) if self.guide else None
        units = encoded_units(rows, self.section.learns, constants, bench)
        if guidance:
            guidance.meet([example for unit in units for example in unit])
        model = lora.attach(bench.model, start, bench.blocks, keep_cores=True)
        self._descend(model, units, event, constants, bench, guidance)
        del units
        return AdapterRelease(adapter=lora.read(model, alpha=start.alpha, base=start.base))

    def _descend(
        self,
        model: Any,
        units: Sequence[tuple[TokenSequence, ...]],
        event: PoissonGaussian,
        constants: PublicConstants,
        bench: Workbench,
        guidance: Guidance | None,
    ) -> None:
        """Take the receipt's steps."""
        import torch

        weights = select(model, factors.moved(self.schedule, self.round_number))
        first_block = sequences.first_adapted_block(weights)
        keeps = not (guidance and guidance.rewrites) and sequences.can_be_cut(model, first_block)
        frozen = sequences.FrozenPrefix(first_block=first_block) if keeps else None
        optimizer = torch.optim.AdamW(
            groups(weights, self.section.learning_rate, self.b_learning_rate_factor),
            weight_decay=self.section.weight_decay,
            fused=True,
        )
        for step in range(event.steps):
            weights = select(model, factors.active(self.schedule, self.round_number, step))
            sampled = bench.noise.poisson_sample(len(units), event.sample_rate)
            examples: Sequence[TokenSequence] = [example for index in sampled for example in units[int(index)]]
            summed = clipped_sum(
                model,
                guidance.texts(model, examples, step) if guidance else examples,
                clip_norm=gaussian.usable_clip(event.clip_norm) / constants.max_rows_per_unit,
                max_batch_tokens=self.section.micro_batch_tokens,
                pad_id=bench.model.tokenizer.pad_token_id,
                engine=self.section.engine,
                frozen=frozen,
                losses=guidance.losses if guidance else None,
            )
            noisy = gaussian.release(
                summed.tensors, clip_norm=event.clip_norm, noise_multiplier=event.noise_multiplier, noise=bench.noise
            )
            del sampled, examples, summed
            for weight, total in zip(weights.values(), noisy, strict=True):
                mean = (total / constants.expected_batch).astype(np.float32)
                weight.grad = torch.from_numpy(self.finish(mean) if self.finish else mean)
            optimizer.step()
            optimizer.zero_grad()


def select(model: Any, active: Sequence[Factor]) -> dict[str, Any]:
    """Let the active factors of an attached adapter ask for a gradient, and no others; return them by name.

    Raises: AdapterMismatch when there are none: cores, of an adapter that has none.
    """
    for name, weight in lora.parameters(model).items():
        weight.requires_grad_(name.rsplit(".", 1)[-1] in active)
    found = trained(model)
    if not found:
        raise AdapterMismatch(f"the adapter has no {', '.join(active)} to train; Fed-SB needs one with cores")
    return found


def groups(weights: Mapping[str, Any], learning_rate: float, b_factor: float) -> list[dict[str, Any]]:
    """Return the parameters for an optimizer, b with a learning rate of its own where it has one."""
    if b_factor == 1:
        return [{"params": list(weights.values()), "lr": learning_rate}]
    found = [
        {"params": [weight for name, weight in weights.items() if name.endswith(".b") == b], "lr": rate}
        for b, rate in ((False, learning_rate), (True, learning_rate * b_factor))
    ]
    return [group for group in found if group["params"]]
