"""Bits a model needs per byte of text: perplexity that does not depend on the tokenizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fl_app.metrics.interval import bootstrap, paired_count
from fl_app.types import Score

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDING = 1e-3
"""How far above 0 a float32 sum of log-probabilities may round; 1e-3 nats is below any score we print."""


def bits_per_byte(log_probs: Sequence[float], byte_counts: Sequence[int], *, rng: np.random.Generator) -> Score:
    """Return total bits over total bytes, with a bootstrap interval over items. Lower is better.

    `log_probs` are in nats, one per text; `byte_counts` are the UTF-8 lengths of the same texts.

    Raises: ValueError when there are no items, the lengths differ, a log-probability is positive or not finite, or a
        text has no bytes.
    """
    count = paired_count("bits_per_byte", log_probs, byte_counts)
    for index, (log_prob, size) in enumerate(zip(log_probs, byte_counts, strict=True)):
        if not (math.isfinite(log_prob) and log_prob <= ROUNDING):
            raise ValueError(f"bits_per_byte: log-probability of item {index} is {log_prob}; it must be finite, <= 0")
        if not size >= 1:
            raise ValueError(f"bits_per_byte: item {index} has {size} bytes; leave empty texts out")
    bits = -np.asarray(log_probs, dtype=np.float64) / math.log(2)
    sizes = np.asarray(byte_counts, dtype=np.float64)
    interval = bootstrap(lambda items: float(bits[items].sum() / sizes[items].sum()), count=count, rng=rng)
    value = float(bits.sum() / sizes.sum())
    return Score(value=value, low=interval.low, high=interval.high, count=count, higher_is_better=False)
