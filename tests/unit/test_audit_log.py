"""The audit log: on disk before anybody acts on it, and not to be changed, moved, removed or cut unseen."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tomllib
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import audit_log
from fl_app.audit_log import AuditLog, read, verify
from fl_app.errors import AuditBroken, DiskFull
from fl_app.hash_chain import NO_LINE, seal
from fl_app.origin import ROOT

HASH = "ab" * 32
ACTIONS = ("run_seen", "reserved", "trained", "outbox", "committed", "sent")


def written(folder: Path, events: int = 6) -> tuple[Path, str]:
    """Return a log of so many events, and its head."""
    path = folder / "audit.jsonl"
    log, head = AuditLog(path, "site"), NO_LINE
    for number in range(events):
        head = log.append(ACTIONS[number % 6], run="run-a", round=number, object_sha256=HASH, ledger_seq=number)
    return path, head


def test_an_event_says_who_when_and_what(tmp_path: Path) -> None:
    summer = timezone(timedelta(hours=2))
    log = AuditLog(tmp_path / "a.jsonl", "system", lambda: datetime(2030, 1, 1, 1, 2, 3, 4_000, tzinfo=summer))
    head = log.append(
        "refused", run="run-a", round=2, policy_id=HASH, ledger_seq=7, outcome="refused", code="budget_spent"
    )
    (line,) = (tmp_path / "a.jsonl").read_text(encoding="ascii").splitlines()
    assert json.loads(line) == {
        "seq": 0,
        "ts": "2029-12-31T23:02:03.004Z",
        "prev": NO_LINE,
        "hash": head,
        "actor": "system",
        "action": "refused",
        "run": "run-a",
        "round": 2,
        "object_sha256": "",
        "policy_id": HASH,
        "ledger_seq": 7,
        "outcome": "refused",
        "code": "budget_spent",
        "software": audit_log.SOFTWARE,
    }
    assert log.last() == read(tmp_path / "a.jsonl")[0]


def test_time_is_now_in_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    path, _ = written(tmp_path, 1)
    stamp = datetime.fromisoformat(read(path)[0].ts)
    assert before - timedelta(milliseconds=1) <= stamp <= datetime.now(UTC)


def test_the_software_is_the_one_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"{project['name']} {project['version']}" == audit_log.SOFTWARE


def test_each_event_follows_the_one_before(tmp_path: Path) -> None:
    path, head = written(tmp_path)
    entries = read(path)
    assert [entry.action for entry in entries] == list(ACTIONS)
    assert [entry.seq for entry in entries] == list(range(6))
    assert [entry.prev for entry in entries] == [NO_LINE, *(entry.hash for entry in entries[:-1])]
    assert verify(path) == head == entries[-1].hash
    for entry in entries:
        assert verify(path, entry.hash) == head
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_an_event_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced, sync = tmp_path / "audit.jsonl", [], os.fsync

    def watch(descriptor: int) -> None:
        sync(descriptor)
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append(place.read_bytes() if place.is_file() else place)

    monkeypatch.setattr(audit_log.os, "fsync", watch)
    AuditLog(path, "site").append("reserved")
    assert synced == [tmp_path, path.read_bytes()]  # its name, then its line


@pytest.mark.parametrize(
    "change",
    [
        {"action": "trained on Wilhelmina"},
        {"action": ""},
        {"action": "Trained"},
        {"code": "KeyError: 'Wilhelmina'"},
        {"outcome": "12 rows"},
        {"object_sha256": "Wilhelmina"},
        {"policy_id": "ab" * 31},
    ],
)
def test_text_has_no_place(tmp_path: Path, change: dict[str, Any]) -> None:
    asked = {"action": "trained"} | change
    with pytest.raises(ValueError, match="audit"):
        AuditLog(tmp_path / "audit.jsonl", "site").append(asked.pop("action"), **asked)
    assert not (tmp_path / "audit.jsonl").exists()


def test_a_run_s_name_is_kept_short_and_on_its_line(tmp_path: Path) -> None:
    """It is the one text that comes from elsewhere."""
    path = tmp_path / "audit.jsonl"
    AuditLog(path, "site").append("run_seen", run="\n\x1b[31m\ud800é" * 99)
    assert len(path.read_bytes().splitlines()) == 1
    assert path.read_bytes().isascii()
    assert len(read(path)[0].run) == audit_log.MAX_RUN


# --- what was tampered with


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_change_is_detected(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A byte changed, removed or added; lines removed, moved or repeated; the end cut: each with the head kept."""
    path, head = written(tmp_path_factory.mktemp("log"))
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kind = data.draw(st.sampled_from(["flip", "delete", "insert", "drop", "swap", "repeat", "cut", "cut lines"]))
    place = data.draw(st.integers(0, len(content) - 1))
    line = data.draw(st.integers(0, len(lines) - 1))
    match kind:
        case "flip":
            changed = bytearray(content)
            changed[place] ^= data.draw(st.integers(1, 255))
        case "delete":
            changed = content[:place] + content[place + 1 :]
        case "insert":
            changed = content[:place] + data.draw(st.binary(min_size=1, max_size=3)) + content[place:]
        case "drop":
            changed = b"".join([*lines[:line], *lines[line + 1 :]])
        case "swap":
            other = data.draw(st.integers(0, len(lines) - 1).filter(lambda n: n != line))
            lines[line], lines[other] = lines[other], lines[line]
            changed = b"".join(lines)
        case "repeat":
            changed = b"".join([*lines[: line + 1], *lines[line:]])
        case "cut":
            changed = content[:place]
        case _:
            changed = b"".join(lines[:line])
    path.write_bytes(changed)
    with pytest.raises(AuditBroken):
        verify(path, head)
    path.write_bytes(content)
    assert verify(path, head) == head  # the twin: untouched, it is whole


