"""Who takes part: waiting for nodes, asking their names, and waves that end in time."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body
from google.protobuf.message import DecodeError

from fl_app import wire
from fl_app.errors import RoundFailed
from fl_app.types import Hello, Refusal
from simulations.local_grid import FIRST_NODE, LocalGrid
from strategies.cohort import UNREADABLE, exchange, gather, refresh
from strategies.collected import needed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulations.local_grid import Fault

POLL_S = 0.01


def _hello(name: str) -> Hello:
    return Hello(site=name, epsilon=8.0, delta=1e-5, unit="record", spent=0.5)


def _answers(names: list[str]) -> Any:
    """Return an app whose node number `i` says that it is `names[i]`; "" is busy, "?" answers nonsense, "!" breaks."""

    def app(message: Message, context: Context) -> Message:
        name = names[int(context.node_config["partition-id"])]
        if name == "":
            refusal = Refusal(site="unnamed", round=0, code="policy", incident="abc")
            return Message(wire.pack_reply(refusal), reply_to=message)
        if name == "?":
            return Message(RecordDict({"secrets": ConfigRecord({"row": "text"})}), reply_to=message)
        if name == "!":
            return Message(Error(2, "Traceback: the row says ..."), reply_to=message)
        return Message(wire.pack_reply(_hello(name)), reply_to=message)

    return app


class SlowGrid(LocalGrid):
    """A grid whose nodes appear one by one, one more at every look; `deaf` nodes never answer anything."""

    def __init__(self, names: list[str], *, at_once: int = 0, deaf: tuple[int, ...] = (), **more: Any) -> None:
        super().__init__(_answers(names), nodes=len(names), run_config={}, **more)
        self.looks = at_once
        self.asked: list[int] = []
        self._deaf = deaf
        self.present: set[int] | None = None

    def get_node_ids(self) -> Iterable[int]:
        if self.present is not None:
            return sorted(self.present)
        self.looks += 1
        return sorted(super().get_node_ids(), reverse=True)[: self.looks - 1]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        wave = list(messages)
        self.asked += [message.metadata.dst_node_id for message in wave]
        return super().push_messages(wave)

    def _answer(self, message: Message) -> Message | None:
        if message.metadata.dst_node_id - FIRST_NODE in self._deaf:
            return None
        return super()._answer(message)


def _all_there(names: list[str], **more: Any) -> SlowGrid:
    return SlowGrid(names, at_once=len(names), **more)


# --- gather


def test_gather_waits_until_the_nodes_are_there() -> None:
    grid = SlowGrid(["mill", "inn", "farm"])

    cohort = gather(grid, sites=3, wait_s=30.0, poll_s=POLL_S)

    assert grid.looks == 4
    assert sorted(hello.site for hello in cohort.hellos.values()) == ["farm", "inn", "mill"]
    assert cohort.unready == {}


def test_too_few_nodes_fail_in_time() -> None:
    grid = _all_there(["mill", "inn"])
    began = time.monotonic()

    with pytest.raises(RoundFailed, match=r"2 of 3 nodes after 0\.2 s, 3 needed; see server\.network\.sites"):
        gather(grid, sites=3, wait_s=0.2, poll_s=POLL_S)

    assert 0.2 <= time.monotonic() - began < 5.0
    assert grid.asked == []


def test_a_run_begins_without_nodes_that_a_quorum_does_not_need() -> None:
    cohort = gather(_all_there(["mill", "inn"]), sites=3, wait_s=0.2, poll_s=POLL_S, quorum=0.6)

    assert cohort.sites() == ["inn", "mill"]


def test_a_name_that_two_nodes_claim_is_nobodys() -> None:
    """Whoever of them is the mill, neither may speak for it; the run goes on with the others."""
    cohort = gather(_all_there(["mill", "inn", "mill"]), sites=3, wait_s=5.0, poll_s=POLL_S)

    assert {node: hello.site for node, hello in cohort.hellos.items()} == {FIRST_NODE + 1: "inn"}
    assert cohort.unready.keys() == {FIRST_NODE, FIRST_NODE + 2}
    assert all("two nodes claim the name mill; give every" in why for why in cohort.unready.values())


@pytest.mark.parametrize(
    ("policy", "words"),
    [({"delta": 0.011}, "delta = 0.011"), ({"epsilon": 10_001.0}, "epsilon = 10001"), ({"delta": 1e-2}, "")],
)
def test_a_policy_that_promises_nothing_is_not_ready(policy: dict[str, float], words: str) -> None:
    odd = dataclasses.replace(_hello("mill"), **policy)
    app = _answers(["inn"])

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            return app(message, context)
        return Message(wire.pack_reply(odd), reply_to=message)

    cohort = gather(LocalGrid(answer, nodes=2, run_config={}), sites=2, wait_s=5.0, poll_s=POLL_S)

    assert sorted(hello.site for hello in cohort.hellos.values()) == (["inn"] if words else ["inn", "mill"])
    assert [words in why for why in cohort.unready.values()] == ([True] if words else [])


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]])
def test_nodes_stand_in_the_order_of_their_names(names: list[str]) -> None:
    cohort = gather(_all_there(names), sites=3, wait_s=5.0, poll_s=POLL_S)

    assert cohort.nodes() == [FIRST_NODE + names.index(name) for name in ("a", "b", "c")]
    assert [cohort.hellos[node].site for node in cohort.nodes()] == ["a", "b", "c"]


def test_what_a_site_says_of_itself_is_kept() -> None:
    cohort = gather(_all_there(["mill"]), sites=1, wait_s=5.0, poll_s=POLL_S)

    assert cohort.hellos == {FIRST_NODE: _hello("mill")}


def test_nodes_that_cannot_introduce_themselves_are_left_out_with_their_reason() -> None:
    cohort = gather(_all_there(["mill", "", "?", "!", "inn"], deaf=(4,)), sites=5, wait_s=0.3, poll_s=POLL_S)

    assert [hello.site for hello in cohort.hellos.values()] == ["mill"]
    assert cohort.unready.keys() == {FIRST_NODE + node for node in (1, 2, 3, 4)}
    assert cohort.unready[FIRST_NODE + 1] == "policy"
    assert cohort.unready[FIRST_NODE + 2].startswith("keys: records ['secrets']")
    assert cohort.unready[FIRST_NODE + 3] == "error: code 2"
    assert cohort.unready[FIRST_NODE + 4] == "silent"
    assert not any("row" in why for why in cohort.unready.values())


def test_a_node_too_many_is_asked_as_well() -> None:
    cohort = gather(_all_there(["mill", "inn", "farm"]), sites=2, wait_s=5.0, poll_s=POLL_S)

    assert len(cohort.hellos) == 3


@pytest.mark.parametrize(
    ("asked", "quorum", "expected"), [(100, 0.07, 7), (4, 0.5, 2), (5, 0.5, 3), (3, 1.0, 3), (9, 0.01, 1)]
)
def test_a_quorum_is_a_whole_number(asked: int, quorum: float, expected: int) -> None:
    assert needed(asked, quorum) == expected


# --- refresh


def test_a_node_that_is_gone_is_not_asked_and_one_that_is_back_is() -> None:
    grid = _all_there(["mill", "inn"])
    cohort = gather(grid, sites=2, wait_s=5.0, poll_s=POLL_S)
    asked = list(grid.asked)

    grid.present = {FIRST_NODE}
    without = refresh(grid, cohort, wait_s=5.0, poll_s=POLL_S)
    grid.present = None
    back = refresh(grid, without, wait_s=5.0, poll_s=POLL_S)

    assert (without.nodes(), without.sites()) == ([FIRST_NODE], ["inn", "mill"])
    assert back.nodes() == cohort.nodes()
    assert grid.asked == asked  # whoever is known is not asked again


def test_a_node_that_comes_later_introduces_itself() -> None:
    grid = _all_there(["mill", "inn", "farm"])
    grid.present = {FIRST_NODE, FIRST_NODE + 1}
    cohort = gather(grid, sites=2, wait_s=5.0, poll_s=POLL_S)
    grid.present = None

    assert refresh(grid, cohort, wait_s=5.0, poll_s=POLL_S).sites() == ["farm", "inn", "mill"]


def test_a_site_that_comes_back_as_another_node_takes_its_place() -> None:
    grid = _all_there(["mill", "inn", "mill"])
    grid.present = {FIRST_NODE, FIRST_NODE + 1}
    cohort = gather(grid, sites=2, wait_s=5.0, poll_s=POLL_S)
    grid.present = {FIRST_NODE + 1, FIRST_NODE + 2}

    back = refresh(grid, cohort, wait_s=5.0, poll_s=POLL_S)

    assert back.hellos.keys() == {FIRST_NODE + 1, FIRST_NODE + 2}
    assert (back.sites(), back.unready) == (["inn", "mill"], {})


def test_a_second_node_with_the_name_of_one_that_is_there_stays_out() -> None:
    grid = _all_there(["mill", "inn", "mill"])
    grid.present = {FIRST_NODE, FIRST_NODE + 1}
    cohort = gather(grid, sites=2, wait_s=5.0, poll_s=POLL_S)
    grid.present = None

    after = refresh(grid, cohort, wait_s=5.0, poll_s=POLL_S)

    assert after.nodes() == cohort.nodes()
    assert after.unready[FIRST_NODE + 2].startswith("duplicate: two nodes claim the name mill")


# --- exchange


def _wave(grid: LocalGrid) -> list[Message]:
    return [Message(RecordDict(), node, MessageType.TRAIN, group_id="1", ttl=10.0) for node in grid.get_node_ids()]


def _exchange(faults: dict[int, Fault], *, timeout_s: float) -> tuple[list[int], float]:
    """Send a wave to three nodes; return who answered, by number, and how long it took."""
    grid = LocalGrid(_answers(["a", "b", "c"]), nodes=3, run_config={}, faults=faults)
    heard: list[int] = []
    began = time.monotonic()

    def hear(reply: Message) -> None:
        heard.append(reply.metadata.src_node_id - FIRST_NODE)

    exchange(grid, _wave(grid), timeout_s=timeout_s, poll_s=POLL_S, on_reply=hear)
    return heard, time.monotonic() - began


def test_a_wave_ends_when_all_have_answered() -> None:
    heard, took = _exchange({}, timeout_s=60.0)

    assert sorted(heard) == [0, 1, 2]
    assert took < 30.0


def test_a_wave_with_a_silent_node_ends_at_the_deadline() -> None:
    heard, took = _exchange({1: "silent"}, timeout_s=0.3)

    assert sorted(heard) == [0, 2]
    assert 0.3 <= took < 5.0


def test_an_error_is_an_answer() -> None:
    heard, took = _exchange({1: "raises"}, timeout_s=60.0)

    assert sorted(heard) == [0, 1, 2]
    assert took < 30.0


def test_nobody_asked_nothing_awaited() -> None:
    grid = LocalGrid(_answers([]), nodes=0, run_config={})
    began = time.monotonic()

    exchange(grid, [], timeout_s=60.0, poll_s=POLL_S, on_reply=lambda _: pytest.fail("nobody was asked"))

    assert time.monotonic() - began < 30.0


def test_a_reply_to_something_else_is_not_handed_over() -> None:
    """A late reply of an earlier wave comes in; it does not count as an answer to this one."""

    class Late(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            for reply in found:
                reply.metadata.__dict__["_reply_to_message_id"] = "another"
            return found

    grid = Late(_answers(["a"]), nodes=1, run_config={})
    heard: list[Message] = []
    strays: list[Message] = []

    exchange(grid, _wave(grid), timeout_s=0.1, poll_s=POLL_S, on_reply=heard.append, on_stray=strays.append)

    assert heard == []
    assert [reply.metadata.src_node_id for reply in strays] == [FIRST_NODE]


class Crowded(LocalGrid):
    """After every reply comes the same one again, in the name of node `voice`; with `lost`, Flower's error instead."""

    voice, lost = FIRST_NODE + 1, False

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for reply in list(found):
            copy = Message(RecordDict(), dst_node_id=1, message_type=MessageType.TRAIN)
            if self.lost:
                copy = Message(Error(2, "lost"), reply_to=copy)
            copy.metadata.__dict__["_src_node_id"] = self.voice
            copy.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
            found.insert(0, copy)
        return found[:1] if self.lost else found


