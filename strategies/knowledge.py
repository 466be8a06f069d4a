"""KnowledgeSG as a Flower strategy: it configures waves and aggregates their replies; decisions are the pipeline's.

One wave of training per round carries the target down and the DP releases up; after the last round, one wave of
evaluation lets every site score the final target on public text.

Source: KnowledgeSG (2410.05725), made multi-site, multi-round, and without private exemplars on the server.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fl_app import wire
from fl_app.errors import StillroomError, WireViolation
from fl_app.types import Refusal, Upload
from strategies.cohort import Cohort, exchange, gather, refresh
from strategies.collected import Collected
from strategies.summary import write_summary

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
        self._bytes_down = 0
        self._seconds = 0.0

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
        except BaseException as error:
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
        else:
            self._look_again(grid)
            messages = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
            self.pipeline.play(number, self._collect(self._wave(grid, "train", number, messages)))
        return self._target(number)

    def open(self, grid: Grid) -> None:
        """Wait for the sites, learn their names and begin the run."""
        network = self.network
        self.cohort = gather(
            grid, sites=network.sites, wait_s=network.wait_s, poll_s=network.poll_s, quorum=network.quorum
        )
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
        self.pipeline.play(server_round, self._collect(replies))
        return self._target(server_round), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the wave that lets every site score the target on public text."""
        return self._to_all(server_round, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean bits per byte over the sites that scored, and tell the journal about each."""
        found: list[float] = []
        for reply in self._ordered(replies):
            site = self.cohort.hellos[reply.metadata.src_node_id].site
            if reply.has_error():
                continue
            try:
                probe = wire.unpack_probe(reply.content)
            except WireViolation as error:
                self.pipeline.journal.event("probe", site=site, error=str(error)[:200])
                continue
            if probe.items:
                found.append(probe.bits_per_byte)
            self.pipeline.journal.event("probe", site=site, items=probe.items, bits_per_byte=probe.bits_per_byte)
        return MetricRecord({"bits_per_byte": sum(found) / len(found)}) if found else None

    def _target(self, number: int) -> ArrayRecord:
        arrays = wire.pack_broadcast(self.pipeline.broadcast(number))["arrays"]
        assert isinstance(arrays, ArrayRecord)
        return arrays

    def summary(self) -> None:
        """Say nothing: the journal and `summary.json` say it."""

    def _hellos(self) -> dict[str, Hello]:
        return {hello.site: hello for hello in self.cohort.hellos.values()}

    def _look_again(self, grid: Grid) -> None:
        """See which nodes are there before a round: some may have died, and some may be back."""
        before = set(self.cohort.hellos)
        self.cohort = refresh(grid, self.cohort, wait_s=self.network.wait_s, poll_s=self.network.poll_s)
        if set(self.cohort.hellos) != before:
            self.pipeline.spending.join(self._hellos())

    def _to_all(self, number: int, kind: str) -> list[Message]:
        content = wire.pack_broadcast(self.pipeline.broadcast(number))
        self._bytes_down = wire.num_bytes(content)
        ttl = self.network.reply_timeout_s
        return [Message(content, node, kind, group_id=str(number), ttl=ttl) for node in self.cohort.nodes()]

    @staticmethod
    def _again(message: Message, left_s: float) -> Message:
        """Return a message's question once more: a site that has trained answers it from its outbox."""
        told = message.metadata
        return Message(message.content, told.dst_node_id, told.message_type, group_id=told.group_id, ttl=left_s)

    def _wave(self, grid: Grid, phase: str, number: int, messages: Iterable[Message]) -> list[Message]:
        """Send a wave and return what came in time, telling the journal as it comes."""
        wave = list(messages)
        journal = self.pipeline.journal
        done: list[Message] = []

        def progress(reply: Message) -> None:
            done.append(reply)
            journal.event("phase_progress", round=number, phase=phase, done=len(done), total=len(wave))

        with self.pipeline.phase(number, phase):
            began = time.monotonic()
            timeout_s, poll_s = self.network.reply_timeout_s, self.network.poll_s
            exchange(grid, wave, timeout_s=timeout_s, poll_s=poll_s, on_reply=progress, again=self._again)
            self._seconds = round(time.monotonic() - began, 3)
        return done

    def _ordered(self, replies: Iterable[Message]) -> list[Message]:
        known = [reply for reply in replies if reply.metadata.src_node_id in self.cohort.hellos]
        return sorted(known, key=lambda reply: self.cohort.hellos[reply.metadata.src_node_id].site)

    def _collect(self, replies: Iterable[Message]) -> Collected:
        """Sort the replies of a wave into uploads, refusals, broken messages and silence."""
        uploads: list[Upload] = []
        refusals: list[Refusal] = []
        broken: dict[str, str] = {}
        bytes_up: dict[str, int] = {}
        for message in self._ordered(replies):
            site = self.cohort.hellos[message.metadata.src_node_id].site
            if message.has_error():
                broken[site] = f"error: code {message.error.code}"
                continue
            bytes_up[site] = wire.num_bytes(message.content)
            try:
                reply = wire.unpack_reply(message.content)
            except WireViolation as error:
                broken[site] = f"wire: {error}"
                continue
            if isinstance(reply, Refusal) and reply.site == "unnamed":
                reply = dataclasses.replace(reply, site=site)
            if reply.site != site:
                broken[site] = "site: the reply names another site"
            elif isinstance(reply, Upload):
                uploads.append(reply)
            else:
                refusals.append(reply)
        sites = self.cohort.sites()
        heard = {*broken, *(upload.site for upload in uploads), *(refusal.site for refusal in refusals)}
        return Collected(
            uploads=tuple(uploads),
            refusals=tuple(refusals),
            broken=broken,
            silent=tuple(site for site in sites if site not in heard),
            asked=max(len(sites), self.network.sites),
            bytes_up=bytes_up,
            bytes_down=dict.fromkeys(sites, self._bytes_down),
            seconds=self._seconds,
        )
