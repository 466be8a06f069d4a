"""LoRA-FAIR: the mean of A stays, and the mean of B is corrected towards the exact sum; the next round starts there.

    A = A' = sum_k p_k A_k,   B = B' + D,   B' = sum_k p_k B_k,   M = sum_k p_k B_k A_k
    D = argmin |M - (B' + D) A'|^2 + penalty |D|^2
      = sum_k p_k (B_k - B') (A_k - A') A'' (A' A'' + penalty I)^-1,   where A'' is A' transposed

The closed form needs r x r matrices only. It is solved through the singular values of A', so that a mean of dependent
rows gives the shortest D of all that are best: penalty 0 is least squares, whose error is orthogonal to the rows of A';
a large penalty leaves the mean of the factors. In the norm of the products it is never worse than `mean_factors`.

| mode          | minimises                                          | how                                           |
|---------------|----------------------------------------------------|-----------------------------------------------|
| closed_form   | the squared distance plus penalty |D|^2            | the formula above                             |
| paper         | 1 - cosine of (B' + D) A' and M, plus penalty |D|  | gradient steps from D = 0, per layer          |

Both look for the same direction: products with A' form a linear space, and where the penalty is small the nearest point
of a linear space also has the smallest angle. They differ in length, which a cosine does not see: the paper's minimum
is any multiple, held near B' by the penalty alone. Its slope falls as the products grow, so that a thousand steps of
0.01 go a small part of the way: of cosines between 0.589 (the mean) and 0.659 (the best) they reach 0.597, measured on
five drawn sites of rank 6. `steps` is an assumption: the notes name SGD and a penalty of 0.01, and public
re-implementations take 1000 steps of 0.01.

Source: Bian et al. 2024 (LoRA-FAIR, 2411.14961), the minimisation of its section 4, read in notes on the paper; no code
of the authors was at hand. Ours adds the closed form, and weighs by public constants.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fl_app.types import Adapter, LoraFactors
from strategies import products
from strategies.weighing import Weighed, Whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast
    from strategies.stages import Setting

Doubles: TypeAlias = npt.NDArray[np.float64]

NOISE = 2.0**-23
"""Singular values of A' below r times this share of the greatest are float32's rounding of A', not directions."""


class Ridge(Weighed):
    """[server.aggregator] kind = "ridge"; `steps` and `learning_rate` are the paper mode's."""

    one_rank: ClassVar[str] = (
        "corrects the mean of the factors, and factors of different ranks or scalings have no mean"
    )
    no_cores: ClassVar[str] = "where sites train the core alone, the mean of the cores needs no correction"

    kind: Literal["ridge"]
    penalty: Annotated[float, Field(ge=0)] = 0.01
    mode: Literal["closed_form", "paper"] = "closed_form"
    steps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    learning_rate: Annotated[float, Field(gt=0)] = 0.01

    def merge(
        self, adapters: Sequence[Adapter], shares: Sequence[float], broadcast: Broadcast, setting: Setting
    ) -> Whole:
        """Return the corrected mean of the factors."""
        mean = products.by_factor(adapters, lambda parts: products.mean(parts, shares))
        layers: dict[str, LoraFactors] = {}
        for name, began in mean.layers.items():
            found = [adapter.layers[name] for adapter in adapters]
            a, b = began.a.astype(np.float64), began.b.astype(np.float64)
            if self.mode == "closed_form":
                moved = b + _correction(found, shares, began, self.penalty)
            else:
                moved = _descend(found, shares, a=a, start=b, section=self)
            layers[name] = LoraFactors(a=began.a, b=moved.astype(np.float32))
        corrected = dataclasses.replace(mean, layers=layers)
        return Whole(adapter=corrected, start=corrected)


def _correction(found: Sequence[LoraFactors], shares: Sequence[float], mean: LoraFactors, penalty: float) -> Doubles:
    """Return D of one layer, shape (d_out, r)."""
    u, s, v = np.linalg.svd(mean.a.astype(np.float64), full_matrices=False)
    # The factor is s / (s^2 + penalty), and 0 for a direction that is none, where penalty 0 would divide by 0.
    kept = s > len(u) * NOISE * s[0]
    gain = np.divide(s, s**2 + penalty, out=np.zeros_like(s), where=kept)
    back = (v.T * gain) @ u.T
    missed = np.zeros(mean.b.shape)
    for share, one in zip(shares, found, strict=True):
        missed += share * (one.b.astype(np.float64) - mean.b) @ ((one.a.astype(np.float64) - mean.a) @ back)
    return missed


def _descend(
    found: Sequence[LoraFactors], shares: Sequence[float], *, a: Doubles, start: Doubles, section: Ridge
) -> Doubles:
    """Return B after the paper's gradient steps; where a norm is 0 there is no angle, and B stays.

    cosine = <C, B> / (|M| n),   C = M A'',   n^2 = <B G, B>,   G = A' A''
    """
    gram = a @ a.T
    target = np.zeros_like(start)
    for share, one in zip(shares, found, strict=True):
        target += share * one.b.astype(np.float64) @ (one.a.astype(np.float64) @ a.T)
    length = _norm_of_sum(found, shares)
    b = start.copy()
    for _ in range(section.steps):
        reach = b @ gram
        size = float(np.sqrt(max(0.0, np.sum(reach * b))))
        if length == 0 or size == 0:
            return b
        slope = (float(np.sum(target * b)) / size**2 * reach - target) / (length * size)
        moved = b - start
        far = float(np.linalg.norm(moved))
        if far > 0:
            slope += section.penalty / far * moved
        b -= section.learning_rate * slope
    return b


def _norm_of_sum(found: Sequence[LoraFactors], shares: Sequence[float]) -> float:
    """Return the Frobenius norm of sum_k p_k B_k A_k, from thin QR of the stack."""
    b = np.concatenate([share * one.b.astype(np.float64) for share, one in zip(shares, found, strict=True)], axis=1)
    a = np.concatenate([one.a.astype(np.float64) for one in found], axis=0)
    _, upper = np.linalg.qr(b)
    _, lower = np.linalg.qr(a.T)
    return float(np.linalg.norm(upper @ lower.T))
