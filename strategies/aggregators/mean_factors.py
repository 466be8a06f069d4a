"""FedIT: the plain mean of A and of B, each for itself.

mean(B) @ mean(A) is not mean(B @ A): the error is the cross-covariance of the factors over the sites. It stays the
reference because most published numbers use it.

Source: Zhang et al. 2023 (FedIT, 2305.05644), with equal public weights: client-sent row counts are private.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from fl_app import lora
from fl_app.config import Section
from fl_app.types import Adapter, AdapterRelease, LoraFactors, Merged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast, Floats, Upload
    from strategies.stages import Aggregator, Setting


class MeanFactors(Section):
    """[server.aggregator] kind = "mean_factors"."""

    kind: Literal["mean_factors"]

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage."""
        return mean_factors


def mean_factors(uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:  # noqa: ARG001 - the protocol's
    """Return the mean of the factors. Summation is in float64 and in the order of the sites' names."""
    ordered = sorted(uploads, key=lambda upload: upload.site)
    adapters = [upload.release.adapter for upload in ordered if isinstance(upload.release, AdapterRelease)]
    if not adapters:
        raise ValueError("no adapter to aggregate")
    lora.check_alike(adapters)
    layers = {
        name: LoraFactors(
            a=_mean([adapter.layers[name].a for adapter in adapters]),
            b=_mean([adapter.layers[name].b for adapter in adapters]),
        )
        for name in sorted(adapters[0].layers)
    }
    merged = Adapter(layers=layers, alpha=adapters[0].alpha, base=adapters[0].base)
    return Merged(adapter=merged, used=tuple(upload.site for upload in ordered))


def _mean(parts: Sequence[Floats]) -> Floats:
    """Return the mean of equal shapes, summed in float64."""
    return np.asarray(np.mean(np.stack(parts), axis=0, dtype=np.float64), np.float32)
