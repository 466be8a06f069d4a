"""FLoRIST: of each layer's exact sum the fewest singular values that hold a share of its energy, as a block.

    q_l = the least q with  sum of the q greatest squared values  >=  tau * sum of all squared values,   of layer l

The energy is that of the squares, so the error of a layer is at most sqrt(1 - tau) of its norm, and tau = 1 keeps the
sum whole, up to float64. An adapter here has one rank for all its layers, so layers are filled with zeros up to the
greatest q_l: the download is 4 max_l q_l sum_l (d_in + d_out) bytes, where the paper's, with a rank for each layer, is
4 sum_l q_l (d_in + d_out). The block goes under the model, and the next round starts from a fresh adapter.

tau is a constant of the configuration. Choosing it by a look at private validation rows would be a release.

Source: Ramesh and Jyotikrishna 2025 (FLoRIST, 2506.09199), section 3: the squared energies, and clients that add the
product to their weights before the next round. Theirs takes two SVDs of the stacks and puts the values on B; ours takes
thin QR (`fl_app.low_rank`), shares the values between A and B, and weighs by public constants instead of row counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fl_app import lora, low_rank
from strategies.weighing import Weighed, Whole, fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Adapter, Broadcast
    from strategies.stages import Setting


class ThresholdedSvd(Weighed):
    """[server.aggregator] kind = "thresholded_svd": `energy` is tau, the share of the squares that is kept."""

    anew: ClassVar[bool] = True

    kind: Literal["thresholded_svd"]
    energy: Annotated[float, Field(gt=0, le=1)]

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return what is kept, as adapter and as block, and a fresh start; a sum of zeros keeps one zero."""
        parts = low_rank.decompose(lora.stacked(adapters, shares))
        ranks = low_rank.energy_ranks(parts, self.energy)
        scaling = broadcast.adapter.alpha / lora.rank_of(broadcast.adapter)
        most = max(1, *ranks.values())
        kept = low_rank.adapter_of(low_rank.cut(parts, ranks), rank=most, scaling=scaling, base=broadcast.adapter.base)
        return Whole(adapter=kept, start=fresh(broadcast, setting), blocks=(kept,))
