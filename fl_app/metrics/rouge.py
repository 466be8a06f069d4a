"""ROUGE-L: overlap of an answer with its reference by longest common subsequence of words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fl_app.metrics.interval import bootstrap, paired_count
from fl_app.types import Score

if TYPE_CHECKING:
    from collections.abc import Sequence


def rouge_l(predictions: Sequence[str], references: Sequence[str], *, rng: np.random.Generator) -> Score:
    """Return the mean ROUGE-L F1, with a bootstrap interval over items.

    The library's own tokens (lower case, a-z and 0-9, no stemming): text in another script scores 0.

    Raises: ValueError when there are no items or the lengths differ.
    Source: Lin 2004, through `rouge_score`.
    """
    count = paired_count("rouge_l", predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = np.array(
        [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)], dtype=np.float64
    )
    interval = bootstrap(lambda items: float(scores[items].mean()), count=count, rng=rng)
    return Score(value=float(scores.mean()), low=interval.low, high=interval.high, count=count, higher_is_better=True)
