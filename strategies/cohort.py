"""Who takes part: Flower's nodes by their sites' logical ids, and waves of messages that end in time.

Node ids are random per run and Flower's own sampling is unseeded, so nothing here depends on either: nodes introduce
themselves once, and every wave is sent and read in the order of the sites' names.

| what happens                                     | what is done                                                   |
|--------------------------------------------------|----------------------------------------------------------------|
| nodes missing when `wait_s` has passed           | the run begins without them if those there make the quorum     |
| a node comes later, or comes back as another one | it is asked for its name before the next round                 |
| a node is gone                                   | it is not asked; its site counts as silent                     |
| a node was lost in the middle of a wave          | asked once more when it is back: it answers from its outbox    |
| two nodes there claim one name                   | the one that was known stays, else neither: nobody can tell    |
| late, duplicate and foreign replies              | not handed over                                                |
| a site can carry nothing of what is trained      | it is not asked, and named with the reason                     |
"""

from __future__ import annotations

import dataclasses
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
from strategies.collected import needed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flwr.serverapp import Grid

LOST = frozenset({3, 4, 5, 8})
"""Flower's codes for a reply that will not come, from a node that may come back: MESSAGE_UNAVAILABLE, the same of a
reply, NODE_UNAVAILABLE, CLIENT_APP_CRASHED. What a node fetched once is not delivered again (specs `flower.md` 4)."""


UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, DecodeError)
"""What Flower's rebuilding of a message raises for one that is none: in JSON, in protobuf, in a field's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """The sites of a run by node, sorted by name; `unready` are nodes that could not introduce themselves.

    `here` are the nodes that were there at the last look; only they are asked.
    """

    hellos: Mapping[int, Hello]
    unready: Mapping[int, str]
    here: frozenset[int] = frozenset()

    def nodes(self) -> list[int]:
        """Return the nodes that are there, in the order of their sites' names."""
        return sorted(self.hellos.keys() & self.here, key=lambda node: self.hellos[node].site)

    def sites(self) -> list[str]:
        """Return the names of all sites, there or not, in order."""
        return sorted({hello.site for hello in self.hellos.values()})

    def fitting(self, unfit: Callable[[Hello], str]) -> Cohort:
        """Return the cohort without the sites for which `unfit` gives a reason; they are unready, each for its own."""
        reasons = {node: why for node, hello in self.hellos.items() if (why := unfit(hello))}
        hellos = {node: hello for node, hello in self.hellos.items() if node not in reasons}
        return dataclasses.replace(self, hellos=hellos, unready={**self.unready, **reasons})


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    *,
    timeout_s: float,
    poll_s: float,
    on_reply: Callable[[Message], None],
    on_stray: Callable[[Message], None] = lambda _: None,
    again: Callable[[Message, float], Message] | None = None,
) -> None:
    """Send messages and hand over each reply as it comes, until all are here or `timeout_s` has passed.

    A reply is the first one that the node asked gives to its own message, by the SuperLink's word and by the reply's
    own. Any other goes to `on_stray`: of a node that was not asked, to a message of an earlier wave, or a second one.
    Flower's own word that a reply will not come, which it says in no node's name, ends the wait for it. `again` makes
    the second message to a node that was lost after it had the first, with the seconds that are left; each is asked
    twice at most.
    Flower's `send_and_receive` sleeps three seconds between polls; this polls every `poll_s`.
    """
    deadline = time.monotonic() + timeout_s
    pending = _push(grid, messages)
    asked = {message.metadata.dst_node_id for message in messages}
    lost: dict[int, tuple[Message, Message]] = {}  # by node: what it was asked, and the error that came back
    asked_again: set[int] = set()
    while pending or lost:
        for mid, reply in _pull(grid, dict(pending)):
            message, source = pending.get(mid), reply.metadata.src_node_id
            node = message.metadata.dst_node_id if message else 0
            own = source == node and reply.metadata.reply_to_message_id == mid
            if message is None or not (own or (reply.has_error() and source not in asked)):
                on_stray(reply)
                continue
            del pending[mid]
            if again and reply.has_error() and reply.error.code in LOST and node not in asked_again:
                lost[node] = (message, reply)
            elif own:
                on_reply(reply)
            else:
                on_stray(reply)
        left = deadline - time.monotonic()
        for node in sorted(lost.keys() & set(grid.get_node_ids())) if lost and left > 0 else ():
            assert again is not None
            message, _ = lost.pop(node)
            asked_again.add(node)
            pending |= _push(grid, [again(message, left)])
        if left <= 0:
            break
        if pending or lost:
            time.sleep(min(poll_s, left))
    for node, (_, reply) in lost.items():
        (on_reply if reply.metadata.src_node_id == node else on_stray)(reply)


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


