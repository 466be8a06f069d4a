"""A wrong baseline, kept to be measured against: factors of mixed ranks are filled up with zeros, then averaged.

    A = sum_k p_k [A_k; 0],   B = sum_k p_k [s_k B_k / s, 0]

It is what plain averaging does where sites have ranks of their own, and it is wrong twice. B @ A is not sum_k p_k B_k
A_k: it misses the cross-covariance of the factors, as `mean_factors` does. And a direction that only the larger sites
have is divided by all of them in A and once more in B: a lone site of share p that holds it counts p^2 instead of p.
Use `stacked`, `truncated_svd` or `thresholded_svd`, which are exact for the same uploads.

Source: the zero-padding of HetLoRA (Cho et al. 2024, 2401.06432), as other papers compare with it; without that paper's
weights by the norm of a client's update and without its pruning of ranks. Scalings are folded into B, so that what is
wrong is the averaging alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fl_app import lora
from fl_app.errors import AdapterMismatch
from fl_app.types import Adapter, LoraFactors
from strategies import products
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast
    from strategies.stages import Setting


class ZeroPadded(Weighed):
    """[server.aggregator] kind = "zero_padded"."""

    no_cores: ClassVar[str] = "where sites train the core alone, all have one rank"

    kind: Literal["zero_padded"]

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the mean of the padded factors, at the broadcast's rank.

        Raises: AdapterMismatch for an adapter of a higher rank: cutting it would lose what its site trained.
        """
        spec = lora.spec_like(broadcast.adapter)
        largest = max(map(lora.rank_of, adapters))
        if largest > spec.rank:
            raise AdapterMismatch(
                f"zero_padded fills up to lora.rank = {spec.rank}, and an upload has rank {largest}; raise lora.rank, "
                "or use truncated_svd"
            )
        padded = [_padded(adapter, spec.rank, spec.alpha) for adapter in adapters]
        mean = products.by_factor(padded, lambda parts: products.mean(parts, shares))
        return Whole(adapter=mean, start=mean)


def _padded(adapter: Adapter, rank: int, alpha: float) -> Adapter:
    """Return the same delta_W at a higher rank: zeros below a and beside b, the scaling folded into b."""
    more = rank - lora.rank_of(adapter)
    ratio = (adapter.alpha / lora.rank_of(adapter)) / (alpha / rank)
    layers = {
        name: LoraFactors(
            a=np.pad(factors.a, ((0, more), (0, 0))),
            b=np.pad(ratio * factors.b.astype(np.float64), ((0, 0), (0, more))).astype(np.float32),
        )
        for name, factors in adapter.layers.items()
    }
    return Adapter(layers=layers, alpha=alpha, base=adapter.base)
