"""Training by scalars: a public random direction for every step, and one byte that says how far to go along it.

    z_t ~ N(0, I), drawn from (run, site, round, t);    w <- w - learning_rate * g_t * z_t

Whoever knows where a round began and its g_t walks the same path: `replay` is the walk that the site itself took,
so both ends agree in every bit, and a round of T steps travels as T bytes. That holds because nothing else enters a
step: the rate is constant, nothing decays, and g_t is what its byte says (`decode(encode(g))`) on both sides.

The byte: a sign, and the logarithm of |g| in steps of 1/16; 0 is zero. Within [SMALLEST, LARGEST] the relative error is
at most e^(1/32) - 1 = 3.2 %. Beyond it saturates; below, it goes to SMALLEST or to zero, whichever is nearer.

Directions are numpy's normals (ziggurat) from its Philox generator, keyed by a hash, made on the CPU in float32. NEP 19
lets them change with numpy's version; both ends run the one of the lock.

Legend of shapes: P = coordinates that a step moves, the active factors one after the other in sorted order of names.
Source: Spall 1992 (SPSA); Zelikman et al. 2023 (Just One Byte, 2306.10015) for the quantiser, which there needs a ninth
bit for the sign and covers 3.6e-4 to 2800; Qin et al. 2024 (FedKSeed, 2312.06353) for what a replay rests on. Ours
differs in fresh directions instead of a pool of seeds, since scalars travel step by step and no sums over seeds.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

import numpy as np

from fl_app import factors, lora
from fl_app.errors import NotFinite
from fl_app.types import Adapter, LoraFactors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from fl_app.types import Floats, Schedule

    Bytes = npt.NDArray[np.uint8]

PER_E = 16
"""Codes per factor of e."""

TOP, SIGN = 127, 128
"""The largest code, and the bit that makes a value negative."""

LARGEST = 20.085536923187668
"""e^3, the value of `TOP`: the slopes that a scalar is a mean of are clipped to 16 or less. An honest site saturates
too, so no scalar is larger."""

SMALLEST = 0.007635094218859962
"""e^(3 - 126 / 16), the value of code 1."""


@functools.cache
def _values() -> tuple[float, ...]:
    """Return the values of the codes 0 to 127, rounded from 30 digits, so that no library's `exp` has a say."""
    with localcontext() as context:
        context.prec = 30
        return (0.0, *(float((Decimal(3) - Decimal(TOP - code) / PER_E).exp()) for code in range(1, TOP + 1)))


def encode(scalars: Floats | npt.NDArray[np.float64]) -> Bytes:
    """Return the nearest codes by logarithm. Shapes: (steps,) -> (steps,) uint8. Raises: NotFinite."""
    if not np.isfinite(scalars).all():
        raise NotFinite("a scalar of a zeroth-order round is NaN or infinite; it has no code")
    size = np.abs(scalars.astype(np.float64))
    with np.errstate(divide="ignore"):
        code = np.rint(PER_E * (np.log(size) - 3)) + TOP
    code = np.where(size < SMALLEST / 2, 0, code.clip(1, TOP)).astype(np.uint8)
    return np.where((scalars < 0) & (code > 0), code | SIGN, code).astype(np.uint8)


def decode(codes: Bytes) -> Floats:
    """Return the values of codes. Shapes: (steps,) uint8 -> (steps,) float32. Any byte has one; 128 is zero."""
    values = np.array(_values())[codes & TOP]
    return (np.where(codes & SIGN, -values, values) + 0.0).astype(np.float32)


def replay(
    start: Adapter,
    scalars: Floats,
    *,
    run: str,
    site: str,
    round_number: int,
    learning_rate: float,
    schedule: Schedule,
) -> Adapter:
    """Return the adapter that a site has after these scalars, from `start`, to the bit.

    `run` and `site` are those of the upload.
    """
    walk = Walk(
        start,
        run=run,
        site=site,
        round_number=round_number,
        learning_rate=learning_rate,
        schedule=schedule,
    )
    for step, scalar in enumerate(scalars):
        walk.go(walk.direction(step), float(scalar))
    return walk.adapter


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Direction:
    """One step's z, by factor. Shapes: as the factors that it moves, float32."""

    parts: dict[str, Floats]


class Walk:
    """A walk from one adapter along public directions; `weights` is where it is, by `<layer>.<factor>`.

    Guarantee: elementwise float32 products and sums alone, which IEEE 754 leaves no choice about.
    """

    def __init__(
        self, start: Adapter, *, run: str, site: str, round_number: int, learning_rate: float, schedule: Schedule
    ) -> None:
        self._start, self._rate = start, learning_rate
        self._schedule: Schedule = schedule
        self._place: Sequence[str | int] = (run, site, round_number)
        self._round = round_number
        self.weights: dict[str, Floats] = {}
        for name, one in start.layers.items():
            self.weights |= {key: np.array(part, np.float32) for key, part in lora.named_factors(name, one).items()}
        self.weights = dict(sorted(self.weights.items()))

    def direction(self, step: int) -> Direction:
        """Return z of a step: standard normals for its active factors."""
        active = factors.active(self._schedule, self._round, step)
        moved = {name: part for name, part in self.weights.items() if name.rpartition(".")[2] in active}
        named = "\x1f".join(str(one) for one in ("zeroth order", *self._place, step))
        digest = hashlib.sha256(named.encode("utf-8", "surrogatepass")).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        flat = draw.standard_normal(sum(part.size for part in moved.values()), dtype=np.float32)
        ends = np.cumsum([part.size for part in moved.values()])[:-1]
        return Direction(
            parts={
                name: values.reshape(part.shape)
                for (name, part), values in zip(moved.items(), np.split(flat, ends), strict=True)
            }
        )

    def beside(self, direction: Direction, shift: float) -> dict[str, Floats]:
        """Return the moved factors at w + shift * z; the walk stays where it is."""
        return {name: _moved(self.weights[name], z, shift) for name, z in direction.parts.items()}

    def go(self, direction: Direction, scalar: float) -> None:
        """Take the step w <- w - learning_rate * scalar * z."""
        for name, z in direction.parts.items():
            self.weights[name] = _moved(self.weights[name], z, -self._rate * scalar)

    @property
    def adapter(self) -> Adapter:
        """The adapter at this place."""
        layers = {
            name: LoraFactors(
                a=self.weights[f"{name}.a"], b=self.weights[f"{name}.b"], core=self.weights.get(f"{name}.core")
            )
            for name in self._start.layers
        }
        return Adapter(layers=layers, alpha=self._start.alpha, base=self._start.base)


def _moved(weight: Floats, z: Floats, length: float) -> Floats:
    """Return weight + length * z, `length` rounded to float32 first."""
    moved: Floats = np.multiply(z, np.float32(length), dtype=np.float32)
    moved += weight
    return moved
