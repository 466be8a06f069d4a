"""Who takes part: Flower's nodes by their sites' logical ids, and one wave of messages to them.

Node ids are random per run and Flower's own sampling is unseeded, so nothing here depends on either: nodes introduce
themselves once, and every wave is sent and read in the order of the sites' names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Message, MessageType, RecordDict

from fl_app import wire
from fl_app.errors import RoundFailed, WireViolation
from fl_app.types import Hello, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flwr.serverapp import Grid


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
) -> None:
    """Send messages and hand over each reply as it comes, until all are here or `timeout_s` has passed.

    Flower's `send_and_receive` sleeps three seconds between polls; this polls every `poll_s`.
    """
    pending = {mid for mid in grid.push_messages(messages) if mid}
    deadline = time.monotonic() + timeout_s
    while pending:
        for reply in grid.pull_messages(list(pending)):
            if reply.metadata.reply_to_message_id in pending:
                pending.discard(reply.metadata.reply_to_message_id)
                on_reply(reply)
        if not pending or time.monotonic() >= deadline:
            return
        time.sleep(poll_s)


def gather(grid: Grid, *, sites: int, wait_s: float, poll_s: float) -> Cohort:
    """Wait for `sites` nodes, ask each for its name, and return the cohort.

    Raises: RoundFailed when fewer nodes are there in time, or two of them claim one name.
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
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RoundFailed(f"two nodes claim the name {', '.join(twice)}; give every site.toml its own site.name")
    return Cohort(hellos=hellos, unready=unready)


def _read(content: RecordDict) -> Hello | str:
    try:
        if "refusal" in content:
            reply = wire.unpack_reply(content)
            return reply.code if isinstance(reply, Refusal) else "unreadable"
        return wire.unpack_hello(content)
    except WireViolation as error:
        return f"wire: {error}"
