"""Plain LoRA: no clip, no noise, no privacy. The comparison that says what privacy costs, for every schedule.

`schedule` says which factors learn when (`fl_app.factors`), so that FFA-LoRA, RoLoRA, LA-LoRA and Fed-SB have their
comparison too. Sampler, normaliser, loss and optimizer are those of `clients.dp_steps`, so that clip and noise are all
that differs. Its release has no receipt and its epsilon is infinite; a site lets it run only when its own policy says
`limits.non_private = true`, and its ledger then never certifies anything again.

Source: Hu et al. 2021 (LoRA, 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from clients.dp_steps import select
from clients.per_example import plain_sum
from clients.units import Learns, encoded_units
from fl_app import factors, lora
from fl_app.config import Section
from fl_app.errors import PolicyRefusal
from fl_app.types import AdapterRelease, Schedule

if TYPE_CHECKING:
    from clients.private_rows import PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.types import Adapter, DpReceipt, ReleaseKind


class PlainLora(Section):
    """[client.learner] kind = "plain_lora"."""

    kind: Literal["plain_lora"]
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 512
    learns: Learns = "instruction"
    schedule: Schedule = "both"

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return PlainLoraLearner(section=self, round_number=round_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainLoraLearner:
    """A `Learner` without a receipt."""

    section: PlainLora
    round_number: int
    release_kind: ReleaseKind = "adapter"
    private: bool = False
    noise: float | None = None
    clip_norm: float = float("inf")

    @property
    def steps(self) -> int:
        """Steps of one round."""
        return self.section.steps

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return no receipt: no mechanism bounds what the release says."""
        return ()

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> AdapterRelease:
        """Return the trained adapter. Raises: PolicyRefusal for a receipt, which would promise what is not kept."""
        import torch

        if receipts:
            raise PolicyRefusal(f"receipts {receipts} were not announced by this learner: plain LoRA has none")
        units = encoded_units(rows, self.section.learns, constants, bench)
        model = lora.attach(bench.model, start, bench.blocks, keep_cores=True)
        schedule = self.section.schedule
        weights = select(model, factors.moved(schedule, self.round_number))
        optimizer = torch.optim.AdamW(
            weights.values(), lr=self.section.learning_rate, weight_decay=self.section.weight_decay, fused=True
        )
        for step in range(self.section.steps):
            weights = select(model, factors.active(schedule, self.round_number, step))
            summed = plain_sum(
                model,
                [
                    example
                    for index in bench.noise.poisson_sample(len(units), constants.sample_rate)
                    for example in units[int(index)]
                ],
                max_batch_tokens=self.section.micro_batch_tokens,
                pad_id=bench.model.tokenizer.pad_token_id,
            )
            for weight, total in zip(weights.values(), summed, strict=True):
                weight.grad = torch.from_numpy((total / constants.expected_batch).astype(np.float32))
            optimizer.step()
            optimizer.zero_grad()
        del units
        return AdapterRelease(adapter=lora.read(model, alpha=start.alpha, base=start.base))
