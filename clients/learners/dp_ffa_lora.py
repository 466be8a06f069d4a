"""DP-FFA-LoRA: A stays as it was broadcast, only B learns.

The update is then linear in what is trained, so noise enters the product once: E|error|^2 = sigma^2 d_out |A|^2, where
training both adds sigma^2 d_in |B|^2 and sigma^4 r d_out d_in. Every site keeps the same A, so the mean of the factors
is the mean of the products. `[lora] init = "orthonormal"` gives A orthonormal rows, which spreads the noise evenly.

Source: Sun et al. 2024 (FFA-LoRA, 2403.12313, ICLR), section 4, with the joint clip, sampler and accountant of
`clients.dp_steps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from clients.dp_steps import DpAdapterLearner, DpStepsSection

if TYPE_CHECKING:
    from clients.stages import Learner


class DpFfaLora(DpStepsSection):
    """[client.learner] kind = "dp_ffa_lora"."""

    kind: Literal["dp_ffa_lora"]

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return DpAdapterLearner(section=self, schedule="b", round_number=round_number)
