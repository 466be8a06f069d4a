"""The Gaussian mechanism as a computer can keep it: noise on a public lattice, whose low bits say nothing.

    release = step * (round(sum / step) + round(noise_multiplier * clip_norm * normal / step))

The textbook adds real noise to a real sum. In floating point the *set* of reachable outputs depends on the sum, and
from one output's low bits a neighbour can be ruled out (Mironov 2012; Jin et al. 2022, arXiv 2112.05307). Here sum and
noise are whole multiples of one public power of two, added exactly: every neighbour reaches every multiple, and the
release is `round(sum) + round(noise)`, a post-processing of the Gaussian mechanism on the rounded sum.

What rounding costs, and who pays. Rounding may move neighbours apart by one step in every coordinate, sqrt(d) steps in
L2 norm. `step` keeps that below clip_norm * 2^-14, and callers clip to `usable_clip`, which is 2^-13 short of the clip
norm they announce; the rest pays for float64 sums of up to 2^18 contributions. So the sensitivity that the receipt
states holds after rounding, not before it.

What is left, with its size. The normals are float64 evaluations of Box-Muller; against 50 digits their error is at most
2^-50 * max(r, 1 / r) for a radius r, and 2^-24 where the radius vanishes (tests/privacy/test_gaussian.py). At noise
multiplier 1 a lattice cell is wider than the spacing of the floats in it by 2^23, so the chance of a cell is off by a
relative 2^-23 or so; over 200 steps of 2.4 million coordinates, all of it taken to conspire, that is of the order of
0.01 of epsilon at delta 1e-5, an estimate and no bound. It grows in proportion to the noise multiplier. Normals end at
9.4 standard deviations, which 5e8 draws meet with probability 1e-12. Timing is not hidden.

Source: Casacuberta et al. 2022 (arXiv 2207.10635) on sensitivity after rounding; Google's secure noise generation on
power-of-two granularity. Ours differs in shrinking the clip instead of raising the noise: the receipt stays as asked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fl_app.errors import LedgerRefusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fl_app.privacy.noise import NoiseSource

    Doubles = npt.NDArray[np.float64]

SLACK = 2.0**-13
"""Share of the clip norm that pays for rounding: half of it for the lattice, half for float64 sums."""


def usable_clip(clip_norm: float) -> float:
    """Return the L2 norm to clip contributions to, so that their rounded sum has sensitivity `clip_norm`."""
    return clip_norm * (1 - SLACK)


def lattice_step(clip_norm: float, dimension: int) -> float:
    """Return the largest power of two with step * sqrt(dimension) <= clip_norm * SLACK / 2. A public constant."""
    return 2.0 ** math.floor(math.log2(clip_norm * SLACK / 2 / math.sqrt(max(dimension, 1))))


def release(
    totals: Sequence[Doubles], *, clip_norm: float, noise_multiplier: float, noise: NoiseSource
) -> list[Doubles]:
    """Return the noised sums, multiples of one lattice step, in the order and shapes of `totals`.

    Every coordinate of every tensor gets independent noise of standard deviation noise_multiplier * clip_norm: the
    tensors are one vector, and their joint sensitivity is `clip_norm`.

    Guarantee: `PoissonGaussian(noise_multiplier, ...)` or `Gaussian(noise_multiplier, ...)`, whichever way units were
    drawn, when adding or removing a unit moves `totals` by at most `usable_clip(clip_norm)` in L2 norm.
    Raises: LedgerRefusal for a clip norm or noise multiplier that is no noise, or a total that is not finite.
    """
    if not (0 < clip_norm < math.inf and 0 < noise_multiplier < math.inf):
        raise LedgerRefusal(f"clip_norm = {clip_norm!r} and noise_multiplier = {noise_multiplier!r} must be positive")
    step = lattice_step(clip_norm, sum(total.size for total in totals))
    released: list[Doubles] = []
    for total in totals:
        if not np.isfinite(total).all():
            raise LedgerRefusal("a clipped sum is not finite: a contribution got past the clip; nothing is released")
        noisy = np.asarray(noise.normal(total.shape), np.float64)
        noisy *= noise_multiplier * clip_norm / step
        np.rint(noisy, out=noisy)
        noisy += np.rint(total / step)
        noisy *= step
        released.append(noisy)
    return released
