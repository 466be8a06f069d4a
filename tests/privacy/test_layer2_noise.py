"""Layer 2 of the proof: the noise itself, caught where the optimizer receives it.

What AdamW sees, times the public normaliser, minus the clipped sum, is noise_multiplier * clip_norm in every coordinate
of every factor, and independent of all other noise. Seeded sources are held to four standard errors; the production
source, which has no seed, to bounds that chance crosses once in 10^6 runs at most. Every check fails at 3 % off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from clients import local_round
from clients.config import SitePolicy
from fl_app import lora, lora_start
from fl_app.config import LoraSection, shared
from fl_app.origin import ROOT
from fl_app.privacy.gaussian import lattice_step
from fl_app.privacy.noise import NoiseSource, SecureNoise, SimulatedNoise
from fl_app.seeds import stream
from simulations.attacks.canaries import TARGETS
from tests.privacy.replay import CLIP, NOISE, active, build, observe, private_kinds, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

STEPS, RANK = 6, 64
SCALE = NOISE * CLIP
BOUNDS = {"seeded": (4.0, 1e-3), "secure": (7.0, 1e-6)}
"""Standard errors that a correlation may reach, and the smallest p-value of a Kolmogorov-Smirnov test."""


@dataclass(frozen=True)
class Noise:
    """What one run's steps added, by factor, in units of its scale. Each array: (steps, coordinates)."""

    factors: dict[str, np.ndarray]

    def of(self, *ends: str) -> np.ndarray:
        """Return all factors whose name ends so, side by side."""
        parts = [part for name, part in self.factors.items() if name.endswith(ends)]
        return np.concatenate(parts, axis=1) if parts else np.zeros((STEPS, 0))

    @property
    def flat(self) -> np.ndarray:
        return self.of("")


@pytest.fixture(scope="module")
def start(frozen: FrozenModel) -> Adapter:
    """A wide adapter: 131,072 coordinates."""
    spec = lora.spec_of(frozen, LoraSection(rank=RANK, alpha=float(RANK), targets=TARGETS))
    return lora_start.initial(spec, np.random.default_rng(0))


def added(
    kind: str, source: Any, frozen: FrozenModel, start: Adapter, *, rows: Sequence[str] = (), rate: float = 1e-9
) -> Noise:
    """Run a learner and return the noise of its steps."""
    learner = build(kind, steps=STEPS, clip_norm=CLIP)
    units = [[text] for text in rows]
    found = observe(learner, rows_of(units), source, frozen=frozen, start=start, sample_rate=rate)
    assert (found.sums != 0).any() == bool(rows)
    if not rows:  # the normaliser is a power of two, and float32 holds these multiples of the step to the bit
        step = lattice_step(CLIP, found.seen.shape[1])
        assert np.array_equal(found.seen / step, np.rint(found.seen / step))
    noise = (found.seen - found.sums) / SCALE
    sizes = {
        f"{name}.{factor}": getattr(layer, factor).size
        for name, layer in sorted(start.layers.items())
        for factor in ("a", "b")
        if factor in active(kind, 1)[0]
    }
    parts = np.split(noise, np.cumsum(list(sizes.values()))[:-1], axis=1)
    return Noise(factors=dict(zip(sizes, parts, strict=True)))


KINDS = [kind for kind in private_kinds() if kind not in {"dp_la_lora", "dp_lora_sb"}]
"""Those whose steps are all alike and have enough numbers for statistics; the others take the same path."""


def source_of(name: str, seed: int = 0) -> NoiseSource:
    return SecureNoise() if name == "secure" else SimulatedNoise(stream(seed, "noise", "site", 1))


def check_scale(noise: Noise) -> None:
    """Over all steps 1 %, and for each kind of factor: nine standard errors and more. Each single factor: 10 %."""
    for values in (noise.flat, noise.of(".a"), noise.of(".b")):
        if values.size:
            assert values.size >= 1e5
            assert abs(values.std() - 1) < 0.01, values.std()
            assert abs(values.mean()) < 6 / values.size**0.5
    for name, values in noise.factors.items():
        assert abs(values.std() - 1) < 0.1, name


def check_law(noise: Noise, least: float) -> None:
    assert stats.kstest(noise.flat.ravel(), "norm").pvalue > least


def check_independence(series: Sequence[np.ndarray], bound: float) -> None:
    """No two of the vectors are correlated, over the coordinates they share by place."""
    for n, left in enumerate(series):
        for right in series[:n]:
            size = min(left.size, right.size)
            correlation = np.corrcoef(left[:size], right[:size])[0, 1]
            assert abs(correlation) < bound / size**0.5, correlation * size**0.5


@pytest.fixture(scope="module", params=[(kind, source) for kind in KINDS for source in BOUNDS], ids="-".join)
def made(request: pytest.FixtureRequest, frozen: FrozenModel, start: Adapter) -> tuple[Noise, str]:
    kind, source = request.param
    return added(kind, source_of(source), frozen, start), source


