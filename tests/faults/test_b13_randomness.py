"""B13: a simulation is its seed and nothing else; a real site's noise is nobody's, whatever is seeded around it.

The production source has no seed, so two equal outcomes of 256 bits are the failure. Each claim has its twin: the same
question asked of the seeded source gives the opposite answer.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import local_round
from clients.config import read_client
from clients.local_round import Settings, Site
from fl_app import lora
from fl_app.config import shared
from fl_app.errors import DeploymentUnsafe
from fl_app.journal import STAMP
from fl_app.origin import ROOT
from fl_app.privacy import noise
from fl_app.types import AdapterRelease, Broadcast, PoissonGaussian, Refusal, Upload
from simulations import launch
from simulations.deployment import runs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.types import Adapter

CASE = pytest.mark.bar("B13")
SMALL = (
    'simulation.partition={kind="iid", sites=2}',
    "simulation.max_rows_per_site=30",
    "simulation.policy.epsilon=2.0",
    "simulation.policy.min_noise_multiplier=0.8",
    "simulation.policy.max_noise_multiplier=5.0",
    "run.rounds=1",
    "client.learner.steps=1",
    "server.synthesizer.drafts=6",
    "server.synthesizer.max_new_tokens=12",
    "server.filters=[]",
    "server.distiller.max_new_tokens=8",
    "server.exam.choice_items=3",
    "server.exam.free_items=2",
    "server.exam.max_new_tokens=2",
)
STEPS = 2


@pytest.fixture
def start(learned: Callable[[int], Adapter]) -> Adapter:
    return learned(5)


@pytest.fixture
def sites(site_folder: Any, tmp_path: Path) -> Callable[[str], Callable[[], Site]]:
    """Return a function: a mode -> a maker of fresh copies of one site that serves it."""

    def serving(mode: str) -> Callable[[], Site]:
        site_folder.policy(limits={"simulation": mode == "simulation"})
        plain = tmp_path / f"plain-{mode}"
        shutil.copytree(site_folder.directory, plain)

        def fresh() -> Site:
            copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
            shutil.copytree(plain, copy)
            return Site(directory=copy)

        return fresh

    return serving


def asked(site: Site, adapter: Adapter, *, mode: str, seed: int = 3, steps: int = STEPS) -> Upload | Refusal:
    """Return what a site answers to round 1 of a run."""
    tree: dict[str, Any] = {
        "run": {"rounds": 2, "mode": mode, "seed": seed},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": steps}},
    }
    told = Settings(shared=shared(tree), asked=read_client(tree))
    message = Broadcast(run="run", round=1, adapter=adapter, config_digest="d")
    return local_round.guarded(site, "run", 1, lambda: local_round.train(site, message, told))


def released(site: Site, adapter: Adapter, **more: Any) -> str:
    """Return the hash of what a site releases in round 1."""
    answer = asked(site, adapter, **more)
    assert isinstance(answer, Upload), answer
    assert isinstance(answer.release, AdapterRelease)
    return lora.sha256(answer.release.adapter)


def seed_everything(value: int) -> None:
    """Seed every generator that a process has for all."""
    import torch

    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - what must not matter
    torch.manual_seed(value)


def counting() -> SimpleNamespace:
    """Return what the noise may take for the operating system: its randomness is a counter."""
    drawn = itertools.count()
    return SimpleNamespace(urandom=lambda size: next(drawn).to_bytes(size, "big"))


# --- whole runs


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(launch, "BUILD", tmp_path / "build")
    monkeypatch.setattr(launch, "RUNS", tmp_path / "runs")
    return tmp_path


@CASE
def test_a_simulation_is_its_seed_on_three_runs(workplace: Path) -> None:
    """Three runs, each with other global seeds; the third in a process of its own with another PYTHONHASHSEED.

    That another seed gives another run, and the same seed the same bytes, `tests/system/test_loop.py` says.
    """
    found: list[dict[str, Any]] = []
    for number in (1, 2):
        seed_everything(number)
        found.append(launch.play(launch.prepare("configs/smoke.toml", "\n".join(SMALL), run=f"run-{number}")))
    words = ["--config", "configs/smoke.toml", "--run", "run-3", "--sites", str(workplace / "sites-3")]
    words += [word for item in (*SMALL, f'run.directory="{workplace}/runs/run-3"') for word in ("--override", item)]
    env = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "simulations.launch", *words], env=env, check=True, capture_output=True)
    found.append(launch.read_summary(workplace / "runs" / "run-3"))

    assert found[0]["hashes"] == found[1]["hashes"] == found[2]["hashes"]
    assert found[0]["lessons"] > 0


# --- one site


@CASE
def test_production_is_never_the_same_twice(sites: Any, start: Adapter) -> None:
    fresh = sites("production")
    found = []
    for _ in range(3):
        seed_everything(0)
        found.append(released(fresh(), start, mode="production"))
    assert len(set(found)) == 3

    fresh = sites("simulation")
    assert released(fresh(), start, mode="simulation") == released(fresh(), start, mode="simulation")


@CASE
def test_the_seed_of_a_configuration_reaches_no_byte_of_production(
    sites: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the operating system's randomness replaced by a counter, two seeds release the same bytes."""
    fresh = sites("production")

    def counted(seed: int) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(noise, "os", counting())
            return released(fresh(), start, mode="production", seed=seed)

    assert counted(3) == counted(2**62) == counted(3)

    fresh = sites("simulation")
    seeded = [released(fresh(), start, mode="simulation", seed=seed) for seed in (3, 4)]
    assert seeded[0] != seeded[1]


