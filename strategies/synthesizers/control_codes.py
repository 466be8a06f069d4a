"""Synthetic instructions from public control codes, written by W_loc with the sites' adapters.

The prompt is a control code's text and nothing else: no private exemplar, ever. What the model knows of private
messages it knows through DP releases, so everything it writes is post-processing of them.

`voices` says whose adapter writes:

| voices      | who writes                                    | one hostile site                                    |
|-------------|-----------------------------------------------|-----------------------------------------------------|
| "merged"    | the merged adapter                            | is in every draft, as far as the aggregator lets it |
| "each_site" | every release that was used, an equal share   | is in its own drafts and nowhere else; the filter   |
|             | of the drafts each, the remainder by name     | `site_share` holds its share of what is kept        |

A draft of "each_site" carries its site in `origin.voice`, so text can be traced to the release that wrote it. That is
post-processing of that release and costs its rows nothing more; but where the promise is at client level
(`central_dp`) a single release is not covered by it, and "each_site" is refused.

Source: Kurakin et al. 2023 (2306.01684), conditional sampling after prefix-LM tuning; KnowledgeSG (2410.05725) samples
from prompts with three raw private rows, which voids the guarantee (specs, 1.7): ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app.errors import RoundFailed
from fl_app.types import Material, ReleaseSpec
from strategies.coded import SamplingSection, drafted, evenly, read_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from fl_app.types import Adapter, ControlCode, Draft
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class ControlCodes(SamplingSection):
    """[server.synthesizer] kind = "control_codes": `drafts` per round, codes drawn evenly from the file `codes`.

    With fewer `drafts` than sites under voices = "each_site", the last sites by name write none.
    """

    kind: Literal["control_codes"]
    codes: str
    drafts: Annotated[int, Field(ge=1, le=1_000_000)]
    voices: Literal["merged", "each_site"] = "merged"

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage over the codes of the file.

        Raises: ConfigInvalid when the file is missing or holds no code.
        """
        return CodedSampling(section=self, lab=lab, codes=read_codes(Path(self.codes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSampling:
    """A `Synthesizer`."""

    section: ControlCodes
    lab: Lab
    codes: Sequence[ControlCode]

    @property
    def asks(self) -> ReleaseSpec:
        """Adapters."""
        return ReleaseSpec(codes=frozenset(code.id for code in self.codes))

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return nothing: a site trains on its rows alone."""
        return Material()

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return `drafts` texts; every code is used equally often, give or take one, in random order.

        Each voice takes a run of that order, so it uses codes equally often give or take two. Drafts of several voices
        alternate, so that a filter that keeps the first of two alike prefers no site's whole batch to another's.

        Raises: RoundFailed when each site is to write and no release may.
        """
        chosen = evenly(self.codes, self.section.drafts, rng)
        if self.section.voices == "merged":
            return self._written(voices.merged, "", chosen, range(len(chosen)), rng, round_number)
        if not voices.by_site:
            raise RoundFailed(
                f'round {round_number}: server.synthesizer.voices = "each_site", and no single release may write: the '
                'aggregator made only the merged adapter private; write voices = "merged"'
            )
        drafts: list[Draft] = []
        begin = 0
        for number, site in enumerate(sorted(voices.by_site)):
            places = range(number, len(chosen), len(voices.by_site))
            codes = chosen[begin : begin + len(places)]
            begin += len(places)
            drafts += self._written(voices.by_site[site], site, codes, places, rng, round_number)
        return tuple(sorted(drafts, key=lambda draft: int(draft.origin.stream)))

    def _written(
        self,
        adapter: Adapter,
        voice: str,
        codes: Sequence[ControlCode],
        places: Sequence[int],
        rng: np.random.Generator,
        round_number: int,
    ) -> tuple[Draft, ...]:
        """Return what one voice writes, a text per code; `places` are its drafts' numbers in the round."""
        if not codes:
            return ()
        writer = self.lab.local_with(adapter, f"W_loc + {voice or 'sites'}")
        texts = self.section.sample(writer, [code.text for code in codes], rng)
        return drafted(texts, codes, method=self.section.kind, round_number=round_number, places=places, voice=voice)