def test_the_first_bad_seq_is_named(tmp_path: Path) -> None:
    path, head = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for number in range(6):
        path.write_bytes(b"".join([*lines[:number], lines[number].replace(b"run-a", b"run-b"), *lines[number + 1 :]]))
        with pytest.raises(AuditBroken, match=rf"seq {number} was changed"):
            verify(path)
        path.write_bytes(b"".join([*lines[:number], *lines[number + 1 :]]))
        with pytest.raises(AuditBroken, match=rf"seq {number} does not follow|does not contain head"):
            verify(path, head)


def test_a_line_sealed_anew_breaks_the_next(tmp_path: Path) -> None:
    """Whoever changes a line and its hash has to change all that follow, and then the head is another."""
    path, head = written(tmp_path)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines[2]["code"] = "hidden"
    for number, line in enumerate(lines[2:], start=2):
        path.write_bytes(b"".join(seal({k: v for k, v in one.items() if k != "hash"}) for one in lines))
        with pytest.raises(AuditBroken, match="does not follow" if number < 5 else "does not contain head"):
            verify(path, head)
        line.pop("hash")
        seal(line)
        if number < 5:
            lines[number + 1]["prev"] = line["hash"]
    verify(path)  # and without the head nobody can tell


def test_a_cut_at_a_line_is_seen_with_a_head_alone(tmp_path: Path) -> None:
    path, head = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    verify(path)
    with pytest.raises(AuditBroken, match=rf"ends at seq 3 and does not contain head {head}"):
        verify(path, head)


def test_other_fields_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path, 1)
    line = json.loads(path.read_bytes())
    line.pop("hash")
    path.write_bytes(seal({**line, "note": "x"}))
    with pytest.raises(AuditBroken, match="seq 0 has other fields"):
        read(path)


def test_no_log_is_no_empty_log(tmp_path: Path) -> None:
    with pytest.raises(AuditBroken, match="no audit log can be read"):
        verify(tmp_path / "audit.jsonl")
    assert AuditLog(tmp_path / "audit.jsonl", "site").last() is None


# --- crashes, company and trouble


@pytest.mark.parametrize("events", [0, 1, 3])
def test_a_torn_line_is_removed_and_said(tmp_path: Path, events: int) -> None:
    path, _ = written(tmp_path, events + 1)
    content = path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(start + 1, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(AuditBroken, match=rf"seq {events} is torn"):
            verify(path)
        AuditLog(path, "site").append("ledger_verified")
        entries = read(path)
        assert [entry.action for entry in entries][events:] == ["recovered", "ledger_verified"]
        assert entries[events].outcome == "torn_line"


def test_a_last_line_that_was_changed_stops_all_writing(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"sent"', b'"kept"'))
    for touch in (lambda: AuditLog(path, "site").append("sent"), lambda: AuditLog(path, "site").last()):
        with pytest.raises(AuditBroken, match=r"last line was changed"):
            touch()


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AuditBroken, match="nothing is done off the record"):
        AuditLog(tmp_path / "no" / "audit.jsonl", "site").append("sent")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit_log.os, "write", full)
    with pytest.raises(DiskFull, match=r"No space left.* bytes needed.*free some space"):
        AuditLog(tmp_path / "audit.jsonl", "site").append("sent")
    assert (tmp_path / "audit.jsonl").read_bytes() == b""


def _write_twenty(path: Path) -> None:
    for _ in range(20):
        AuditLog(path, "site").append("sent")


def test_eight_processes_write_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_twenty, args=(tmp_path / "audit.jsonl",)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert len(read(tmp_path / "audit.jsonl")) == 160


def test_a_line_longer_than_a_block_is_found_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_BLOCK", 7)
    path, head = written(tmp_path)
    found = AuditLog(path, "site").last()
    assert found is not None
    assert found.hash == head
    assert re.fullmatch("[0-9a-f]{64}", head)
