"""Share of equal labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_app.metrics.interval import paired_count, wilson
from fl_app.types import Score

if TYPE_CHECKING:
    from collections.abc import Sequence


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> Score:
    """Return the share of predictions that equal their reference, with a Wilson interval.

    Raises: ValueError when there are no items or the lengths differ.
    """
    count = paired_count("accuracy", predictions, references)
    right = sum(int(p == r) for p, r in zip(predictions, references, strict=True))
    interval = wilson(right, count)
    return Score(value=right / count, low=interval.low, high=interval.high, count=count, higher_is_better=True)
