"""Flower's grid inside one process: the unmodified apps, no Ray, no server, in the order of the nodes.

For tests, fault injection and small machines. One attribute of Flower is not public (`TaskIdentity`, which a
`Message` reads for its run id); it is touched here and nowhere else.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Literal

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from flwr.clientapp import ClientApp

Fault = Literal["raises", "silent"]

FIRST_NODE = 1000
_RAISED = 2
"""Flower's error code CLIENT_APP_RAISED_EXCEPTION."""


class LocalGrid(Grid):
    """`nodes` clients of one app. `faults` makes a node raise or stay silent when it is asked to train."""

    def __init__(
        self,
        app: ClientApp,
        *,
        nodes: int,
        run_config: Mapping[str, Any],
        run_id: int = 1,
        faults: Mapping[int, Fault] | None = None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, 1
        self._app = app
        self._faults = dict(faults or {})
        self._box: dict[str, Message] = {}
        self._contexts = {
            FIRST_NODE + index: Context(
                run_id=run_id,
                node_id=FIRST_NODE + index,
                node_config={"partition-id": index, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(nodes)
        }
        self.replies: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        """Return every node."""
        return list(self._contexts)

    def get_nodes(self) -> Any:
        """Not offered: the strategy identifies nodes by their sites."""
        raise NotImplementedError

    @property
    def run(self) -> Any:
        """Not offered: there is no run record in process."""
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        """Nothing to set."""

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Deprecated in Flower; not offered."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages and return their ids."""
        ids: list[str] = []
        for message in messages:
            identifier = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = identifier
            self._box[identifier] = message
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the next addressed node answer and return its reply."""
        for identifier in list(message_ids):
            if identifier in self._box:
                reply = self._answer(self._box.pop(identifier))
                if reply is not None:
                    self.replies.append(reply)
                    return [reply]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push all, pull all."""
        pending = list(self.push_messages(messages))
        replies: list[Message] = []
        for identifier in pending:
            replies.extend(self.pull_messages([identifier]))
        return replies

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        fault = self._faults.get(node - FIRST_NODE) if message.metadata.message_type == "train" else None
        if fault == "silent":
            return None
        if fault == "raises":
            return Message(Error(_RAISED, "injected"), reply_to=message)
        return self._app(message, self._contexts[node])
