"""B3: sites die, dawdle, answer twice and come back; a round closes in time with the right survivors, or says why not.

The strategy, the pipeline, validation, receipts, checkpoints and files are the real ones; models are left out (the
exam scores nothing, a tuner that needs none), and time is a clock of our own: a deadline of an hour costs nothing.
Sites are small: a deterministic release for every (site, round), kept in an outbox, and a count of trainings.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pytest
from flwr.app import Error, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fl_app import lora, wire
from fl_app.audit_log import AuditLog
from fl_app.config import SharedConfig
from fl_app.errors import RoundFailed
from fl_app.journal import Journal, read_lines
from fl_app.lora import LoraSpec
from fl_app.privacy.accountants import pld
from fl_app.types import (
    Adapter,
    AdapterRelease,
    DpReceipt,
    Draft,
    Hello,
    Lesson,
    LoraFactors,
    Origin,
    PoissonGaussian,
    Upload,
)
from simulations.local_grid import FIRST_NODE, LocalGrid
from strategies import cohort
from strategies.aggregators.mean_factors import MeanFactors
from strategies.checkpoint import Checkpoint
from strategies.config import NetworkSection
from strategies.exam import Exam
from strategies.knowledge import Knowledge
from strategies.pipeline import Pipeline
from strategies.ranks import Ranks, SameRank
from strategies.spending import Spending
from strategies.stages import Setting, Stages
from tests.faults.hostile import read
from tests.faults.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from strategies.stages import Voices

SITES, ROUNDS, DEADLINE_S, POLL_S = 4, 3, 600.0, 1.0
SPEC = LoraSpec(shapes={"block.0.q": (6, 4), "block.1.v": (6, 5)}, rank=2, alpha=4.0, base="b" * 64)
RECEIPT = DpReceipt(event=PoissonGaussian(noise_multiplier=6.0, sample_rate=0.1, steps=1, clip_norm=1.0), unit="record")
SPENT = {n: pld.epsilon([RECEIPT] * n, 1e-5) for n in range(1, ROUNDS + 1)}

Fate = Literal["answers", "silent", "late", "twice", "breaks", "lost and back", "dies"]
TIMELY: tuple[Fate, ...] = ("answers", "twice", "lost and back")
FATES: tuple[Fate, ...] = ("answers", "silent", "late", "twice", "breaks", "lost and back", "dies")
Plan = dict[tuple[int, int], Fate]
"""(round, site) -> what happens to it; whoever is not named answers."""


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Houses:
    """All sites: what each has released, by round. Outlives a run, as real sites do."""

    trained: Counter[tuple[int, int]] = field(default_factory=Counter)
    outbox: dict[tuple[int, int], Upload] = field(default_factory=dict)

    def app(self, message: Message, context: Any) -> Message:
        site = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            hello = Hello(site=_name(site), epsilon=8.0, delta=1e-5, unit="record", spent=0.0)
            return Message(wire.pack_reply(hello), reply_to=message)
        broadcast = read(message.content)
        number = broadcast.round
        if (number, site) not in self.outbox:
            self.trained[number, site] += 1
            made = sum((earlier, site) in self.outbox for earlier in range(1, number)) + 1
            self.outbox[number, site] = Upload(
                site=_name(site),
                round=number,
                release=AdapterRelease(adapter=_adapter(number, site)),
                receipts=(RECEIPT,),
                spent=SPENT[made],
                run=broadcast.named,
            )
        return Message(wire.pack_reply(self.outbox[number, site]), reply_to=message)


def _name(site: int) -> str:
    return f"house-{site}"


def _adapter(*names: int) -> Adapter:
    rng = np.random.default_rng([7, *names])
    layers = {
        name: LoraFactors(
            a=rng.normal(size=(SPEC.rank, d_in)).astype(np.float32),
            b=rng.normal(size=(d_out, SPEC.rank)).astype(np.float32),
        )
        for name, (d_in, d_out) in SPEC.shapes.items()
    }
    return Adapter(layers=layers, alpha=SPEC.alpha, base=SPEC.base)


class FaultGrid(LocalGrid):
    """A grid on which everything of a plan happens, in the time of a clock."""

    def __init__(self, houses: Houses, plan: Plan, clock: Clock) -> None:
        super().__init__(cast("Any", houses.app), nodes=SITES, run_config={})
        self._plan, self._clock = plan, clock
        self._dead: set[int] = set()
        self._away: dict[int, float] = {}
        self._due: list[tuple[float, int, str, Message]] = []
        self._count = 0
        self._over: set[str] = set()
        self._wave: set[tuple[str, str]] = set()

    def get_node_ids(self) -> Iterable[int]:
        gone = self._dead | {site for site, until in self._away.items() if until > self._clock.now}
        return [FIRST_NODE + site for site in range(SITES) if site not in gone]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        wave = list(messages)
        wave_of = {(one.metadata.message_type, one.metadata.group_id) for one in wave}
        if wave_of != self._wave:
            self._over |= {identifier for _, _, identifier, _ in self._due}
        self._wave = wave_of
        ids = list(super().push_messages(wave))
        for identifier, message in zip(ids, wave, strict=True):
            self._happen(identifier, message)
        return ids

    def _happen(self, identifier: str, message: Message) -> None:
        self._box.pop(identifier)
        site = message.metadata.dst_node_id - FIRST_NODE
        if message.metadata.message_type != "train":
            self._deliver(0.0, identifier, self._answer(message))
            return
        key = (int(message.metadata.group_id), site)
        fate = self._plan.pop(key, "answers")
        if fate == "dies":
            self._dead.add(site)
        elif fate == "lost and back":  # it has trained, and its answer is lost with it
            self._answer(message)
            self._away[site] = self._clock.now + 60
            gone = Message(Error(5, "node unavailable"), reply_to=message)
            gone.metadata.__dict__["_src_node_id"] = 1  # the SuperLink says so, in its own name
            self._deliver(30.0, identifier, gone)
        elif fate == "breaks":
            self._deliver(1.0, identifier, Message(Error(2, "Traceback"), reply_to=message))
        elif fate != "silent":
            reply = self._answer(message)
            self._deliver(2 * DEADLINE_S if fate == "late" else 5.0 + site, identifier, reply)
            if fate == "twice":
                self._deliver(6.0 + site, identifier, reply)

    def _deliver(self, after_s: float, identifier: str, reply: Message | None) -> None:
        if reply is not None:
            self._count += 1
            heapq.heappush(self._due, (self._clock.now + after_s, self._count, identifier, reply))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand over what is due for these, and what nobody asked for any more: the strategy has to tell."""
        wanted, kept, due = set(message_ids), [], []
        while self._due and self._due[0][0] <= self._clock.now:
            one = heapq.heappop(self._due)
            (due if one[2] in wanted or one[2] in self._over else kept).append(one)
        for one in kept:
            heapq.heappush(self._due, one)
        self._over |= {one[2] for one in due}
        return [one[3] for one in due]


