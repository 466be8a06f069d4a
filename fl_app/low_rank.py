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

from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def cut(parts: Mapping[str, Svd], ranks: Mapping[str, int]) -> dict[str, Svd]:
    """Return the first `ranks[layer]` singular values of each layer: the best approximation of that rank.

    Guarantee: what is left out has the Frobenius norm sqrt(sum of the squares of the values left out).
    """
    return {
        name: Svd(u=part.u[:, : ranks[name]], s=part.s[: ranks[name]], v=part.v[: ranks[name]])
        for name, part in parts.items()
    }


def energy_ranks(parts: Mapping[str, Svd], energy: float) -> dict[str, int]:
    """Return, by layer, the fewest values whose squares sum to `energy` of all their squares; 0 for a layer of zeros.

    With `energy` 1 what is left out is below float64's rounding of the sum, 1e-8 of the layer's norm.
    """
    ranks: dict[str, int] = {}
    for name, part in parts.items():
        sums = np.cumsum(part.s**2)
        ranks[name] = int(np.searchsorted(sums, energy * sums[-1])) + 1 if sums[-1] > 0 else 0
    return ranks


def with_core(adapter: Adapter, rank: int) -> Adapter:
    """Return the best adapter of this rank with cores: b = u, a = v, both orthonormal, core = diag(s) / scaling.

    It looks at nothing but the released adapter that it is given, so it costs no privacy: the way to a basis under DP
    for Fed-SB, of which public code takes it from raw gradients of the private rows.

    Raises: AdapterMismatch when the adapter has fewer directions than `rank`.
    Source: Fed-SB (Singhal et al. 2025, 2502.15436) begins with the SVD of a first gradient; ours decomposes an adapter
    that was trained under DP.
    """
    parts = decompose(adapter)
    scaling = adapter.alpha / next(iter(adapter.layers.values())).a.shape[0]
    layers: dict[str, LoraFactors] = {}
    for name, part in parts.items():
        if len(part.s) < rank:
            raise AdapterMismatch(
                f"{name} has {len(part.s)} directions, fewer than the {rank} asked for; lower lora.rank, or train the "
                "first adapter at a higher one"
            )
        core = np.diag(part.s[:rank] / scaling).astype(np.float32)
        a, b = part.v[:rank].astype(np.float32), part.u[:, :rank].astype(np.float32)
        layers[name] = LoraFactors(a=a, b=b, core=core)
    return Adapter(layers=layers, alpha=scaling * rank, base=adapter.base)


def sketched(adapters: Sequence[Adapter], weights: Sequence[float], sketch: Mapping[str, np.ndarray]) -> dict[str, Svd]:
    """Return the decomposition of sum_k weights_k delta_W_k as two sums of thin matrices show it.

        y = sum_k w_k s_k b_k (a_k omega),   q from y = q r,   p = sum_k w_k s_k a_k' (b_k' q),   q p' = u s v

    Shapes: sketch by layer (d_in, m), m columns drawn at random; y (d_out, m), p (d_in, min(m, d_out)).
    Guarantee: exact, up to float64, once m is at least the rank of the sum (for all but a null set of draws); below,
    the projection of the sum onto the columns of y.
    Source: Halko, Martinsson and Tropp 2011 (0909.4061), without power iterations.
    """
    found: dict[str, Svd] = {}
    for name, omega in sorted(sketch.items()):
        sides = [_sides(adapter, name, weight) for adapter, weight in zip(adapters, weights, strict=True)]
        seen = sum(b @ (a @ omega) for a, b in sides)
        basis, _ = np.linalg.qr(np.asarray(seen, np.float64))
        back = sum(a.T @ (b.T @ basis) for a, b in sides)
        u, s, v = np.linalg.svd(np.asarray(back, np.float64).T, full_matrices=False)
        found[name] = Svd(u=basis @ u, s=s, v=v)
    return found


def _sides(adapter: Adapter, layer: str, weight: float) -> tuple[Doubles, Doubles]:
    """Return a and weight * scaling * b @ core of one layer, in float64."""
    factors = adapter.layers[layer]
    scaling = weight * adapter.alpha / factors.a.shape[0]
    b = factors.b.astype(np.float64)
    core = b if factors.core is None else b @ factors.core.astype(np.float64)
    return factors.a.astype(np.float64), scaling * core
