"""The same run through Flower's own door: a SuperLink, `flwr run`, Ray actors; slow.

What it must be: bit for bit the run in process, whatever the number of workers; loud when it fails; gone afterwards.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from simulations import launch

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

SMALL = (
    'simulation.partition={kind="iid", sites=2}',
    "simulation.max_rows_per_site=30",
    "simulation.policy.epsilon=2.0",
    "simulation.policy.min_noise_multiplier=0.8",
    "simulation.policy.max_noise_multiplier=5.0",
    "client.learner.steps=1",
    "server.synthesizer.drafts=6",
    "server.synthesizer.max_new_tokens=12",
    "server.filters=[]",
    "server.distiller.max_new_tokens=8",
    "server.exam.choice_items=3",
    "server.exam.free_items=2",
    "server.exam.max_new_tokens=2",
)
MARK = "STILLROOM_TEST_RUN"


def _marked(mark: str) -> list[int]:
    """Return every other process that inherited this test's mark in its environment."""
    found: list[int] = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes() and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def _none_left(mark: str) -> list[int]:
    """Return who is still there after a grace of ten seconds: a process that was ended takes a moment to go."""
    deadline = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """A word in the environment of whatever these tests start, which no process can lose."""
    value = uuid.uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, value)
        yield value


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own instead of build/, runs/ and the system's temporary one."""
    place = tmp_path_factory.mktemp("workplace")
    (place / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        patch.setattr(tempfile, "tempdir", str(place / "tmp"))
        yield place


def _on_ray(name: str, workers: int, *, sites: Path | None = None) -> launch.Prepared:
    overrides = (*SMALL, 'simulation.grid="ray"', f"simulation.workers={workers}")
    return launch.prepare("configs/smoke.toml", "\n".join(overrides), run=name, sites=sites)


@pytest.fixture(scope="module")
def in_process(workplace: Path, mark: str) -> dict[str, Any]:
    return launch.play(launch.prepare("configs/smoke.toml", "\n".join(SMALL), run="in-process"))


@pytest.fixture(scope="module")
def ray_home(workplace: Path, in_process: dict[str, Any]) -> Path:
    """The sites of a finished run on two workers."""
    prepared = _on_ray("ray-2", 2)
    launch.play(prepared)
    return prepared.federation.root


def test_the_scan_finds_what_is_there(mark: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            deadline = time.monotonic() + 10
            while child.pid not in _marked(mark) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert child.pid in _marked(mark)
        finally:
            child.kill()
    assert child.pid not in _marked(mark)


def test_ray_with_two_workers_gives_the_run_in_process(
    in_process: dict[str, Any], ray_home: Path, workplace: Path, mark: str
) -> None:
    summary = launch.read_summary(workplace / "runs" / "ray-2")

    assert in_process["lessons"] > 0
    assert summary["hashes"] == in_process["hashes"]
    assert summary["exam"] == in_process["exam"]
    assert summary["epsilon"] == in_process["epsilon"]
    assert _none_left(mark) == []
    assert list((workplace / "tmp").glob("stillroom-flower-*")) == []


def test_ray_with_one_worker_gives_it_too(in_process: dict[str, Any], mark: str) -> None:
    summary = launch.play(_on_ray("ray-1", 1))

    assert summary["hashes"] == in_process["hashes"]
    assert _none_left(mark) == []


def test_a_run_that_fails_on_ray_exits_1_and_leaves_nothing(ray_home: Path, workplace: Path, mark: str) -> None:
    """The sites have spent their budgets; `flwr run` itself would exit 0."""
    overrides = (*SMALL, 'simulation.grid="ray"', "simulation.workers=2")
    words = ["--config", "configs/smoke.toml", "--run", "spent", "--sites", str(ray_home)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = launch.main([*words, *(word for item in overrides for word in ("--override", item))])

    assert code == 1
    assert "RoundFailed: round 1: 0 of 2 sites sent a sound upload" in err.getvalue()
    assert "budget_spent" in err.getvalue()
    assert out.getvalue().splitlines()[-1] == str(workplace / "runs" / "spent")
    assert _none_left(mark) == []
    assert list((workplace / "tmp").glob("stillroom-flower-*")) == []


def test_a_server_that_cannot_begin_on_ray_exits_1_and_says_where_the_reason_is(workplace: Path, mark: str) -> None:
    """The server app raises before the first round, so there is no summary, only Flower's log."""
    overrides = (*SMALL, 'simulation.grid="ray"', 'server.exam.path="nowhere.jsonl"')
    words = ["--config", "configs/smoke.toml", "--run", "no-exam"]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = launch.main([*words, *(word for item in overrides for word in ("--override", item))])

    log = workplace / "runs" / "no-exam" / "flower.log"
    assert code == 1
    assert f"RoundFailed: the run ended without a summary; the reason is at the end of {log}" in err.getvalue()
    assert "server.exam.path: no file at" in log.read_text(encoding="utf-8")
    assert _none_left(mark) == []