def _synthesise(voices: Voices, rng: np.random.Generator, number: int) -> Sequence[Draft]:
    del rng
    text = lora.sha256(voices.merged)
    origin = Origin(round=number, method="hash", code="", stream=str(number))
    return [Draft(id=text[:8], instruction=text, response="", origin=origin)]


def _tune(adapter: Adapter, lessons: Sequence[Any], rng: np.random.Generator) -> Adapter:
    del rng, adapter
    seed = hashlib.sha256("".join(lesson.answer for lesson in lessons).encode()).digest()[:4]
    return _adapter(int.from_bytes(seed, "little"))


def _distil(drafts: Sequence[Draft], rng: np.random.Generator) -> Sequence[Any]:
    del rng
    return [Lesson(draft_id=d.id, instruction=d.instruction, answer=d.instruction[::-1], teacher="t") for d in drafts]


def _knowledge(directory: Path, quorum: float, rounds: int = ROUNDS) -> Knowledge:
    shared = SharedConfig.model_validate(
        {
            "run": {"rounds": rounds, "mode": "simulation"},
            "model": {"name": "none"},
            "lora": {"rank": SPEC.rank, "alpha": SPEC.alpha, "targets": ("q", "v")},
        }
    )
    resolved = SimpleNamespace(name="none", sha256=SPEC.base)
    lab = SimpleNamespace(
        local=SimpleNamespace(resolved=resolved),
        local_with=lambda _adapter, name: SimpleNamespace(name=name),
        professional=SimpleNamespace(name="professional"),
        professional_sha256=SPEC.base,
        close=lambda: None,
        progress=None,
    )
    record = Journal(directory)
    pipeline = Pipeline(
        run="faults",
        shared=shared,
        spec=SPEC,
        lab=cast("Any", lab),
        stages=Stages(
            aggregator=MeanFactors(kind="mean_factors").build(
                Setting(run="faults", mode="simulation", seed=0, rounds=1, sites=1, directory=directory)
            ),
            synthesizer=Writer(_synthesise),
            filters=(),
            distiller=_distil,
            tuner=_tune,
        ),
        exam=Exam(choice=(), free=(), max_new_tokens=1, calibrate=False),
        journal=record,
        checkpoint=Checkpoint(directory, run="faults", config_digest="d" * 64),
        audit=AuditLog(directory / "audit.jsonl", "server"),
        spending=Spending(journal=record),
        config_digest="d" * 64,
        tree={"run": {"rounds": rounds}, "client": {"learner": {"kind": "dp_lora"}}},
        start=_adapter(),
        quorum=quorum,
        ranks=Ranks(section=SameRank(), spec=SPEC, seed=0, tokens=512, cost=lambda _, __: 0),
    )
    network = NetworkSection(sites=SITES, wait_s=120.0, reply_timeout_s=DEADLINE_S, poll_s=POLL_S, quorum=quorum)
    return Knowledge(pipeline, network)


