"""Private Evolution: a population of synthetic texts, kept by what the sites' noisy votes say and varied by a model.

    round 1    population: texts under public codes, by a model that no site has touched, or by `writer`
    round r    every site votes over the population (`clients.learners.pe_votes`); the `keep` texts with the most noisy
               votes stay; the next population is what stayed, filled up with variations of it

No model is trained on private text, so a site needs no gradients and the server may use any model, and the cost does
not depend on how many texts there are: T rounds are T Gaussians of sensitivity 1, mu = sqrt(T) / noise_multiplier per
site. The sum over n sites has noise of noise_multiplier * sqrt(n) votes in every bin.

`quota` says how many texts of each code stay:

| quota    | in proportion to                                                                              |
|----------|-----------------------------------------------------------------------------------------------|
| "votes"  | the code's noisy votes, all its bins together: charged with the histogram, costs nothing more |
| "survey" | the sites' noisy counts of codes (RAFT's profile), charged once as the survey                 |
| "even"   | nothing: every code the same                                                                  |

Never to raw counts, which the papers use. While there is room, every code with a text keeps one.

`weigh` says what a site weighs in the sum: as many "votes" as it has, or every site the same ("sites"), its histogram
brought to L2 norm 1. A hostile site can send any numbers; only with "sites" is it worth no more than another.

`emits` says what becomes drafts: what was "selected" (as the papers), or the whole next "population".

With `writer`, an adapter that a former run's sites trained, votes refine DP text: RAFT's combination of strong sites
that train and weak ones that only vote. In one run it cannot be had: a site has one learner for all rounds, and every
site is asked for the same kind of release. So strong sites run `dp_lora` first; then all of them vote in a second run
with writer = "runs/<first>/rounds/<last>/merged". Each site's ledger adds both up.

Measured (`benchmarks/evolution.py`, one seed: four sites of 300 letters, 96 texts of which 24 stay, SmolLM2-135M and
MiniLM): after four rounds the nearest kept text to a held-out letter has a mean cosine of 0.467 at epsilon 1, 0.477
without noise, and 0.397 where noise drowns the votes.

The population outlives the process in `evolution/<round>.jsonl` of the run directory, so filters may drop what they
like: a text that repeats its own former draft is dropped as a draft and lives on as a parent.

Source: Aug-PE (Xie et al. 2024, 2403.01749), DPSDA (Lin et al. 2023, 2305.15560); RAFT (2603.07027, from a note). Ours
differs in quotas from noisy numbers only, in sampling without replacement, and in a variation that a small model can
write (`strategies.variations`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from fl_app import journal, votes
from fl_app.errors import RoundFailed
from fl_app.types import CodedText, HistogramRelease, Material, ReleaseSpec
from strategies.coded import (
    CODE_SLOT,
    DESCRIBED,
    SamplingSection,
    asked_for,
    drafted,
    evenly,
    fixed_adapter,
    read_codes,
    unquoted,
)
from strategies.selection import Rule, apportion, chosen
from strategies.variations import VariationSection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from fl_app.types import Adapter, ControlCode, Draft, ReleaseKind
    from strategies.lab import Lab, TextModel
    from strategies.stages import Synthesizer, Voices

    Doubles = npt.NDArray[np.float64]

SURVEYED = "codes"
"""Name of the survey's noisy counts, one per code in the order of the ids."""