def gather(grid: Grid, *, sites: int, wait_s: float, poll_s: float, quorum: float = 1.0) -> Cohort:
    """Wait for `sites` nodes, at most `wait_s`, ask each for its name, and return the cohort.

    Raises: RoundFailed when fewer nodes than the quorum are there in time.
    """
    deadline = time.monotonic() + wait_s
    while len(nodes := sorted(grid.get_node_ids())) < sites:
        if time.monotonic() >= deadline:
            if len(nodes) >= needed(sites, quorum):
                break
            raise RoundFailed(
                f"{len(nodes)} of {sites} nodes after {wait_s:g} s, {needed(sites, quorum)} needed; see "
                "server.network.sites, wait_s and quorum, and resume the run when they are there"
            )
        time.sleep(poll_s)
    cohort = Cohort(hellos={}, unready={}, here=frozenset(nodes))
    return _introduce(grid, cohort, nodes, wait_s=wait_s, poll_s=poll_s)


def refresh(grid: Grid, cohort: Cohort, *, wait_s: float, poll_s: float) -> Cohort:
    """Return the cohort as it is now: nodes that are gone left out, nodes that are new or were unready asked."""
    here = frozenset(grid.get_node_ids())
    cohort = dataclasses.replace(cohort, here=here)
    return _introduce(grid, cohort, sorted(here - cohort.hellos.keys()), wait_s=wait_s, poll_s=poll_s)


def _introduce(grid: Grid, cohort: Cohort, nodes: Sequence[int], *, wait_s: float, poll_s: float) -> Cohort:
    """Ask nodes for their names."""
    if not nodes:
        return cohort
    replies: list[Message] = []
    wave = [Message(RecordDict(), node, MessageType.QUERY, group_id="hello", ttl=wait_s) for node in nodes]
    exchange(grid, wave, timeout_s=wait_s, poll_s=poll_s, on_reply=replies.append)
    hellos = dict(cohort.hellos)
    unready = {node: why for node, why in cohort.unready.items() if node in cohort.here}
    unready |= dict.fromkeys(nodes, "silent")
    answers: dict[int, Hello] = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        answer = f"error: code {reply.error.code}" if reply.has_error() else _read(reply.content)
        if isinstance(answer, Hello):
            answers[node] = answer
            del unready[node]
        else:
            unready[node] = answer
    names = [hello.site for hello in answers.values()]
    known = {hello.site for node, hello in hellos.items() if node in cohort.here}
    for node, hello in sorted(answers.items()):
        if hello.site in known or names.count(hello.site) > 1:
            unready[node] = f"duplicate: two nodes claim the name {hello.site}; give every site.toml its own site.name"
            continue
        for former in [one for one, other in hellos.items() if other.site == hello.site]:
            del hellos[former]  # the site has come back as another node
        hellos[node] = hello
    return Cohort(hellos=hellos, unready=unready, here=cohort.here)


def _push(grid: Grid, messages: Sequence[Message]) -> dict[str, Message]:
    """Send messages and return them by their ids, without those that Flower did not take (grids tell that apart)."""
    taken = {mid for mid in grid.push_messages(messages) if mid}
    return {message.metadata.message_id: message for message in messages if message.metadata.message_id in taken}


def _read(content: RecordDict) -> Hello | str:
    try:
        if "refusal" in content:
            reply = wire.unpack_reply(content)
            return reply.code if isinstance(reply, Refusal) else "unreadable"
        return wire.unpack_hello(content)
    except WireViolation as error:
        return one_line(f"{error.rule}: {error}")
