"""FedASK: the best adapter of the run's rank to the sum, seen through a random sketch of it.

    Y = sum_k p_k s_k B_k (A_k Omega),   Q from Y = Q R,   P = sum_k p_k s_k A_k' (B_k' Q),   Q P' = U S V

Omega is d_in x (rank + oversample), drawn anew for every round and layer from the run's seed. Q P' is the sum itself
once rank + oversample reaches the sum's rank; else its projection onto Y's columns. Of that the best adapter of the
run's rank is kept, as in `truncated_svd`, so that both A and B move even where sites train B alone.

| sites train                  | rank of the sum | exact from                          |
|------------------------------|-----------------|-------------------------------------|
| B, with one A (as published) | at most r       | oversample = 0, and nothing is cut  |
| A and B                      | up to sum r_k   | oversample = sum r_k - r, then cut  |

Y and P are sums over the sites, and nothing else of theirs is used: under secure aggregation two trips of sums would
do. Here the server holds the factors that sites released, so it computes both by itself, and one trip is enough.

Source: Wen et al. 2025 (FedASK, 2507.09990). Theirs weighs by row counts, draws one Omega for the whole run, and counts
its privacy by expected participation; ours weighs by public constants, and every ledger counts what happened.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fl_app import lora, low_rank
from fl_app.seeds import stream
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Adapter, Broadcast
    from strategies.stages import Setting


class SketchedSvd(Weighed):
    """[server.aggregator] kind = "sketched_svd": `oversample` columns beside the run's rank."""

    no_cores: ClassVar[str] = "where sites train the core alone, the mean of the cores is exact and nothing is sketched"

    kind: Literal["sketched_svd"]
    oversample: Annotated[int, Field(ge=0, le=4096)] = 8

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the head of the sketched decomposition at the broadcast's rank."""
        spec = lora.spec_like(broadcast.adapter)
        columns = spec.rank + self.oversample
        sketch = {
            name: stream(setting.seed, "sketch", broadcast.round, name).standard_normal((d_in, columns))
            for name, (d_in, _) in spec.shapes.items()
        }
        parts = low_rank.sketched(adapters, shares, sketch)
        head = low_rank.adapter_of(parts, rank=spec.rank, scaling=spec.alpha / spec.rank, base=spec.base)
        head = dataclasses.replace(head, alpha=spec.alpha)  # not through a division and back
        return Whole(adapter=head, start=head)
