"""The site's door: Flower's messages in, values to `clients`, replies out. Nothing but wiring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fl_app.origin import check_origin

check_origin()

from clients import local_round  # noqa: E402
from clients.config import read_client  # noqa: E402
from fl_app import wire, wire_broadcast  # noqa: E402
from fl_app.config import digest, read_tree, shared  # noqa: E402
from fl_app.errors import PolicyRefusal  # noqa: E402
from fl_app.types import Refusal  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.types import Broadcast, Probe, Upload

app = ClientApp()


def _site(context: Context) -> local_round.Site:
    """The site of this node: `rows` of its own configuration, or a simulated one's directory under `sites`."""
    rows = context.node_config.get("rows") or f"{context.run_config['sites']}/{context.node_config['partition-id']}"
    return local_round.Site(directory=Path(str(rows)))


def _settings(context: Context, broadcast: Broadcast) -> local_round.Settings:
    tree = read_tree(str(context.run_config["config"]), str(context.run_config["overrides"]))
    if digest(tree) != broadcast.config_digest:
        raise PolicyRefusal("the server runs another configuration than this bundle's; start the run again")
    return local_round.Settings(shared=shared(tree), asked=read_client(tree))


def _answer(message: Message, context: Context, work: Callable[..., Upload | Probe]) -> Message:
    site = _site(context)
    broadcast = local_round.guarded(site, "", 0, lambda: wire_broadcast.unpack(message.content, site.received.find))
    if isinstance(broadcast, Refusal):
        return Message(wire.pack_reply(broadcast), reply_to=message)

    def answer() -> RecordDict:
        settings = _settings(context, broadcast)
        reply = work(site, broadcast, settings)
        return wire.pack_reply(reply, local_round.sent(settings, broadcast), broadcast.adapter)

    reply = local_round.guarded(site, broadcast.run, broadcast.round, answer)
    return Message(wire.pack_reply(reply) if isinstance(reply, Refusal) else reply, reply_to=message)


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Answer with the site's name and public policy."""
    site = _site(context)
    reply = local_round.guarded(site, "", 0, lambda: local_round.hello(site))
    return Message(wire.pack_reply(reply), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with a DP release, or a refusal."""
    return _answer(message, context, local_round.train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer with the broadcast's score on public text: free of budget, spent or not."""
    return _answer(message, context, local_round.probe)
