"""FedEx-LoRA: the mean of the factors goes on, and what it misses goes under the model as a block, exactly.

    residual = s (sum_k p_k B_k A_k - B' A') = s sum_k p_k (B_k - B') (A_k - A'),   A', B' the means

The second form is the weighted cross-covariance of the factors. It is a sum of K products that depend on each other,
sum_k p_k (B_k - B') = 0, so K - 1 pairs carry it: with H the (K-1) x K matrix of orthonormal rows that are orthogonal
to (sqrt p_1, ..., sqrt p_K), the pairs are sum_k H_jk sqrt(p_k) of the centred B_k and A_k. That makes the block's rank
(K - 1) r and a download of 4 (K - 1) r (d_in + d_out) bytes a layer, where a dense residual takes 4 d_in d_out; a block
of more rank than the maps can have is cut down to theirs (`low_rank.compact`), without loss.

Source: Singhal et al. 2025 (FedEx-LoRA, 2410.09432). Theirs adds the residual to the frozen weights, with the
plain mean; ours keeps it in factors, so that no base weight changes, nothing depends on how a layer stores its weight
(their public code adds the transpose, which is right for Conv1D alone), and quantised bases work. Public weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fl_app import lora, low_rank
from fl_app.types import Adapter, LoraFactors
from strategies import products
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast
    from strategies.stages import Setting


class Residual(Weighed):
    """[server.aggregator] kind = "residual"."""

    one_rank: ClassVar[str] = (
        "starts from the mean of the factors, and factors of different ranks or scalings have no mean"
    )
    no_cores: ClassVar[str] = "where sites train the core alone, the mean of the cores misses nothing"

    kind: Literal["residual"]

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the mean of the factors as start, the residual as block (none for one site), and both as one."""
        start = products.by_factor(adapters, lambda parts: products.mean(parts, shares))
        if len(adapters) == 1:
            return Whole(adapter=start, start=start)
        block = low_rank.compact(_covariance(adapters, shares, start))
        return Whole(adapter=lora.stacked([start, block]), start=start, blocks=(block,))


def _covariance(adapters: Sequence[Adapter], shares: Sequence[float], centre: Adapter) -> Adapter:
    """Return the weighted cross-covariance of the factors, of rank (K - 1) r, in the scaling of `centre`."""
    mixing = contrasts(shares) * np.sqrt(shares)
    layers: dict[str, LoraFactors] = {}
    for name, mean in centre.layers.items():
        a_KrI = np.stack([adapter.layers[name].a for adapter in adapters]).astype(np.float64) - mean.a
        b_KOr = np.stack([adapter.layers[name].b for adapter in adapters]).astype(np.float64) - mean.b
        a_JrI, b_JOr = np.tensordot(mixing, a_KrI, 1), np.tensordot(mixing, b_KOr, 1)
        layers[name] = LoraFactors(
            a=np.concatenate(a_JrI, axis=0).astype(np.float32), b=np.concatenate(b_JOr, axis=1).astype(np.float32)
        )
    alpha = centre.alpha * (len(adapters) - 1)  # alpha / rank stays what it was
    return Adapter(layers=layers, alpha=alpha, base=centre.base)


def contrasts(shares: Sequence[float]) -> np.ndarray:
    """Return a (K-1, K) matrix of orthonormal rows, all orthogonal to the square roots of the shares."""
    first = np.sqrt(np.asarray(shares, np.float64))
    basis, _ = np.linalg.qr(np.column_stack([first, np.eye(len(first))[:, 1:]]))
    return basis[:, 1:].T
