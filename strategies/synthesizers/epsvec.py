"""EPSVec, the server's half: public text tells the sites where to measure from; their vectors steer the base model.

    prepare      by class: public texts (negatives) -> the centre of their states after each of `layers`; over all
                 classes the usual distance from the centre, a layer's scale. Sites get these and each class's prompt.
    __call__     sum of the sites' vectors, at length 1 by class and layer; W_loc writes after each class's prompt with
                 coefficient * scale * that vector added to the newest token after each of the layers.

A class is a control code. Its prompt is the code's text after fixed public shots: `<code text><shot><separator>` for
each, then the code's text again. With shots a draft ends at the first separator, since a model that was shown a list
goes on with it. Sites read their rows after the same prompt, so that the difference is the rows' and not the prompt's.

W_loc reads and writes bare: the target's adapter neither moves the centres, which stay the same in every round, nor the
text. Negatives come from the file `negatives`, or W_loc writes them, unsteered, from the stream `negatives_seed`: the
same for every round and after every resumption, so they are made once in a process.

A class without mass has a vector of noise: its drafts are steered somewhere, and say nothing of anybody.
One vector comes of all sites; it costs one release a round, and any number of drafts after it nothing.

Source: EPSVec (2602.21218) and its code (1.4 * unit vector at layers 18 to 21 of 32, temperature 1.6). Ours differs:
the push is in units of the layer's public scale (theirs has this as an option), so that a coefficient goes from model
to model; public means instead of pairs (`clients.learners.epsvec`); no judge of negatives and drafts, which the filters
are for; shots are a public file, where the origin of theirs is not told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fl_app import steering
from fl_app.config import Section
from fl_app.errors import ConfigInvalid, NotFinite, RoundFailed
from fl_app.seeds import stream
from fl_app.types import CodedText, Material, Origin, ReleaseKind, ReleaseSpec, VectorRelease
from strategies.coded import draft, read_coded_texts, read_codes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Adapter, ControlCode, Draft, Floats
    from strategies.lab import Lab
    from strategies.stages import Synthesizer, Voices

READ_ROWS = 8
"""Public texts that are read in one batch; on a CPU more gain nothing (assumption, not studied)."""

LEAST_NEGATIVES = 2
"""Of one text the mean is the text, and its distance from it is no scale."""


class EpsVec(Section):
    """[server.synthesizer] kind = "epsvec": `drafts` per round over the codes of the file `codes`.

    `negatives` and `shots` are JSON lines with code and text, public both; `num_negatives` and `num_shots` of a code
    are used, the first of the file. Without a file of negatives W_loc writes them. `layers` as in [client.learner];
    `max_text_tokens` as the sites' own max_tokens, or negatives and rows are cut differently.
    One layer at about 0.6 of the depth and `coefficient` 0.6 are what SmolLM2-135M liked best on financial headlines
    (layer 18 of 30); k layers cost sqrt(k) of noise each, and want a coefficient k times smaller.
    `quota` shares the drafts out: evenly, or as the sites' noised counts say.
    """

    writes_from: ClassVar[ReleaseKind | None] = "vector"
    kind: Literal["epsvec"]
    codes: str
    drafts: Annotated[int, Field(ge=1, le=1_000_000)]
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
    voices: Literal["merged"] = "merged"
    coefficient: Annotated[float, Field(ge=0, le=100)] = 0.6
    quota: Literal["even", "counts"] = "even"
    negatives: str = ""
    num_negatives: Annotated[int, Field(ge=LEAST_NEGATIVES, le=100_000)] = 200
    negatives_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    shots: str = ""
    num_shots: Annotated[int, Field(ge=0, le=32)] = 2
    separator: Annotated[str, Field(min_length=1)] = "\n\n"
    max_text_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    max_new_tokens: Annotated[int, Field(ge=4, le=4096)] = 64
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.9
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    def build(self, lab: Lab) -> Synthesizer:
        """Return the stage.

        Raises: ConfigInvalid when a file is missing or cannot be read, a text's code is none of the codes, a code has
        fewer than two negatives in the file, or the model lacks one of the layers.
        """
        codes = read_codes(Path(self.codes))
        steering.check_layers(lab.local.model, self.layers)
        shots = _by_code(self.shots, "server.synthesizer.shots", codes, self.num_shots)
        negatives = _by_code(self.negatives, "server.synthesizer.negatives", codes, self.num_negatives)
        for code, texts in negatives.items():
            if self.negatives and len(texts) < LEAST_NEGATIVES:
                raise ConfigInvalid(
                    f"server.synthesizer.negatives: {self.negatives} has {len(texts)} texts of code {code!r}, and "
                    f"needs {LEAST_NEGATIVES}; leave `negatives` empty and W_loc writes them"
                )
        return SteeredSampling(section=self, lab=lab, codes=codes, shots=shots, negatives=negatives)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeredSampling:
    """A `Synthesizer`. `shots` and `negatives` are texts by code."""

    section: EpsVec
    lab: Lab
    codes: Sequence[ControlCode]
    shots: Mapping[str, Sequence[str]]
    negatives: Mapping[str, Sequence[str]]
    made: list[Material] = field(default_factory=list[Material])

    @property
    def asks(self) -> ReleaseSpec:
        """A vector by code and layer, and a count by code."""
        width = steering.width(self.lab.local.model)
        vectors = {steering.vector_name(code.id, layer): width for code in self.codes for layer in self.section.layers}
        counts = {steering.count_name(code.id): 1 for code in self.codes}
        return ReleaseSpec(kind="vector", vectors=vectors | counts, codes=frozenset(code.id for code in self.codes))

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return prompts, centres and scales, a function of the section, its files and W_loc: the same in every round.

        Raises: RoundFailed when W_loc writes fewer than two texts for a code, or all the same; NotFinite.
        """
        if not self.made:
            self.made.append(self._material(self.negatives if self.section.negatives else self._written_negatives()))
        return self.made[0]

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Return `drafts` texts, codes in random order; all codes are written in the same batches.

        Raises: RoundFailed when no site sent vectors, or one that is not what was asked.
        """
        if voices.material is None:
            raise RoundFailed(f"round {round_number}: no material, so nobody knows what the vectors are measured from")
        summed = self._summed(voices, round_number)
        chosen = self._chosen(summed, rng)
        layers, scales = self.section.layers, voices.material.vectors
        directions: dict[int, Floats] = {
            layer: np.stack([summed[steering.vector_name(code.id, layer)] for code in chosen]).astype(np.float32)
            for layer in layers
        }
        lengths = {layer: self.section.coefficient * float(scales[steering.scale_name(layer)][0]) for layer in layers}
        writer = self.lab.local_with(None, "W_loc, steered").steered(directions, lengths)
        texts = writer.generate(
            [self._prompt(code) for code in chosen],
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            rng=rng,
        )
        return tuple(
            draft(
                self._cut(text, code),
                Origin(round=round_number, method=self.section.kind, code=code.id, stream=str(place), prompt=code.text),
            )
            for place, (code, text) in enumerate(zip(chosen, texts, strict=True))
        )

    def _prompt(self, code: ControlCode) -> str:
        shown = [f"{code.text}{shot}{self.section.separator}" for shot in self.shots[code.id]]
        return "".join(shown) + code.text

    def _cut(self, text: str, code: ControlCode) -> str:
        """Return a text without what follows it, where the prompt taught the model to go on."""
        if self.shots[code.id]:
            text = text.lstrip().split(self.section.separator, 1)[0]
        return text.strip()

    def _written_negatives(self) -> dict[str, list[str]]:
        asked = [code for code in self.codes for _ in range(self.section.num_negatives)]
        texts = self.lab.local_with(None, "W_loc").generate(
            [self._prompt(code) for code in asked],
            max_new_tokens=self.section.max_new_tokens,
            temperature=self.section.temperature,
            top_p=self.section.top_p,
            rng=stream(self.section.negatives_seed, "epsvec", "negatives"),
        )
        found: dict[str, list[str]] = {code.id: [] for code in self.codes}
        for code, text in zip(asked, texts, strict=True):
            if cut := self._cut(text, code):
                found[code.id].append(cut)
        return found

    def _material(self, negatives: Mapping[str, Sequence[str]]) -> Material:
        states = self.lab.side_by_side(lambda code: self._states(code, negatives[code.id]), self.codes)
        vectors: dict[str, Floats] = {}
        distances: dict[int, list[np.ndarray]] = {layer: [] for layer in self.section.layers}
        for code, by_layer in zip(self.codes, states, strict=True):
            for layer, found in by_layer.items():
                centre = found.mean(axis=0, dtype=np.float64)
                vectors[steering.centre_name(code.id, layer)] = centre.astype(np.float32)
                distances[layer].append(np.linalg.norm(found - centre, axis=1))
        for layer, norms in distances.items():
            scale = float(np.median(np.concatenate(norms)))
            if not np.isfinite(scale):
                raise NotFinite(f"the distance of public texts after block {layer} is {scale}: check the base model")
            if scale == 0:
                raise RoundFailed(f"public texts are all the same after block {layer}: give a file of negatives")
            vectors[steering.scale_name(layer)] = np.array([scale], np.float32)
        return Material(
            texts=tuple(CodedText(code=code.id, text=self._prompt(code)) for code in self.codes), vectors=vectors
        )

    def _states(self, code: ControlCode, texts: Sequence[str]) -> dict[int, Floats]:
        if len(texts) < LEAST_NEGATIVES:
            raise RoundFailed(
                f"W_loc wrote {len(texts)} texts for code {code.id!r} that are not blank, and {LEAST_NEGATIVES} are "
                "needed: raise num_negatives, or give a file of negatives"
            )
        return steering.representations(
            self.lab.local.model,
            self.lab.local.tokenizer,
            [self._prompt(code)] * len(texts),
            texts,
            layers=self.section.layers,
            max_text_tokens=self.section.max_text_tokens,
            batch_rows=READ_ROWS,
        )

    def _summed(self, voices: Voices, round_number: int) -> dict[str, np.ndarray]:
        """Return the sum of the sites' vectors and counts by name, in float64 and in the order of the sites."""
        releases = {s: one for s, one in sorted(voices.releases.items()) if isinstance(one, VectorRelease)}
        if not releases:
            raise RoundFailed(f"round {round_number}: no site sent vectors; [client.learner] must be of kind epsvec")
        asked = self.asks.vectors
        summed = {name: np.zeros(length) for name, length in asked.items()}
        for site, one in releases.items():
            for name, length in asked.items():
                vector = one.vectors.get(name)
                if vector is None or vector.shape != (length,) or not np.isfinite(vector).all():
                    raise RoundFailed(f"round {round_number}: {site} sent no {name!r} of {length} finite numbers")
                summed[name] += vector
        return summed

    def _chosen(self, summed: Mapping[str, np.ndarray], rng: np.random.Generator) -> list[ControlCode]:
        """Return a code per draft. What is left over after whole shares goes to codes by lot, or to the largest rests.

        Without any positive count, "counts" is "even".
        """
        weights = np.ones(len(self.codes))
        if self.section.quota == "counts":
            counts = np.array([float(summed[steering.count_name(code.id)][0]) for code in self.codes])
            weights = np.maximum(counts, 0.0) if (counts > 0).any() else weights
        shares = weights / weights.sum() * self.section.drafts
        whole = np.floor(shares).astype(int)
        rests = sorted(rng.permutation(len(self.codes)), key=lambda index: whole[index] - shares[index])
        whole[rests[: self.section.drafts - int(whole.sum())]] += 1
        return [self.codes[int(index)] for index in rng.permutation(np.repeat(np.arange(len(self.codes)), whole))]


def _by_code(path: str, key: str, codes: Sequence[ControlCode], most: int) -> dict[str, list[str]]:
    """Return the first `most` texts of every code in a file, none without a file. Raises: ConfigInvalid."""
    found: dict[str, list[str]] = {code.id: [] for code in codes}
    for one in read_coded_texts(Path(path), key) if path else ():
        if one.code not in found:
            raise ConfigInvalid(f"{key}: {path} has a text of code {one.code!r}, which is none of the codes")
        if len(found[one.code]) < most:
            found[one.code].append(one.text)
    return found
