"""FLoRA: all sites' adapters stacked into one block under the model; the next round starts from a fresh adapter.

    block = rows of all A_k over each other, columns of all p_k s_k B_k side by side;   b @ a = sum_k p_k s_k B_k A_k

Exact for any ranks and scalings, because nothing is averaged: the rank is sum r_k. A share goes on one side only; on
both it would square. Dropping a site's rows and columns and sharing anew is the aggregate without that site.

What it costs: every site downloads the stack of all sites, 4 sum_k r_k (d_in + d_out) bytes a layer, and A begins anew
each round, with B = 0, so a first step moves B alone (LoRA-FAIR, 2411.14961, calls that the initialization lag).

Source: Wang et al. 2024 (FLoRA, 2409.05976), section 3. Theirs merges the stack into the base weights of every site and
folds the share into A; ours keeps the base as it is, carries the stack as a frozen block, folds the share into B, and
weighs by public constants instead of row counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fl_app import lora
from strategies.weighing import Weighed, Whole, fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Adapter, Broadcast
    from strategies.stages import Setting


class Stacked(Weighed):
    """[server.aggregator] kind = "stacked"."""

    anew: ClassVar[bool] = True

    kind: Literal["stacked"]

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the stack, as adapter and as block, and a fresh start."""
        stack = lora.stacked(adapters, shares)
        return Whole(adapter=stack, start=fresh(broadcast, setting), blocks=(stack,))
