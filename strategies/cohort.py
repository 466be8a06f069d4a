"""Who takes part: Flower's nodes by their sites' logical ids, and one wave of messages to them.

Node ids are random per run and Flower's own sampling is unseeded, so nothing here depends on either: nodes introduce
themselves once, and every wave is sent and read in the order of the sites' names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from google.protobuf.message import DecodeError

from fl_app import wire
from fl_app.errors import RoundFailed, WireViolation
from fl_app.text import one_line
from fl_app.types import Hello, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flwr.serverapp import Grid


UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, DecodeError)
"""What Flower's rebuilding of a message raises for one that is none: in JSON, in protobuf, in a field's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """The sites of a run by node, sorted by name; `unready` are nodes that could not introduce themselves."""

    hellos: Mapping[int, Hello]
    unready: Mapping[int, str]

    def nodes(self) -> list[int]:
        """Return the nodes in the order of their sites' names."""
        return sorted(self.hellos, key=lambda node: self.hellos[node].site)


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    *,
    timeout_s: float,
    poll_s: float,
    on_reply: Callable[[Message], None],
    on_stray: Callable[[Message], None] = lambda _: None,
) -> None:
    """Send messages and hand over each reply as it comes, until all are here or `timeout_s` has passed.

    A reply is the first one that the node asked gives to its own message, by the SuperLink's word and by the reply's
    own. Any other goes to `on_stray`: of a node that
    was not asked, to a message of an earlier wave, or a second one.
    Flower's `send_and_receive` sleeps three seconds between polls; this polls every `poll_s`.
    """
    wave = list(messages)
    pending = {mid: one for one, mid in zip(wave, grid.push_messages(wave), strict=False) if mid}
    wave_nodes = {mid: one.metadata.dst_node_id for mid, one in pending.items()}
    deadline = time.monotonic() + timeout_s
    while pending:
        for mid, reply in _pull(grid, dict(pending)):
            node, expected = reply.metadata.src_node_id, wave_nodes[mid]
            if mid in pending and (reply.metadata.reply_to_message_id, node) == (mid, expected):
                del pending[mid]
                on_reply(reply)
            else:
                # Flower's own word, in no node's name, that a reply was lost on its way: no use to wait for it.
                if reply.has_error() and node not in wave_nodes.values():
                    pending.pop(mid, None)
                on_stray(reply)
        if not pending or time.monotonic() >= deadline:
            return
        time.sleep(poll_s)


def _pull(grid: Grid, asked: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
    """Give the replies that are there, each with the id of the message under which it was found.

    Flower rebuilds a reply, its sender's name included, from bytes of that sender, and raises when they are no reply;
    all that it was pulling along is lost with it. So every message is asked about alone: the SuperLink vouches for who
    answered it, and what cannot be rebuilt is that node's error.
    """
    for mid, message in asked.items():
        try:
            found = [(mid, reply) for reply in grid.pull_messages([mid]) if _whole(reply)]
        except UNREADABLE:
            found = [(mid, Message(Error(ErrorCode.UNKNOWN, "cannot be rebuilt"), reply_to=message))]
        yield from found


def _whole(reply: Message) -> bool:
    """Return True. Raises: TypeError for a reply whose content is another of Flower's objects, ValueError for none."""
    if not reply.has_error() and not isinstance(reply.content, RecordDict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{type(reply.content).__name__} where a RecordDict is asked")
    return True


def gather(grid: Grid, *, sites: int, wait_s: float, poll_s: float) -> Cohort:
    """Wait for `sites` nodes, ask each for its name, and return the cohort.

    A name that two nodes claim is nobody's: both are left out and named, as nothing here could tell whose it is.

    Raises: RoundFailed when fewer nodes are there in time.
    """
    deadline = time.monotonic() + wait_s
    while len(nodes := sorted(grid.get_node_ids())) < sites:
        if time.monotonic() >= deadline:
            raise RoundFailed(f"{len(nodes)} of {sites} nodes after {wait_s:g} s; see server.network.sites and wait_s")
        time.sleep(poll_s)
    replies: list[Message] = []
    wave = [Message(RecordDict(), node, MessageType.QUERY, group_id="hello", ttl=wait_s) for node in nodes]
    exchange(grid, wave, timeout_s=wait_s, poll_s=poll_s, on_reply=replies.append)
    hellos: dict[int, Hello] = {}
    unready = dict.fromkeys(nodes, "silent")
    for reply in replies:
        node = reply.metadata.src_node_id
        answer = f"error: code {reply.error.code}" if reply.has_error() else _read(reply.content)
        if isinstance(answer, Hello):
            hellos[node] = answer
            del unready[node]
        else:
            unready[node] = answer
    names = [hello.site for hello in hellos.values()]
    for node, hello in list(hellos.items()):
        if names.count(hello.site) > 1:
            unready[node] = f"duplicate: two nodes claim the name {hello.site}; give every site.toml its own site.name"
            del hellos[node]
    return Cohort(hellos=hellos, unready=unready)


def _read(content: RecordDict) -> Hello | str:
    try:
        if "refusal" in content:
            reply = wire.unpack_reply(content)
            return reply.code if isinstance(reply, Refusal) else "unreadable"
        return wire.unpack_hello(content)
    except WireViolation as error:
        return one_line(f"{error.rule}: {error}")
