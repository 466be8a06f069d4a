"""B10, soak: hundreds of rounds in one process, after which nothing has grown that should not have.

The real strategy, wire, site, ledger and journal, over the in-process grid, with a model that knows nothing. In the
long runs the stages that only compute say the same every time; in another every stage is the real one.
"""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord

from fl_app import client_app, journal, lora, peft_files
from fl_app.config import read_tree, shared
from fl_app.types import Draft, Lesson, LoraFactors, Origin
from simulations import launch
from simulations.local_grid import LocalGrid
from strategies.config import build_pipeline, read_server
from strategies.knowledge import Knowledge
from tests.faults.writer import Writer

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.types import Adapter

bar = pytest.mark.bar("B10")
SLOW = pytest.mark.slow
ROUNDS, WARM = 500, 50
SHAPES = 150
"""Rounds until real stages have met every shape of batch: kernels are prepared and kept for each. Measured: resident
memory goes from 590 to 747 MiB over the first 160 rounds and from there to 748 over another 140."""
SLOPE_MIB = 0.02
"""Resident memory a round may add after the first `WARM` (specs, B10)."""

SMALL = """
simulation.partition={kind="iid", sites=1}
simulation.max_rows_per_site=6
simulation.plant_share=0.0
simulation.policy.epsilon=50.0
simulation.policy.sample_rate=0.05
simulation.policy.min_noise_multiplier=50.0
simulation.policy.max_noise_multiplier=50.0
simulation.policy.max_rounds=1000
simulation.policy.max_tokens=8
client.learner.steps=1
client.probe.items=1
server.network.poll_s=0.001
server.professional.public_text=""
server.filters=[]
server.exam.choice_items=0
server.exam.free_items=0
"""


@dataclass
class Watch:
    """What the process and the run directory hold, round by round."""

    directory: Path
    rss_mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    disk: int = 0

    def look(self) -> None:
        gc.collect()
        if not self.rss_mib:
            gc.freeze()  # a million objects of libraries, which every later collection would go through again
        process = psutil.Process()
        self.rss_mib.append(process.memory_info().rss / 2**20)
        self.files.append(process.num_fds())
        self.threads.append(threading.active_count())
        self.cpu_s.append(time.process_time())

    def measure_disk(self) -> None:
        self.disk = sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())


def slope(values: list[float], every: int) -> float:
    """Return the growth per round of values taken every few rounds: the median of the slopes between all pairs.

    Source: Theil 1950 and Sen 1968; a page that the allocator takes once does not tilt it.
    """
    pairs = [(values[j] - values[i]) / ((j - i) * every) for i in range(len(values)) for j in range(i + 1, len(values))]
    return float(np.median(pairs))


class Still:
    """Stages that say the same every round; the tuner moves the target a little, as a real one does."""

    def synthesise(self, _adapter: Any, _rng: Any, number: int) -> list[Draft]:
        origin = Origin(round=number, method="m", code="c", stream="0")
        return [Draft(id=str(number), instruction=f"Ask {number}?", response="", origin=origin)]

    def distil(self, drafts: Any, _rng: Any) -> list[Lesson]:
        return [Lesson(draft_id=d.id, instruction=d.instruction, answer="Rest.", teacher="t") for d in drafts]

    def tune(self, adapter: Adapter, _lessons: Any, _rng: Any) -> Adapter:
        layers = {name: LoraFactors(a=one.a, b=one.b + np.float32(1e-4)) for name, one in adapter.layers.items()}
        return dataclasses.replace(adapter, layers=layers)


def soak(name: str, rounds: int, *more: str, still: bool, every: int) -> Watch:
    """Play that many rounds and look at the process every few of them."""
    prepared = launch.prepare("configs/smoke.toml", "\n".join([SMALL, f"run.rounds={rounds}", *more]), run=name)
    tree = read_tree(prepared.run_config["config"], prepared.run_config["overrides"])
    server = read_server(tree)
    pipeline = build_pipeline(tree, shared(tree), server, run=name)
    if still:
        stages = Still()
        pipeline.stages = dataclasses.replace(
            pipeline.stages, synthesizer=Writer(stages.synthesise), distiller=stages.distil, tuner=stages.tune
        )
    watch = Watch(directory=prepared.directory)
    event = pipeline.journal.event

    def heard(what: str, **fields: Any) -> None:
        event(what, **fields)
        if what == "round_finished" and fields["round"] % every == 0:
            watch.look()

    pipeline.journal.event = heard  # type: ignore[method-assign]
    grid = LocalGrid(client_app.app, nodes=1, run_config=prepared.run_config)
    replies = grid.replies
    pull = grid.pull_messages

    def forget(ids: Any) -> Any:
        found = pull(ids)
        replies.clear()  # the grid keeps them for tests to look at; a real one does not
        return found

    grid.pull_messages = forget  # type: ignore[method-assign]
    try:
        Knowledge(pipeline, server.network).start(grid, ArrayRecord())
    finally:
        gc.unfreeze()
    watch.measure_disk()
    return watch


