"""A mean over seeds and its interval: what several runs of one cell say, and whether two cells differ.

Two-sided 95 % Student interval over seeds. Out of scope: intervals over test items (`fl_app.metrics.interval`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with its two-sided 95 % Student interval; infinite ends for one seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def apart(self) -> bool:
        """Whether a difference is told apart from zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Show what is known."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.seeds > 1 else f"{self.mean:.3f} (one seed)"


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of one value a seed."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:  # noqa: PLR2004
        return Interval(mean=mean, low=-math.inf, high=math.inf, seeds=len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean=mean, low=mean - half, high=mean + half, seeds=len(values))
