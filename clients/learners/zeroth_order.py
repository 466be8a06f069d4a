"""DP zeroth-order training: every step releases one number, the noised slope of the loss along a public direction.

    g_i = (loss_i(w + eps z) - loss_i(w - eps z)) / (2 eps),   g = (sum of g_i clipped to C + sigma C N(0, 1)) / batch

Two forward passes and no backward one. z is public, drawn after the broadcast and from names alone
(`fl_app.zeroth_order`), so a unit moves the sum by C at most whatever it says, and the noise is on one number however
many coordinates move. What is done with g is post-processing: it is quantised to a byte before it is used, so that the
site's adapter is the one that anybody makes of the bytes.

A row's two losses are functions of that row alone, in bits as well: they are computed in `per_example.row_losses`, in
isolated batches where kernels keep rows apart. A slope that is not finite counts zero.

In bfloat16 a loss is right to three digits or so, and differences over a small `perturbation` are rounding; take a
larger one, or a model in float32. No weight decay and no schedule of rates: a replay knows neither.

Source: Spall 1992 (SPSA); Malladi et al. 2023 (MeZO, 2305.17333); Tang et al. 2024 (DP-ZO, 2401.04343) and Zhang et al.
2023 (DPZero, 2310.09639) for clip and noise on the scalar; Zelikman et al. 2023 (Just One Byte, 2306.10015), Qin et al.
2024 (FedKSeed, 2312.06353). Ours differs from DPZero in Poisson sampling where it is accounted (theirs shuffles), with
sensitivity C of add-or-remove (2C there); from Just One Byte in noise; from all in public step count and normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from clients.dp_steps import announced, receipt, select
from clients.per_example import row_losses
from clients.units import Learns, encoded_units
from fl_app import factors, lora, sequences
from fl_app.config import Section
from fl_app.privacy import gaussian
from fl_app.types import AdapterRelease, Schedule
from fl_app.zeroth_order import Walk, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    import numpy.typing as npt

    from clients.private_rows import PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.sequences import TokenSequence
    from fl_app.types import Adapter, DpReceipt, Floats, ReleaseKind
    from fl_app.zeroth_order import Direction

    Doubles = npt.NDArray[np.float64]


class ZerothOrder(Section):
    """[client.learner] kind = "zeroth_order". `clip_norm` bounds a row's slope; 16 is what a byte can still tell.

    A byte tells no slope below 0.004: where noise_multiplier * clip_norm / expected_batch is not well above that, most
    steps stand still, and are paid for.
    """

    kind: Literal["zeroth_order"]
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    clip_norm: Annotated[float, Field(ge=1e-2, le=16)] = 1.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] = factors.ZEROTH_ORDER_RATE
    perturbation: Annotated[float, Field(ge=1e-6, le=1)] = 1e-3
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 512
    learns: Learns = "instruction"
    schedule: Schedule = "both"

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return ZerothOrderLearner(section=self, round_number=round_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZerothOrderLearner:
    """A `Learner` whose release is as many numbers as it takes steps, and the adapter that they make."""

    section: ZerothOrder
    round_number: int
    release_kind: ReleaseKind = "adapter"
    private: bool = True
    noise: float | None = None

    @property
    def steps(self) -> int:
        """Noisy steps of one round."""
        return self.section.steps

    @property
    def clip_norm(self) -> float:
        """Bound on one unit's contribution to the slope of one step."""
        return self.section.clip_norm

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the receipt of one round."""
        return (receipt(self.section, constants, noise),)

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> AdapterRelease:
        """Return the scalars and the adapter that `zeroth_order.replay` makes of them.

        Guarantee: `receipts`, for units of `constants.unit`, under add-or-remove of one unit.
        Raises: PolicyRefusal when the receipts are not those that this learner announced.
        """
        event = announced(receipts, self.section, constants)
        one = self.section
        units = encoded_units(rows, one.learns, constants, bench)
        model = lora.attach(bench.model, start, bench.blocks, keep_cores=True)
        select(model, factors.moved(one.schedule, self.round_number))
        losses_of = _losses(model, one.micro_batch_tokens, bench.model.tokenizer.pad_token_id)
        walk = Walk(
            start,
            run=bench.run,
            site=bench.site,
            round_number=self.round_number,
            learning_rate=one.learning_rate,
            schedule=one.schedule,
        )
        clip = gaussian.usable_clip(event.clip_norm) / constants.max_rows_per_unit
        scalars = np.zeros(event.steps, np.float32)
        for step in range(event.steps):
            direction = walk.direction(step)
            sampled = bench.noise.poisson_sample(len(units), event.sample_rate)
            examples = [example for index in sampled for example in units[int(index)]]
            total = clipped_slope(losses_of, walk, direction, examples, perturbation=one.perturbation, clip_norm=clip)
            (noisy,) = gaussian.release(
                [total], clip_norm=event.clip_norm, noise_multiplier=event.noise_multiplier, noise=bench.noise
            )
            del sampled, examples, total
            (scalars[step],) = decode(encode(noisy / constants.expected_batch))
            walk.go(direction, float(scalars[step]))
        del units
        return AdapterRelease(adapter=walk.adapter, scalars=scalars)


def clipped_slope(
    losses_of: Callable[[Mapping[str, Floats], Sequence[TokenSequence]], Doubles],
    walk: Walk,
    direction: Direction,
    examples: Sequence[TokenSequence],
    *,
    perturbation: float,
    clip_norm: float,
) -> Doubles:
    """Return the sum of the examples' slopes along `direction`, each clipped to `clip_norm`; 0 for no examples.

    Guarantee: adding or removing an example moves it by at most `clip_norm`, up to 2^-53 for each addition. Shape (1,).
    """
    above = losses_of({**walk.weights, **walk.beside(direction, perturbation)}, examples)
    below = losses_of({**walk.weights, **walk.beside(direction, -perturbation)}, examples)
    with np.errstate(invalid="ignore", over="ignore"):
        slopes = (above - below) / (2 * perturbation)
    return np.array([np.where(np.isfinite(slopes), slopes.clip(-clip_norm, clip_norm), 0.0).sum()])


def _losses(
    model: Any, max_batch_tokens: int, pad_id: int
) -> Callable[[Mapping[str, Floats], Sequence[TokenSequence]], Doubles]:
    """Return a function: (factors, examples) -> each example's loss with the model at these factors."""
    import torch

    slots = lora.parameters(model)
    first_block = sequences.first_adapted_block(slots)
    keeps = sequences.can_be_cut(model, first_block)
    frozen = sequences.FrozenPrefix(first_block=first_block) if keeps else None

    def losses_of(weights: Mapping[str, Floats], examples: Sequence[TokenSequence]) -> Doubles:
        with torch.no_grad():
            for name, values in weights.items():
                slots[name].copy_(torch.from_numpy(values))
        return row_losses(model, examples, max_batch_tokens=max_batch_tokens, pad_id=pad_id, frozen=frozen)

    return losses_of
