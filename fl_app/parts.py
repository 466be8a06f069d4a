"""The parts of a broadcast, by content: what a site already has does not travel again.

    a, b, core     one factor of all layers of the adapter that is trained
    block-<hash>   an adapter under it; a run adds some and changes none

A frozen a (FFA-LoRA), a factor whose turn it was not (RoLoRA), the bases of Fed-SB and every block of a former round
are therefore sent once. A site keeps the parts of its last broadcast (`clients.received`); the server counts on them
only where the site answered that broadcast with a sound upload.

Source: ours; content addressing as in any package store.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from fl_app import lora

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Adapter, Factor, Floats

FACTORS: tuple[Factor, ...] = ("a", "b", "core")


def part(adapter: Adapter, factor: Factor) -> dict[str, Floats]:
    """Return one factor of every layer by `<layer>.<factor>`; empty where there is none."""
    named = [lora.named_factors(name, adapter.layers[name]) for name in sorted(adapter.layers)]
    return {key: one for found in named for key, one in found.items() if key.endswith(f".{factor}")}


def arrays_of(adapter: Adapter) -> dict[str, Floats]:
    """Return all factors of an adapter by their names."""
    return {key: values for factor in FACTORS for key, values in part(adapter, factor).items()}


def sha256(arrays: Mapping[str, Floats]) -> str:
    """Return the content hash of arrays by name."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key], "<f4").tobytes())
    return digest.hexdigest()


def of_adapter(adapter: Adapter) -> dict[Factor, str]:
    """Return the hash of each factor that an adapter has."""
    found: dict[Factor, dict[str, Floats]] = {factor: part(adapter, factor) for factor in FACTORS}
    return {factor: sha256(arrays) for factor, arrays in found.items() if arrays}


def hashes(adapter: Adapter, blocks: Sequence[Adapter] = ()) -> frozenset[str]:
    """Return the hashes of all parts of a broadcast."""
    return frozenset([*of_adapter(adapter).values(), *(sha256(arrays_of(block)) for block in blocks)])