@pytest.mark.parametrize("voice", [FIRST_NODE + 1, 77], ids=["another node of the wave", "a node nobody asked"])
def test_nobody_answers_for_another_node(voice: int) -> None:
    """What comes first in the wrong name does not take the place of the right one."""
    grid = Crowded(_answers(["a", "b"]), nodes=2, run_config={})
    grid.voice = voice
    heard: list[int] = []
    strays: list[int] = []

    exchange(
        grid,
        _wave(grid)[:1],
        timeout_s=5.0,
        poll_s=POLL_S,
        on_reply=lambda reply: heard.append(reply.metadata.src_node_id),
        on_stray=lambda reply: strays.append(reply.metadata.src_node_id),
    )

    assert (heard, strays) == ([FIRST_NODE], [voice])


def test_a_reply_that_flower_lost_is_not_waited_for() -> None:
    grid = Crowded(_answers(["a"]), nodes=1, run_config={})
    grid.voice, grid.lost = 1, True
    began = time.monotonic()

    exchange(grid, _wave(grid), timeout_s=60.0, poll_s=POLL_S, on_reply=lambda _: pytest.fail("it was lost"))

    assert time.monotonic() - began < 30.0


class Torn(LocalGrid):
    """The reply of node 1 cannot be rebuilt; it is gone, and with it all that were pulled along."""

    error: Exception = ValueError("torn")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = [mid for mid in message_ids if mid in self._box]
        found = [reply for mid in waiting for reply in super(Torn, self).pull_messages([mid])]
        if any(reply.metadata.src_node_id == FIRST_NODE + 1 for reply in found):
            raise self.error
        return found


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), TypeError("x"), IndexError(3), DecodeError("x")])
def test_a_reply_that_flower_cannot_rebuild_costs_its_own_node_only(error: Exception) -> None:
    grid = Torn(_answers(["a", "b", "c"]), nodes=3, run_config={})
    grid.error = error
    heard: dict[int, bool] = {}

    exchange(
        grid,
        _wave(grid),
        timeout_s=60.0,
        poll_s=POLL_S,
        on_reply=lambda reply: heard.update({reply.metadata.src_node_id - FIRST_NODE: reply.has_error()}),
    )

    assert heard == {0: False, 1: True, 2: False}


