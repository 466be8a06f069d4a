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
(`central_dp`) a single release is not covered by it, and "each_site" is refused. All sites write in the same batches,
each row under its own site's adapter and from a stream of its own (`fl_app.row_adapters`).

Source: Kurakin et al. 2023 (2306.01684), conditional sampling after prefix-LM tuning; KnowledgeSG (2410.05725) samples
from prompts with three raw private rows, which voids the guarantee (specs, 1.7): ours does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fl_app.errors import RoundFailed
from fl_app.types import Material, ReleaseSpec
from strategies.coded import SamplingSection, by_counts, drafted, evenly, read_codes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from fl_app.types import Adapter, ControlCode, Draft, ReleaseKind
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class ControlCodes(SamplingSection):
    """[server.synthesizer] kind = "control_codes": `drafts` per round, under the codes of the file `codes`.

    `quota` says how often each: evenly, or as the sites' noisy counts say (`[client.survey]`).
    With fewer `drafts` than sites under voices = "each_site", the last sites by name write none.
    """

    writes_from: ClassVar[ReleaseKind | None] = "adapter"
    kind: Literal["control_codes"]
    codes: str
    drafts: Annotated[int, Field(ge=1, le=1_000_000)]
    voices: Literal["merged", "each_site"] = "merged"
    quota: Literal["even", "survey"] = "even"

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
        if self.section.quota == "survey":
            chosen = by_counts(self.codes, voices.surveys, self.section.drafts, rng)
        else:
            chosen = evenly(self.codes, self.section.drafts, rng)
        if self.section.voices == "merged":
            texts = self._merged(voices.merged, chosen, rng)
            return self._drafts(texts, [""] * len(chosen), chosen, round_number)
        if not voices.by_site:
            raise RoundFailed(
                f'round {round_number}: server.synthesizer.voices = "each_site", and no single release may write: the '
                'aggregator made only the merged adapter private; write voices = "merged"'
            )
        sites = sorted(voices.by_site)
        who = [sites[place % len(sites)] for place in range(len(chosen))]
        # Each site's run of `chosen`, dealt to its places.
        runs = iter(chosen)
        hands = {site: [next(runs) for one in who if one == site] for site in sites}
        codes = [hands[site][place // len(sites)] for place, site in enumerate(who)]
        return self._drafts(self._each(voices.by_site, who, codes, rng), who, codes, round_number)

    def _merged(self, adapter: Adapter, codes: Sequence[ControlCode], rng: np.random.Generator) -> list[str]:
        """Return a text per code, by the merged adapter."""
        writer = self.lab.local_with(adapter, "W_loc + sites")
        return self.section.sample(writer, [code.text for code in codes], rng)

    def _each(
        self,
        adapters: Mapping[str, Adapter],
        who: Sequence[str],
        codes: Sequence[ControlCode],
        rng: np.random.Generator,
    ) -> list[str]:
        """Return a text per code, each by its site's adapter; all sites write in the same batches."""
        texts = self.lab.local_with_rows({site: adapters[site] for site in sorted(set(who))}).generate(
            [code.text for code in codes],
            who,
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            rng=rng,
        )
        return [text.strip() for text in texts]

    def _drafts(
        self, texts: Sequence[str], who: Sequence[str], codes: Sequence[ControlCode], round_number: int
    ) -> tuple[Draft, ...]:
        return drafted(texts, codes, method=self.section.kind, round_number=round_number, voices=who)
