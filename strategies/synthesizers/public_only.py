"""The floor without private data: text under public control codes by a model that no site has touched.

No site is asked for anything, so nothing is spent. Every method that spends must write better text than this, or its
budget bought nothing; a run with this kind and the same start, codes and filters gives the figure to compare with.

Source: the "epsilon 0" rows of InvisibleInk (2507.02974), where public generation came close to private prediction at
epsilon 1 (specs, 3.6).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fl_app.types import Material, ReleaseSpec
from strategies.coded import SamplingSection, drafted, evenly, fixed_adapter, read_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Adapter, ControlCode, Draft, ReleaseKind
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class PublicOnly(SamplingSection):
    """[server.synthesizer] kind = "public_only": `drafts` per round, codes drawn evenly from the file `codes`.

    `writer` is a PEFT directory made of public text, such as the run's own `lora.start`: then every round is written
    by the same model. Empty: the target writes, which begins as the start and learns its own filtered text.
    """

    writes_from: ClassVar[ReleaseKind | None] = None
    kind: Literal["public_only"]
    codes: str
    drafts: Annotated[int, Field(ge=1, le=1_000_000)]
    writer: str = ""
    voices: Literal["merged"] = "merged"

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage over the codes of the file.

        Raises: ConfigInvalid when the codes or the writer are missing; AdapterMismatch for another base's adapter.
        """
        codes = read_codes(Path(self.codes))
        return PublicWriting(section=self, lab=lab, codes=codes, writer=fixed_adapter(lab, self.writer))


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicWriting:
    """A `Synthesizer` that needs no site."""

    section: PublicOnly
    lab: Lab
    codes: Sequence[ControlCode]
    writer: Adapter | None

    @property
    def asks(self) -> ReleaseSpec:
        """Nothing of anybody."""
        return ReleaseSpec(kind=None)

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return nothing."""
        del target, earlier, rng, round_number
        return Material()

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return `drafts` texts; every code is used equally often, give or take one."""
        codes = evenly(self.codes, self.section.drafts, rng)
        writer = self.lab.local_with(self.writer or voices.merged, "W_loc, public")
        texts = self.section.sample(writer, [code.text for code in codes], rng)
        return drafted(texts, codes, method=self.section.kind, round_number=round_number)
