"""Variations of a synthetic text: near it in meaning, new in words. Public and synthetic text in, synthetic text out.

| kind       | what the model is asked                                           | who can do it                      |
|------------|--------------------------------------------------------------------|------------------------------------|
| "continue" | go on from the text's beginning, after its control code           | any model that writes under codes  |
| "rephrase" | say it in other words, in one of the fixed tones (`TONES`)         | a model that follows instructions  |
| "fill"     | replace the blanks of a text of which a share of words is masked  | a model that follows instructions  |

`mask_share` is the probability that a word is given up: of each word for "fill"; for "continue" the words kept are the
first Binomial(n, 1 - mask_share), never all. The asked length of "rephrase" and "fill" is the text's own plus normal
noise, so that a population does not shrink to one length.

What SmolLM2-135M can do (`benchmarks/variations.py`, 48 made-up letters; cosine to the parent by MiniLM, share well
formed, share that names the code's topic):

|                          | cosine | well formed | on topic |
|--------------------------|--------|-------------|----------|
| another text of the code | 0.38   | 0.62        | 0.67     |
| "continue", public start | 0.65   | 0.88        | 0.67     |
| "rephrase", bare model   | 0.39   | 0.71        | 0.21     |
| "rephrase", public start | 0.51   | 0.58        | 0.35     |
| "fill", bare model       | 0.17   | 0.69        | 0.06     |
| "fill", public start     | 0.26   | 0.54        | 0.17     |

So "continue" is the default: nearer than chance, and no worse text. The others are for larger models.

Source: Aug-PE (Xie et al. 2024, 2403.01749), rephrasing for open models and filling masked text for a large one, with
length noise; "continue" is ours, for models too small to follow either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from fl_app.types import CodedText
from strategies.coded import SamplingSection, unquoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from strategies.lab import TextModel

VariationKind: TypeAlias = Literal["continue", "rephrase", "fill"]

TONES = ("plain", "formal", "friendly", "worried", "short and direct", "polite", "detailed", "casual")
BLANK = "_"
LEAST_WORDS = 3


class VariationSection(SamplingSection):
    """[server.synthesizer.variation]: how a kept text is varied, and how its model is sampled."""

    kind: VariationKind = "continue"
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    length_std: Annotated[float, Field(ge=0, le=1000)] = 4.0

    def vary(
        self,
        model: TextModel,
        parents: Sequence[CodedText],
        codes: Mapping[str, str],
        rng: np.random.Generator,
    ) -> list[CodedText]:
        """Return one variation per parent, of its code, in order; the parent itself where the model wrote nothing.

        `codes` maps a code's id to its text. Parents may repeat: each time is another draw.
        """
        begun = [self._begin(model, parent, codes, rng) for parent in parents]
        written = self.sample(model, [prompt for prompt, _ in begun], rng)
        varied: list[CodedText] = []
        for parent, (_, kept), text in zip(parents, begun, written, strict=True):
            answer = _first_paragraph(text)
            whole = f"{kept} {answer}".strip() if self.kind == "continue" else unquoted(answer)
            varied.append(CodedText(code=parent.code, text=whole) if answer and whole else parent)
        return varied

    def _begin(
        self, model: TextModel, parent: CodedText, codes: Mapping[str, str], rng: np.random.Generator
    ) -> tuple[str, str]:
        """Return the prompt, and the part of the parent that the answer continues."""
        words = parent.text.split()
        length = max(LEAST_WORDS, len(words) + round(rng.normal(0, self.length_std)))
        match self.kind:
            case "continue":
                kept = " ".join(words[: min(rng.binomial(len(words), 1 - self.mask_share), len(words) - 1)])
                return codes.get(parent.code, "") + kept, kept
            case "rephrase":
                tone = TONES[int(rng.integers(len(TONES)))]
                asked = f"Say the message below in other words, in a {tone} tone, in about {length} words."
                return model.chat(f"{asked} Reply with the new message alone.\n\nMessage: {parent.text}"), ""
            case "fill":
                masked = [BLANK if rng.random() < self.mask_share else word for word in words]
                asked = f"Replace every {BLANK} in the message below, so that it reads well in about {length} words."
                return model.chat(f"{asked} Reply with the whole message alone.\n\nMessage: {' '.join(masked)}"), ""


def _first_paragraph(text: str) -> str:
    return text.strip().partition("\n\n")[0].strip()
