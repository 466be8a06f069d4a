"""The keys of a sum of kernel features: one table for the site that sums and for the server that reads the sum.

Features under another embedder, seed, bandwidth or length than the sum's are noise to it, and nothing in the numbers
would tell. So both sides read these keys, with these defaults, from one class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fl_app.config import Section
from fl_app.embeddings import AnyEmbedder
from fl_app.kernel_features import Kernel, kernel_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.embeddings import Embedder
    from fl_app.types import Floats


class KernelSumSection(Section):
    """Which features are summed, and of which embedding.

    The defaults are measured (`benchmarks/kernel_density.py`, MiniLM, 1,200 letters of four sites against public
    questions of the same topics). AUC by noise multiplier 0, 4 and 16; by the exact density, 0.81:

    | bandwidth | dim 1024         | dim 4096         |
    |-----------|------------------|------------------|
    | 0.35      | 0.64, 0.55, 0.52 | 0.72, 0.54, 0.52 |
    | 0.5       | 0.75, 0.73, 0.61 | 0.80, 0.75, 0.60 |
    | 1.0       | 0.78, 0.77, 0.72 | 0.81, 0.80, 0.74 |
    | 4.0       | 0.78, 0.75, 0.65 | 0.81, 0.78, 0.64 |
    """

    embedder: AnyEmbedder
    dim: Annotated[int, Field(ge=2, le=65_536, multiple_of=2)] = 4096
    bandwidth: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    kernel: Kernel = "gaussian"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def features(self, texts: Sequence[str], embed: Embedder, *, alone: bool = False) -> Floats:
        """Return one row per text, of L2 norm 1; `alone` for private texts, see `Embedder`. Shapes: (texts, dim)."""
        vectors = embed(texts, alone=alone)
        return kernel_features(vectors, self.dim, self.bandwidth, self.seed, kernel=self.kernel)

    def same_sum(self, other: KernelSumSection) -> str:
        """Return the first key in which the two sums differ, empty when one may be read as the other."""
        keys = KernelSumSection.model_fields
        return next((key for key in keys if getattr(self, key) != getattr(other, key)), "")
