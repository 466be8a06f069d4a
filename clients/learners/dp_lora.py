"""DP-LoRA: DP-AdamW on both factors of every adapted layer.

Per step: Poisson-sample units at the public rate, clip each one's gradient jointly over all factors, add Gaussian
noise to the sum, divide by the public expected batch, take an AdamW step. The number of steps is a public constant;
an empty sample is a step of noise alone. Optimizer state is fresh in every round and made of noised gradients only.

A privacy unit that is a column with up to k rows is sampled as a whole, and each of its rows is clipped to C / k:
the unit's contribution stays within C.

Source: Liu et al. 2023 (DP-LoRA, 2312.17493) with a joint clip instead of two, Poisson sampling and an accountant over
all steps instead of a per-step formula (specs, 2.2); loss on the suffix as in Kurakin et al. 2023 (2306.01684).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from clients.per_example import Engine, clipped_sum
from fl_app import lora, models, sequences
from fl_app.config import Section
from fl_app.errors import PolicyRefusal
from fl_app.types import AdapterRelease, DpReceipt, PoissonGaussian

if TYPE_CHECKING:
    from clients.private_rows import PrivateRow, PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.sequences import TokenSequence
    from fl_app.types import Adapter


class DpLora(Section):
    """[client.learner] kind = "dp_lora".

    `learns`: the instruction after its control code (what the server needs in order to write new ones), or the
    answer to it in chat form.
    """

    kind: Literal["dp_lora"]
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 1024
    learns: Literal["instruction", "answer"] = "instruction"
    engine: Engine = "hooks"

    def build(self) -> Learner:
        """Return the stage."""
        return DpLoraLearner(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpLoraLearner:
    """A `Learner`."""

    section: DpLora
    release_kind: str = "adapter"

    @property
    def steps(self) -> int:
        """Noisy steps of one round."""
        return self.section.steps

    @property
    def clip_norm(self) -> float:
        """L2 bound on one unit's contribution to one step."""
        return self.section.clip_norm

    def announce(self, constants: PublicConstants, noise_multiplier: float) -> DpReceipt:
        """Return the receipt of one round."""
        event = PoissonGaussian(
            noise_multiplier=noise_multiplier,
            sample_rate=constants.sample_rate,
            steps=self.section.steps,
            clip_norm=self.section.clip_norm,
        )
        return DpReceipt(event=event, unit=constants.unit)

    def __call__(
        self, rows: PrivateRows, start: Adapter, receipt: DpReceipt, constants: PublicConstants, bench: Workbench
    ) -> AdapterRelease:
        """Return the trained adapter.

        Guarantee: `receipt`, for units of `constants.unit`, under add-or-remove of one unit.
        Raises: PolicyRefusal when the receipt is not one that this learner announced.
        """
        import torch

        event = receipt.event
        if not isinstance(event, PoissonGaussian) or receipt != self.announce(constants, event.noise_multiplier):
            raise PolicyRefusal(f"receipt {receipt} was not announced by this learner")
        units = self._units(rows, constants, bench)
        model = lora.attach(bench.model, start)
        weights = list(lora.parameters(model).values())
        optimizer = torch.optim.AdamW(weights, lr=self.section.learning_rate, weight_decay=self.section.weight_decay)
        for _ in range(event.steps):
            sampled = bench.noise.poisson_sample(len(units), event.sample_rate)
            summed = clipped_sum(
                model,
                [example for index in sampled for example in units[int(index)]],
                clip_norm=event.clip_norm / constants.max_rows_per_unit,
                max_batch_tokens=self.section.micro_batch_tokens,
                pad_id=bench.model.tokenizer.pad_token_id,
                engine=self.section.engine,
            )
            for weight, total in zip(weights, summed.tensors, strict=True):
                noise = torch.from_numpy(bench.noise.normal(tuple(total.shape))).double()
                noisy = total.double() + event.noise_multiplier * event.clip_norm * noise
                weight.grad = (noisy / constants.expected_batch).float()
            del sampled, summed
            optimizer.step()
        del units
        return AdapterRelease(adapter=lora.read(model, alpha=start.alpha, base=start.base))

    def _units(
        self, rows: PrivateRows, constants: PublicConstants, bench: Workbench
    ) -> list[tuple[TokenSequence, ...]]:
        """Return the encoded rows of every privacy unit."""
        grouped: dict[str, list[TokenSequence]] = {}
        for row in rows.examples:
            grouped.setdefault(row.unit, []).append(self._encode(row, constants.max_tokens, bench))
        return [tuple(examples) for examples in grouped.values()]

    def _encode(self, row: PrivateRow, max_tokens: int, bench: Workbench) -> TokenSequence:
        tokenizer: Any = bench.model.tokenizer
        if self.section.learns == "answer":
            prefix = models.chat_prompt(tokenizer, row.instruction, bench.system)
            return sequences.encode(tokenizer, prefix, row.output, max_tokens=max_tokens)
        return sequences.encode(tokenizer, bench.codes.get(row.code, ""), row.instruction, max_tokens=max_tokens)
