"""B8b: a server that tries to weaken what a site promised, in twelve ways and some more, through the real door.

The server writes the configuration and the bundle's overrides, and its digest matches; the site is a production site.
Every attempt is answered with a code, leaves the ledger as it was, byte for byte, and stands in the audit log.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from flwr.app import ConfigRecord, Message, RecordDict

from clients.site import Site
from fl_app import audit_log, client_app, wire, wire_broadcast
from fl_app.config import digest, read_tree
from fl_app.types import Broadcast, PoissonGaussian, Refusal, Upload
from simulations.local_grid import FIRST_NODE, LocalGrid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.types import Adapter

TREE: dict[str, Any] = {
    "run": {"rounds": 3, "mode": "production", "seed": 3},
    "model": {"name": "tiny-random", "dtype": "float32"},
    "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
    "client": {"learner": {"kind": "dp_lora", "steps": 2, "clip_norm": 1.0}},
}


@dataclass(frozen=True)
class Server:
    """Whoever writes configuration, overrides and messages; the site has its own directory."""

    site: Site
    config: Path
    start: Adapter
    folder: Any

    def send(
        self, overrides: str = "", *, number: int = 1, change: Callable[[RecordDict], None] | None = None, **more: Any
    ) -> Upload | Refusal:
        """Ask for a round with this configuration."""
        theirs = more.pop("theirs", overrides)  # what the server's own bundle says
        message = Broadcast(
            **{
                "run": "run-a",
                "round": number,
                "adapter": self.start,
                "config_digest": digest(read_tree(str(self.config), theirs)),
            }
            | more
        )
        content = wire_broadcast.pack(message)
        if change is not None:
            change(content)
        run_config = {"config": str(self.config), "overrides": overrides, "sites": str(self.site.directory.parent)}
        grid = LocalGrid(client_app.app, nodes=1, run_config=run_config)
        (reply,) = grid.send_and_receive([Message(content, FIRST_NODE, "train")])
        assert not reply.has_error()
        return wire.unpack_reply(reply.content)

    def policy(self, **limits: Any) -> None:
        """Write the site's policy."""
        self.folder.policy(
            limits={
                "simulation": False,
                "max_clip_norm": 1.0,
                "min_noise_multiplier": 0.5,
                "base_models": [self.start.base],
                **limits,
            }
        )


@pytest.fixture
def server(site_folder: Any, tmp_path: Path, learned: Callable[[int], Adapter]) -> Server:
    place = tmp_path / "sites" / "0"
    place.parent.mkdir()
    site_folder.directory.rename(place)
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(TREE), encoding="utf-8")
    made = Server(
        site=Site(directory=place),
        config=config,
        start=learned(5),
        folder=dataclasses.replace(site_folder, directory=place),
    )
    made.policy()
    return made


def other_base(content: RecordDict) -> None:
    adapter = wire_broadcast.unpack(content).adapter
    broadcast = dataclasses.replace(wire_broadcast.unpack(content), adapter=dataclasses.replace(adapter, base="f" * 64))
    fresh = wire_broadcast.pack(broadcast)
    for name in ("broadcast", "arrays"):
        content[name] = fresh[name]


def extra_key(content: RecordDict) -> None:
    record = content["broadcast"]
    assert isinstance(record, ConfigRecord)
    record["noise_multiplier"] = 0.1


ATTEMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "less noise": (
        {"overrides": "client.learner.noise_multiplier=0.01"},
        "unknown key client.learner.noise_multiplier",
    ),
    "more steps": ({"overrides": "client.learner.steps=11"}, "11 steps a round asked, at most 10"),
    "a larger clip": ({"overrides": "client.learner.clip_norm=100.0"}, "clip norm 100 asked, at most 1 allowed"),
    "a larger delta": ({"overrides": "client.delta=0.1"}, "unknown key client.delta"),
    "a higher rate": ({"overrides": "client.learner.sample_rate=1.0"}, "unknown key client.learner.sample_rate"),
    "another base": ({"change": other_base}, "base model ffffffffffff is not on the list"),
    "metrics on": ({"overrides": "client.disclose_metrics=true"}, "unknown key client.disclose_metrics"),
    "a seed": ({"overrides": "run.mode='simulation' run.seed=7"}, "run.mode is 'simulation' (seeded noise"),
    "no noise": ({"overrides": "client.learner={kind='plain_lora',steps=2}"}, "a learner without noise is asked"),
    "packing": ({"overrides": "client.learner.packing=true"}, "unknown key client.learner.packing"),
    "another bundle": ({"theirs": "client.learner.steps=3"}, "the server runs another configuration than this bundle"),
    "a policy of its own": ({"overrides": "client.policy.epsilon=99.0"}, "unknown key client.policy"),
    "more rounds": ({"overrides": "run.rounds=6"}, "at most 5 rounds allowed"),
    "a round beyond the last": ({"number": 4}, "round 4 of 3 asked"),
    "a key in the message": ({"change": extra_key}, "broadcast holds"),
    "a seed for the noise": ({"overrides": "client.learner.seed=7"}, "unknown key client.learner.seed"),
}
"""The first twelve are the bar's; what a server may do, and the words of the site's own log."""


