"""How far texts differ from each other: distinct n-grams, and BLEU of each text against the others.

Both depend on how many texts there are and how long they are: compare figures of sets of one size. Neither says
whether the texts are good.

Source: distinct-n of Li et al. 2016 (1510.03055), section 4: distinct n-grams over all n-grams, here over the set;
self-BLEU of Zhu et al. 2018 (Texygen, 1802.01886), by sacrebleu (Post 2018, 1804.08771).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app import text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

ORDERS = (1, 2, 3)
SAMPLE = 300
"""Texts that self-BLEU reads: its cost grows with the square, and 300 take seconds. A choice of cost, not studied."""

LEAST = 2
"""With one text there is nothing to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity:
    """`distinct` maps n to a share, or None when no text has n words; `self_bleu` is 0 to 100, 100 for equal texts.

    `compared` is how many texts self-BLEU read; `settings` is sacrebleu's own signature of what it computed.
    """

    texts: int
    mean_words: float | None
    distinct: Mapping[str, float | None]
    self_bleu: float | None
    compared: int
    settings: str


def diversity(texts: Sequence[str], rng: np.random.Generator) -> Diversity:
    """Return both measures of a set of texts; of more than `SAMPLE`, self-BLEU reads a draw without replacement."""
    chosen = list(texts)
    if len(chosen) > SAMPLE:
        chosen = [chosen[i] for i in sorted(rng.choice(len(chosen), SAMPLE, replace=False))]
    value, settings = self_bleu(chosen)
    lengths = [len(text.words(one)) for one in texts]
    return Diversity(
        texts=len(texts),
        mean_words=sum(lengths) / len(lengths) if lengths else None,
        distinct={str(order): distinct(texts, order) for order in ORDERS},
        self_bleu=value,
        compared=len(chosen) if value is not None else 0,
        settings=settings,
    )


def distinct(texts: Sequence[str], order: int) -> float | None:
    """Return distinct n-grams over all n-grams of words, None when there are none."""
    grams = [gram for one in texts for gram in text.ngrams(text.words(one), order)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> tuple[float | None, str]:
    """Return the mean sentence BLEU of each text against all others as its references, and sacrebleu's signature."""
    from sacrebleu.metrics.bleu import BLEU

    measure = BLEU(effective_order=True)
    if len(texts) < LEAST:
        return None, ""
    scores = [
        measure.sentence_score(one, [*texts[:number], *texts[number + 1 :]]).score for number, one in enumerate(texts)
    ]
    # Rounding to thousandths: sacrebleu goes through exp(log), and equal texts are to read 100, not 100.00000000000004.
    return round(sum(scores) / len(scores), 3), str(measure.get_signature())