def test_the_noise_has_the_scale_and_the_law_of_the_receipt(made: tuple[Noise, str]) -> None:
    noise, source = made
    assert noise.flat.shape[0] == STEPS
    check_scale(noise)
    check_law(noise, BOUNDS[source][1])


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_three_percent_off_is_caught(made: tuple[Noise, str], factor: float) -> None:
    noise, source = made
    off = replace(noise, factors={name: values * factor for name, values in noise.factors.items()})
    with pytest.raises(AssertionError):
        check_scale(off)
    with pytest.raises(AssertionError):
        check_law(off, BOUNDS[source][1])


def test_factors_and_steps_are_independent(made: tuple[Noise, str]) -> None:
    noise, source = made
    bound = BOUNDS[source][0]
    check_independence(list(noise.flat), bound)
    for step in range(STEPS):
        check_independence([values[step] for values in noise.factors.values()], bound)
        check_independence([noise.flat[step, :-1], noise.flat[step, 1:]], bound)  # and neighbours in a factor
    # The twins: one factor's noise used for another, one step's for the next.
    first, second, *_ = noise.factors
    with pytest.raises(AssertionError):
        check_independence([noise.factors[first][0], noise.factors[first][0], noise.factors[second][0]], bound)
    with pytest.raises(AssertionError):
        check_independence([noise.flat[0], 0.1 * noise.flat[0] + noise.flat[1]], bound)


def test_noise_on_one_factor_alone_is_caught(made: tuple[Noise, str]) -> None:
    noise, _ = made
    silent = {name: values * (not name.endswith(".b")) for name, values in noise.factors.items()}
    with pytest.raises(AssertionError):
        check_scale(replace(noise, factors=silent))


def test_rows_change_nothing_about_the_noise(frozen: FrozenModel, start: Adapter) -> None:
    """Every row drawn in every step: the rest after the clipped sum is the same noise."""
    noise = added("dp_lora", source_of("seeded"), frozen, start, rows=["a row", "another one"], rate=1.0)
    check_scale(noise)
    check_law(noise, 1e-3)
    check_independence(list(noise.flat), 4.0)


def site_policy(name: str) -> Any:
    return SitePolicy.model_construct(site=type("Named", (), {"name": name}))


def settings_of(mode: str) -> Any:
    return shared(
        {
            "run": {"rounds": 3, "mode": mode, "seed": 3},
            "model": {"name": "tiny-random", "dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj"]},
        }
    )


@pytest.mark.parametrize(("mode", "bound"), [("simulation", 4.0), ("production", 7.0)])
def test_rounds_and_sites_are_independent(mode: str, bound: float, frozen: FrozenModel, start: Adapter) -> None:
    """As a site makes its source: by the run's mode, its own name and the ledger's entry, under one seed for all."""
    places = [("harbour", 1), ("harbour", 3), ("school", 1), ("school", 3)]

    def make(site: str, entry: int) -> np.ndarray:
        source = local_round._noise(site_policy(site), settings_of(mode), entry=entry)
        assert source.simulated == (mode == "simulation")
        return added("dp_lora", source, frozen, start).flat.ravel()

    found = [make(*place) for place in places]
    check_independence(found, bound)
    again = make(*places[0])
    assert np.array_equal(again, found[0]) == (mode == "simulation")  # the twin: same place, same seed, same noise
    if mode == "simulation":
        with pytest.raises(AssertionError):
            check_independence([again, found[0]], bound)
    else:
        check_independence([again, found[0]], bound)


DRAW = "from fl_app.privacy.noise import SecureNoise as S; s = S(); print(s.normal((4,)).tobytes().hex())"


def drawn_by(code: str, count: int) -> list[str]:
    """Return what `count` fresh processes print, all with the same seeds everywhere a seed can be put."""
    preamble = "import random, numpy as np; random.seed(0); np.random.seed(0); "
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    return [
        subprocess.run(
            [sys.executable, "-c", preamble + code],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(count)
    ]


def test_restarts_never_repeat() -> None:
    found = drawn_by(DRAW, 3)
    assert len(set(found)) == 3
    assert all(len(line.strip()) == 64 for line in found)
    seeded = DRAW.replace("S(); ", "type('S', (), {'normal': lambda _, shape: np.random.normal(size=shape)})(); ")
    assert len(set(drawn_by(seeded, 2))) == 1  # the twin


def in_forks(source: Any, count: int) -> set[bytes]:
    """Return what a source that has drawn once draws next, here and in `count` forks."""
    source.normal((4,))
    found: list[bytes] = []
    for _ in range(count):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, source.normal((4,)).tobytes())
            os._exit(0)
        os.waitpid(child, 0)
        found.append(os.read(read, 64))
        os.close(read)
        os.close(write)
    return {*found, source.normal((4,)).tobytes()}


@pytest.mark.parametrize(
    ("make", "different"), [(SecureNoise, 5), (lambda: source_of("seeded"), 1)], ids=["secure", "twin"]
)
def test_forks_never_repeat(make: Callable[[], Any], different: int) -> None:
    assert len(in_forks(make(), 4)) == different
