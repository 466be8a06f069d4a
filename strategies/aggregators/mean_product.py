"""The exact mean of the products B @ A, as one stacked adapter for the synthesis loop, where nothing is carried on.

With shares p_k the stack is A = rows of all A_k, B = columns of all p_k B_k: B @ A = sum_k p_k B_k A_k
(`fl_app.lora.stacked`). Its rank is the sum of the ranks, so no round can start from it: see `stacked` for that.

Source: Wang et al. 2024 (FLoRA, 2409.05976), section 3; ours keeps the stack as an adapter instead of merging it into
the base, and weighs by public constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fl_app import lora
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Adapter, Broadcast
    from strategies.stages import Setting


class MeanProduct(Weighed):
    """[server.aggregator] kind = "mean_product"."""

    carries: ClassVar[bool] = False

    kind: Literal["mean_product"]

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return an adapter of rank sum r_k whose delta_W is the mean of the adapters' delta_W, exactly.

        Scalings may differ: each s_k = alpha_k / r_k is folded into its block of B.
        """
        return Whole(adapter=lora.stacked(adapters, shares))