@CASE
@pytest.mark.parametrize("mode", ["production", "simulation"])
def test_global_seeds_move_nothing(mode: str, sites: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the bytes of a release nor the state of anybody's global generator."""
    fresh = sites(mode)
    found = []
    for value in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(noise, "os", counting())
            seed_everything(value)
            found.append(released(fresh(), start, mode=mode))
    assert found[0] == found[1]


@CASE
def test_a_process_that_forks_in_mid_air_releases_two_things(sites: Any, start: Adapter) -> None:
    """Parent and child play the same round from the same memory; a library generator would answer twice the same."""
    fresh = sites("production")
    ours, theirs = fresh(), fresh()
    twin = np.random.default_rng(0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, (released(theirs, start, mode="production") + twin.bytes(4).hex()).encode())
        finally:
            os._exit(0)
    here = released(ours, start, mode="production") + twin.bytes(4).hex()
    os.waitpid(child, 0)
    there = os.read(read, 256).decode()
    os.close(read)
    os.close(write)

    assert len(here) == len(there) == 72
    assert here[:64] != there[:64]
    assert here[64:] == there[64:]


@CASE
def test_what_a_simulation_left_is_refused_by_a_production_site(sites: Any, start: Adapter, site_folder: Any) -> None:
    """Its run, its ledger and its outbox; and nothing is trained, spent or sent."""
    real = sites("production")()
    answer = asked(real, start, mode="simulation")
    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert not (real.directory / "outbox").exists()

    site = sites("simulation")()
    released(site, start, mode="simulation")
    spent = (site.directory / "ledger" / "ledger.jsonl").read_bytes()
    shutil.copy(real.directory / "site.toml", site.directory / "site.toml")
    answer = asked(site, start, mode="production")
    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"
    assert (site.directory / "ledger" / "ledger.jsonl").read_bytes() == spent


@CASE
def test_what_a_simulation_made_starts_no_production_run(tmp_path: Path) -> None:
    """A target carries its stamp on its card; a production run that would begin from it is not submitted."""
    config = ROOT / "configs" / "deploy" / "hospitals.toml"
    (tmp_path / "README.md").write_text(f"# target\n\n**{STAMP}**\n", encoding="utf-8")
    for setting in ("lora.start", "server.professional.adapter"):
        with pytest.raises(DeploymentUnsafe, match=f"{setting}: .* was made by a simulation"):
            runs.check_run(config, f'{setting}="{tmp_path}"')
    (tmp_path / "README.md").write_text("# target\n", encoding="utf-8")
    runs.check_run(config, f'lora.start="{tmp_path}"')


# --- steps


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count what a round draws: one sample and its noise for each step."""
    found = {"samples": 0, "drawn": 0}
    plain = noise.SecureNoise.poisson_sample

    def sample(self: noise.SecureNoise, count: int, rate: float) -> Any:
        found["samples"] += 1
        drawn = plain(self, count, rate)
        found["drawn"] += len(drawn)
        return drawn

    monkeypatch.setattr(noise.SecureNoise, "poisson_sample", sample)
    return found


@CASE
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 31, 40, 64, 80, 100, 200])
def test_the_number_of_steps_is_a_constant_of_the_configuration(
    rows: int, sites: Any, start: Adapter, counted: dict[str, int]
) -> None:
    """Data sets of twenty sizes: the same receipt, the same number of samples drawn, however many rows they caught."""
    site = sites("production")()
    lines = [json.dumps({"id": str(n), "instruction": f"row {n}", "output": "x" * (n % 7)}) for n in range(rows)]
    (site.directory / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    answer = asked(site, start, mode="production", steps=3)

    assert isinstance(answer, Upload), answer
    assert answer.receipts is not None
    event = answer.receipts[0].event
    assert isinstance(event, PoissonGaussian)
    assert (event.steps, event.sample_rate) == (3, 0.25)
    assert counted["samples"] == 3
    assert counted["drawn"] <= 3 * rows
