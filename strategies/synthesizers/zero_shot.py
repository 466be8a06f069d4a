"""The floor without any tuning: the bare local model is asked, in its chat form, for a text of each code.

No site is asked for anything and no adapter is used, not even a public start, so nothing is spent. What the model
knows of the domain is what it was published with, and what a few fixed public `shots` show it.

Source: the zero-shot and few-shot rows of Gemma's DP recipe (specs, 5.2: MAUVE 0.006 and 0.008 against 0.795).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from fl_app.types import Material, ReleaseSpec
from strategies.coded import (
    CODE_SLOT,
    DESCRIBED,
    SamplingSection,
    asked_for,
    drafted,
    evenly,
    read_codes,
    unquoted,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Adapter, ControlCode, Draft, ReleaseKind
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class ZeroShot(SamplingSection):
    """[server.synthesizer] kind = "zero_shot": `drafts` per round, codes drawn evenly from the file `codes`.

    `template` holds {code} once, where the code's text goes. `shots` are public examples, the same in every prompt.
    """

    writes_from: ClassVar[ReleaseKind | None] = None
    kind: Literal["zero_shot"]
    codes: str
    drafts: Annotated[int, Field(ge=1, le=1_000_000)]
    template: str = DESCRIBED
    shots: list[str] = Field(default_factory=list)
    voices: Literal["merged"] = "merged"

    @field_validator("template")
    @classmethod
    def _has_slot(cls, template: str) -> str:
        if template.count(CODE_SLOT) != 1:
            raise ValueError(f"template must hold {CODE_SLOT} exactly once, where the code's text goes")
        return template

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage over the codes of the file.

        Raises: ConfigInvalid when the codes are missing.
        """
        return Asking(section=self, lab=lab, codes=read_codes(Path(self.codes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A `Synthesizer` that needs no site."""

    section: ZeroShot
    lab: Lab
    codes: Sequence[ControlCode]

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
        """Return `drafts` texts; every code is used equally often, give or take one. No adapter is looked at."""
        del voices
        codes = evenly(self.codes, self.section.drafts, rng)
        model = self.lab.local_with(None, "W_loc")
        prompts = [asked_for(model, code, self.section.template, self.section.shots) for code in codes]
        texts = [unquoted(text) for text in self.section.sample(model, prompts, rng)]
        return drafted(texts, codes, method=self.section.kind, round_number=round_number)
