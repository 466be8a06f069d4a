"""Mean of the F1 of every class, each class counting the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fl_app.metrics.interval import bootstrap, paired_count
from fl_app.types import Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.metrics.interval import Indices


def macro_f1(predictions: Sequence[int], references: Sequence[int], *, rng: np.random.Generator) -> Score:
    """Return the macro-averaged F1 over the classes that occur on either side, with a bootstrap interval.

    F1 of a class = 2 * hits / (predicted + true); a class that occurs on one side only scores 0. A resample is
    averaged over the classes it holds, so that a class drawn by nobody does not count as a mistake.

    Raises: ValueError when there are no items or the lengths differ.
    """
    count = paired_count("macro_f1", predictions, references)
    labels, codes = np.unique(np.array([*predictions, *references]), return_inverse=True)
    predicted, true = codes[:count], codes[count:]

    def statistic(items: Indices) -> float:
        p, t = predicted[items], true[items]
        hits = np.bincount(p[p == t], minlength=len(labels))
        totals = np.bincount(p, minlength=len(labels)) + np.bincount(t, minlength=len(labels))
        present = totals > 0
        return float((2 * hits[present] / totals[present]).mean())

    interval = bootstrap(statistic, count=count, rng=rng)
    value = statistic(np.arange(count))
    return Score(value=value, low=interval.low, high=interval.high, count=count, higher_is_better=True)
