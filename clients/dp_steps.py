"""DP-AdamW on LoRA factors: the steps that every private adapter learner takes; learners say which factors move.

    sample units -> clipped sum -> noise on the sum -> public normaliser -> AdamW

Per step: Poisson-sample units at the public rate, clip each one's gradient jointly over all trained factors, add
Gaussian noise to the sum, divide by the public expected batch, take an AdamW step. The number of steps is a public
constant; an empty sample is a step of noise alone. Optimizer state is fresh in every round and made of noised
gradients only; nothing else of a step leaves this function.

A privacy unit that is a column with up to k rows is sampled as a whole, and each of its rows is clipped to C / k:
the unit's contribution stays within C.

Source: Abadi et al. 2016 (1607.00133) with AdamW on the noised mean (McMahan et al. 2018, 1812.06210); ours differs in
the public normaliser and step count, which theirs derive from the data, and in noise on a lattice
(`fl_app.privacy.gaussian`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from clients.per_example import Engine, clipped_sum, trained
from clients.units import Learns, encoded_units
from fl_app import lora, sequences
from fl_app.config import Section
from fl_app.errors import PolicyRefusal
from fl_app.privacy import gaussian
from fl_app.types import AdapterRelease, DpReceipt, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from clients.per_example import RowLosses
    from clients.private_rows import PrivateRows
    from clients.stages import PublicConstants, Workbench
    from fl_app.sequences import TokenSequence
    from fl_app.types import Adapter, ReleaseKind


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


@dataclass(frozen=True, slots=True, kw_only=True)
class DpAdapterLearner:
    """A `Learner` that moves the factors named by `trains` and leaves the others as they came, to the bit.

    `guide` gives what else it goes by; without it, the loss is that of the rows' own words. `ready` raises when
    something it needs is not here; it is asked before a receipt is announced, so that nothing is reserved in vain.
    """

    section: DpStepsSection
    trains: tuple[Literal["a", "b"], ...]
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
        event = PoissonGaussian(
            noise_multiplier=noise,
            sample_rate=constants.sample_rate,
            steps=self.section.steps,
            clip_norm=self.section.clip_norm,
        )
        return (DpReceipt(event=event, unit=constants.unit),)

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
        event = receipts[0].event if receipts else None
        if not isinstance(event, PoissonGaussian) or receipts != self.announce(constants, event.noise_multiplier):
            raise PolicyRefusal(f"receipts {receipts} were not announced by this learner")
        guidance = self.guide(start, bench) if self.guide else None
        units = encoded_units(rows, self.section.learns, constants, bench)
        if guidance:
            guidance.meet([example for unit in units for example in unit])
        model = lora.attach(bench.model, start)
        for name, weight in lora.parameters(model).items():
            weight.requires_grad_(name.rsplit(".", 1)[-1] in self.trains)
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

        weights = trained(model)
        first_block = sequences.first_adapted_block(weights)
        keeps = not (guidance and guidance.rewrites) and sequences.can_be_cut(model, first_block)
        frozen = sequences.FrozenPrefix(first_block=first_block) if keeps else None
        optimizer = torch.optim.AdamW(
            weights.values(), lr=self.section.learning_rate, weight_decay=self.section.weight_decay, fused=True
        )
        for step in range(event.steps):
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
                weight.grad = torch.from_numpy((total / constants.expected_batch).astype(np.float32))
            optimizer.step()