@dataclass(frozen=True)
class Ended:
    """How a run ended: by round, who was used and what the target was; what failed; how long each wave took."""

    used: list[tuple[str, ...]]
    targets: list[str]
    failed: str
    waves_s: list[float]
    rejected: list[dict[str, str]]


def _play(directory: Path, houses: Houses, plan: Plan, *, quorum: float) -> Ended:
    clock = Clock()
    grid = FaultGrid(houses, dict(plan), clock)
    knowledge = _knowledge(directory, quorum)
    waves: list[float] = []
    failed = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "time", clock)
        patch.setattr(os, "fsync", lambda _: None)  # nobody pulls a plug here (B2 and B4 do)
        own = cohort.exchange

        def timed(grid: Any, messages: Sequence[Message], **more: Any) -> None:
            began = clock.now
            own(grid, messages, **more)
            if messages and messages[0].metadata.message_type == "train":
                waves.append(clock.now - began)

        patch.setattr("strategies.knowledge.exchange", timed)
        try:
            knowledge.start(grid)
        except RoundFailed as error:
            failed = str(error)
    records = knowledge.pipeline.records
    return Ended(
        used=[record.used for record in records],
        targets=[record.hashes["target"] for record in records],
        failed=failed,
        waves_s=waves,
        rejected=[dict(record.rejected) for record in records],
    )


def _survivors(plan: Plan, number: int) -> set[int]:
    """Return who answers round `number` in time: whoever died stays dead."""
    dead = {site for (when, site), fate in plan.items() if fate == "dies" and when <= number}
    return {site for site in range(SITES) if site not in dead and plan.get((number, site), "answers") in TIMELY}


def _expected(plan: Plan, quorum: float) -> tuple[list[tuple[str, ...]], bool]:
    """Return who is used in each round until one has too few, and whether one had."""
    used: list[tuple[str, ...]] = []
    for number in range(1, ROUNDS + 1):
        here = _survivors(plan, number)
        if len(here) < cohort.needed(SITES, quorum):
            return used, True
        used.append(tuple(_name(site) for site in sorted(here)))
    return used, False


PLANS = st.dictionaries(
    st.tuples(st.integers(1, ROUNDS), st.integers(0, SITES - 1)), st.sampled_from(FATES), max_size=8
)