@pytest.mark.bar("B8b")
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_is_refused_and_leaves_the_ledger_as_it_was(server: Server, attempt: str) -> None:
    assert isinstance(server.send(), Upload)  # the twin: as planned, the same door opens
    before = {path.name: path.read_bytes() for path in server.site.ledger_path.parent.iterdir()}
    known = audit_log.verify(server.site.directory / "audit.jsonl")
    asked, words = ATTEMPTS[attempt]

    answer = server.send(**{"number": 2} | asked)

    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert words in (server.site.directory / "site.log").read_text(encoding="utf-8").splitlines()[-1]
    assert {path.name: path.read_bytes() for path in server.site.ledger_path.parent.iterdir()} == before
    last = audit_log.read(server.site.directory / "audit.jsonl")[-1]
    assert (last.action, last.outcome, last.code, last.actor) == ("refused", "refused", "policy", "site")
    assert last.policy_id == server.site.policy.id
    audit_log.verify(server.site.directory / "audit.jsonl", known)
    assert isinstance(server.send(number=2), Upload)  # and the site goes on


@pytest.mark.bar("B8b")
def test_a_configuration_that_is_not_on_the_site_s_list_is_refused(server: Server) -> None:
    listed = digest(read_tree(str(server.config)))
    server.policy(allowed_configs=[listed])
    answer = server.send("client.learner.learning_rate=0.5")
    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert "is not on the list limits.allowed_configs" in (server.site.directory / "site.log").read_text("utf-8")
    assert not server.site.ledger_path.exists()
    assert isinstance(server.send(), Upload)  # the twin: the one on the list


def test_a_server_that_asks_for_more_epsilon_is_capped(server: Server) -> None:
    server.policy(max_noise_multiplier=9.0)
    answer = server.send("client.epsilon=1e6 run.rounds=1")
    assert isinstance(answer, Upload)
    assert 7.9 < answer.spent <= 8.0
    (receipt,) = answer.receipts or ()
    assert isinstance(receipt.event, PoissonGaussian)
    assert receipt.event.noise_multiplier >= 0.5


def test_the_policy_of_the_day_is_on_record(server: Server) -> None:
    """And what followed under it, in order, each tied to its line of the ledger."""
    server.send()
    first = server.site.policy.id
    server.policy(max_steps_per_round=9)
    server.send(number=2)
    server.send(number=2)  # again, from the outbox
    entries = audit_log.read(server.site.directory / "audit.jsonl")
    round_of = ["run_seen", "reserved", "trained", "outbox", "committed", "sent"]
    assert [entry.action for entry in entries] == [
        *("policy_read", *round_of),
        *("policy_changed", *round_of),
        *("run_seen", "resent"),
    ]
    assert [entry.policy_id for entry in entries[:7]] == [first] * 7
    assert {entry.policy_id for entry in entries[7:]} == {server.site.policy.id} != {first}
    lines = [json.loads(line) for line in server.site.ledger_path.read_text(encoding="utf-8").splitlines()]
    for entry in entries:
        if entry.action in {"reserved", "committed"}:
            line = lines[entry.ledger_seq]
            assert line["kind"] == {"reserved": "reserve", "committed": "commit"}[entry.action]
            assert line.get("policy_id", entry.policy_id) == entry.policy_id
            assert line.get("sha256", entry.object_sha256) == entry.object_sha256
    assert [line["audit"] for line in lines if line["kind"] == "reserve"] == [entries[1].hash, entries[8].hash]


def test_a_policy_with_an_unknown_key_trains_nothing(server: Server) -> None:
    path = server.site.directory / "site.toml"
    path.write_text(path.read_text(encoding="utf-8") + "\n[limitz]\nmax_steps = 9\n", encoding="utf-8")
    answer = server.send()
    assert isinstance(answer, Refusal)
    assert (answer.site, answer.code) == ("unnamed", "policy")
    assert not server.site.ledger_path.exists()
    assert [entry.code for entry in audit_log.read(server.site.directory / "audit.jsonl")] == ["policy"]


# --- a place of its own


@pytest.mark.parametrize(("mode", "open_to_all"), [(0o755, True), (0o701, True), (0o770, False), (0o700, False)])
def test_a_production_site_that_everybody_may_enter_is_refused(server: Server, mode: int, open_to_all: bool) -> None:
    server.site.directory.chmod(mode)
    answer = server.send()
    assert isinstance(answer, Refusal if open_to_all else Upload)
    if isinstance(answer, Refusal):
        assert answer.code == "policy"
        log = (server.site.directory / "site.log").read_text(encoding="utf-8")
        assert f"run: chmod 700 {server.site.directory}" in log
        assert not server.site.ledger_path.exists()


def test_what_a_round_leaves_behind_is_the_owner_s_alone(server: Server) -> None:
    server.send()
    server.send(number=9)
    modes = {
        str(path.relative_to(server.site.directory)): path.stat().st_mode & 0o777
        for path in server.site.directory.iterdir()
        if path.name not in {"rows.jsonl", "codes.jsonl", "site.toml"}
    }
    folders = {"ledger": 0o700, "outbox": 0o700, "received": 0o700}
    assert modes == {**folders, "audit.jsonl": 0o600, "site.log": 0o600}
    assert server.site.ledger_path.stat().st_mode & 0o777 == 0o600
    for path in server.site.outbox.rglob("*"):
        assert path.is_file() or path.stat().st_mode & 0o777 == 0o700


def test_a_seeded_release_and_a_real_one_never_share_a_ledger(server: Server) -> None:
    assert isinstance(server.send(), Upload)
    server.policy(simulation=True)
    answer = server.send("run.mode='simulation'")
    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"


def test_a_production_upload_shows_its_ledger_s_head(server: Server) -> None:
    """And the next broadcast that brings it back is served; another head is not."""
    first = server.send()
    assert isinstance(first, Upload)
    assert first.head == server.site.ledger(server.site.policy).head
    answer = server.send(number=2, head="ab" * 32)
    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"
    second = server.send(number=2, head=first.head)
    assert isinstance(second, Upload)
    assert second.head != first.head
    again = server.send(number=2, head=second.head)  # a resend knows it too
    assert isinstance(again, Upload)
    assert again.head == second.head
