"""DP-RoLoRA: the factors take turns by rounds, b in odd ones and a in even ones.

In every round one factor is everybody's, as it was broadcast, so the mean of the other is the mean of the products,
exactly; and noise enters the product once, linearly, as in FFA-LoRA, while both factors come to learn. b begins, since
at b = 0 a has no gradient. Half an adapter travels.

Source: Chen et al. 2025 (RoLoRA, 2502.01755, NeurIPS), section 4: robust federated fine-tuning by alternating
minimisation. Ours differs in the joint clip, noise, sampler and accountant of `clients.dp_steps`, where theirs has
none, and in AdamW state that is fresh in every round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from clients.dp_steps import DpAdapterLearner, DpStepsSection

if TYPE_CHECKING:
    from clients.stages import Learner


class DpRolora(DpStepsSection):
    """[client.learner] kind = "dp_rolora"."""

    kind: Literal["dp_rolora"]

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round, whose number says which factor learns."""
        return DpAdapterLearner(section=self, schedule="rounds", round_number=round_number)
