"""B2: the server dies at every phase, before, inside and after what it writes; the run that goes on ends the same.

Every case plays the real loop in a fork that ends itself without cleaning up (`os._exit`), then resumes it here. The
professional is an HTTP endpoint of this process, which counts what it is asked: a prompt paid twice would be seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from fl_app import disk, journal
from fl_app.errors import RunInvalid
from simulations import launch
from simulations.local_grid import LocalGrid
from strategies.checkpoint import Checkpoint
from strategies.distillers import endpoint
from strategies.knowledge import Knowledge
from tests.workplace import at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from simulations.launch import Prepared

ROUND = 2
KILLED = 137
COMMITTED = ("validate", "aggregate", "synthesise", "filter", "distil", "tune", "publish")
PHASES = ("open", "dispatch", *COMMITTED)
POINTS = ("before", "inside", "after")
SMALL = (
    "run.rounds=2",
    'simulation.partition={kind="iid", sites=2}',
    "simulation.max_rows_per_site=20",
    "simulation.policy.epsilon=2.0",
    "simulation.policy.min_noise_multiplier=2.0",
    "simulation.policy.max_noise_multiplier=2.0",
    "client.learner.steps=1",
    "client.probe.items=0",
    "server.synthesizer.drafts=4",
    "server.synthesizer.max_new_tokens=8",
    "server.exam.choice_items=2",
    "server.exam.free_items=0",
    "server.tuner.learning_rate=0.02",
)


class _Professional(ThreadingHTTPServer):
    """An endpoint that answers every prompt with a sentence made from it, and remembers who asked what."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Answer(BaseHTTPRequestHandler):
    server: _Professional

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        self.server.asked.append(prompt)
        said = f"Rest {hashlib.sha256(prompt.encode()).hexdigest()[:6]} days."
        reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}], "usage": {"total_tokens": 9}}
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def professional() -> Iterator[_Professional]:
    with _Professional() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("workplace")
    with at(place):
        yield place


def _prepare(name: str, professional: _Professional) -> Prepared:
    distiller = (
        f'server.distiller={{kind="endpoint", base_url="{professional.address}", model="m", max_total_tokens=100000, '
        "max_concurrency=1, max_tokens=8}"
    )
    return launch.prepare("configs/smoke.toml", "\n".join((*SMALL, distiller)), run=name)


@pytest.fixture(scope="module")
def whole(professional: _Professional) -> tuple[Path, dict[str, Any], list[str]]:
    """The run that nobody stopped: its directory, its summary, and what its professional was asked."""
    prepared = _prepare("whole", professional)
    summary = launch.play(prepared)
    asked = list(professional.asked)
    assert len(asked) == len(set(asked)) >= 4
    return prepared.directory, summary, asked


def _die() -> None:
    os._exit(KILLED)


def _killed_at_commit(patch: pytest.MonkeyPatch, number: int, phase: str, point: str) -> None:
    commit = Checkpoint.commit

    def deadly(self: Checkpoint, one: int, name: str, **more: Any) -> Any:
        here = (one, name) == (number, phase)
        if here and point == "before":
            _die()
        done = commit(self, one, name, **more)
        if here:
            _die()
        return done

    patch.setattr(Checkpoint, "commit", deadly)


def _killed_inside_a_write(patch: pytest.MonkeyPatch, ending: str) -> None:
    """Die with half of a file written beside its place; `ending` is how the path of the file ends."""
    replace = disk.replace

    def torn(path: Path, content: bytes) -> None:
        if str(path).endswith(ending):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.torn").write_bytes(content[: len(content) // 2])
            _die()
        replace(path, content)

    patch.setattr(disk, "replace", torn)


def _killed_between_prompts(patch: pytest.MonkeyPatch) -> None:
    """Die with one answer kept and the next half written; its prompt has been paid for, so it must not have gone out.

    A request that was under way when the process died cannot be unpaid: at most `max_concurrency` of them, by design.
    """
    ask = endpoint.EndpointDistiller._ask
    done: list[str] = []

    def deadly(self: Any, client: Any, key: str, *rest: Any) -> None:
        if any(f"rounds/{ROUND}" in one for one in done):
            _die()
        ask(self, client, key, *rest)
        done.append(f"rounds/{_round_of(self)}")

    patch.setattr(endpoint.EndpointDistiller, "_ask", deadly)