def test_any_plan_closes_in_time_with_its_survivors(
    tmp_path_factory: pytest.TempPathFactory, record_property: Any
) -> None:
    """Whatever happens: right survivors, in time, the result of the same survivors alone, and resumable if stopped."""
    seen: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(plan=PLANS, quorum=st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    def check(plan: Plan, quorum: float) -> None:
        seen["plans"] += 1
        houses, folder = Houses(), tmp_path_factory.mktemp("run")
        ended = _play(folder, houses, plan, quorum=quorum)
        used, stopped = _expected(plan, quorum)

        assert ended.used == used
        assert bool(ended.failed) == stopped
        assert all(took <= DEADLINE_S + 5 for took in ended.waves_s)
        alone = {
            (number, site): "silent"
            for number in range(1, len(used) + 1)
            for site in range(SITES)
            if site not in _survivors(plan, number)
        }
        others = _play(tmp_path_factory.mktemp("alone"), Houses(), cast("Plan", alone), quorum=quorum)
        assert others.targets[: len(used)] == ended.targets
        if stopped:
            seen["stopped"] += 1
            assert f"{cohort.needed(SITES, quorum)} needed" in ended.failed
            again = _play(folder, houses, {}, quorum=quorum)
            assert (again.failed, len(again.used)) == ("", ROUNDS)
            assert again.targets[: len(used)] == ended.targets
        assert set(houses.trained.values()) == {1}  # nobody ever trained a round twice
        seen["passed"] += 1

    check()
    assert seen["stopped"] >= 5  # both endings were met
    record_property("bar", {"name": "B3", "passed": seen["passed"], "of": seen["plans"]})


@pytest.mark.bar("B3")
@pytest.mark.parametrize("fate", FATES)
def test_one_site_in_trouble(fate: Fate, tmp_path: Path) -> None:
    """The others go on; it is back in the next round unless it is dead."""
    plan: Plan = {(2, 1): fate}
    ended = _play(tmp_path, Houses(), plan, quorum=0.5)

    everybody = tuple(_name(site) for site in range(SITES))
    without = tuple(name for name in everybody if name != _name(1))
    in_time = fate in TIMELY
    assert ended.failed == ""
    assert ended.used == [everybody, everybody if in_time else without, without if fate == "dies" else everybody]
    assert ended.waves_s[1] <= DEADLINE_S + 5
    waits = fate in {"silent", "late", "dies"}
    assert (ended.waves_s[1] >= DEADLINE_S) == waits


@pytest.mark.bar("B3")
def test_below_quorum_stops_clearly_and_goes_on_when_the_sites_are_back(tmp_path: Path) -> None:
    houses = Houses()
    plan: Plan = {(2, 0): "dies", (2, 1): "silent", (2, 2): "breaks"}

    ended = _play(tmp_path, houses, plan, quorum=0.75)
    again = _play(tmp_path, houses, {}, quorum=0.75)

    assert len(ended.used) == 1
    assert "round 2: 1 of 4 sites sent a sound upload, 3 needed" in ended.failed
    assert "silent: house-0, house-1" in ended.failed
    assert "resume the run when the sites are back" in ended.failed
    assert len(again.used) == ROUNDS
    assert again.targets[0] == ended.targets[0]
    assert houses.trained[2, 3] == 1  # it had trained before, and answered from its outbox
    events = [line["event"] for line in read_lines(tmp_path / "journal.jsonl")]
    assert (events.count("run_started"), events.count("run_resumed")) == (1, 1)


@pytest.mark.bar("B3")
def test_a_site_that_was_never_there_is_named_and_joins_later(tmp_path: Path) -> None:
    class Late(FaultGrid):
        def get_node_ids(self) -> Iterable[int]:
            there = list(super().get_node_ids())
            return there if self._clock.now > 125 else [node for node in there if node != FIRST_NODE + 3]

    clock = Clock()
    knowledge = _knowledge(tmp_path, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "time", clock)
        knowledge.start(Late(Houses(), {}, clock))

    used = [len(record.used) for record in knowledge.pipeline.records]
    assert used == [3, 4, 4]  # the run waited 120 s for it, the first wave took some more
    assert "house-3" in knowledge.pipeline.spending.sites


@pytest.mark.bar("B3")
def test_a_resumed_run_ends_as_one_that_went_through(tmp_path: Path) -> None:
    """Twin of the comparison above: with other survivors the target is another, so equality says something."""
    through = _play(tmp_path / "through", Houses(), {}, quorum=1.0)
    houses = Houses()
    stopped = _play(tmp_path / "stopped", houses, {(2, 2): "silent"}, quorum=1.0)
    again = _play(tmp_path / "stopped", houses, {}, quorum=1.0)
    other = _play(tmp_path / "other", Houses(), {(2, 2): "silent"}, quorum=0.5)

    assert len(stopped.used) == 1
    assert again.targets == through.targets
    assert other.targets[1] != through.targets[1]
