"""How far an honest site can have moved an adapter in one round: the cap on an update's norm, from public constants.

All learners but one end their steps with AdamW, whose step does not depend on the size of the gradient, and so neither
on the rows nor on the noise. With m and v the running means of gradients and of their squares, Cauchy and Schwarz give

    |m_t| <= (1 - b1) sqrt(sum_j (b1^2 / b2)^j) sqrt(sum_j b2^j g_(t-j)^2),   j = 0 ... t - 1

and with both bias corrections one coordinate moves in step t by at most

    lr c_t,   c_t = (1 - b1) / (1 - b1^t)  sqrt((1 - b2^t) / (1 - b2))  sqrt((1 - (b1^2 / b2)^t) / (1 - b1^2 / b2)).

c_1 = 1, and c_t grows to 7.27 for torch's constants. Kingma and Ba's own bound, 1 or 3.16, is for gradients that keep
their scale or come once, and can be exceeded. A tensor of n numbers therefore moves by at most lr sum_t c_t sqrt(n),
and by the share that weight decay takes of where it began. The products B A are bound with their factors:

    |B' A' - B A| <= |B' - B| |A'| + |B| |A' - A|.

A factor counts the steps in which it is active (`fl_app.factors`): AdamW's state stands still in the others. What a
round does not move, or a site does not send, may not differ from the broadcast at all.

A zeroth-order step moves a factor by learning_rate * |g| * |z|, with g the slope that travels, of at most
`zeroth_order.LARGEST`, and z public standard normals: of n numbers longer than sqrt(n) + t with probability
exp(-t^2 / 2) at most (Laurent and Massart 2000). t is taken so that no step of a round makes a factor's z longer, but
once in 10^12 rounds.

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

from fl_app import factors, zeroth_order
from fl_app.config import Section, parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_app.types import Factor, Floats

BETA_1, BETA_2 = 0.9, 0.999
"""AdamW's constants in torch, which no learner changes."""

B_FACTORS = {"dp_la_lora": 2.0}
"""How much faster than a b learns where the table does not say; of all other kinds as fast."""

SLACK = 1.02
"""Float32 in the running means is below 1e-4 of a step at a thousand steps, and an update that travels in int8 may be
off by a 126th of its largest number (`fl_app.transport`): twice both, to be clear of them."""

ROUNDING = 2.0**-23
"""What storing a weight in float32 may add to one step, relative to the weight; twice the true half unit."""


class _Learner(Section):
    """What the bound needs of [client.learner]; all else there is the site's business."""

    model_config = ConfigDict(extra="ignore")

    kind: str
    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    b_learning_rate_factor: Annotated[float, Field(gt=0, le=100)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far the steps of a round move one factor.

    `coordinate`: how far one number. `spread`: by how much more than sqrt(n) of that n of them go together, at most.
    `decay`: what weight decay takes, as a share of where the factor began.
    """

    steps: int
    coordinate: float
    spread: float = 0.0
    decay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateCap:
    """The most that an update of one round of `steps` steps may measure, in L2 norm.

    `reaches`: of the factors that may differ from the broadcast. `largest`: of the whole update, whatever the steps
    could reach. `by_scalars`: the update must come as as many scalars as there are steps.
    """

    steps: int
    reaches: Mapping[Factor, Reach]
    largest: float = math.inf
    by_scalars: bool = False

    @property
    def trains(self) -> tuple[Factor, ...]:
        """The factors that may differ from the broadcast."""
        return tuple(self.reaches)

    def of(self, factor: Factor, start: Floats) -> float:
        """Return the cap on one factor that began at `start`; 0 for a factor that no step moves."""
        if factor not in self.reaches:
            return 0.0
        reach = self.reaches[factor]
        began, moved = norm(start), reach.coordinate * (math.sqrt(start.size) + reach.spread)
        return SLACK * (moved + reach.decay * began) + reach.steps * ROUNDING * (began + moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCap:
    """The caps of the rounds of a run, from its table [client.learner]."""

    learner: Mapping[str, Any]
    largest: float = math.inf

    def of_round(self, number: int) -> UpdateCap:
        """Return the cap for the uploads of one round."""
        section = parse(_Learner, dict(self.learner), where="client.learner")
        schedule = factors.schedule_of(self.learner)
        by_scalars = section.kind == "zeroth_order"
        reaches: dict[Factor, Reach] = {}
        for factor in factors.sent(self.learner, number):
            steps = sum(factor in factors.active(schedule, number, step) for step in range(section.steps))
            if steps:
                reaches[factor] = _reach_by_scalars(section, steps) if by_scalars else _reach(section, factor, steps)
        return UpdateCap(steps=section.steps, reaches=reaches, largest=self.largest, by_scalars=by_scalars)


def norm(values: np.ndarray[Any, Any]) -> float:
    """Return the L2 norm, in float64, so that no float32 overflows on the way."""
    flat = values.ravel().astype(np.float64, copy=False)
    return math.sqrt(float(np.dot(flat, flat)))


def read_cap(learner: Mapping[str, Any], *, largest: float = math.inf) -> RunCap:
    """Return the caps for the sites of a run, whose steps the table [client.learner] fixes.

    Raises: ConfigInvalid for a kind of learner of which nobody has said which factors it moves.
    """
    cap = RunCap(learner=learner, largest=largest)
    cap.of_round(1)  # whatever is wrong with the table is wrong in every round
    return cap


def _reach(section: _Learner, factor: Factor, steps: int) -> Reach:
    """Return how far AdamW carries a factor in the steps in which it is active."""
    rate = section.learning_rate
    if factor == "b":
        rate *= section.b_learning_rate_factor or B_FACTORS.get(section.kind, 1.0)
    return Reach(steps=steps, coordinate=rate * bounds(steps), decay=_decay(rate * section.weight_decay, steps))


def _reach_by_scalars(section: _Learner, steps: int) -> Reach:
    """Return how far zeroth-order steps carry a factor, but for one round in 10^12."""
    coordinate = section.learning_rate * zeroth_order.LARGEST * steps
    return Reach(steps=steps, coordinate=coordinate, spread=math.sqrt(2 * math.log(1e12 * steps)))


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
