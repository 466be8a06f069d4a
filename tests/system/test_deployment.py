"""A real deployment on loopback: the run in process bit for bit, whoever is killed on the way; slow.

One deployment for all of it. Runs take minutes: each message to a site is a new process that imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fl_app.journal import read_lines
from fl_app.origin import ROOT
from simulations import launch
from simulations.deployment import bundle, smoke
from simulations.deployment.loopback import Loopback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulations.launch import Prepared

pytestmark = pytest.mark.slow

MARK = "STILLROOM_TEST_DEPLOYMENT"


def marked(mark: str) -> list[int]:
    """Return every other process that inherited this test's mark in its environment."""
    found: list[int] = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes() and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def none_left(mark: str) -> list[int]:
    deadline = time.monotonic() + 15
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@dataclass(frozen=True)
class Played:
    """A deployment in which one run has ended, what the same run gave in process, and the mark of its processes."""

    deployment: Loopback
    prepared: Prepared
    expected: dict[str, Any]
    mark: str

    def journal(self, directory: Path) -> list[dict[str, Any]]:
        path = directory / "journal.jsonl"
        return list(read_lines(path)) if path.is_file() else []

    def trainings(self, directory: Path) -> int:
        """Return how many waves of training a run has sent out."""
        told = [(line["event"], line.get("phase")) for line in self.journal(directory)]
        return told.count(("phase_started", "train"))

    def await_training(self, directory: Path, more_than: int = 0) -> None:
        """Wait until the next wave of training is out, and a little, so that sites are at it."""
        deadline = time.monotonic() + 300
        while self.trainings(directory) <= more_than:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(4)

    def kill_app(self, program: str) -> None:
        """Kill the one process that runs `program`; it was started by a SuperExec."""
        command = {pid: (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in marked(self.mark)}
        (found,) = [pid for pid, words in command.items() if program.encode() in words]
        os.kill(found, signal.SIGKILL)

    def kill(self, name: str) -> None:
        """Kill a process the hard way; what it started has to notice by itself."""
        process = self.deployment.processes.pop(name)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("deployment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        yield place


@pytest.fixture(scope="module")
def played(workplace: Path) -> Iterator[Played]:
    """A run that loses all of the server's side once: first its own app, then, begun again, SuperLink and gate."""
    mark = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        expected = launch.play(smoke.prepare(workplace, "in-process"))
        prepared = smoke.prepare(workplace, "deployed")
        with Loopback(workplace / "deployment") as deployment:
            deployment.start()
            for site in prepared.federation.sites:
                deployment.add_node(site.directory.name, site.directory)
            deployment.await_nodes()
            deployment.sign(ROOT)
            made = Played(deployment=deployment, prepared=prepared, expected=expected, mark=mark)
            deployment.operator.submit(ROOT, smoke.run_config(prepared))
            made.await_training(prepared.directory)
            made.kill_app("flwr-serverapp")
            seen = made.trainings(prepared.directory)
            run_id = deployment.operator.submit(ROOT, smoke.run_config(prepared))
            made.await_training(prepared.directory, more_than=seen)
            for name in ("superlink", "gate"):
                made.kill(name)
            time.sleep(3)
            deployment.start_link()
            deployment.start_gate()
            done = prepared.directory / "summary.json"
            deployment.operator.wait(run_id, timeout_s=smoke.RUN_S, hint=done.is_file)
            yield made
    assert none_left(mark) == []


def test_whatever_is_killed_at_the_server_the_run_is_the_one_in_process(played: Played) -> None:
    """Process isolation and a database: server's app and nodes wait for a SuperLink that died. A run whose own app died
    is begun again with the same words: sites that had answered answer from their outbox, and nobody pays twice.
    """
    found = launch.read_summary(played.prepared.directory)
    assert found["lessons"] > 0
    smoke.check_same(played.expected, found)
    assert smoke.check_ledgers(played.prepared) == {"0": 2, "1": 2, "2": 2}


def test_the_bundle_ran_and_not_the_checkout(played: Played) -> None:
    """Every process that ran an app unpacked the signed bundle, and the checkout is on nobody's path."""
    homes = played.deployment.folder / "homes"
    fab_hash = bundle.digest(bundle.build(ROOT))
    for name in ("superexec", "0-superexec", "1-superexec", "2-superexec"):
        assert [path.name[-8:] for path in (homes / name / "apps").iterdir() if path.is_dir()] == [fab_hash[:8]]
        assert str(ROOT / "fl_app") not in (played.deployment.logs / f"{name}.log").read_text(encoding="utf-8")


def test_the_sites_rows_are_in_no_log_of_the_server_and_not_in_its_database(played: Played) -> None:
    places = [played.deployment.logs / f"{name}.log" for name in ("superlink", "superexec", "gate")]
    places += [path for path in played.deployment.folder.glob("link.db*") if path.is_file()]
    held = b"".join(path.read_bytes() for path in places)
    rows = [row for site in played.prepared.federation.sites for row in read_lines(site.directory / "rows.jsonl")]
    assert rows
    assert [row["id"] for row in rows if str(row["instruction"]).encode() in held] == []


def test_a_killed_supernode_costs_its_round_alone_and_sites_answer_from_their_outbox(played: Played) -> None:
    """The same run again, into another directory: nothing is trained twice, and a site may die meanwhile.

    Without that site the first round leads elsewhere, so the second asks what was never answered under this name, and
    the sites say so instead of sending what they answered then.
    """
    deployment, prepared = played.deployment, played.prepared
    before = {s.directory: (s.directory / "ledger" / "ledger.jsonl").read_bytes() for s in prepared.federation.sites}
    directory = prepared.directory.with_name("again")
    config = smoke.run_config(prepared)
    config["overrides"] = config["overrides"].replace(str(prepared.directory), str(directory))
    run_id = deployment.operator.submit(ROOT, config)
    played.await_training(directory)
    played.kill("0-supernode")
    killed = time.monotonic()
    with pytest.raises(launch.RoundFailed, match=r"refused: site-1: policy, site-2: policy; .*silent: site-0"):
        deployment.operator.wait(run_id, timeout_s=smoke.RUN_S, hint=(directory / "summary.json").is_file)

    found = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert found["status"] == "failed"
    assert set(found["rounds"][0]["used"]) == {"site-1", "site-2"}
    for site in ("site-1", "site-2"):
        key = f"round_1/releases/{site}"
        assert found["hashes"][key] == played.expected["hashes"][key]
    for place, ledger in before.items():
        assert (place / "ledger" / "ledger.jsonl").read_bytes() == ledger

    # the server holds it for online for a minute; then the same key is let in again
    time.sleep(max(0.0, killed + 65 - time.monotonic()))
    node = deployment.nodes["0"]
    deployment.end("0-superexec")
    deployment.start_node(node)
    deployment.await_nodes()
    assert deployment.processes["0-supernode"].poll() is None


def test_a_smoke_that_is_interrupted_leaves_nobody(tmp_path: Path) -> None:
    """Interrupted while the nodes come up."""
    mark = uuid.uuid4().hex
    env = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-m", "simulations.deployment.smoke"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("stillroom-deploy-*/deployment/logs/*-supernode.log")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(marked(mark)) > 3
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert none_left(mark) == []
    assert list(tmp_path.glob("stillroom-deploy-*")) == []


def test_the_command_prints_its_figures_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"kind": "deploy_smoke", "status": "completed"}
    monkeypatch.setattr(smoke, "smoke", lambda _folder, *, record: {**figures, "recorded": record})
    assert smoke.main(["--record"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {**figures, "recorded": True}


def test_a_difference_is_a_failure(played: Played) -> None:
    """The comparison of the smoke can fail: one hash, one score."""
    other = json.loads(json.dumps(played.expected))
    other["hashes"]["round_2/target"] = "0" * 64
    with pytest.raises(launch.RoundFailed, match=r"differs .* in hashes \['round_2/target'\]"):
        smoke.check_same(played.expected, other)
    with pytest.raises(launch.RoundFailed, match=r"differs .* in lessons"):
        smoke.check_same(played.expected, {**played.expected, "lessons": 0})