@pytest.mark.parametrize("content", [None, ArrayRecord(), ConfigRecord({"x": 1}), Array(np.zeros(1))], ids=repr)
def test_a_reply_of_another_kind_is_its_nodes_error(content: Any) -> None:
    """Flower puts whatever object a node sent into the place of the content."""
    app = _answers(["a", "b"])

    def answer(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if context.node_config["partition-id"] == 1:
            reply.__dict__["_content"] = content
        return reply

    cohort = gather(LocalGrid(answer, nodes=2, run_config={}), sites=2, wait_s=5.0, poll_s=POLL_S)

    assert [hello.site for hello in cohort.hellos.values()] == ["a"]
    assert cohort.unready == {FIRST_NODE + 1: "error: code 0"}


def test_a_node_cannot_sign_with_anothers_name() -> None:
    """Sender and message are what it writes of itself, and it writes the other's; the SuperLink knows better."""

    class Forging(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            found = list(super().pull_messages(message_ids))
            for reply in found:
                if reply.metadata.src_node_id == FIRST_NODE:
                    reply.metadata.__dict__["_src_node_id"] = FIRST_NODE + 1
                    reply.metadata.__dict__["_reply_to_message_id"] = self.others
            return found

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = list(super().push_messages(messages))
            self.others = ids[1]
            return ids

    grid = Forging(_answers(["a", "b"]), nodes=2, run_config={})
    heard: list[Message] = []
    strays: list[Message] = []

    exchange(grid, _wave(grid), timeout_s=0.1, poll_s=POLL_S, on_reply=heard.append, on_stray=strays.append)

    assert len(heard) == len(strays) == 1
    assert wire.unpack_hello(heard[0].content).site == "b"
    assert wire.unpack_hello(strays[0].content).site == "a"


def test_what_is_not_a_torn_reply_is_raised() -> None:
    grid = Torn(_answers(["a", "b"]), nodes=2, run_config={})
    grid.error = ConnectionError("the SuperLink is gone")

    with pytest.raises(ConnectionError):
        exchange(grid, _wave(grid), timeout_s=60.0, poll_s=POLL_S, on_reply=lambda _: None)


GOOD_BODY = {"dtype": "float32", "shape": [1, 1], "stype": "numpy.ndarray", "arraychunk_ids": [0]}
BODIES = {
    "good": json.dumps(GOOD_BODY).encode(),
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "nothing in it": b"{}",
    "a list": b"[]",
    "a number for a name": json.dumps({**GOOD_BODY, "dtype": 5}).encode(),
    "text for a shape": json.dumps({**GOOD_BODY, "shape": ["x"]}).encode(),
    "no shape": json.dumps({**GOOD_BODY, "shape": None}).encode(),
    "a chunk that is not there": json.dumps({**GOOD_BODY, "arraychunk_ids": [7]}).encode(),
    "chunks that are no list": json.dumps({**GOOD_BODY, "arraychunk_ids": 3}).encode(),
}


@pytest.mark.parametrize("kind", BODIES)
def test_what_flower_raises_for_an_array_that_is_none_is_known(kind: str) -> None:
    array = Array(np.zeros((1, 1), np.float32))
    content = add_header_to_object_body(object_body=BODIES[kind], obj=array)

    if kind == "good":
        assert Array.inflate(content, array.children).data == array.data
        return
    with pytest.raises(UNREADABLE):
        Array.inflate(content, array.children)
