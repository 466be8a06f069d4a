"""DP-LoRA-SB, the learner of Fed-SB: only an r x r core between two frozen factors learns.

    delta_W = s * b @ core @ a,   gradient of the core = s * b' G a'   (G: the gradient of the whole map)

With orthonormal a and b one step on the core is a step along s^2 b b' G a' a, the projection of G on their spaces. a
and b are everybody's, as they were broadcast, so the mean of the cores is the mean of the updates, exactly; r^2 numbers
a layer travel, so r can be large. Noise on a core adds sigma^2 r^2 to the product, where on b alone it adds sigma^2 r
d_out. The clip is joint over the cores of all layers.

Where a and b come from is the server's matter (`lora.init`): drawn, or taken from the base model. Never from private
gradients: the published code reads them without noise.

Source: Singhal et al. 2025 (Fed-SB, 2502.15436), section 3; LoRA-SB (2411.19557). Ours differs in the start (a core of
zero in directions that saw no data, where theirs begins one step from the base, by private gradients), in AdamW on the
noised mean as in every learner here, and in clip, sampler and accountant of `clients.dp_steps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from clients.dp_steps import DpAdapterLearner, DpStepsSection

if TYPE_CHECKING:
    from clients.stages import Learner


class DpLoraSb(DpStepsSection):
    """[client.learner] kind = "dp_lora_sb"."""

    kind: Literal["dp_lora_sb"]

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return DpAdapterLearner(section=self, schedule="core", round_number=round_number)
