"""What goes from round to round: the adapter that sites train, the blocks under it, and what each site gets of both.

    carries = "target"   the tuned target: the knowledge loop, in which the aggregate writes and teaches
    carries = "merged"   the aggregate itself: federated fine-tuning, in which every round goes on where the last ended

Only an aggregator's result is carried, so all of this is made of releases. Blocks (`Merged.blocks`) are what FLoRA and
FedEx-LoRA add to the base; they are adapters of any rank, kept apart because a site has the former ones already.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl_app import lora, lora_cut, low_rank, parts, peft_files
from fl_app.types import AdapterRelease, LoraFactors, Merged, Upload

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.lora import LoraSpec
    from fl_app.types import Adapter

START, BLOCKS = "start", "blocks"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Carried:
    """The model of a round: base + sum of delta_W(blocks) + delta_W(adapter)."""

    adapter: Adapter
    blocks: tuple[Adapter, ...] = ()

    def complete(self, adapter: Adapter | None = None) -> Adapter:
        """Return `adapter`, or the own one, with the blocks as one plain adapter of the same delta_W."""
        return completed(adapter or self.adapter, self.blocks)

    def parts(self) -> frozenset[str]:
        """Return the hashes of what a site that has all of this need not be sent again."""
        return parts.hashes(self.adapter, self.blocks)

    def cut(self, spec: LoraSpec) -> Carried:
        """Return what a site of a narrower spec gets: its layers, and the first rank components of the adapter."""
        if spec.shapes.keys() == self.adapter.layers.keys() and spec.rank == lora.rank_of(self.adapter):
            return self
        return Carried(
            adapter=lora_cut.cut(self.adapter, spec),
            blocks=tuple(
                dataclasses.replace(block, layers={name: block.layers[name] for name in sorted(spec.shapes)})
                for block in self.blocks
            ),
        )

    def after(self, merged: Merged, number_spec: LoraSpec) -> Carried:
        """Return what the next round begins with when this one's aggregate is carried.

        Where a round trained fewer rank components than there are, the others stay as they were.
        """
        start = merged.start or merged.adapter
        if number_spec.rank < lora.rank_of(self.adapter):
            start = lora_cut.patched(self.adapter, start)
        return Carried(adapter=start, blocks=(*self.blocks, *merged.blocks))


def completed(adapter: Adapter, blocks: tuple[Adapter, ...]) -> Adapter:
    """Return an adapter on blocks as one plain adapter of no more rank than its maps have."""
    return low_rank.compact(lora.stacked([adapter, *blocks])) if blocks else lora.plain(adapter)


def whole(upload: Upload, broadcast: Adapter) -> Upload:
    """Return an upload with the layers that its site does not train exactly as they were: it changed nothing there.

    An adapter has one rank, so what a site of a smaller rank trained is then filled up with zeros to the broadcast's.
    """
    if not isinstance(upload.release, AdapterRelease):
        return upload
    sent = upload.release.adapter
    if sent.layers.keys() == broadcast.layers.keys():
        return upload
    blank = {name: _zeros(one) for name, one in broadcast.layers.items() if name in sent.layers}
    trained = lora_cut.patched(dataclasses.replace(broadcast, layers=blank), sent)
    layers = {**broadcast.layers, **trained.layers}
    adapter = dataclasses.replace(broadcast, layers={name: layers[name] for name in sorted(layers)})
    return dataclasses.replace(upload, release=dataclasses.replace(upload.release, adapter=adapter))


def _zeros(factors: LoraFactors) -> LoraFactors:
    core = None if factors.core is None else np.zeros_like(factors.core)
    return LoraFactors(a=np.zeros_like(factors.a), b=np.zeros_like(factors.b), core=core)


def write(merged: Merged, folder: Path, *, base_name: str) -> list[Path]:
    """Write what an aggregate leaves for the next round beside it, and return where."""
    places: list[Path] = []
    if merged.start is not None:
        peft_files.save(merged.start, folder / START, base_name=base_name)
        places.append(folder / START)
    for number, block in enumerate(merged.blocks):
        peft_files.save(block, folder / BLOCKS / str(number), base_name=base_name)
        places.append(folder / BLOCKS / str(number))
    return places


def read(merged: Merged, folder: Path, *, blocks: int, start: bool) -> Merged:
    """Return an aggregate with what `write` wrote of it."""
    return dataclasses.replace(
        merged,
        start=peft_files.load(folder / START) if start else None,
        blocks=tuple(peft_files.load(folder / BLOCKS / str(number)) for number in range(blocks)),
    )
