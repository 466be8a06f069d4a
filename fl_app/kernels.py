"""Whether this machine computes a row of a matrix product to the same bits, however many rows stand beside it.

A clip bounds what one example adds; it does not bound what one example does to the *rounding* of others. A kernel that
picks its order of summation by the height of a batch lets a new row move everybody else's gradient in the last bits:
1e-7 of it in float32, but up to 1e-2 in bfloat16, and a sum of many such moves is no longer covered by the clip norm.
So a learner puts rows into one batch only where this check passes, and trains them one by one where it does not.

Measured on an AMD EPYC (MKL and oneDNN of torch 2.13): products of 4 rows and more agree in all bits, of 1 to 3 rows do
not, hence `HEIGHT_STEP`. That they can differ is also what makes the check one that can fail.

Out of scope: elementwise kernels, which agree when every tensor is a multiple of the vector length (widths are
multiples of 16); the whole is held to the bit by tests/privacy on every machine that runs them.
"""

from __future__ import annotations

import functools
from typing import Any

HEIGHT_STEP = 16
"""Rows of a product are a multiple of this, by padding where need be."""

_LARGE = 1 << 22
"""Weights with more elements (an output head) are tried at fewer heights, or the check would cost seconds."""


def keep_rows_apart(model: Any, most_rows: int) -> bool:
    """Whether products with the model's weights give a row the same bits at every height up to `most_rows`.

    Looks at shapes alone, so that the answer is a property of machine and model; it is kept per process.
    """
    import torch

    dtype = model.get_input_embeddings().weight.dtype  # factors are float32, and computed with in the model's own type
    shapes = sorted({tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2})  # noqa: PLR2004
    height = max(-(-most_rows // HEIGHT_STEP) * HEIGHT_STEP, 2 * HEIGHT_STEP)
    return all(_agree(shape, dtype, height, torch.get_num_threads()) for shape in shapes)


@functools.lru_cache(maxsize=1024)
def _agree(shape: tuple[int, int], dtype: Any, height: int, threads: int) -> bool:  # noqa: ARG001 - part of the key
    """Whether x @ w and x @ w' agree in all bits at several heights, for weights of this shape."""
    import torch

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw).to(dtype)
    heights = {HEIGHT_STEP, 3 * HEIGHT_STEP} if weight.numel() > _LARGE else _heights(height)
    for matrix in (weight, weight.t()):
        rows = torch.randn(height, matrix.shape[0], generator=draw).to(dtype)
        whole = rows @ matrix
        for some in heights:
            for start in {0, height - some}:
                if not torch.equal(rows[start : start + some] @ matrix, whole[start : start + some]):
                    return False
    return True


def _heights(height: int) -> set[int]:
    """Return 16, 32, 48, and then doubles, and one just below the top."""
    doubles = {HEIGHT_STEP << power for power in range(1, 12)}
    return {some for some in doubles | {HEIGHT_STEP, 3 * HEIGHT_STEP, height - HEIGHT_STEP} if 0 < some < height}
