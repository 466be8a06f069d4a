"""A kernel as an inner product of short vectors, so that one noisy sum answers every question of density.

    z(x) = sqrt(2 / dim) * (cos w_1 x, sin w_1 x, ..., cos w_h x, sin w_h x),   h = dim / 2
    E <z(x), z(y)> = k(x - y);   |z(x)| = 1 whatever x is

A site sums z over its texts and adds noise once. The density of private text near any y is then <z(y), noisy sum>, for
as many y as anybody likes: post-processing. Since every text weighs exactly 1 in L2 norm, one record moves the sum by
1, and no clipping is needed or loses anything.

| kernel      | k(x - y)                            | w is drawn from                         |
|-------------|-------------------------------------|-----------------------------------------|
| "gaussian"  | exp(-|x - y|^2 / (2 bandwidth^2))   | normal, standard deviation 1 / bandwidth |
| "laplacian" | exp(-|x - y|_1 / bandwidth)         | Cauchy, scale 1 / bandwidth, per coordinate |

The frequencies come from a public seed: both sides draw the same ones, and they hide nothing.

How far off (`pair_std`, `noise_std`). One pair's estimate is a mean over h frequencies of cos(w (x - y)), whose
variance is (1 + k(2 (x - y))) / 2 - k^2. So its standard deviation is (1 - k^2) / sqrt(dim) for the Gaussian, where
k(2 d) = k^4, and sqrt((1 - k^2) / dim) for the Laplacian, where k(2 d) = k^2. Pairs share the frequencies, so a sum of
n pairs is off by at most n times the largest. The noise of the sum adds noise_multiplier * clip_norm, because z(y) has
norm 1; over the sites, in quadrature.

Source: Rahimi & Recht 2007 for the features; Backurs et al. 2024 (2403.08917) for answering similarities to private
data from one private structure; Wagner, Naamad & Mishra 2023 (2307.01877) for releasing a noisy sum of random Fourier
features. Ours differs in Gaussian noise on the joint sum. Of the last two papers the abstracts were read.
Out of scope: embedding (`fl_app.embeddings`), noise (`fl_app.privacy.gaussian`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from fl_app.seeds import stream

if TYPE_CHECKING:
    import numpy.typing as npt

    from fl_app.types import Floats

    Doubles = npt.NDArray[np.float64]

Kernel: TypeAlias = Literal["gaussian", "laplacian"]


def kernel_features(
    embeddings: Floats, dim: int, bandwidth: float, seed: int, *, kernel: Kernel = "gaussian"
) -> Floats:
    """Return the features of every embedding.

    Guarantee: each row has L2 norm 1 within 1e-6 (float32); the rest is paid for by summing over
    `gaussian.usable_clip(1)`, 1.2e-4 short of 1. Rows do not depend on one another.
    Shapes: embeddings (N, d), result (N, dim) float32.
    Raises: ValueError for a dim that is odd or below 2, or a bandwidth that is not positive.
    """
    if dim < 2 or dim % 2:  # noqa: PLR2004 -- one cosine and one sine
        raise ValueError(f"dim = {dim} must be even and at least 2: features come in pairs of cosine and sine")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth = {bandwidth} must be positive and finite")
    rng = stream(seed, "kernel_features", kernel)
    shape = (embeddings.shape[1], dim // 2)
    drawn = rng.standard_normal(shape) if kernel == "gaussian" else rng.standard_cauchy(shape)
    phases = np.einsum("nd,dh->nh", embeddings.astype(np.float64), drawn / bandwidth)  # row by row, not blocked
    features = np.concatenate([np.cos(phases), np.sin(phases)], axis=1)
    return (features * math.sqrt(2 / dim)).astype(np.float32)


def densities(features: Floats, noisy_sum: Floats) -> Doubles:
    """Return the estimated sum of kernel values between each text and all texts in the sum; noise may make it negative.

    Shapes: features (N, dim), noisy_sum (dim,), result (N,) float64.
    """
    return features.astype(np.float64) @ noisy_sum.astype(np.float64)


def pair_std(kernel_value: float, dim: int, *, kernel: Kernel = "gaussian") -> float:
    """Return the standard deviation, over seeds, of one pair's estimate whose true kernel value is `kernel_value`."""
    spread = 1 - kernel_value**2
    return spread / math.sqrt(dim) if kernel == "gaussian" else math.sqrt(spread / dim)


def noise_std(noise_multiplier: float, clip_norm: float, *, sites: int = 1) -> float:
    """Return the standard deviation that the noise of `sites` sums adds to any one density."""
    return noise_multiplier * clip_norm * math.sqrt(sites)
