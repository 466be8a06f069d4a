"""Which factors of an adapter a learner moves, in which round and step, and which of them travel: public, by its kind.

| schedule | moves                                           | methods                                    |
|----------|-------------------------------------------------|--------------------------------------------|
| both     | a and b in every step                           | LoRA, DP-LoRA; FedSA-LoRA, which sends a   |
| b        | b; a stays as it was broadcast                  | FFA-LoRA, FedASK                           |
| rounds   | b in odd rounds, a in even ones                 | RoLoRA                                     |
| steps    | b in odd steps, a in even ones (from 1)         | LA-LoRA                                    |
| core     | the r x r core; a and b stay                    | Fed-SB, LoRA-SB, LoRA-XS                   |

b comes first wherever factors take turns: it begins at zero, and then a has no gradient.
Source: RoLoRA (2502.01755), LA-LoRA (2602.19926; its code begins with a), Fed-SB (2502.15436), FedSA-LoRA (2410.01463).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, get_args

from fl_app.errors import ConfigInvalid
from fl_app.types import ReleaseSpec, ScalarWalk, Schedule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_app.types import Factor, Precision

OF_KIND: dict[str, Schedule] = {
    "dp_lora": "both",
    "dp_distil": "both",
    "dp_fedsa_lora": "both",
    "dp_ffa_lora": "b",
    "dp_rolora": "rounds",
    "dp_la_lora": "steps",
    "dp_lora_sb": "core",
}
"""The schedule of every kind of learner that has one; `plain_lora` and `zeroth_order` say theirs in `schedule`."""

CHOOSE = frozenset({"plain_lora", "zeroth_order"})

KINDS = frozenset(OF_KIND) | CHOOSE
"""Every kind of learner that trains an adapter."""


def schedule_of(learner: Mapping[str, Any]) -> Schedule:
    """Return the schedule of the table [client.learner]. Raises: ConfigInvalid for a kind that trains no adapter."""
    kind = str(learner.get("kind"))
    if kind in CHOOSE:
        chosen = learner.get("schedule", "both")
        if chosen not in get_args(Schedule):
            raise ConfigInvalid(f"client.learner.schedule = {chosen!r}: known are {', '.join(get_args(Schedule))}")
        return cast("Schedule", chosen)
    if kind not in OF_KIND:
        raise ConfigInvalid(f"client.learner.kind = {kind!r}: known are {', '.join([*OF_KIND, *sorted(CHOOSE)])}")
    return OF_KIND[kind]


def moved(schedule: Schedule, round_number: int) -> tuple[Factor, ...]:
    """Return the factors that a round moves."""
    match schedule:
        case "both" | "steps":
            return ("a", "b")
        case "b":
            return ("b",)
        case "rounds":
            return ("b",) if round_number % 2 else ("a",)
        case "core":
            return ("core",)


def active(schedule: Schedule, round_number: int, step: int) -> tuple[Factor, ...]:
    """Return the factors that one step of a round moves; `step` counts from 0."""
    if schedule == "steps":
        return ("a",) if step % 2 else ("b",)
    return moved(schedule, round_number)


def sent(learner: Mapping[str, Any], round_number: int) -> tuple[Factor, ...]:
    """Return the factors that a site sends in a round: those that moved, and of FedSA-LoRA's only a."""
    return ("a",) if learner.get("kind") == "dp_fedsa_lora" else moved(schedule_of(learner), round_number)


def travels(learner: Mapping[str, Any], round_number: int, precision: Precision) -> ReleaseSpec:
    """Return what of an adapter travels in a round, and how: factors at a precision, or scalars of one byte."""
    if learner.get("kind") == "zeroth_order":
        rate = float(learner.get("learning_rate", ZEROTH_ORDER_RATE))
        walk = ScalarWalk(steps=int(learner["steps"]), learning_rate=rate, schedule=schedule_of(learner))
        return ReleaseSpec(factors=sent(learner, round_number), walk=walk)
    return ReleaseSpec(factors=sent(learner, round_number), precision=precision)


ZEROTH_ORDER_RATE = 2e-3
"""The rate of a zeroth-order learner where [client.learner] says none; both ends walk with it."""
