"""The protocol of an attack: what is known of a release in, a certified lower bound on epsilon out.

Legend of shapes: M = canaries, P = trained coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Doubles = npt.NDArray[np.float64]
    Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """One noisy sum over a random half of the canaries, with all that the accountant's worst-case attacker knows.

    `matches` is each canary's clipped gradient times the release, `gram` their products with each other, all in units
    of the clip norm; `noise_multiplier` is the claimed one. `included` is the key: only who counts the right guesses
    may look at it.

    Shapes: matches (M,), gram (M, M), included (M,) bool.
    """

    matches: Doubles
    gram: Doubles
    noise_multiplier: float
    included: Flags


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackResult:
    """What an attack proved: epsilon is at least `lower_bound`, at the attack's confidence and delta.

    `guesses`, `right`: of the number of guesses that proved most. `accuracy`: share of right guesses when every
    canary is guessed. `ceiling`: the bound if every guess had been right; nothing above it can ever be proved.
    """

    lower_bound: float
    guesses: int
    right: int
    accuracy: float
    ceiling: float


class Attack(Protocol):
    """Evidence -> what it proves. `rng` breaks ties."""

    def __call__(self, evidence: Evidence, rng: np.random.Generator) -> AttackResult:
        """Return a result that is a valid lower bound whatever the evidence is."""
        ...
