"""Narrower adapters, for sites that carry less: fewer rank components, fewer layers, in the scaling of the whole.

Legend of shapes: r = rank; a (r, d_in), b (d_out, r), core (r, r).
Source: the first components of every site, as in HetLoRA (2401.06432) and DyLoRA (2210.07558); ours keeps alpha / rank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fl_app import lora
from fl_app.errors import AdapterMismatch
from fl_app.lora import LoraSpec
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Sequence


def narrowed(spec: LoraSpec, *, rank: int | None = None, first_layer: int = 0, targets: Sequence[str] = ()) -> LoraSpec:
    """Return the spec of a site that carries less: fewer rank components, only blocks from one up, only some maps.

    alpha goes with the rank, so that delta_W is scaled alike everywhere.
    Raises: AdapterMismatch when nothing is left, or the rank is not between 1 and the spec's.
    """
    rank = spec.rank if rank is None else rank
    if not 1 <= rank <= spec.rank:
        raise AdapterMismatch(f"rank {rank} is not between 1 and lora.rank = {spec.rank}")
    shapes = {
        name: shape
        for name, shape in spec.shapes.items()
        if lora.block_of(name) >= first_layer and (not targets or name.rpartition(".")[2] in targets)
    }
    if not shapes:
        named = f" among {', '.join(targets)}" if targets else ""
        raise AdapterMismatch(f"no adapted layer from decoder block {first_layer} up{named}; nothing is left to train")
    alpha = spec.alpha if rank == spec.rank else spec.alpha * rank / spec.rank
    return LoraSpec(shapes=shapes, rank=rank, alpha=alpha, base=spec.base, core=spec.core)


def cut(adapter: Adapter, spec: LoraSpec) -> Adapter:
    """Return the layers of a narrower spec with their first rank components: the very numbers, in that scaling."""
    rank = spec.rank
    layers = {
        name: LoraFactors(
            a=adapter.layers[name].a[:rank],
            b=np.ascontiguousarray(adapter.layers[name].b[:, :rank]),
            core=None if (core := adapter.layers[name].core) is None else np.ascontiguousarray(core[:rank, :rank]),
        )
        for name in sorted(spec.shapes)
    }
    return Adapter(layers=layers, alpha=spec.alpha, base=adapter.base)


def patched(adapter: Adapter, piece: Adapter) -> Adapter:
    """Return an adapter with its first rank components, in the layers of `piece`, replaced by those of `piece`."""
    rank = lora.rank_of(piece)
    layers: dict[str, LoraFactors] = {}
    for name, whole in adapter.layers.items():
        if (new := piece.layers.get(name)) is None:
            layers[name] = whole
            continue
        a, b, core = whole.a.copy(), whole.b.copy(), None if whole.core is None else whole.core.copy()
        a[:rank], b[:, :rank] = new.a, new.b
        if core is not None and new.core is not None:
            core[:rank, :rank] = new.core
        layers[name] = LoraFactors(a=a, b=b, core=core)
    return Adapter(layers=layers, alpha=adapter.alpha, base=adapter.base)


def check_start(adapter: Adapter, blocks: Sequence[Adapter], spec: LoraSpec) -> None:
    """Raise `AdapterMismatch` unless a site may train this: of `spec`, or narrower, on blocks of the same maps."""
    shapes = {name: spec.shapes[name] for name in adapter.layers if name in spec.shapes}
    rank = lora.rank_of(adapter)
    narrower = narrowed(spec, rank=rank) if rank <= spec.rank else spec
    if found := lora.difference(adapter, dataclasses.replace(narrower, shapes=shapes or spec.shapes)):
        raise AdapterMismatch(str(found))
    for block in blocks:
        wanted = LoraSpec(shapes=shapes, rank=lora.rank_of(block), alpha=block.alpha, base=spec.base)
        if found := lora.difference(block, wanted):
            raise AdapterMismatch(f"a block under the adapter: {found}")