def _round_of(stage: Any) -> int:
    """Return the round that is being played, from what is committed beside the answers."""
    return sum((stage.cache.parent / "rounds" / str(n) / "done" / "filter.json").is_file() for n in (1, 2))


def _killed_in_dispatch(patch: pytest.MonkeyPatch, point: str) -> None:
    push, answer, wave = LocalGrid.push_messages, LocalGrid._answer, Knowledge._wave
    seen: Counter[str] = Counter()

    def of_round(message: Any) -> bool:
        told = message.metadata
        return told.message_type == "train" and told.group_id == str(ROUND)

    def deadly_push(self: LocalGrid, messages: Any) -> Any:
        sent = list(messages)
        if point == "before" and any(map(of_round, sent)):
            _die()
        return push(self, sent)

    def deadly_answer(self: LocalGrid, message: Any) -> Any:
        if point == "inside" and of_round(message):
            seen["train"] += 1
            if seen["train"] == 2:  # the first site has trained and answered
                _die()
        return answer(self, message)

    def deadly_wave(self: Knowledge, grid: Any, phase: str, number: int, messages: Any) -> Any:
        done = wave(self, grid, phase, number, messages)
        if point == "after" and (phase, number) == ("train", ROUND):
            _die()
        return done

    patch.setattr(LocalGrid, "push_messages", deadly_push)
    patch.setattr(LocalGrid, "_answer", deadly_answer)
    patch.setattr(Knowledge, "_wave", deadly_wave)


INSIDE: dict[str, str] = {
    "open": "digest.txt",
    "validate": f"rounds/{ROUND}/releases/site-1/adapter_model.safetensors",
    "aggregate": f"rounds/{ROUND}/merged/adapter_config.json",
    "synthesise": f"rounds/{ROUND}/drafts.jsonl",
    "filter": f"rounds/{ROUND}/screened.json",
    "tune": f"rounds/{ROUND}/target/adapter_model.safetensors",
    "publish": "runs/{run}/target/adapter_model.safetensors",
}


def _arrange(patch: pytest.MonkeyPatch, run: str, phase: str, point: str) -> None:
    if phase == "dispatch":
        _killed_in_dispatch(patch, point)
    elif phase == "distil" and point == "inside":
        _killed_between_prompts(patch)
    elif point != "inside":
        _killed_at_commit(patch, 0 if phase == "open" else ROUND, phase, point)
    elif phase == "publish":
        _killed_at_target_of_round(patch, INSIDE[phase].format(run=run))
    else:
        _killed_inside_a_write(patch, INSIDE[phase])


def _killed_at_target_of_round(patch: pytest.MonkeyPatch, ending: str) -> None:
    """The newest target is written in every round; die in this one, with the record written and the target torn."""
    replace = disk.replace

    def watched(path: Path, content: bytes) -> None:
        replace(path, content)
        if str(path).endswith(f"rounds/{ROUND}/record.json"):
            _killed_inside_a_write(patch, ending)

    patch.setattr(disk, "replace", watched)


