"""Supervised fine-tuning of the target adapter on lessons, with the loss on the answer alone.

Steps, batches, schedule and rehearsal are those of `strategies.tuning`.

Source: KnowledgeSG (2410.05725), step 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strategies.tuning import Tuning, TuningSection, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.sequences import TokenSequence
    from fl_app.types import Adapter, Lesson
    from strategies.lab import Lab
    from strategies.stages import Tuner


class Sft(TuningSection):
    """[server.tuner] kind = "sft"."""

    kind: Literal["sft"]

    def build(self, lab: Lab) -> Tuner:
        """Return the stage."""
        return SupervisedTuning(section=self, lab=lab)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedTuning:
    """A `Tuner`."""

    section: Sft
    lab: Lab

    def __call__(self, adapter: Adapter, lessons: Sequence[Lesson], rng: np.random.Generator) -> Adapter:
        """Return the tuned adapter; without lessons, the same one. Raises: RoundFailed, as `fit`."""
        encoded = encode(self.section, self.lab, lessons, rng)
        return self.fit(adapter, (*encoded.answers, *encoded.rehearsed), rng)

    def fit(self, adapter: Adapter, examples: Sequence[TokenSequence], rng: np.random.Generator) -> Adapter:
        """Return the adapter tuned on token sequences; without any, the same one.

        Raises: RoundFailed when too many gradients, or the result, are not finite: the last good target then stays.
        """
        return Tuning(section=self.section, lab=self.lab).fit(adapter, examples, rng)
