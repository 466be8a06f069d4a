"""No synthetic text: the sites send adapters, nobody writes from them, and no lesson is taught.

What is left of a round is federated fine-tuning: with `server.carries = "merged"` the next round trains on from the
aggregate. The comparison that says what the knowledge loop adds, and the place of every federated-LoRA method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fl_app.config import Section
from fl_app.types import Material, ReleaseSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Adapter, Draft
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class NoDrafts(Section):
    """[server.synthesizer] kind = "no_drafts"."""

    writes_from: ClassVar[Literal["adapter"]] = "adapter"
    kind: Literal["no_drafts"]
    voices: Literal["merged"] = "merged"

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage."""
        del lab
        return Silence()


class Silence:
    """A `Synthesizer` that asks for adapters and writes nothing."""

    @property
    def asks(self) -> ReleaseSpec:
        """An adapter of every site."""
        return ReleaseSpec()

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return nothing."""
        del target, earlier, rng, round_number
        return Material()

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return no draft."""
        del voices, rng, round_number
        return ()
