"""The exact mean of the products B @ A, as one stacked adapter.

With weights p_k = 1/K the stack is A = rows of all A_k, B = columns of all p_k B_k: B @ A = sum_k p_k B_k A_k
(`fl_app.lora.stacked`).

Source: Wang et al. 2024 (FLoRA, 2409.05976), section 3; ours keeps the stack as an adapter instead of merging it into
the base, and takes equal public weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fl_app import lora
from fl_app.config import Section
from fl_app.types import AdapterRelease, Merged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast, Upload
    from strategies.stages import Aggregator, Setting


class MeanProduct(Section):
    """[server.aggregator] kind = "mean_product"."""

    kind: Literal["mean_product"]

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage."""
        return mean_product


def mean_product(uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:  # noqa: ARG001 - the protocol's
    """Return an adapter of rank sum r_k whose delta_W is the mean of the uploads' delta_W, exactly.

    Scalings may differ: each s_k = alpha_k / r_k is folded into its block of B.
    """
    ordered = sorted(uploads, key=lambda upload: upload.site)
    adapters = [upload.release.adapter for upload in ordered if isinstance(upload.release, AdapterRelease)]
    if not adapters:
        raise ValueError("no adapter to aggregate")
    lora.check_alike(adapters, same_rank=False)
    merged = lora.stacked(adapters, [1 / len(adapters)] * len(adapters))
    return Merged(adapter=merged, used=tuple(upload.site for upload in ordered))
