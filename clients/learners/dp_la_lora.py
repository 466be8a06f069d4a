"""DP-LA-LoRA: the factors take turns by steps, and the noised gradient may be smoothed before AdamW sees it.

In each step one factor learns while the other stands still, so that noise enters the product once and linearly; clip
and noise are over the active factor alone. b learns `b_learning_rate_factor` times as fast as a.

`smoothing` = s > 0 replaces a noised gradient g, as one row of n numbers closed to a ring, by the solution of

    (1 - s D) h = g,   (D h)_i = h_(i-1) - 2 h_i + h_(i+1);   by Fourier:  h^_k = g^_k / (1 + 2 s (1 - cos(2 pi k / n)))

The mean of g stays; of independent noise the variance falls by (1 + 2 s) / (1 + 4 s)^1.5: to .385, .268, .149 for
s = .5, 1, 3. What a neighbour in memory has to do with a coordinate is the method's own guess: in a, rows run over the
inputs of a map, in b over the rank. It is post-processing of what was released, so the receipt stays as it is.

Source: LA-LoRA (2602.19926, ICLR 2026), and Osher et al. 2018 (Laplacian smoothing, 1806.06317). The paper smooths with
a Gaussian filter, its code with the Laplacian one, which is ours. The code clips the gradient of a batch at a median of
its norms, which bounds nobody's share: no guarantee follows. It also takes each step twice, smoothed and raw, and
begins with a, which has no gradient while b = 0. Ours differs in all four.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from clients.dp_steps import DpAdapterLearner, DpStepsSection

if TYPE_CHECKING:
    from clients.stages import Learner
    from fl_app.types import Floats


class DpLaLora(DpStepsSection):
    """[client.learner] kind = "dp_la_lora". The factor of 2 is that of the published code; `smoothing` 0 is none."""

    kind: Literal["dp_la_lora"]
    b_learning_rate_factor: Annotated[float, Field(gt=0, le=100)] = 2.0
    smoothing: Annotated[float, Field(ge=0, le=1e3)] = 0.0

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return DpAdapterLearner(
            section=self,
            schedule="steps",
            round_number=round_number,
            b_learning_rate_factor=self.b_learning_rate_factor,
            finish=functools.partial(smoothed, strength=self.smoothing) if self.smoothing else None,
        )


def smoothed(gradient: Floats, *, strength: float) -> Floats:
    """Return a gradient after the periodic Laplacian low-pass over all its numbers in a row. Shapes: any, kept."""
    flat = gradient.ravel().astype(np.float64)
    angles = 2 * np.pi * np.arange(flat.size // 2 + 1) / flat.size
    passed = np.fft.rfft(flat) / (1 + 2 * strength * (1 - np.cos(angles)))
    return np.fft.irfft(passed, flat.size).reshape(gradient.shape).astype(np.float32)
