"""A site as a place: its policy's name, its logs, and what it says of itself."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from clients import local_round, outbox
from clients.config import read_client, read_policy
from clients.dp_steps import DpAdapterLearner
from clients.local_round import Settings, Site
from fl_app import audit_log, lora, releases
from fl_app.config import shared
from fl_app.errors import ConfigInvalid, LedgerCorrupt
from fl_app.hash_chain import NO_LINE
from fl_app.privacy.chain import Committed, Reserved
from fl_app.types import NO_HEAD, Broadcast, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.types import Adapter


@pytest.fixture
def site(site_folder: Any) -> Site:
    return Site(directory=site_folder.directory)


@pytest.fixture
def start(learned: Callable[[int], Adapter]) -> Adapter:
    return learned(5)


def ask(site: Site, start: Adapter, number: int = 1, *, mode: str = "simulation", head: str = "") -> Upload | Refusal:
    tree: dict[str, Any] = {
        "run": {"rounds": 4, "mode": mode, "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": 2}},
    }
    told = Settings(shared=shared(tree), asked=read_client(tree))
    message = Broadcast(run="a", round=number, adapter=start, config_digest="d", head=head)
    return local_round.guarded(site, "a", number, lambda: local_round.train(site, message, told))


def log_of(site: Site) -> str:
    return (site.directory / "site.log").read_text(encoding="utf-8")


def test_no_head_is_no_line() -> None:
    assert NO_HEAD == NO_LINE


# --- the policy


def test_a_policy_s_id_is_what_it_says_and_not_how(site: Site, site_folder: Any) -> None:
    first = site.policy.id
    path = site.directory / "site.toml"
    lines = path.read_text(encoding="utf-8")
    path.write_text("# a remark\n\n" + lines, encoding="utf-8")
    assert site.policy.id == first
    for change in ({"privacy": {"epsilon": 8.001}}, {"limits": {"max_clip_norm": 1.0}}, {"site": {"name": "mill"}}):
        site_folder.policy(**change)
        assert site.policy.id != first
    site_folder.policy(limits={"max_clip_norm": 1e6})  # the default, said out loud
    assert site.policy.id == first


@pytest.mark.parametrize(
    "limits", [{"max_clip_norm": 0.0}, {"max_clip_norm": float("inf")}, {"allowed_configs": ["d"]}, {"max_clip": 1.0}]
)
def test_strange_limits_are_refused(site: Site, site_folder: Any, limits: dict[str, Any]) -> None:
    site_folder.policy(limits=limits)
    with pytest.raises(ConfigInvalid, match=r"limits\.(max_clip|allowed_configs)"):
        read_policy(site.directory)


# --- what it says of itself


def test_a_simulated_site_shows_no_head_and_a_real_one_does(site: Site, site_folder: Any, start: Adapter) -> None:
    upload = ask(site, start)
    assert isinstance(upload, Upload)
    assert upload.head == local_round.hello(site).head == NO_HEAD
    site_folder.policy(limits={"simulation": False})
    for name in ("ledger", "outbox"):
        shutil.rmtree(site.directory / name)
    hello = local_round.hello(site)
    assert hello.head == site.ledger(site.policy).head != NO_HEAD
    upload = ask(site, start, mode="production")
    assert isinstance(upload, Upload)
    assert upload.head == local_round.hello(site).head == site.ledger(site.policy).head != hello.head


def test_no_head_asks_for_nothing(site: Site, start: Adapter) -> None:
    """A simulated site gets back what it sent."""
    assert isinstance(ask(site, start, head=NO_HEAD), Upload)
    assert isinstance(ask(site, start, 2, head="ab" * 32), Refusal)


# --- the ledger and its witness


def test_an_older_copy_put_back_while_it_trains_keeps_the_release_here(
    site: Site, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation is in the copy as well, so the commit goes through; what another round released is not."""
    assert isinstance(ask(site, start), Upload)
    plain = DpAdapterLearner.__call__

    def rolls_back(self: DpAdapterLearner, *arguments: Any) -> Any:
        saved = {path: path.read_bytes() for path in site.ledger_path.parent.iterdir()}
        monkeypatch.setattr(DpAdapterLearner, "__call__", plain)
        assert isinstance(ask(site, start, 3), Upload)  # meanwhile, another round
        for path, content in saved.items():
            path.write_bytes(content)
        return plain(self, *arguments)

    monkeypatch.setattr(DpAdapterLearner, "__call__", rolls_back)
    answer = ask(site, start, 2)
    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"
    assert "round-3 was released, but the ledger does not know it" in log_of(site)
    assert "sent" not in [entry.action for entry in audit_log.read(site.directory / "audit.jsonl") if entry.round == 2]


