"""How the numbers of an adapter travel: as they are, in half the bytes, or in a quarter.

| precision | a number takes | its error                                                                           |
|-----------|----------------|--------------------------------------------------------------------------------------|
| float32   | 4 bytes        | none                                                                                 |
| float16   | 2 bytes        | 2^-11 of the number; below 6e-5 at most 2^-25                                        |
| int8      | 1 byte         | 1/126 of the largest |x| of its rank component at most, a quarter of that in the mean |

What a site sends below float32 is its update, factor minus broadcast: the error is then a share of what was learned,
not of what was there before. A broadcast travels as it is, so int8 is for uploads alone.

A site rounds what it releases before it is kept and hashed, and a server rounds the target before it is kept, so both
sides hold the same bits; rounding twice is rounding once. After noise it is post-processing: no receipt changes.

int8 has one scale for each row of a, column of b and row of a core, a power of two, so that a code times its scale is
exact. Legend of shapes: r = rank; a (r, d_in), b (d_out, r), core (r, r); scales (r,).
Source: ours; symmetric integer quantisation as in Jacob et al. 2018 (1712.05877), there with real scales.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from fl_app.errors import NotFinite
from fl_app.types import Adapter

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    import numpy.typing as npt

    from fl_app.types import Factor, Floats, Precision

DTYPES: dict[str, str] = {"float32": "<f4", "float16": "<f2", "int8": "|i1", "uint8": "|u1"}
"""How numpy writes a number of each type that travels."""

CODES = 126.5
"""Codes go to 126, so that a number that was rounded once does not need a larger scale the second time."""

LOWEST = -126
"""The least exponent of a scale; a component below 2^-126 travels as zero."""

HALF_MOST = 65504.0
"""The largest number of float16."""


EXPONENT = "exponent"
"""What the exponents of int8's scales are called, behind the name of their factor."""

TURNS = 8
"""Rounding an update again settles at once but where it is as small as float32's own steps; then in a turn or two."""


def rounded(adapter: Adapter, factors: Iterable[Factor], precision: Precision, start: Adapter | None = None) -> Adapter:
    """Return an adapter whose named factors are what arrives when they travel at this precision.

    With `start`, their difference from it is what travels.
    Guarantee: rounded twice is rounded once, to the bit. Raises: NotFinite when a number is too large for float16, or
    an update does not settle.
    """
    if precision == "float32":
        return adapter
    chosen = set(factors)

    def one(name: str, factor: Factor) -> Floats | None:
        values: Floats | None = getattr(adapter.layers[name], factor)
        if values is None or factor not in chosen:
            return values
        return _settled(values, factor, precision, None if start is None else getattr(start.layers[name], factor))

    layers = {
        name: dataclasses.replace(layer, a=one(name, "a"), b=one(name, "b"), core=one(name, "core"))
        for name, layer in adapter.layers.items()
    }
    return Adapter(layers=layers, alpha=adapter.alpha, base=adapter.base)


def _settled(values: Floats, factor: Factor, precision: Precision, start: Floats | None) -> Floats:
    for _ in range(TURNS):
        after = decode(encode(values, factor, precision, start), factor, start)
        if np.array_equal(after, values):
            return after
        values = after
    raise NotFinite(f'a factor {factor} does not settle at {precision}; use lora.upload_precision = "float32"')


def encode(
    values: Floats, factor: Factor, precision: Precision, start: Floats | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that a factor travels as: itself as "", and for int8 the exponents of its scales.

    Below float32 with `start` it is the difference from it that travels.

    Raises: NotFinite for a number that the precision cannot hold.
    """
    if precision == "float32":
        return {"": np.ascontiguousarray(values, np.float32)}
    if start is not None:
        values = values - start
    if not np.isfinite(values).all():
        raise NotFinite(f"a factor {factor} holds NaN or infinity, which does not travel")
    if precision == "float16":
        if np.abs(values).max(initial=0.0) > HALF_MOST:
            raise NotFinite(f"a factor {factor} holds numbers above {HALF_MOST:g}; let it travel in float32")
        return {"": np.ascontiguousarray(values, np.float16)}
    largest = np.abs(values).max(axis=_others(factor), initial=0.0).astype(np.float64)
    mantissa, exponent = np.frexp(largest / CODES)
    exponents = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent), LOWEST, None)  # noqa: PLR2004 - a power of two
    exponents = np.where(largest == 0, LOWEST, exponents).astype(np.int8)
    codes = np.rint(values / _scales(exponents, factor)).astype(np.int8)
    return {"": np.ascontiguousarray(codes), EXPONENT: exponents}


def decode(arrays: dict[str, npt.NDArray[Any]], factor: Factor, start: Floats | None = None) -> Floats:
    """Return the factor that arrived, in float32; below float32 on top of `start`, where there is one."""
    values = arrays[""]
    if values.dtype == np.float32:
        return values.astype(np.float32, copy=False)
    if EXPONENT in arrays:
        values = values.astype(np.float64) * _scales(arrays[EXPONENT], factor)
    update = values.astype(np.float32)
    return update if start is None else start + update


def shapes(shape: tuple[int, int], factor: Factor, precision: Precision) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `encode` gives for a factor of this shape."""
    if precision != "int8":
        return {"": shape}
    return {"": shape, EXPONENT: (shape[1] if factor == "b" else shape[0],)}


def num_bytes(shape: tuple[int, int], factor: Factor, precision: Precision) -> int:
    """Return the bytes of a factor's numbers on the wire, headers aside."""
    width = {"float32": 4, "float16": 2, "int8": 1}[precision]
    return sum(width * int(np.prod(one)) for one in shapes(shape, factor, precision).values())


def _others(factor: Factor) -> int:
    """Return the axis that a rank component runs along."""
    return 0 if factor == "b" else 1


def _scales(exponents: npt.NDArray[np.int8], factor: Factor) -> npt.NDArray[np.float64]:
    scales = np.ldexp(1.0, exponents.astype(np.int64))
    return scales[None, :] if factor == "b" else scales[:, None]
