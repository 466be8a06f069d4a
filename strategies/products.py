"""Arithmetic of delta_W = (alpha / r) * b @ a over all layers, without ever writing a d_out x d_in matrix out.

Aggregators that speak of products share it. An adapter is here one vector, the entries of its products in all layers:
its norm is what an upload can do to the model, and it does not change when b and a are rescaled against each other.

    <b1 a1, b2 a2> = sum of (b1' b2) * (a1 a2')             r x r matrices, entry by entry
    b1 a1 - b2 a2  = (b1 - b2) a1 + b2 (a1 - a2)            small terms when the two are near each other

Legend of shapes: r = rank; a (r, d_in), b (d_out, r).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fl_app import lora
from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, AdapterRelease, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fl_app.types import Floats, Upload


def by_site(uploads: Sequence[Upload]) -> dict[str, Adapter]:
    """Return the adapters by site, names sorted. Raises: ValueError for none, or two of one site: it has one voice."""
    found = [(upload.site, upload.release.adapter) for upload in uploads if isinstance(upload.release, AdapterRelease)]
    if not found:
        raise ValueError("no adapter to aggregate")
    adapters = dict(sorted(found, key=lambda pair: pair[0]))
    if len(adapters) < len(found):
        raise ValueError("a site sent two uploads, which would count twice; a site has one upload a round")
    return adapters


def check_maps(adapters: Mapping[str, Adapter], start: Adapter, *, same_rank: bool = False) -> None:
    """Raise `AdapterMismatch` unless uploads and broadcast agree in base, layers and the maps they adapt.

    numpy would stretch a factor of another shape in a difference, so shapes are compared here and never there.
    """
    lora.check_alike(list(adapters.values()), same_rank=same_rank)
    try:
        lora.check_alike([start, *list(adapters.values())[:1]], same_rank=same_rank)
    except AdapterMismatch as error:
        raise AdapterMismatch(f"uploads do not answer the broadcast adapter (adapter 0): {error}") from None
    for site, adapter in adapters.items():
        rank = lora.rank_of(adapter)
        for layer, began in start.layers.items():
            sent = adapter.layers[layer]
            if sent.a.shape != (rank, began.a.shape[1]) or sent.b.shape != (began.b.shape[0], rank):
                raise AdapterMismatch(
                    f"{site}: {layer} is {sent.b.shape} @ {sent.a.shape}, the broadcast one adapts "
                    f"({began.b.shape[0]}, {began.a.shape[1]})"
                )
            if sent.core is not None and sent.core.shape != (rank, rank):
                raise AdapterMismatch(f"{site}: {layer}.core is {sent.core.shape}, its rank {rank}")
            if not all(np.isfinite(part).all() for part in lora.named_factors(layer, sent).values()):
                raise AdapterMismatch(f"{site}: {layer} holds NaN or infinity, which no distance is taken from")


def by_factor(adapters: Sequence[Adapter], combine: Callable[[Sequence[Floats]], Floats]) -> Adapter:
    """Return the adapter whose factors are what `combine` makes of the adapters' factors, each for itself.

    Where adapters have cores, the cores alone are combined: a and b must be the same in all, bit for bit, since a core
    speaks in their directions. Raises: AdapterMismatch naming the first layer where they are not.
    """
    first = adapters[0]
    layers: dict[str, LoraFactors] = {}
    for name in sorted(first.layers):
        found = [adapter.layers[name] for adapter in adapters]
        if found[0].core is None:
            layers[name] = LoraFactors(a=combine([one.a for one in found]), b=combine([one.b for one in found]))
            continue
        for index, other in enumerate(found[1:], start=1):
            if other.a.tobytes() != found[0].a.tobytes() or other.b.tobytes() != found[0].b.tobytes():
                raise AdapterMismatch(
                    f"{name}: adapters 0 and {index} have cores between other factors a and b, so their cores cannot "
                    "be compared; sites train the core alone"
                )
        cores = combine([one.core for one in found if one.core is not None])
        layers[name] = LoraFactors(a=found[0].a.copy(), b=found[0].b.copy(), core=cores)
    return Adapter(layers=layers, alpha=first.alpha, base=first.base)


def mean(parts: Sequence[Floats], shares: Sequence[float]) -> Floats:
    """Return the weighted mean of equal shapes.

    Guarantee: summed in float64; equal parts come out as they are, bit for bit, since shares sum to 1 to 2^-53 a part
    and float32 rounds at 2^-25.
    """
    total = shares[0] * parts[0].astype(np.float64)
    for share, part in zip(shares[1:], parts[1:], strict=True):
        total += share * part.astype(np.float64)
    return total.astype(np.float32)


def distance(left: Adapter, right: Adapter) -> float:
    """Return the Frobenius norm of delta_W(left) - delta_W(right), over all layers together; ranks may differ.

    Guarantee: 0 for equal adapters; else exact to about 1e-8 of the larger of the two terms above, in float64.
    """
    return math.sqrt(sum(max(0.0, _squared(left, right, layer)) for layer in sorted(left.layers)))


def _squared(left: Adapter, right: Adapter, layer: str) -> float:
    """Return the squared norm of one layer's difference."""
    one, other = left.layers[layer], right.layers[layer]
    scale = left.alpha / one.a.shape[0]
    ratio = (right.alpha / other.a.shape[0]) / scale
    a, b = one.a.astype(np.float64), _times_core(one)
    c, d = other.a.astype(np.float64), _times_core(other) * ratio
    if a.shape == c.shape:
        columns, rows = np.concatenate([b - d, d], axis=1), np.concatenate([a, a - c], axis=0)
    else:
        columns, rows = np.concatenate([b, -d], axis=1), np.concatenate([a, c], axis=0)
    return scale**2 * float(np.sum((columns.T @ columns) * (rows @ rows.T)))


def _times_core(factors: LoraFactors) -> np.ndarray:
    """Return b @ core in float64, b itself without a core."""
    b = factors.b.astype(np.float64)
    return b if factors.core is None else b @ factors.core.astype(np.float64)