def test_a_release_knows_its_line(site: Site, start: Adapter) -> None:
    assert isinstance(ask(site, start), Upload)
    entries = site.ledger(site.policy).entries()
    reserved = next(entry for entry in entries if isinstance(entry, Reserved))
    committed = next(entry for entry in entries if isinstance(entry, Committed))
    (place,) = site.outbox.glob("*/round-1/manifest.json")
    said = json.loads(place.read_text(encoding="ascii"))
    assert said == {
        "id": reserved.id,
        "ledger_seq": reserved.seq,
        "round": 1,
        "run": "a.d",
        "sha256": committed.sha256,
        "answers": releases.broadcast_sha256(Broadcast(run="a", round=1, adapter=start, config_digest="d")),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "0" * 16}, "does not know it"),
        ({"round": 2}, "does not know it"),
        ({"ledger_seq": 3}, "does not know it"),
        ({"sha256": "0" * 64}, "knows another"),
        ({"run": None}, "does not know it"),
    ],
)
def test_a_release_that_the_ledger_does_not_know_stops_everything(
    site: Site, start: Adapter, change: dict[str, Any], words: str
) -> None:
    assert isinstance(ask(site, start), Upload)
    entries = site.ledger(site.policy).entries()
    outbox.check_witnesses(site.outbox, entries)
    (place,) = site.outbox.glob("*/round-1/manifest.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | change), encoding="ascii")
    with pytest.raises(LedgerCorrupt, match=words + r".*was rolled back; restore the newest copy"):
        outbox.check_witnesses(site.outbox, entries)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"id": []}', b"{}"])
def test_a_manifest_that_cannot_be_read_stops_everything(site: Site, start: Adapter, content: bytes) -> None:
    assert isinstance(ask(site, start), Upload)
    (place,) = site.outbox.glob("*/round-1/manifest.json")
    place.write_bytes(content)
    with pytest.raises(LedgerCorrupt, match="cannot be read; restore it"):
        outbox.check_witnesses(site.outbox, site.ledger(site.policy).entries())


def test_releases_of_before_manifests_are_no_witnesses_and_are_still_sent(site: Site, start: Adapter) -> None:
    first = ask(site, start)
    (place,) = site.outbox.glob("*/round-1/manifest.json")
    place.unlink()
    again = ask(site, start)
    assert isinstance(first, Upload)
    assert isinstance(again, Upload)
    assert lora.sha256(again.release.adapter) == lora.sha256(first.release.adapter)  # type: ignore[union-attr]


# --- on record


def test_nothing_is_spent_off_the_record(site: Site, start: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written stops a round before its reservation, and a reservation before its training."""
    append = audit_log.AuditLog.append
    for action, lines in (("run_seen", 0), ("reserved", 3)):

        def fails(self: Any, what: str, *, stop: str = action, **fields: Any) -> str:
            if what == stop:
                raise audit_log.AuditBroken("cannot write audit.jsonl: No space left on device")
            return append(self, what, **fields)

        with monkeypatch.context() as patch:
            patch.setattr(audit_log.AuditLog, "append", fails)
            patch.setattr(DpAdapterLearner, "__call__", lambda *_: pytest.fail("trained off the record"))
            answer = ask(site, start)
        assert isinstance(answer, Refusal)
        assert answer.code == "ledger"
        content = site.ledger_path.read_text(encoding="utf-8") if site.ledger_path.exists() else ""
        assert len(content.splitlines()) == lines


def test_a_changed_audit_log_stops_training_and_not_refusing(site: Site, start: Adapter) -> None:
    assert isinstance(ask(site, start), Upload)
    path = site.directory / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"sent"', b'"kept"'))
    answer = ask(site, start, 2)
    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"
    assert "its last line was changed" in log_of(site)
    assert "the audit log does not take a refusal" in log_of(site)


def test_the_record_quotes_nobody(site: Site, start: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "Wilhelmina Quillfeather"

    def quotes(*_: Any) -> Any:
        raise ValueError(f"cannot tokenize {secret!r}")

    monkeypatch.setattr(DpAdapterLearner, "__call__", quotes)
    assert isinstance(ask(site, start), Refusal)
    assert secret in log_of(site)  # the twin: the site's own log may know
    content = (site.directory / "audit.jsonl").read_text(encoding="utf-8")
    assert "Quillfeather" not in content
    assert [entry.code for entry in audit_log.read(site.directory / "audit.jsonl")][-1] == "internal"


def test_hello_is_on_record(site: Site) -> None:
    local_round.hello(site)
    local_round.hello(site)
    entries = audit_log.read(site.directory / "audit.jsonl")
    assert [entry.action for entry in entries] == ["policy_read", "ledger_verified", "ledger_verified"]
    assert {entry.policy_id for entry in entries} == {site.policy.id}
