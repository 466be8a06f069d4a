"""DistilDP's tuner: the target learns from the professional's whole distribution, not from the word it chose.

    L = (1 - w) * CE + w * t^2 * KL(softmax(z_T / t) || softmax(z_S / t)) + hidden_weight * MSE(last states)

per scored token of an answer, the mean over an answer's tokens, then over the answers (`fl_app.distillation`). The
published code sums the KL over positions and averages the cross entropy, so its w = 0.4 acts like 0.988;
`normalise = "paper"` does the same. Instructions that are rehearsed carry cross entropy alone: the professional
answers messages, what they look like is for the sites' adapter to say.

The teacher is the lab's professional on the same chat prompt, the student the local model with the target adapter;
both must share one vocabulary. Lessons are released text, so all of this is post-processing and costs no budget.

Source: DistilDP (Flemings & Annavaram 2024, 2403.00932), section 3 and its loss; w = 0.4 and t = 1 are its choices,
though for a sum over positions. Ours differs in the mean over tokens, in never learning padding or prompts, in the
student being an adapter, and in a learned projection where widths differ: trained beside the adapter, then dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fl_app.distillation import DistilLoss, Normalise, Teacher, Weights, check_pair
from strategies.tuning import Tuning, TuningSection, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Adapter, Lesson
    from strategies.lab import Lab
    from strategies.stages import Tuner

PLAIN = Weights()


class DistilDp(TuningSection):
    """[server.tuner] kind = "distil_dp".

    `soft_weight` 0 and `hidden_weight` 0 is `sft` to the bit, whatever the professional is.
    """

    kind: Literal["distil_dp"]
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.4
    temperature: Annotated[float, Field(ge=0.1, le=100)] = 1.0
    hidden_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    normalise: Normalise = "token"

    def build(self, lab: Lab) -> Tuner:
        """Return the stage. Raises: ConfigInvalid when professional and local model do not share a vocabulary."""
        if self.soft_weight or self.hidden_weight:
            local, teacher = lab.local, lab.professional
            check_pair(local.model, local.tokenizer, teacher.model, teacher.tokenizer, where="server.tuner")
        return SoftTuning(section=self, lab=lab)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTuning:
    """A `Tuner` with a teacher."""

    section: DistilDp
    lab: Lab

    def __call__(self, adapter: Adapter, lessons: Sequence[Lesson], rng: np.random.Generator) -> Adapter:
        """Return the tuned adapter; without lessons, the same one.

        Raises: RoundFailed when too many gradients, or the result, are not finite: the last good target then stays.
        """
        section = self.section
        encoded = encode(section, self.lab, lessons, rng)
        examples = (*encoded.answers, *encoded.rehearsed)
        told = Weights(hard=1 - section.soft_weight, soft=section.soft_weight, hidden=section.hidden_weight)
        if not (examples and told.teacher_needed):
            return Tuning(section=section, lab=self.lab).fit(adapter, examples, rng)
        teacher = Teacher(self.lab.professional.model)
        if section.epochs > 1:
            teacher.keep(encoded.answers)
        answers = {id(one) for one in encoded.answers}
        projection = self._projection(teacher.width, rng)
        losses = DistilLoss(
            teacher=teacher,
            weigh=lambda one: told if id(one) in answers else PLAIN,
            temperature=section.temperature,
            normalise=section.normalise,
            projection=projection,
        )
        beside = () if projection is None else (projection,)
        return Tuning(section=section, lab=self.lab, losses=losses, beside=beside).fit(adapter, examples, rng)

    def _projection(self, width: int, rng: np.random.Generator) -> Any:
        """Return a fresh map from the student's states to the teacher's where they differ in width, else None."""
        own = int(self.lab.local.model.get_output_embeddings().weight.shape[1])
        if not self.section.hidden_weight or own == width:
            return None
        import torch

        drawn = rng.normal(0, own**-0.5, (width, own))
        return torch.nn.Parameter(torch.from_numpy(drawn).float())
