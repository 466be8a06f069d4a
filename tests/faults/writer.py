"""A synthesizer made of a function, for runs whose stages cost nothing: sites are asked for adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_app.types import Material, ReleaseSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.types import Draft


@dataclass(frozen=True)
class Writer:
    """`write` gets what a synthesizer gets."""

    write: Callable[[Any, Any, int], Sequence[Draft]]
    asks: ReleaseSpec = field(default_factory=ReleaseSpec)

    def prepare(self, *_: Any) -> Material:
        return Material()

    def __call__(self, voices: Any, rng: Any, round_number: int) -> Sequence[Draft]:
        return self.write(voices, rng, round_number)