def _in_a_fork(work: Callable[[], object]) -> int:
    """Return the exit status of a process of its own that does this work."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _artefacts(directory: Path) -> dict[str, str]:
    """Return the hash of every artefact of a run: adapters, drafts, verdicts, lessons, receipts."""
    names = {"drafts.jsonl", "lessons.jsonl", "screened.json", "receipts.json"}
    files = [path for path in directory.rglob("*") if path.name in names or path.name.startswith("adapter_")]
    return {str(path.relative_to(directory)): journal.file_sha256(path) for path in files}


@pytest.mark.bar("B2")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_ends_as_if_nobody_had_killed_it(
    phase: str, point: str, professional: _Professional, whole: tuple[Path, dict[str, Any], list[str]]
) -> None:
    reference, expected, asked = whole
    name = f"{phase}-{point}"
    prepared = _prepare(name, professional)
    professional.asked.clear()

    with pytest.MonkeyPatch.context() as patch:
        _arrange(patch, name, phase, point)
        status = _in_a_fork(lambda: launch.play(prepared))
    assert status == KILLED
    summary = launch.play(launch.resume(prepared.directory))

    assert summary["hashes"] == expected["hashes"]
    assert _artefacts(prepared.directory) == _artefacts(reference)
    assert (summary["exam"], summary["epsilon"]) == (expected["exam"], expected["epsilon"])
    assert sorted(professional.asked) == sorted(asked)  # every prompt once: none lost, none paid twice
    for site in prepared.federation.sites:
        kinds = Counter(
            json.loads(line)["kind"] for line in (site.directory / "ledger" / "ledger.jsonl").read_text().splitlines()
        )
        assert (kinds["reserve"], kinds["commit"]) == (2, 2)  # one release a round, however often it was asked for
    assert len(_repeated(prepared.directory)) <= 1


def _repeated(directory: Path) -> set[tuple[int, str]]:
    """Return the phases that began more than once; a wave and the look at what it brought are one."""
    events = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    begun = Counter((event["round"], event["phase"]) for event in events if event["event"] == "phase_started")
    begun.pop((0, "broadcast"), None)
    return {(number, "train" if phase == "validate" else phase) for (number, phase), n in begun.items() if n > 1}


# --- what a run that goes on refuses


def _stopped(name: str, professional: _Professional) -> Prepared:
    prepared = _prepare(name, professional)
    with pytest.MonkeyPatch.context() as patch:
        _arrange(patch, name, "tune", "before")
        assert _in_a_fork(lambda: launch.play(prepared)) == KILLED
    return prepared


@pytest.fixture(scope="module")
def stopped(professional: _Professional) -> Prepared:
    return _stopped("stopped", professional)


def test_an_artefact_that_was_changed_is_not_gone_on_from(stopped: Prepared) -> None:
    drafts = stopped.directory / "rounds" / "1" / "drafts.jsonl"
    before = drafts.read_bytes()
    try:
        drafts.write_bytes(before.replace(b'"round": 1', b'"round": 3', 1))
        with pytest.raises(RunInvalid, match=r"drafts\.jsonl is not what synthesise of round 1 made; restore it"):
            launch.play(launch.resume(stopped.directory))
        drafts.unlink()
        with pytest.raises(RunInvalid, match=r"drafts\.jsonl is gone, and synthesise of round 1 was done"):
            launch.play(launch.resume(stopped.directory))
    finally:
        drafts.write_bytes(before)


def test_a_phase_that_was_replaced_is_not_gone_on_from(stopped: Prepared) -> None:
    done = stopped.directory / "rounds" / "1" / "done" / "filter.json"
    before = done.read_text()
    try:
        entry = json.loads(before)
        done.write_text(json.dumps({**entry, "value": {**entry["value"], "kept": []}}))
        with pytest.raises(RunInvalid, match=r"distil\.json belongs behind another past than this run's"):
            launch.play(launch.resume(stopped.directory))
        done.write_text("{")
        with pytest.raises(RunInvalid, match=r"filter\.json cannot be read"):
            launch.play(launch.resume(stopped.directory))
    finally:
        done.write_text(before)


def test_another_configuration_does_not_go_on(stopped: Prepared) -> None:
    told = stopped.directory / launch.LAUNCH
    before = told.read_text()
    try:
        entry = json.loads(before)
        told.write_text(json.dumps({**entry, "overrides": entry["overrides"] + "\nserver.tuner.epochs=2"}))
        with pytest.raises(RunInvalid, match=r"holds a run of another configuration .* resume it with the config"):
            launch.play(launch.resume(stopped.directory))
    finally:
        told.write_text(before)


def test_two_processes_do_not_play_one_run(stopped: Prepared) -> None:
    digest = (stopped.directory / "digest.txt").read_text().strip()
    holder = Checkpoint(stopped.directory, run="stopped", config_digest=digest)
    try:
        with pytest.raises(RunInvalid, match="another process plays the run"):
            launch.play(launch.resume(stopped.directory))
    finally:
        holder.close()


def test_a_run_without_sites_cannot_go_on(stopped: Prepared) -> None:
    told = stopped.directory / launch.LAUNCH
    before = told.read_text()
    try:
        told.write_text(json.dumps({**json.loads(before), "sites": str(stopped.directory / "nowhere")}))
        with pytest.raises(RunInvalid, match=r"sites of this run are gone: .*nowhere; restore them"):
            launch.resume(stopped.directory)
    finally:
        told.write_text(before)


def test_a_run_that_is_complete_or_unknown_does_not_go_on(
    whole: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(RunInvalid, match="is complete; nothing is left to do"):
        launch.resume(whole[0])
    with pytest.raises(RunInvalid, match=r"holds no launch\.json"):
        launch.resume(tmp_path)
    assert launch.main(["--resume", str(tmp_path)]) == 2
