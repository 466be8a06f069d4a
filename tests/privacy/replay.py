"""Record a learner on one data set and replay it on a neighbour: noise that is written down, and a look into the step.

The recording source makes every decision and every normal by itself; the replaying one gives the same again and is
told only what the extra unit does. Whatever then differs between the two runs was caused by that unit.
Paradigm: Re:cord-play (PETS 2026, arXiv 2602.17454).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from clients.learners import AnyLearner
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app.privacy import gaussian
from simulations.attacks.canaries import steps_seen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from clients.stages import Learner
    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

CLIP, NOISE, EXPECTED = 0.05, 0.25, 4

FACTORS = {"a": "a", "b": "b", "c": "core"}
ACTIVE = {"dp_ffa_lora": ["b"], "dp_rolora": ["b"], "dp_la_lora": ["b", "a"], "dp_lora_sb": ["c"]}
"""The first letters of the factors that the steps of round 1 move, over and over; of all other kinds a and b."""


def active(kind: str, steps: int) -> list[str]:
    """Return the first letters of the factors that each step of round 1 moves, written down by hand."""
    turns = ACTIVE.get(kind, ["ab"])
    return [turns[step % len(turns)] for step in range(steps)]


def begin(adapter: Adapter, kind: str) -> Adapter:
    """Return what a learner of a kind starts from: this adapter, with cores where they are what it trains."""
    if kind != "dp_lora_sb":
        return adapter
    layers = {
        name: dataclasses.replace(one, core=np.eye(len(one.a), dtype=np.float32) + one.a[:, : len(one.a)])
        for name, one in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


class Kept:
    """A drawer in memory."""

    def __init__(self) -> None:
        self.rounds: dict[int, Any] = {}

    def latest(self, before: int) -> Any:
        earlier = [number for number in self.rounds if number < before]
        return self.rounds[max(earlier)] if earlier else None

    def put(self, round_number: int, arrays: Any) -> None:
        self.rounds[round_number] = arrays


@dataclass
class Recording:
    """A `NoiseSource` with decisions fixed beforehand (which units, step by step), and a record of what was asked.

    `calls`: ("sample", rate) or ("normal", shape), in order; what they were told of the number of units is in `counts`.
    """

    decisions: Sequence[Sequence[int]]
    rng: np.random.Generator | None = None
    outputs: Iterator[np.ndarray] | None = None
    simulated: bool = True
    calls: list[tuple[str, Any]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    normals: list[np.ndarray] = field(default_factory=list)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        self.calls.append(("sample", rate))
        self.counts.append(count)
        drawn = self.decisions[len(self.counts) - 1] if len(self.counts) <= len(self.decisions) else ()
        return np.array(sorted(drawn), np.int64)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        self.calls.append(("normal", shape))
        if self.outputs is not None:
            values = next(self.outputs)
        else:
            values = np.zeros(shape) if self.rng is None else self.rng.standard_normal(shape)
        self.normals.append(values.copy())
        return values.copy()

    def replay(self, decisions: Sequence[Sequence[int]]) -> Recording:
        """Return a source that gives the same normals in the same order under other decisions."""
        return Recording(decisions=decisions, outputs=iter(self.normals))


@dataclass(frozen=True)
class Observed:
    """One run of a learner. `sums`: what was to be noised, step by step, in float64. `seen`: what AdamW got of it,
    times the public normaliser. Shapes: (steps, active coordinates), with zeros behind a step of fewer; `kept` is what
    stayed in the drawer."""

    noise: Any
    sums: np.ndarray
    seen: np.ndarray
    release: Adapter
    coordinates: int
    kept: Mapping[str, np.ndarray] | None


def private_kinds() -> list[str]:
    """Return every `kind` of learner that takes private steps; those without a receipt are `plain_*`.

    Learners that take none (vectors, votes, texts), or steps of one number each, have replays of their own, in
    test_epsvec, test_votes, test_private_decoding_audit and test_zeroth_order.
    """
    sections = [one for one in get_args(get_args(AnyLearner)[0]) if "steps" in one.model_fields]
    kinds = [get_args(section.model_fields["kind"].annotation)[0] for section in sections]
    return [kind for kind in kinds if kind != "zeroth_order" and build(kind, steps=1).private]


def build(kind: str, **options: Any) -> Learner:
    section: Any = TypeAdapter(AnyLearner).validate_python({"kind": kind, **options})
    return section.build(1)


def rows_of(units: Sequence[Sequence[str]]) -> PrivateRows:
    """Return rows whose units are named by their place; each unit is the texts of its rows."""
    return PrivateRows(
        [
            PrivateRow(instruction=text, output=f"dear {text}", code="cough", unit=f"person {n}")
            for n, texts in enumerate(units)
            for text in texts
        ]
    )


def observe(
    learner: Learner,
    rows: PrivateRows,
    noise: Any,
    *,
    frozen: FrozenModel,
    start: Adapter,
    **told: Any,
) -> Observed:
    """Run a learner once and return what could be seen of it."""
    sums: list[np.ndarray] = []
    plain = gaussian.release

    def release(totals: Any, **options: Any) -> Any:
        sums.append(np.concatenate([total.ravel() for total in totals]).astype(np.float64))
        return plain(totals, **options)

    values: dict[str, Any] = {"sample_rate": 0.5, "expected_batch": EXPECTED, "max_tokens": 24, "unit": "record"}
    constants = PublicConstants(**{"max_rows_per_unit": 1, **values, **told})
    drawer = Kept()
    bench = Workbench(model=frozen, codes={"cough": "A cough:"}, noise=noise, system="", drawer=drawer)
    with pytest.MonkeyPatch.context() as patch, steps_seen() as seen:
        patch.setattr(gaussian, "release", release)
        released = learner(rows, start, learner.announce(constants, NOISE), constants, bench)
    return Observed(
        noise=noise,
        sums=_padded(sums),
        seen=_padded(seen) * constants.expected_batch,
        release=released.adapter,
        coordinates=sum(map(len, sums)),
        kept=drawer.rounds.get(1),
    )


def _padded(steps: Sequence[np.ndarray]) -> np.ndarray:
    width = max(map(len, steps))
    return np.array([np.pad(step, (0, width - len(step))) for step in steps])