@dataclass(frozen=True)
class Soaked:
    """A finished soak: what was seen after the warm-up, and what it may have taken on the disks."""

    watch: Watch
    every: int
    rounds: int
    room: int
    site: int
    site_room: int

    def after_warm(self, values: list[Any]) -> list[Any]:
        return values[WARM // self.every :]


def soaked(place: Path, rounds: int, *more: str, still: bool = True) -> Soaked:
    every = 5 if rounds < ROUNDS else 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        patch.setattr(os, "fsync", lambda _: None)  # no power fails here, and waiting for a disk tells nothing
        watch = soak("soak", rounds, *more, still=still, every=every)
    adapter = lora.num_bytes(peft_files.load(watch.directory / "target"))
    home = place / "build" / "sites" / "soak" / "0"
    return Soaked(
        watch=watch,
        every=every,
        rounds=rounds,
        room=journal.run_bytes(rounds=rounds, sites=1, adapter_bytes=adapter, text_bytes=4096),
        site=sum(path.stat().st_size for path in home.rglob("*") if path.is_file()),
        site_room=rounds * (adapter + journal.FILE_BYTES) + journal.FIXED_BYTES,
    )


@pytest.fixture(
    scope="module",
    params=[pytest.param((150, True), id="150 rounds"), pytest.param((ROUNDS, True), id="500 rounds", marks=SLOW)],
)
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Soaked:
    rounds, still = request.param
    return soaked(tmp_path_factory.mktemp("soak"), rounds, still=still)


@bar
def test_memory_does_not_grow(long: Soaked) -> None:
    seen = long.after_warm(long.watch.rss_mib)
    assert len(seen) >= 20
    assert slope(seen, long.every) < SLOPE_MIB, seen


@bar
def test_no_file_stays_open(long: Soaked) -> None:
    seen = long.after_warm(long.watch.files)
    assert max(seen) == min(seen), seen


@bar
def test_no_thread_stays(long: Soaked) -> None:
    seen = long.after_warm(long.watch.threads)
    assert max(seen) == min(seen), seen


@bar
def test_the_run_directory_keeps_what_it_says_and_no_more(long: Soaked) -> None:
    """Every round's releases, texts and target are kept, for the audit; that is all, and the estimate covers it."""
    assert long.room / 8 < long.watch.disk <= long.room
    rounds = [path.name for path in (long.watch.directory / "rounds").iterdir()]
    assert sorted(map(int, rounds)) == list(range(long.rounds + 1))  # 0 holds what came before the first


@bar
def test_a_site_keeps_its_releases_and_its_ledger_and_no_more(long: Soaked) -> None:
    assert long.site <= long.site_room


@bar
@pytest.mark.slow
def test_real_stages_leave_nothing_behind_either(tmp_path: Path) -> None:
    """Fewer rounds, each of which writes, filters, answers, tunes and examines."""
    more = (
        "server.synthesizer.drafts=2",
        "server.synthesizer.max_new_tokens=6",
        'server.filters=[{kind="near_duplicate"}]',
        "server.distiller.max_new_tokens=4",
        "server.tuner.epochs=1",
        "server.exam.choice_items=1",
        "server.exam.free_items=1",
        "server.exam.max_new_tokens=2",
    )
    found = soaked(tmp_path, SHAPES + 50, *more, still=False)
    assert slope(found.watch.rss_mib[SHAPES // found.every :], found.every) < 0.2
    for seen in (found.after_warm(found.watch.files), found.after_warm(found.watch.threads)):
        assert max(seen) == min(seen), seen


# --- the twins


def test_the_slope_is_that_of_a_line_with_jumps() -> None:
    rng = np.random.default_rng(0)
    rounds = np.arange(0, 450, 10)
    noise = rng.normal(0, 0.2, len(rounds)) + np.where(rounds > 200, 3.0, 0.0)  # one jump, as of a heap that grew
    assert slope(list(500 + 0.05 * rounds + 0.2 * rng.normal(size=len(rounds))), 10) == pytest.approx(0.05, abs=2e-3)
    assert slope(list(500 + noise * 0.3), 10) < SLOPE_MIB
    assert slope(list(500 + 0.03 * rounds), 10) > SLOPE_MIB


def test_a_leak_of_memory_files_or_threads_is_seen(tmp_path: Path) -> None:
    watch, stop = Watch(directory=tmp_path), threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(3)]
    kept: list[mmap.mmap] = []  # pages of its own: small objects would go where earlier tests have left room
    opened: list[Any] = []
    try:
        for number in range(12):
            kept.append(mmap.mmap(-1, 64 * mmap.PAGESIZE))
            kept[-1].write(os.urandom(64 * mmap.PAGESIZE))
            if number >= 9:
                opened.append((tmp_path / str(number)).open("w"))
                threads[number - 9].start()
            watch.look()
    finally:
        gc.unfreeze()
        stop.set()
        for one in (*kept, *opened):
            one.close()
    assert slope(watch.rss_mib, 1) > SLOPE_MIB
    assert (watch.files[-1] - watch.files[0], watch.threads[-1] - watch.threads[0]) == (3, 3)
