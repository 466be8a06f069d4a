"""Whether this machine computes a row of a matrix product to the same bits, however many rows stand beside it.

A clip bounds what one example adds; it does not bound what one example does to the *rounding* of others. A kernel that
picks its order of summation by the height of a batch lets a new row move everybody else's gradient in the last bits:
1e-7 of it in float32, but up to 1e-2 in bfloat16, and a sum of many such moves is no longer covered by the clip norm.
So a learner puts rows into one batch only where this check passes, and trains them one by one where it does not.

Measured on an AMD EPYC (MKL and oneDNN of torch 2.13): products of 4 rows and more agree in all bits, of 1 to 3 rows do
not, hence `HEIGHT_STEP`; products in bfloat16 with 4 columns differ in one number of 10^4. That they can differ is what
makes the check one that can fail.

Out of scope: elementwise kernels. With one or two threads they agree, since widths are multiples of 16; with 3, 5 or 7
torch cuts tensors inside a vector, and a row was seen to move another by 4e-7 of the clip norm, which the slack of
`fl_app.privacy.gaussian` covers. Our processes run one thread each.
"""

from __future__ import annotations

import functools
from typing import Any

HEIGHT_STEP = 16
"""Rows of a product are a multiple of this, by padding where need be."""

_LARGE = 1 << 22
"""Weights with more elements (an output head) are tried at fewer heights, or the check would cost seconds."""

_FRESH = 1 << 21
"""Numbers drawn for a matrix; to draw all of an output head's would take as long as its product."""

_ENOUGH = 1 << 18
"""Numbers that have to agree before a narrow type is trusted."""

_DEEP = 512
"""Terms of a sum from which a quarter of those numbers is enough (`_slices`)."""


def keep_rows_apart(model: Any, most_rows: int) -> bool:
    """Whether products with the model's weights give a row the same bits at every height up to `most_rows`.

    Looks at shapes alone, so that the answer is a property of machine and model; it is kept per process. Of a LoRA
    factor only the product that widens is tried: the one that narrows is made row by row (`fl_app.lora_linear`).
    """
    import torch

    dtype = model.get_input_embeddings().weight.dtype  # factors are float32, and computed with in the model's own type
    if any(weight.ndim > 2 for weight in model.parameters()):  # noqa: PLR2004 - experts: heights depend on company
        return False
    matrices: set[tuple[int, int, bool]] = set()  # rows, columns, and whether it is a transposed view
    thin: dict[str, tuple[int, int]] = {}  # of a map's factor with what is frozen under it: rank in all, width
    for name, weight in model.named_parameters():
        if weight.ndim == 2:  # noqa: PLR2004
            high, wide = int(weight.shape[0]), int(weight.shape[1])
            if ".lora_A." in name or ".lora_B." in name:  # (r, I) or (O, r); the node keeps b as (r, O)
                if name.endswith(".core.weight"):  # between the two (`fl_app.lora`), made row by row as well
                    continue
                rank, width = (high, wide) if ".lora_A." in name else (wide, high)
                place = name[: name.index(".lora_") + len(".lora_A")]
                thin[place] = (thin.get(place, (0, 0))[0] + rank, width)
            else:
                matrices |= {(high, wide, False), (wide, high, True)}
    matrices |= {(rank, width, False) for rank, width in thin.values()}
    height = max(-(-most_rows // HEIGHT_STEP) * HEIGHT_STEP, 2 * HEIGHT_STEP)
    return all(_agree(matrix, dtype, height, torch.get_num_threads()) for matrix in sorted(matrices))


def draws(numbers: int, dtype: Any) -> int:
    """Return how often to look at so many numbers before saying that two kernels agree.

    In float32 another order of summation shows in every other number. Rounding to a narrower type hides it from all but
    one in 10^4 (measured on products with 4 columns), so a quarter of a million have to agree.
    """
    return 1 if _is_wide(dtype) else max(1, -(-_ENOUGH // numbers))


def _is_wide(dtype: Any) -> bool:
    import torch

    return dtype == torch.float32


@functools.lru_cache(maxsize=1024)
def _agree(matrix: tuple[int, int, bool], dtype: Any, height: int, threads: int) -> bool:  # noqa: ARG001 - a key
    """Whether products with matrices of this shape agree in all bits at several heights.

    At each height so many slices are compared as make enough numbers, the first and the last among them.
    """
    import torch

    rows, columns, transposed = matrix
    draw = torch.Generator().manual_seed(0)
    heights = {HEIGHT_STEP, 3 * HEIGHT_STEP} if rows * columns > _LARGE else _heights(height)
    for _ in range(draws(height * columns, dtype)):
        stored = _numbers(*((columns, rows) if transposed else (rows, columns)), draw, dtype)
        right = stored.t() if transposed else stored
        left = _numbers(height, rows, draw, dtype)
        whole = left @ right
        for some in heights:
            for start in _starts(height, some, enough=_slices(rows, some * columns, dtype)):
                if not torch.equal(left[start : start + some] @ right, whole[start : start + some]):
                    return False
    return True


def _slices(rows: int, numbers: int, dtype: Any) -> int:
    """Return how many slices of so many numbers to compare; a sum of many terms shows its order more often.

    Two halves summed apart and rounded to bfloat16 differ in 2 numbers of 10^5 with 64 terms and 15 with 576 or more.
    """
    enough = _ENOUGH if rows < _DEEP else _ENOUGH // 4
    return 1 if _is_wide(dtype) else -(-enough // numbers)


def _numbers(high: int, wide: int, draw: Any, dtype: Any) -> Any:
    """Return normal draws; past `_FRESH` they repeat, since an order of summation shows in repeated numbers too."""
    import torch

    fresh = min(wide, max(1, _FRESH // high))
    block = torch.randn(high, fresh, generator=draw).to(dtype)
    return block if fresh == wide else block.repeat(1, -(-wide // fresh))[:, :wide].contiguous()


def _starts(height: int, some: int, enough: int) -> list[int]:
    """Return where `enough` slices of `some` rows begin, spread over the height: at least the first and the last."""
    count = height // some
    chosen = max(2, min(enough, count))
    return sorted({(count - 1) * one // (chosen - 1) * some for one in range(chosen)})


def _heights(height: int) -> set[int]:
    """Return 16, 32, 48, and then doubles, and one just below the top."""
    doubles = {HEIGHT_STEP << power for power in range(1, 12)}
    return {some for some in doubles | {HEIGHT_STEP, 3 * HEIGHT_STEP, height - HEIGHT_STEP} if 0 < some < height}