class PrivateEvolution(SamplingSection):
    """[server.synthesizer] kind = "private_evolution".

    `population` texts are voted on, `keep` of them stay. `opening` writes the first ones: after the codes' texts with
    `writer` (a PEFT directory; empty: the target), or "zero_shot" by the bare model, asked with `describe`. Noisy
    counts below `threshold`, in the units of the sum, count as 0 when texts are chosen.
    """

    writes_from: ClassVar[ReleaseKind | None] = "histogram"
    kind: Literal["private_evolution"]
    codes: str
    population: Annotated[int, Field(ge=2, le=100_000)]
    keep: Annotated[int, Field(ge=1, le=100_000)]
    writer: str = ""
    opening: Literal["codes", "zero_shot"] = "codes"
    describe: str = DESCRIBED
    select: Rule = "rank"
    quota: Literal["votes", "survey", "even"] = "votes"
    weigh: Literal["votes", "sites"] = "votes"
    threshold: Annotated[float, Field(ge=0)] = 0.0
    emits: Literal["selected", "population"] = "selected"
    variation: VariationSection = Field(default_factory=VariationSection)
    voices: Literal["merged"] = "merged"

    @field_validator("describe")
    @classmethod
    def _has_slot(cls, describe: str) -> str:
        if describe.count(CODE_SLOT) != 1:
            raise ValueError(f"describe must hold {CODE_SLOT} exactly once, where the code's text goes")
        return describe

    @model_validator(mode="after")
    def _room_to_vary(self) -> PrivateEvolution:
        if not self.keep < self.population:
            raise ValueError(f"keep {self.keep} >= population {self.population}: nothing would ever be varied")
        return self

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage over the codes of the file.

        Raises: ConfigInvalid when the codes or the writer are missing; AdapterMismatch for another base's adapter.
        """
        codes = read_codes(Path(self.codes))
        return Evolution(section=self, lab=lab, codes=codes, writer=fixed_adapter(lab, self.writer))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generation:
    """What the next population begins with: what was kept, most votes first, and variations already written."""

    kept: tuple[CodedText, ...]
    varied: tuple[CodedText, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """A `Synthesizer`. `memory` stands for the run directory where there is none."""

    section: PrivateEvolution
    lab: Lab
    codes: Sequence[ControlCode]
    writer: Adapter | None
    memory: dict[int, Generation] = field(default_factory=dict[int, Generation])

    @property
    def asks(self) -> ReleaseSpec:
        """One noisy count per text of the population; with quota = "survey" one per code as well."""
        survey = {SURVEYED: len(self.codes)} if self.section.quota == "survey" else {}
        codes = frozenset(code.id for code in self.codes)
        return ReleaseSpec(kind="histogram", vectors={"votes": self.section.population}, codes=codes, survey=survey)

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return the population, always of the configured size: what was kept last comes first.

        `earlier` is not looked at: the population is what the votes kept, not what the filters did.
        """
        del earlier
        writer = self.lab.local_with(self.writer or target, "W_loc, writing")
        last = self._last_before(round_number)
        texts = self._opening(writer, rng) if last is None else self._filled(writer, last, rng)
        return Material(texts=texts)

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return what the votes keep, most votes first; with emits = "population" their variations after them.

        Raises: RoundFailed when the round has no histogram over its population, or no survey where one is needed.
        """
        material = voices.material
        if material is None or not material.texts:
            raise RoundFailed(f"round {round_number}: private_evolution has no population; the sites voted on nothing")
        population = material.texts
        counts = self._summed(voices, votes.bin_names(population), round_number)
        kept = tuple(population[place] for place in self._selected(counts, population, voices, rng, round_number))
        last = Generation(kept=kept)
        if self.section.emits == "population":
            writer = self.lab.local_with(self.writer or voices.merged, "W_loc, writing")
            last = Generation(kept=kept, varied=self._filled(writer, last, rng)[len(kept) :])
        self._remember(round_number, last)
        texts = (*last.kept, *last.varied)
        named = {code.id: code for code in self.codes}
        return drafted(
            [one.text for one in texts],
            [named[one.code] for one in texts],
            method=self.section.kind,
            round_number=round_number,
        )

    def _opening(self, writer: TextModel, rng: np.random.Generator) -> tuple[CodedText, ...]:
        """Return the first population, codes used evenly; a code's own text where a model twice wrote nothing."""
        codes = evenly(self.codes, self.section.population, rng)
        model = writer if self.section.opening == "codes" else self.lab.local_with(None, "W_loc")

        def write(some: Sequence[ControlCode]) -> list[str]:
            if self.section.opening == "codes":
                return self.section.sample(model, [code.text for code in some], rng)
            prompts = [asked_for(model, code, self.section.describe) for code in some]
            return [unquoted(text) for text in self.section.sample(model, prompts, rng)]

        texts = write(codes)
        blank = [place for place, text in enumerate(texts) if not text]
        for place, text in zip(blank, write([codes[place] for place in blank]), strict=True):
            texts[place] = text or codes[place].text.strip()
        return tuple(CodedText(code=code.id, text=text) for code, text in zip(codes, texts, strict=True))

    def _filled(self, writer: TextModel, last: Generation, rng: np.random.Generator) -> tuple[CodedText, ...]:
        """Return what there is, and variations of the kept texts in turn until the population is whole."""
        begun = (*last.kept, *last.varied)
        missing = self.section.population - len(begun)
        parents = [last.kept[number % len(last.kept)] for number in range(missing)]
        model = writer if self.section.variation.kind == "continue" else self.lab.local_with(None, "W_loc")
        texts = {code.id: code.text for code in self.codes}
        return (*begun, *self.section.variation.vary(model, parents, texts, rng))

    def _selected(
        self,
        counts: Doubles,
        population: Sequence[CodedText],
        voices: Voices,
        rng: np.random.Generator,
        round_number: int,
    ) -> list[int]:
        """Return the places of the texts that stay, most noisy votes first."""
        places = votes.bins_by_code([one.code for one in population])
        present = [code.id for code in self.codes if code.id in places]
        weights = self._weights(counts, places, present, voices, round_number)
        sizes = [len(places[code]) for code in present]
        least = 1 if self.section.keep >= len(present) else 0
        rest = apportion(weights, self.section.keep - least * len(present), [size - least for size in sizes])
        heard = np.where(counts >= self.section.threshold, counts, 0.0)
        found = [
            place
            for code, more in zip(present, rest, strict=True)
            for place in chosen(heard, places[code], least + more, self.section.select, rng)
        ]
        return sorted(found, key=lambda place: (-counts[place], place))

    def _summed(self, voices: Voices, names: tuple[str, ...], round_number: int) -> Doubles:
        """Return the sum of the sites' histograms, sites in the order of their names. Raises: RoundFailed."""
        total = np.zeros(len(names))
        histograms = {site: one for site, one in sorted(voices.releases.items()) if isinstance(one, HistogramRelease)}
        if not histograms:
            raise RoundFailed(
                f"round {round_number}: private_evolution got no histogram. Way out: client.learner.kind = "
                '"pe_votes", and an aggregator that adds no noise of its own'
            )
        for site, release in histograms.items():
            if release.bins != names or release.counts.shape != (len(names),):
                raise RoundFailed(
                    f"round {round_number}: site {site} voted on {len(release.bins)} texts that are not this round's "
                    f"{len(names)}; its release is of another round or run"
                )
            counts = release.counts.astype(np.float64)
            norm = float(np.linalg.norm(counts))
            total += counts / norm if self.section.weigh == "sites" and norm > 0 else counts
        return total

    def _weights(
        self,
        counts: Doubles,
        places: Mapping[str, votes.Indices],
        present: Sequence[str],
        voices: Voices,
        round_number: int,
    ) -> list[float]:
        match self.section.quota:
            case "even":
                return [1.0] * len(present)
            case "votes":
                return [float(counts[places[code]].sum()) for code in present]
            case "survey":
                told = _surveyed(voices, len(self.codes), round_number)
                by_code = dict(zip(sorted(code.id for code in self.codes), told, strict=True))
                return [float(by_code[code]) for code in present]

    def _last_before(self, round_number: int) -> Generation | None:
        """Return the generation of the latest round before this one."""
        folder = self._folder()
        if folder is None:
            rounds = [number for number in self.memory if number < round_number]
            return self.memory[max(rounds)] if rounds else None
        rounds = [int(path.stem) for path in folder.glob("*.jsonl") if path.stem.isdecimal()]
        rounds = [number for number in rounds if number < round_number]
        if not rounds:
            return None
        rows = journal.read_lines(folder / f"{max(rounds)}.jsonl")
        texts = [(bool(row["kept"]), CodedText(code=row["code"], text=row["text"])) for row in rows]
        return Generation(
            kept=tuple(text for kept, text in texts if kept), varied=tuple(text for kept, text in texts if not kept)
        )

    def _remember(self, round_number: int, last: Generation) -> None:
        folder = self._folder()
        if folder is None:
            self.memory[round_number] = last
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(True, one) for one in last.kept] + [(False, one) for one in last.varied]
        lines = [{"kept": kept, "code": one.code, "text": one.text} for kept, one in rows]
        journal.write_lines(folder / f"{round_number}.jsonl", lines)

    def _folder(self) -> Path | None:
        return None if self.lab.directory is None else self.lab.directory / "evolution"


def _surveyed(voices: Voices, size: int, round_number: int) -> Doubles:
    """Return the sum of the sites' noisy counts of codes. Raises: RoundFailed."""
    told = [survey.vectors[SURVEYED] for _, survey in sorted(voices.surveys.items()) if SURVEYED in survey.vectors]
    if not told or any(one.shape != (size,) for one in told):
        raise RoundFailed(
            f'round {round_number}: quota = "survey" needs the sites\' survey of {size} codes, and {len(told)} sites '
            'sent one of any length. Way out: ask for it, or quota = "votes"'
        )
    return np.sum([one.astype(np.float64) for one in told], axis=0)
