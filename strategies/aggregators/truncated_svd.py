"""FlexLoRA: the best adapter of one rank to the exact sum, by its singular value decomposition.

    sum_k p_k s_k B_k A_k = U S V  ->  B = U_r sqrt(S_r / s),  A = sqrt(S_r / s) V_r      (s = alpha / r of the run)

The error is exactly sqrt(sum of the squares of the singular values that were cut), the least that any adapter of this
rank can have (Eckart and Young 1936), so it is 0 when the sum has no more rank than the run. Values fall along the
rank, so that the first q rows of A and columns of B are the best adapter of rank q: what a site of a lower rank takes.

The decomposition is taken from the stacked factors (`low_rank.decompose`); no d_out x d_in matrix is written. Signs and
directions of singular vectors are not the sites': a momentum kept from the round before would mean nothing.

Source: Bai et al. 2024 (FlexLoRA, 2402.11505). Theirs decomposes the dense sum and gives every client its own rank;
ours is the one adapter that all of those are the head of, with public weights.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fl_app import lora, low_rank
from fl_app.errors import AdapterMismatch
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Adapter, Broadcast
    from strategies.stages import Setting


class TruncatedSvd(Weighed):
    """[server.aggregator] kind = "truncated_svd": `rank` singular values are kept; 0: as many as the run's rank."""

    no_cores: ClassVar[str] = "where sites train the core alone, the mean of the cores is exact and nothing is cut"

    kind: Literal["truncated_svd"]
    rank: Annotated[int, Field(ge=0, le=512)] = 0

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the head of the decomposition at the broadcast's rank, zeros where there are fewer values.

        Raises: AdapterMismatch when more values are to be kept than the run's rank holds.
        """
        spec = lora.spec_like(broadcast.adapter)
        if self.rank > spec.rank:
            raise AdapterMismatch(
                f"server.aggregator.rank = {self.rank} is above lora.rank = {spec.rank}, which every round starts from"
            )
        kept = dict.fromkeys(spec.shapes, self.rank or spec.rank)
        parts = low_rank.cut(low_rank.decompose(lora.stacked(adapters, shares)), kept)
        head = low_rank.adapter_of(parts, rank=spec.rank, scaling=spec.alpha / spec.rank, base=spec.base)
        head = dataclasses.replace(head, alpha=spec.alpha)  # not through a division and back
        return Whole(adapter=head, start=head)
