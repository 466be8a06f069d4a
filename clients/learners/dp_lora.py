"""DP-LoRA: DP-AdamW on both factors of every adapted layer.

Source: Liu et al. 2023 (DP-LoRA, 2312.17493) with a joint clip instead of two, Poisson sampling and an accountant over
all steps instead of a per-step formula (their two clips at C have joint sensitivity sqrt(2) C: counting C states an
epsilon of 8.3 where 17.7 is spent); loss on the suffix as in Kurakin et al. 2023 (2306.01684).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from clients.dp_steps import DpAdapterLearner, DpStepsSection

if TYPE_CHECKING:
    from clients.stages import Learner


class DpLora(DpStepsSection):
    """[client.learner] kind = "dp_lora"."""

    kind: Literal["dp_lora"]

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return DpAdapterLearner(section=self, schedule="both", round_number=round_number)
