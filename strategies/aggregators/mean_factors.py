"""FedIT: the mean of A and of B, each for itself; of adapters with cores, the mean of the cores.

mean(B) @ mean(A) is not mean(B @ A): the error is the cross-covariance of the factors over the sites. Where one factor
is common to all sites it vanishes, and the mean is exact:

| method                | common          | what is averaged                                  | exact |
|-----------------------|-----------------|---------------------------------------------------|-------|
| FedIT, DP-LoRA        | nothing         | A and B                                           | no    |
| LA-LoRA               | nothing         | A and B, which take turns within a round          | no    |
| FFA-LoRA              | A               | B                                                 | yes   |
| RoLoRA                | A, then B       | B in odd rounds, A in even ones                   | yes   |
| FedSA-LoRA            | B, as broadcast | A; the sites keep their own B, which never travel | yes   |
| Fed-SB, LoRA-SB       | A and B         | the r x r cores                                   | yes   |

A common factor comes out bit for bit as it went in. Of FedSA-LoRA the server knows A alone: its delta_W is that of the
broadcast's B, so 0 where B began at zero, and no text can be written from it.

Source: Zhang et al. 2023 (FedIT, 2305.05644); FFA-LoRA (Sun et al. 2024, 2403.12313), RoLoRA (2502.01755), LA-LoRA
(2602.19926), FedSA-LoRA (2410.01463), Fed-SB (2502.15436). Ours weighs by public constants, not by row counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from strategies import products
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Adapter, Broadcast
    from strategies.stages import Setting


class MeanFactors(Weighed):
    """[server.aggregator] kind = "mean_factors"."""

    one_rank: ClassVar[str] = "averages factor by factor, and factors of different ranks or scalings have no mean"

    kind: Literal["mean_factors"]

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the mean of the factors, summed in float64.

        Raises: AdapterMismatch where adapters have cores between different factors.
        """
        return Whole(adapter=products.by_factor(adapters, lambda parts: products.mean(parts, shares)))
