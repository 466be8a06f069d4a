"""Synthetic instructions that the sites wrote themselves, by DP prediction: a text released is a draft.

The server writes nothing. What it can do for the sites is to send them public texts, one of which stands in each public
prompt: the better the public text, the less a site has to pay to move away from it. In later rounds earlier drafts of
the same code may stand there; they are post-processing of releases that were paid for.

Texts of different sites alternate, so that a filter that keeps the first of two alike prefers no site. Each draft
carries its site in `origin.voice`: a hostile site is in its own drafts and nowhere else, and `site_share` holds its
share of what is kept.

Source: Amin et al. 2024 (2407.12108v2) and InvisibleInk 2025 (2507.02974) for what arrives; the texts go on as they
are, the paper's filters are the pipeline's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fl_app.config import Section
from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.types import CodedText, Draft, Material, Origin, ReleaseKind, ReleaseSpec, TextRelease
from strategies.coded import draft, read_coded_texts, read_codes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from fl_app.types import Adapter, ControlCode
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class ReleasedTexts(Section):
    """[server.synthesizer] kind = "released_texts".

    `codes` is the file of public control codes; a site may send `max_texts` texts of `max_bytes` each. `learner` is the
    kind of [client.learner], for the provenance. `public_texts` is a file of JSON lines with code and text, `shots` how
    many of a code are sent; with `recycle` kept drafts of former rounds take their place as soon as there are any.
    """

    writes_from: ClassVar[ReleaseKind | None] = "text"
    kind: Literal["released_texts"]
    codes: str
    max_texts: Annotated[int, Field(ge=1, le=1_000_000)]
    max_bytes: Annotated[int, Field(ge=1, le=1_000_000)] = 4096
    learner: str = ""
    public_texts: str = ""
    shots: Annotated[int, Field(ge=1, le=1000)] = 4
    recycle: bool = False
    voices: Literal["merged"] = "merged"

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage. Raises: ConfigInvalid for a file that is missing or not understood."""
        codes = {code.id: code for code in read_codes(Path(self.codes))}
        key = "server.synthesizer.public_texts"
        shots = read_coded_texts(Path(self.public_texts), key) if self.public_texts else ()
        if odd := sorted({one.code for one in shots} - codes.keys()):
            raise ConfigInvalid(f"{key}: {self.public_texts} holds texts under {odd[0]!r}, which {self.codes} does not")
        return Collected(section=self, codes=codes, public_texts=shots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """A `Synthesizer`."""

    section: ReleasedTexts
    codes: Mapping[str, ControlCode]
    public_texts: Sequence[CodedText]

    @property
    def asks(self) -> ReleaseSpec:
        """Texts under our codes, so many and so long."""
        return ReleaseSpec(
            kind="text",
            codes=frozenset(self.codes),
            max_texts=self.section.max_texts,
            max_bytes=self.section.max_bytes,
        )

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return up to `shots` texts of each code, drawn without replacement; none where there is none."""
        sent: list[CodedText] = []
        for code in sorted(self.codes):
            told = [draft.instruction for draft in earlier if draft.origin.code == code] if self.section.recycle else []
            texts = told or [one.text for one in self.public_texts if one.code == code]
            chosen = rng.permutation(len(texts))[: self.section.shots]
            sent += [CodedText(code=code, text=texts[int(place)]) for place in chosen]
        return Material(texts=tuple(sent))

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return every text as a draft, sites taking turns, each in its own order. `rng` is not used.

        Raises: RoundFailed when no site's texts may be used, or one is under a code that we do not have.
        """
        texts = {site: one.texts for site, one in sorted(voices.releases.items()) if isinstance(one, TextRelease)}
        if not texts:
            raise RoundFailed(
                f"round {round_number}: no site released texts; [client.learner] must be one that writes, and the "
                "aggregator one that keeps releases apart"
            )
        drafts: list[Draft] = []
        for turn in range(max(len(one) for one in texts.values())):
            for site, one in texts.items():
                if turn < len(one):
                    drafts.append(self._draft(one[turn], site, turn, round_number))
        return tuple(drafts)

    def _draft(self, text: CodedText, site: str, turn: int, round_number: int) -> Draft:
        if text.code not in self.codes:
            raise RoundFailed(f"round {round_number}: site {site} wrote under {text.code[:80]!r}, no code of ours")
        origin = Origin(
            round=round_number,
            method=f"{self.section.kind}:{self.section.learner}" if self.section.learner else self.section.kind,
            code=text.code,
            stream=str(turn),
            prompt=self.codes[text.code].text,
            voice=site,
        )
        encodable = text.text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate would stop later stages
        return draft(encodable.strip(), origin)
