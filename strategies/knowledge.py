"""KnowledgeSG as a Flower strategy: it configures waves and aggregates their replies; decisions are the pipeline's.

One wave of training per round carries the target down and the DP releases up; after the last round, one wave of
evaluation lets every site score the final target on public text.

Source: KnowledgeSG (2410.05725), made multi-site, multi-round, and without private exemplars on the server.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result, Strategy

from fl_app import lora, wire, wire_arrays, wire_broadcast
from fl_app.errors import StillroomError, WireViolation
from fl_app.types import Probe, Refusal, Upload
from strategies.cohort import Cohort, exchange, gather, refresh
from strategies.collected import NOBODY, Collected
from strategies.summary import write_summary
from strategies.validate import Rejection, unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flwr.serverapp import Grid

    from fl_app.types import Hello
    from strategies.config import NetworkSection
    from strategies.pipeline import Pipeline


class Knowledge(Strategy):
    """The rounds of one run.

    `start` waits for the sites and bounds every wave; Flower's own loop over the four methods below plays the same
    rounds, once `open` has been called.
    """

    def __init__(self, pipeline: Pipeline, network: NetworkSection) -> None:
        self.pipeline = pipeline
        self.network = network
        self.cohort = Cohort(hellos={}, unready={})
        self._bytes_down: dict[str, int] = {}
        self._seconds = 0.0
        self._strays: list[Message] = []
        self._ids: set[str] = set()

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Play every round of the configuration and return Flower's result (the last target's arrays).

        Raises: RoundFailed; `summary.json` then holds what was reached, and the last good target is in its place.
        """
        began = time.monotonic()
        pipeline = self.pipeline
        rounds = pipeline.shared.run.rounds
        result = Result()
        try:
            self.open(grid)
            for number in range(1, rounds + 1):
                pipeline.journal.event("round_started", round=number, rounds=rounds)
                result.arrays = self._round(grid, number)
            messages = self.configure_evaluate(rounds, ArrayRecord(), ConfigRecord(), grid)
            replies = self._wave(grid, "broadcast", rounds, messages)
            metrics = self.aggregate_evaluate(rounds, replies)
            if metrics is not None:
                result.evaluate_metrics_clientapp[rounds] = metrics
            write_summary(pipeline, status="completed", seconds=time.monotonic() - began)
            pipeline.journal.event("run_finished")
            pipeline.note("run_finished")
        except BaseException as error:
            pipeline.note("run_failed", outcome="failed")
            pipeline.journal.event("run_failed", error=type(error).__name__, message=str(error))
            said = str(error) if isinstance(error, StillroomError) else f"{type(error).__name__}: {error}"
            write_summary(pipeline, status="failed", error=said, seconds=time.monotonic() - began)
            raise
        finally:
            pipeline.close()
        return result

    def _round(self, grid: Grid, number: int) -> ArrayRecord:
        """Play one round and return the new target; no site is asked for what was collected before."""
        if self.pipeline.has_collected(number):
            self.pipeline.play(number)
        elif self.pipeline.asked.kind is None:  # public text alone: no site has anything to say
            self.pipeline.play(number, NOBODY)
        else:
            self._look_again(grid)
            self.pipeline.prepare(number)
            messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            self.pipeline.play(number, self._collect(number, self._wave(grid, "train", number, messages)))
        return self._target(number)

    def open(self, grid: Grid) -> None:
        """Wait for the sites, learn their names and begin the run."""
        network = self.network
        cohort = gather(grid, sites=network.sites, wait_s=network.wait_s, poll_s=network.poll_s, quorum=network.quorum)
        self.cohort = cohort.fitting(self.pipeline.unfit)
        self.pipeline.open(self._hellos(), {f"node {i}": why for i, why in enumerate(self.cohort.unready.values())})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the wave of a round: the pipeline's target to every site. `arrays` and `config` are not used."""
        return self._to_all(server_round, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Play the server's part of the round and return the new target; never None.

        Raises: RoundFailed.
        """
        self.pipeline.play(server_round, self._collect(server_round, replies))
        return self._target(server_round), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the wave that lets every site score the target on public text."""
        return self._to_all(server_round, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean bits per byte over the sites that scored, and tell the journal about each."""
        found: list[float] = []
        journal = self.pipeline.journal
        first, strays = self._sorted_out(server_round, replies)
        for stray in strays:
            journal.event("stray", round=server_round, **dataclasses.asdict(stray))
        for site, reply in first.items():
            probe = _probe(site, server_round, reply)
            if isinstance(probe, Rejection):
                journal.event("probe", site=site, error=str(probe), rule=probe.rule)
            elif isinstance(probe, Probe):
                if probe.items:
                    found.append(probe.bits_per_byte)
                journal.event("probe", site=site, items=probe.items, bits_per_byte=probe.bits_per_byte)
        return MetricRecord({"bits_per_byte": sum(found) / len(found)}) if found else None

    def _target(self, number: int) -> ArrayRecord:
        arrays = wire_broadcast.pack(self.pipeline.broadcast(number))["arrays"]
        assert isinstance(arrays, ArrayRecord)
        return arrays

    def summary(self) -> None:
        """Say nothing: the journal and `summary.json` say it."""

    def _hellos(self) -> dict[str, Hello]:
        return {hello.site: hello for hello in self.cohort.hellos.values()}

    def _look_again(self, grid: Grid) -> None:
        """See which nodes are there before a round: some may have died, and some may be back."""
        before = set(self.cohort.hellos)
        cohort = refresh(grid, self.cohort, wait_s=self.network.wait_s, poll_s=self.network.poll_s)
        self.cohort = cohort.fitting(self.pipeline.unfit)
        if set(self.cohort.hellos) != before:
            self.pipeline.spending.join(self._hellos())

    def _to_all(self, number: int, kind: str) -> list[Message]:
        """Return the messages of a wave: to each site what it carries, without the parts that it has."""
        heads, packed = self.pipeline.spending.heads, dict[str, RecordDict]()
        precision = self.pipeline.shared.lora.broadcast_precision
        messages: list[Message] = []
        for node in self.cohort.nodes():
            site = self.cohort.hellos[node].site
            mine = self.pipeline.broadcast_to(site, number, whole=kind == MessageType.EVALUATE)
            key = lora.sha256(mine.adapter)
            if key not in packed:
                packed[key] = wire_broadcast.pack(mine, precision)
            content = wire_broadcast.addressed(packed[key], heads.get(site, ""), self.pipeline.answered.get(site, ()))
            self._bytes_down[site] = wire_arrays.num_bytes(content)
            ttl = self.network.reply_timeout_s
            messages.append(Message(content, node, kind, group_id=str(number), ttl=ttl))
        return messages

    def _wave(self, grid: Grid, phase: str, number: int, messages: Iterable[Message]) -> list[Message]:
        """Send a wave and return what came in time, telling the journal as it comes."""
        wave, repeated = list(messages), list[Message]()
        journal = self.pipeline.journal
        done: list[Message] = []

        def progress(reply: Message) -> None:
            done.append(reply)
            journal.event("phase_progress", round=number, phase=phase, done=len(done), total=len(wave))

        def again(message: Message, left_s: float) -> Message:
            """Ask once more: a site that has trained answers from its outbox."""
            told = message.metadata
            copy = Message(message.content, told.dst_node_id, told.message_type, group_id=told.group_id, ttl=left_s)
            repeated.append(copy)
            return copy

        with self.pipeline.phase(number, phase):
            began = time.monotonic()
            exchange(
                grid,
                wave,
                timeout_s=self.network.reply_timeout_s,
                poll_s=self.network.poll_s,
                on_reply=progress,
                on_stray=self._strays.append,
                again=again,
            )
            self._ids = {message.metadata.message_id for message in (*wave, *repeated)}
            self._seconds = round(time.monotonic() - began, 3)
        return done

    def _sorted_out(self, number: int, replies: Iterable[Message]) -> tuple[dict[str, Message], list[Rejection]]:
        """Return the one reply of each site to this wave, by name in order, and who else said something."""
        first: dict[str, Message] = {}
        strays: list[Rejection] = []
        for reply in replies:
            hello = self.cohort.hellos.get(reply.metadata.src_node_id)
            if hello and hello.site not in first and reply.metadata.group_id == str(number):
                first[hello.site] = reply
            else:
                strays.append(self._stray(reply, number))
        strays += [self._stray(reply, number) for reply in self._strays]
        self._strays.clear()
        return dict(sorted(first.items())), strays

    def _stray(self, reply: Message, number: int) -> Rejection:
        """Return why a reply is nobody's answer to this wave."""
        told = reply.metadata
        hello = self.cohort.hellos.get(told.src_node_id)
        if hello is None:
            return Rejection(site=f"node {told.src_node_id}", rule="member", reason="not a node of this run")
        if told.group_id != str(number) or (self._ids and told.reply_to_message_id not in self._ids):
            return Rejection(site=hello.site, rule="deadline", reason="came when its wave was over")
        return Rejection(
            site=hello.site, rule="duplicate", reason="a site has one reply to a wave, and to its own message"
        )

    def _collect(self, number: int, replies: Iterable[Message]) -> Collected:
        """Sort the replies of a wave into uploads, refusals, broken messages, strays and silence."""
        uploads: list[Upload] = []
        refusals: list[Refusal] = []
        broken: dict[str, Rejection] = {}
        bytes_up: dict[str, int] = {}
        first, strays = self._sorted_out(number, replies)
        for site, message in first.items():
            if not message.has_error():
                bytes_up[site] = wire_arrays.num_bytes(message.content)
            reply = self._read(site, number, message)
            if isinstance(reply, Rejection):
                broken[site] = reply
            elif isinstance(reply, Upload):
                uploads.append(reply)
            else:
                refusals.append(reply)
        sites = self.cohort.sites()
        return Collected(
            uploads=tuple(uploads),
            refusals=tuple(refusals),
            broken=broken,
            silent=tuple(site for site in sites if site not in first),
            asked=max(len(sites), self.network.sites),
            bytes_up=bytes_up,
            bytes_down={site: self._bytes_down.get(site, 0) for site in sites},
            seconds=self._seconds,
            strays=tuple(strays),
        )

    def _read(self, site: str, number: int, message: Message) -> Upload | Refusal | Rejection:
        """Return what a site said, if it can be read and is said in its own name."""
        if message.has_error():
            return _error(site, message)
        try:
            reply = wire.unpack_reply(
                message.content,
                self.pipeline.spec_of(site, number),
                self.pipeline.asked_in(number),
                self.pipeline.bins(number),
                self.pipeline.broadcast_to(site, number).adapter,
            )
        except WireViolation as error:
            return unreadable(site, error)
        if isinstance(reply, Refusal) and reply.site == "unnamed":
            reply = dataclasses.replace(reply, site=site)
        if reply.site != site:
            return Rejection(site=site, rule="site", reason="the reply names another site")
        if isinstance(reply, Refusal) and reply.round != number:
            return Rejection(site=site, rule="round", reason=f"refuses round {reply.round}, this is {number}")
        return reply


def _probe(site: str, number: int, message: Message) -> Probe | Refusal | Rejection:
    """Return a site's score, if it can be read and is said in its own name for this round."""
    if message.has_error():
        return _error(site, message)
    try:
        if "refusal" in message.content:
            reply = wire.unpack_reply(message.content)
            assert isinstance(reply, Refusal)
            return reply
        probe = wire.unpack_probe(message.content)
    except WireViolation as error:
        return unreadable(site, error)
    if (probe.site, probe.round) != (site, number):
        return Rejection(site=site, rule="site", reason="the score names another site or round")
    return probe


def _error(site: str, message: Message) -> Rejection:
    """Return the rejection of Flower's error reply. Its reason may quote a row, or anything else, and is not told."""
    return Rejection(site=site, rule="error", reason=f"code {message.error.code}")
