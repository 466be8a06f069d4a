"""InvisibleInk over several sites: each adds up its records' differences, adds noise, and the server draws the token.

Where one site's bucket is too small, the buckets of all sites can move the public scores together. A clipped sum that
leaves a site without noise is no DP release, however small the clip: whoever reads it reads the records. Inside one
site the draw itself is the noise (an exponential mechanism); between sites there must be noise on what is sent, and
the draw becomes post-processing of it:

    site      sum over rows of (score - public score), on the public mask, each row within an L2 ball; + Gaussian noise
    server    public score + sum over sites / expected, and a draw from its softmax

A token costs every site one `Gaussian` of a sum, whatever the other sites do; a text of T tokens, T of them. The noise
of all sites adds up in the sum, so that K sites see sqrt(K) times the noise of one for K times the records.

The mask is a function of public scores and constants (`private_decoding.public_mask`), known to both sides. Each row's
difference is recentred at its mean over the mask, since a softmax ignores an offset and a norm does not, and rounded
towards zero to the lattice on which the noise lies: sums of sites are then the sum over all rows, to the bit.

Out of scope: how a vector per token travels; today's rounds carry one release each (DECISIONS.md).

Legend of shapes: R = rows, K = tokens of the mask.
Source: InvisibleInk 2025 (2507.02974) for the differences on top-k+; ours differs in the ball and the noise, which it
does not need on one machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fl_app.privacy import gaussian
from fl_app.types import DpReceipt, Gaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fl_app.privacy.noise import NoiseSource

    Singles = npt.NDArray[np.float32]
    Doubles = npt.NDArray[np.float64]


def receipt(*, noise_multiplier: float, clip_norm: float, tokens: int, unit: str) -> DpReceipt:
    """Return what `tokens` noisy sums of one bucket cost each of its site's units."""
    return DpReceipt(event=Gaussian(noise_multiplier=noise_multiplier, clip_norm=clip_norm, count=tokens), unit=unit)


def clipped_sum(scores_RK: Singles, public_K: Singles, *, clip_norm: float, rows_per_unit: int) -> Doubles:
    """Return the sum of the rows' differences from the public scores, each within clip_norm / rows_per_unit.

    Guarantee: a unit of up to `rows_per_unit` rows moves it by at most `gaussian.usable_clip(clip_norm)` in L2 norm.
    Sums of parts add up to the sum of the whole, to the bit. A row that holds no number adds nothing.
    Shapes: (R, K), (K,) -> (K,).
    """
    step = gaussian.lattice_step(clip_norm, len(public_K))
    most = gaussian.usable_clip(clip_norm) / rows_per_unit
    with np.errstate(invalid="ignore", over="ignore"):
        moves_RK = scores_RK.astype(np.float64) - public_K
        moves_RK -= moves_RK.mean(axis=1, keepdims=True) if moves_RK.size else 0.0
        norms_R = np.sqrt(np.square(moves_RK).sum(axis=1))
    sound = np.isfinite(norms_R)
    moves_RK, norms_R = moves_RK[sound], norms_R[sound]
    moves_RK *= np.minimum(1.0, most / np.maximum(norms_R, most))[:, None]
    return np.trunc(moves_RK / step).sum(axis=0) * step


def noisy_sum(total_K: Doubles, *, clip_norm: float, noise_multiplier: float, noise: NoiseSource) -> Doubles:
    """Return what a site may send: the sum with its noise, on the lattice. Raises: LedgerRefusal without noise."""
    (released,) = gaussian.release([total_K], clip_norm=clip_norm, noise_multiplier=noise_multiplier, noise=noise)
    return released


def joint_scores(public_K: Singles, sums: Sequence[Doubles], *, expected: float) -> Doubles:
    """Return the public scores moved by the mean over the expected number of units of all sites."""
    total_K = np.zeros(len(public_K))
    for one in sums:
        total_K += one  # on one lattice: exact in any order
    return public_K + total_K / expected


def sampled(scores_K: Doubles, temperature: float, rng: np.random.Generator) -> int:
    """Return the place of a draw from softmax(scores / temperature): of released values, so from any generator."""
    return int(np.argmax(scores_K / temperature + rng.gumbel(size=scores_K.shape)))
