"""A whole run in process in which one site, `inn`, may say anything: real server, real wire, real stages, no training.

What sites send is made here: the broadcast, moved a little, with an honest receipt. What the server makes of it is all
its own, from the grid's messages to the tuned target.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from fl_app import lora, models, parts, peft_files, wire, wire_broadcast
from fl_app.config import read_tree, shared
from fl_app.privacy.accountants import pld
from fl_app.types import (
    Adapter,
    AdapterRelease,
    Broadcast,
    DpReceipt,
    Hello,
    LoraFactors,
    PoissonGaussian,
    Probe,
    Upload,
)
from simulations.local_grid import FIRST_NODE, LocalGrid
from strategies import cohort
from strategies.config import build_pipeline, read_server
from strategies.knowledge import Knowledge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from flwr.app import Context

    from fl_app.types import Broadcast, Floats
    from strategies.pipeline import Pipeline

    Twist = Callable[[Message, Message], Sequence[Message]]

NAMES = ("farm", "inn", "mill")
INN = FIRST_NODE + 1
STEPS, DELTA, BUDGET = 2, 1e-5, 8.0
RECEIPT = DpReceipt(
    event=PoissonGaussian(noise_multiplier=4.0, sample_rate=1.0, steps=STEPS, clip_norm=1.0), unit="record"
)
COST = pld.epsilon([RECEIPT], DELTA)
"""Of one round; the honest say in every round what all up to it cost."""
SETTINGS = (
    "run.rounds=1",
    f"client.learner.steps={STEPS}",
    "server.network.sites=3",
    "server.network.poll_s=0.01",
    "server.network.reply_timeout_s=1.0",
    "server.filters=[]",
    "server.synthesizer.drafts=3",
    "server.synthesizer.max_new_tokens=12",
    "server.distiller.max_new_tokens=8",
    "server.tuner.learning_rate=0.02",
    "server.exam.choice_items=1",
    "server.exam.free_items=0",
)


class SteppedTime:
    """A clock that only waiting moves, so that a deadline costs no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclasses.dataclass(frozen=True)
class Played:
    """What came of a run, read from its own files where it can be."""

    pipeline: Pipeline
    directory: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.directory / "rounds/1/record.json").read_text(encoding="utf-8"))

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in (self.directory / "journal.jsonl").read_text(encoding="utf-8").splitlines()]

    @property
    def outcome(self) -> dict[str, str]:
        """What the round made, by content: two runs that agree here made the same of it, to the bit."""
        hashes = self.record["hashes"]
        names = ("merged", "target", "drafts.jsonl", "screened.json", "lessons.jsonl")
        return {
            "file": lora.sha256(peft_files.load(self.directory / "target")),
            **{name: hashes[name] for name in names},
        }


def moved(adapter: Adapter, seed: int, scale: float = 1e-3) -> Adapter:
    """Return what a site might have learned: every number moved a little."""
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(
            a=(one.a + rng.normal(0, scale, one.a.shape)).astype(np.float32),
            b=(one.b + rng.normal(0, scale, one.b.shape)).astype(np.float32),
        )
        for name, one in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def upload(broadcast: Broadcast, site: str, adapter: Adapter | None = None, **changes: Any) -> Upload:
    """Return the honest answer of a site to a broadcast, or one that differs from it as said."""
    release = AdapterRelease(adapter=adapter or moved(broadcast.adapter, seed=NAMES.index(site)))
    honest = Upload(
        site=site,
        run=broadcast.named,
        round=broadcast.round,
        release=release,
        receipts=(RECEIPT,),
        spent=pld.epsilon([RECEIPT] * broadcast.round, DELTA),
    )
    return dataclasses.replace(honest, **changes)


class Hostile(LocalGrid):
    """Sites that answer honestly, except that `twist` says what comes of the inn's answer to a training message.

    `twist` gets the message and the honest reply and returns what is handed over; with `hold`, it is handed over with
    the next wave, when its own is over. `hellos` changes how a site, by its number, introduces itself; `wave` is when
    the twist comes.
    """

    def __init__(
        self,
        twist: Twist | None = None,
        *,
        hellos: Mapping[int, dict[str, Any]] | None = None,
        hold: bool = False,
        wave: str = "train",
    ) -> None:
        self.hellos = hellos or {}
        super().__init__(self._site, nodes=max(2, *self.hellos) + 1 if self.hellos else 3, run_config={})
        self.twist, self.hold, self.held, self.wave = twist, hold, list[Message](), wave
        self.asked: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.asked = list(messages)
        return super().push_messages(self.asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.held and self.asked[0].metadata.message_type == "evaluate":
            return [self.held.pop()]
        replies = super().pull_messages(message_ids)
        return [told for reply in replies for told in self._twisted(reply)]

    def _twisted(self, reply: Message) -> Sequence[Message]:
        (asked,) = [one for one in self.asked if one.metadata.message_id == reply.metadata.reply_to_message_id]
        mine = (asked.metadata.message_type, reply.metadata.src_node_id) == (self.wave, INN)
        told = self.twist(asked, reply) if self.twist and mine else [reply]
        if self.hold and mine:
            self.held += told
            return []
        return told

    def _site(self, message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        if message.metadata.message_type == "query":
            told = {"site": NAMES[number % 3], "epsilon": BUDGET, "delta": DELTA, "unit": "record", "spent": 0.0}
            reply: Any = Hello(**{**told, **self.hellos.get(number, {})})
        else:
            broadcast = read(message.content)
            reply = upload(broadcast, NAMES[number % 3])
            if message.metadata.message_type == "evaluate":
                reply = Probe(site=NAMES[number % 3], round=broadcast.round, items=1, bits_per_byte=2.0)
        return Message(wire.pack_reply(reply), reply_to=message)


KEPT: dict[str, Mapping[str, Floats]] = {}


def read(content: RecordDict) -> Broadcast:
    """Return a broadcast as a site that forgets nothing reads it."""
    broadcast = wire_broadcast.unpack(content, KEPT.get)
    pieces = [parts.part(broadcast.adapter, factor) for factor in parts.of_adapter(broadcast.adapter)]
    KEPT.update((parts.sha256(piece), piece) for piece in [*pieces, *map(parts.arrays_of, broadcast.blocks)])
    return broadcast


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where runs are played: a directory of public files, and a new run directory for each."""

    place: Path

    def knowledge(self, *overrides: str) -> Knowledge:
        """Return a server that has not begun, in a run directory of its own."""
        directory = self.place / f"run-{len(list(self.place.iterdir()))}"
        public = [f'server.exam.path="{self.place}/exam.jsonl"', f'server.synthesizer.codes="{self.place}/codes.jsonl"']
        places = [*public, f'run.directory="{directory}"']
        tree = read_tree("configs/smoke.toml", "\n".join([*SETTINGS, *places, *overrides]))
        server = read_server(tree)
        return Knowledge(build_pipeline(tree, shared(tree), server, run="run-a"), server.network)

    def play(self, grid: Hostile, *overrides: str) -> Played:
        knowledge = self.knowledge(*overrides)
        knowledge.start(grid, ArrayRecord())
        return Played(pipeline=knowledge.pipeline, directory=knowledge.pipeline.journal.directory)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    place = tmp_path_factory.mktemp("hostile")
    (place / "exam.jsonl").write_text('{"question": "Yes?", "choices": ["yes", "no"], "answer": 0}\n')
    (place / "codes.jsonl").write_text('{"id": "cough", "text": "A cough:"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", functools.cache(models.load))
        patch.setattr(cohort, "time", SteppedTime())
        yield Stage(place)
