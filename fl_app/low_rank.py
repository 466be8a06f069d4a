"""Singular values of delta_W, from its factors: no d_out x d_in matrix is ever written out.

    b = Q R,  a' = P T   (thin QR),   s * b @ core @ a = Q (s * R core T') P' = (Q U) S (V P')

The SVD is that of the small matrix in the middle, r x r at most. All of it in float64; signs and order are LAPACK's,
so equal factors give equal bits on one machine.

Legend of shapes: r = rank, q = min(r, d_in, d_out); u (d_out, q), s (q,) falling, v (q, d_in).
Source: the QR route as in FLoRIST (Ramesh and Jyotikrishna 2025, 2506.09199), section 3; ours takes thin QR of both
sides where theirs takes two SVDs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Svd:
    """delta_W = (u * s) @ v of one layer, scaling included."""

    u: Doubles
    s: Doubles
    v: Doubles


def decompose(adapter: Adapter) -> dict[str, Svd]:
    """Return the singular value decomposition of delta_W, by layer in order."""
    found: dict[str, Svd] = {}
    for name in sorted(adapter.layers):
        factors = adapter.layers[name]
        scaling = adapter.alpha / factors.a.shape[0]
        left, upper = np.linalg.qr(factors.b.astype(np.float64))
        right, lower = np.linalg.qr(factors.a.astype(np.float64).T)
        core = upper if factors.core is None else upper @ factors.core.astype(np.float64)
        u, s, v = np.linalg.svd(scaling * core @ lower.T, full_matrices=False)
        found[name] = Svd(u=left @ u, s=s, v=v @ right.T)
    return found


def adapter_of(parts: Mapping[str, Svd], *, rank: int, scaling: float, base: str) -> Adapter:
    """Return the best adapter of this rank (Eckart and Young 1936): b = u sqrt(s / scaling), a = sqrt(s) v alike.

    The singular values are shared evenly, so that both factors begin at one size. Layers of fewer values are filled
    up with zeros. `scaling` is what delta_W is multiplied by, alpha / rank.
    """
    layers: dict[str, LoraFactors] = {}
    for name, part in parts.items():
        kept = min(rank, len(part.s))
        half = np.sqrt(part.s[:kept] / scaling)
        a, b = np.zeros((rank, part.v.shape[1]), np.float32), np.zeros((part.u.shape[0], rank), np.float32)
        a[:kept] = half[:, None] * part.v[:kept]
        b[:, :kept] = part.u[:, :kept] * half
        layers[name] = LoraFactors(a=a, b=b)
    return Adapter(layers=layers, alpha=scaling * rank, base=base)


def compact(adapter: Adapter) -> Adapter:
    """Return an adapter of the same delta_W, up to float32, of no higher rank than the maps themselves can have."""
    first = next(iter(adapter.layers.values()))
    rank = first.a.shape[0]
    most = max(min(one.a.shape[1], one.b.shape[0]) for one in adapter.layers.values())
    if rank <= most:
        return adapter
    return adapter_of(decompose(adapter), rank=most, scaling=adapter.alpha / rank, base=adapter.base)
