"""How far an honest site can have moved an adapter in one round: the cap on an update's norm, from public constants.

Every learner ends its steps with AdamW, whose step does not depend on the size of the gradient, and so neither on the
rows nor on the noise. With m and v the running means of gradients and of their squares, Cauchy and Schwarz give

    |m_t| <= (1 - b1) sqrt(sum_j (b1^2 / b2)^j) sqrt(sum_j b2^j g_(t-j)^2),   j = 0 ... t - 1

and with both bias corrections one coordinate moves in step t by at most

    lr c_t,   c_t = (1 - b1) / (1 - b1^t)  sqrt((1 - b2^t) / (1 - b2))  sqrt((1 - (b1^2 / b2)^t) / (1 - b1^2 / b2)).

c_1 = 1, and c_t grows to 7.27 for torch's constants. Kingma and Ba's own bound, 1 or 3.16, is for gradients that keep
their scale or come once, and can be exceeded. A tensor of n numbers therefore moves by at most lr sum_t c_t sqrt(n),
and by the share that weight decay takes of where it began. The products B A are bound with their factors:

    |B' A' - B A| <= |B' - B| |A'| + |B| |A' - A|.

Guarantee: no release of a learner of `clients.learners` is above the cap, whatever its rows, noise and budget.
Out of scope: a hostile update below the cap. That is for the aggregator.
Source: ours; Adam and its update rule: Kingma & Ba 2015 (1412.6980), sections 2 and 2.1; AdamW: Loshchilov & Hutter
2019 (1711.05101).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field

from fl_app.config import Section, parse
from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_app.types import Floats

TRAINS: dict[str, tuple[str, ...]] = {
    "dp_lora": ("a", "b"),
    "dp_ffa_lora": ("b",),
    "dp_distil": ("a", "b"),
    "plain_lora": ("a", "b"),
}
"""The factors that each kind of learner moves; it leaves the others as they came, to the bit."""

BETA_1, BETA_2 = 0.9, 0.999
"""AdamW's constants in torch, which no learner changes."""

SLACK = 1.01
"""Float32 in the running means: below 1e-4 of a step at a thousand steps. Ten times that again, to be clear of it."""

ROUNDING = 2.0**-23
"""What storing a weight in float32 may add to one step, relative to the weight; twice the true half unit."""


class _Learner(Section):
    """What the bound needs of [client.learner]; all else there is the site's business."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCap:
    """The most that an update may measure, in L2 norm.

    `reach`: what the steps move one coordinate. `decay`: what weight decay takes, as a share of where a factor began.
    `largest`: of the whole update, whatever the optimizer could reach.
    """

    steps: int
    reach: float
    decay: float = 0.0
    trains: tuple[str, ...] = ("a", "b")
    largest: float = math.inf

    def of(self, factor: str, start: Floats) -> float:
        """Return the cap on one factor, "a" or "b", that began at `start`; 0 for a factor that no step moves."""
        if factor not in self.trains:
            return 0.0
        began, moved = norm(start), self.reach * math.sqrt(start.size)
        return SLACK * (moved + self.decay * began) + self.steps * ROUNDING * (began + moved)


def norm(values: np.ndarray[Any, Any]) -> float:
    """Return the L2 norm, in float64, so that no float32 overflows on the way."""
    flat = values.ravel().astype(np.float64, copy=False)
    return math.sqrt(float(np.dot(flat, flat)))


def read_cap(learner: Mapping[str, Any], *, largest: float = math.inf) -> UpdateCap:
    """Return the cap for the sites of a run, whose steps the table [client.learner] fixes.

    Raises: ConfigInvalid for a kind of learner of which nobody has said which factors it moves.
    """
    section = parse(_Learner, dict(learner), where="client.learner")
    if section.kind not in TRAINS:
        raise ConfigInvalid(f"client.learner.kind = {section.kind!r}: known are {', '.join(TRAINS)}")
    return UpdateCap(
        steps=section.steps,
        reach=section.learning_rate * bounds(section.steps),
        decay=_decay(section.learning_rate * section.weight_decay, section.steps),
        trains=TRAINS[section.kind],
        largest=largest,
    )


def bounds(steps: int) -> float:
    """Return the sum of c_t over the steps of a round: how many learning rates one coordinate can move."""
    t = np.arange(1, steps + 1, dtype=np.float64)
    ratio = BETA_1**2 / BETA_2
    first = (1 - BETA_1) / (1 - BETA_1**t)
    return float(np.sum(first * np.sqrt((1 - BETA_2**t) / (1 - BETA_2) * (1 - ratio**t) / (1 - ratio))))


def _decay(rate: float, steps: int) -> float:
    """Return the largest |1 - (1 - rate)^steps|: what is left of a weight after `steps` of decay, from 1.

    | rate        | share                                     |
    |-------------|-------------------------------------------|
    | up to 1     | 1 - (1 - rate)^steps                      |
    | up to 2     | 2: the sign may turn in every step        |
    | beyond      | infinite: such a decay makes weights grow |
    """
    if rate <= 1:
        return 1 - (1 - rate) ** steps
    return 2.0 if rate <= 2 else math.inf  # noqa: PLR2004
