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

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app import journal
from fl_app.config import Section
from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.types import ControlCode, Draft, Origin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from fl_app.types import Adapter
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices


class ControlCodes(Section):
    """[server.synthesizer] kind = "control_codes": `drafts` per round, codes drawn evenly from the file `codes`.

    With fewer `drafts` than sites under voices = "each_site", the last sites by name write none.
    """

    kind: Literal["control_codes"]
    codes: str
    drafts: Annotated[int, Field(ge=1, le=1_000_000)]
    voices: Literal["merged", "each_site"] = "merged"
    max_new_tokens: Annotated[int, Field(ge=4, le=4096)] = 64
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage over the codes of the file.

        Raises: ConfigInvalid when the file is missing or holds no code.
        """
        return CodedSampling(section=self, lab=lab, codes=read_codes(Path(self.codes)))


def read_codes(path: Path) -> tuple[ControlCode, ...]:
    """Return the public control codes of a JSON-lines file with `id` and `text`.

    Raises: ConfigInvalid when the file is missing, holds no code, one without id or text, or one id twice.
    """
    if not path.is_file():
        raise ConfigInvalid(f"server.synthesizer.codes: no file at {path!s}; expected JSON lines with id and text")
    codes: dict[str, ControlCode] = {}
    for number, row in journal.numbered_lines(path):
        name, text = row.get("id"), row.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigInvalid(
                f"{path}:{number}: a control code needs id and text; found keys {', '.join(sorted(row))}"
            )
        if name in codes:
            raise ConfigInvalid(f"{path}:{number}: control code {name!r} is there already; give every code its own id")
        codes[name] = ControlCode(id=name, text=text)
    if not codes:
        raise ConfigInvalid(f"server.synthesizer.codes: {path} holds no control code")
    return tuple(codes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSampling:
    """A `Synthesizer`."""

    section: ControlCodes
    lab: Lab
    codes: Sequence[ControlCode]

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return `drafts` texts; every code is used equally often, give or take one, in random order.

        Each voice takes a run of that order, so it uses codes equally often give or take two. Drafts of several voices
        alternate, so that a filter that keeps the first of two alike prefers no site's whole batch to another's.

        Raises: RoundFailed when each site is to write and no release may.
        """
        order: list[int] = []
        while len(order) < self.section.drafts:
            order += [int(i) for i in rng.permutation(len(self.codes))]
        chosen = [self.codes[i] for i in order[: self.section.drafts]]
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
        return self.lab.local_with(adapter, "W_loc + sites").generate(
            [code.text for code in codes],
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            rng=rng,
        )

    def _each(
        self,
        adapters: Mapping[str, Adapter],
        who: Sequence[str],
        codes: Sequence[ControlCode],
        rng: np.random.Generator,
    ) -> list[str]:
        """Return a text per code, each by its site's adapter; all sites write in the same batches."""
        return self.lab.local_with_rows({site: adapters[site] for site in sorted(set(who))}).generate(
            [code.text for code in codes],
            who,
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            rng=rng,
        )

    def _drafts(
        self, texts: Sequence[str], who: Sequence[str], codes: Sequence[ControlCode], round_number: int
    ) -> tuple[Draft, ...]:
        return tuple(
            _draft(
                text.strip(),
                Origin(
                    round=round_number,
                    method=self.section.kind,
                    code=code.id,
                    stream=str(place),
                    prompt=code.text,
                    voice=voice,
                ),
            )
            for place, (text, voice, code) in enumerate(zip(texts, who, codes, strict=True))
        )


def _draft(text: str, origin: Origin) -> Draft:
    # Without a voice the key is what it was before there were voices: ids of merged drafts stay.
    named = f"\x1f{origin.voice}" if origin.voice else ""
    key = f"{origin.round}\x1f{origin.method}\x1f{origin.code}\x1f{origin.stream}{named}\x1f{text}"
    return Draft(id=hashlib.sha256(key.encode()).hexdigest()[:16], instruction=text, response="", origin=origin)
