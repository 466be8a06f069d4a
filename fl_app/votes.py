"""Votes of private texts for synthetic ones: what a site counts, and how both sides name what was counted.

A vote is a vector over the whole population with L2 norm at most 1, whoever cast it. So one histogram of all votes has
sensitivity 1, and its noise does not grow with the number of bins.

Out of scope: embedding, noise, and what is done with the counts.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from fl_app.types import CodedText, Floats

    Doubles = npt.NDArray[np.float64]
    Indices = npt.NDArray[np.int64]


def bin_names(population: Sequence[CodedText]) -> tuple[str, ...]:
    """Return the name of every text's bin, in order: a hash of place, code and text.

    Whoever counts over another population, or over this one in another order, counts under other names.
    """
    keys = (f"{place}\x1f{one.code}\x1f{one.text}" for place, one in enumerate(population))
    return tuple(hashlib.sha256(key.encode()).hexdigest()[:16] for key in keys)


def bins_by_code(codes: Sequence[str]) -> dict[str, Indices]:
    """Return the places of each code, ascending; `codes` are those of the population's texts, in order."""
    found: dict[str, list[int]] = {}
    for place, code in enumerate(codes):
        found.setdefault(code, []).append(place)
    return {code: np.array(places, np.int64) for code, places in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ballot:
    """A population that can be voted on: by code, the places of its texts and their embeddings.

    Shapes: places (n,) int64, banks (n, d) float32, rows of norm 1.
    """

    size: int
    places: Mapping[str, Indices]
    banks: Mapping[str, Floats]

    @classmethod
    def of(cls, codes: Sequence[str], embeddings: Floats) -> Ballot:
        """Return the ballot over texts of these codes. Shapes: embeddings (len(codes), d)."""
        places = bins_by_code(codes)
        banks = {code: np.ascontiguousarray(embeddings[own]) for code, own in places.items()}
        return cls(size=len(codes), places=places, banks=banks)

    def vote(self, own: Floats, code: str, *, nearest: int) -> Doubles:
        """Return one text's vote: 1 / sqrt(nearest) for each of its `nearest` bins by cosine, within its code.

        A code without bins votes for nothing, one with fewer than `nearest` for all it has, at the same weight. Of
        equals the first is nearest.

        Guarantee: L2 norm at most 1, and 1 when the code has `nearest` bins or more.
        Shapes: own (d,), result (size,) float64.
        """
        vote = np.zeros(self.size)
        if code in self.places:
            order = np.argsort(-(self.banks[code] @ own), kind="stable")
            vote[self.places[code][order[:nearest]]] = 1 / math.sqrt(nearest)
        return vote


def bounded(vote: Doubles, bound: float) -> Doubles:
    """Return a unit's joint vote, shrunk to L2 norm `bound` where it is longer."""
    norm = float(np.linalg.norm(vote))
    return vote if norm <= bound else vote * (bound / norm)
