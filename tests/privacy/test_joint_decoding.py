"""Sums of sites are the sum of all rows, to the bit; a unit moves them within the ball; every token is paid for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import Workbench
from fl_app import joint_decoding, lora
from fl_app.errors import LedgerRefusal
from fl_app.privacy import gaussian
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import DpReceipt, Gaussian, Material
from simulations.joint_decoding import JointPlan, JointSite, write_jointly

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

CLIP = 0.7
CODES = {"cough": "A cough:", "rash": "Of a rash:"}


class NoNoise:
    simulated = True

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


def site_sum(rows: np.ndarray, public: np.ndarray, *, per_unit: int = 1) -> np.ndarray:
    return joint_decoding.clipped_sum(rows, public, clip_norm=CLIP, rows_per_unit=per_unit)


def scores(seed: int, rows: int, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = stream(seed, "joint")
    return rng.normal(0, spread, (rows, 33)).astype(np.float32), rng.normal(0, 2, 33).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 20))
def test_sums_of_sites_are_the_central_sum_to_the_bit(seed: int, first: int, second: int) -> None:
    """Before the noise, and after it when there is none: rows lie on the lattice that the noise lies on."""
    rows, public = scores(seed, 40)
    first, second = sorted((first, first + second))
    parts = [site_sum(part, public) for part in (rows[:first], rows[first:second], rows[second:])]
    whole = site_sum(rows, public)
    assert (parts[0] + parts[1] + parts[2] == whole).all()
    nothing: Any = NoNoise()
    sent = [joint_decoding.noisy_sum(p, clip_norm=CLIP, noise_multiplier=1.0, noise=nothing) for p in parts]
    central = joint_decoding.noisy_sum(whole, clip_norm=CLIP, noise_multiplier=1.0, noise=nothing)
    assert (sum(sent) == whole).all()
    joint = joint_decoding.joint_scores(public, sent, expected=40)
    assert (joint == joint_decoding.joint_scores(public, sent[::-1], expected=40)).all()
    assert (joint == joint_decoding.joint_scores(public, [central], expected=40)).all()


@pytest.mark.parametrize("per_unit", [1, 3])
def test_a_unit_moves_the_sum_within_the_ball(per_unit: int) -> None:
    widest = 0.0
    for seed in range(40):
        rows, public = scores(seed, 12, (0.1, 3.0, 300.0)[seed % 3])
        rows[-per_unit:] = rows[-1]  # a unit that says one thing, in all its rows
        apart = site_sum(rows, public, per_unit=per_unit) - site_sum(rows[:-per_unit], public, per_unit=per_unit)
        widest = max(widest, float(np.linalg.norm(apart)))
    assert 0.999 * CLIP < widest <= gaussian.usable_clip(CLIP)


def test_the_cube_of_the_local_clip_is_no_ball() -> None:
    """The twin: cut coordinate by coordinate, a row moves the sum by sqrt(K) times as much."""
    from fl_app.private_decoding import clip_differences

    rows, public = scores(1, 1, 300.0)
    assert np.linalg.norm(clip_differences(rows, public, CLIP)) > 4 * CLIP


def test_small_differences_pass_unclipped_and_without_their_offset() -> None:
    rows, public = scores(2, 1)
    near = public + np.float32(5) + rows * np.float32(0.01)
    apart = near.astype(np.float64)[0] - public
    np.testing.assert_allclose(site_sum(near, public), apart - apart.mean(), atol=1e-4)


def test_rows_without_numbers_add_nothing() -> None:
    rows, public = scores(3, 4)
    rows[1, 5], rows[2, 0] = np.nan, np.inf
    assert (site_sum(rows, public) == site_sum(rows[[0, 3]], public)).all()
    assert site_sum(rows[:0], public).tolist() == [0.0] * 33


def test_what_is_sent_has_the_noise_of_the_receipt() -> None:
    noise = SimulatedNoise(stream(0, "joint noise"))
    total = np.zeros(200)
    sent = [
        joint_decoding.noisy_sum(total, clip_norm=CLIP, noise_multiplier=1.5, noise=noise) / (1.5 * CLIP)
        for _ in range(1000)
    ]
    assert stats.kstest(np.concatenate(sent), "norm").pvalue > 1e-4
    assert stats.kstest(1.03 * np.concatenate(sent), "norm").pvalue < 1e-4
    with pytest.raises(LedgerRefusal):
        joint_decoding.noisy_sum(total, clip_norm=CLIP, noise_multiplier=0.0, noise=noise)
    paid = joint_decoding.receipt(noise_multiplier=1.5, clip_norm=CLIP, tokens=64, unit="patient")
    assert paid == DpReceipt(event=Gaussian(noise_multiplier=1.5, clip_norm=CLIP, count=64), unit="patient")


def test_the_server_draws_from_softmax() -> None:
    rng = stream(0, "server")
    values = np.array([1.0, 0.0, -1.0])
    counts = np.bincount([joint_decoding.sampled(values, 0.5, rng) for _ in range(9000)], minlength=3)
    for temperature, fits in ((0.5, True), (0.55, False)):
        weights = np.exp(values / temperature)
        assert bool(stats.chisquare(counts, 9000 * weights / weights.sum()).pvalue > 1e-4) is fits


# --- the driver, over in-process sites


def plan(**changes: Any) -> JointPlan:
    values: dict[str, Any] = {
        "buckets_per_code": 2,
        "expected_units": 4.0,
        "clip_norm": 30.0,
        "noise_multiplier": 1e-3,
        "max_new_tokens": 5,
        "max_text": 20,
        "top_k": 30,
    }
    return JointPlan(**{**values, **changes})


def run(
    frozen: FrozenModel, adapter: Adapter, shares: Sequence[Sequence[str]], chosen: JointPlan, noise: Any = None
) -> tuple[tuple[Any, ...], list[JointSite]]:
    sites: list[JointSite] = []
    for number, texts in enumerate(shares):
        rows = [
            PrivateRow(instruction=text, output="", code=("cough", "rash")[n % 2], unit="")
            for n, text in enumerate(texts)
        ]
        bench = Workbench(
            model=frozen,
            codes=CODES,
            noise=noise or SimulatedNoise(stream(number, "site noise")),
            system="",
            material=Material(),
            secret=b"shared",
        )
        sites.append(JointSite(lora.attach(frozen, adapter), PrivateRows(rows), chosen, bench))
    return write_jointly(frozen, adapter, sites, CODES, chosen, stream(0, "server")), sites


TEXTS = [f"record {n} of many" for n in range(12)]


def test_three_sites_write_what_one_with_all_rows_would(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> None:
    """Without noise, and with buckets by one secret: the same sums, the same draws, the same texts."""
    shares = [TEXTS[:4], TEXTS[4:6], TEXTS[6:]]
    together, _ = run(frozen, learned(1), [TEXTS], plan(), NoNoise())
    apart, _ = run(frozen, learned(1), shares, plan(), NoNoise())
    assert apart == together
    alone, _ = run(frozen, learned(1), shares[:1], plan(), NoNoise())
    assert alone != together  # the twin: the other sites have a say


def test_every_token_of_every_bucket_is_a_release_of_every_site(
    frozen: FrozenModel, learned: Callable[[int], Adapter]
) -> None:
    """As many as the receipt says at most, and the same for a site with rows and one without."""
    chosen = plan(noise_multiplier=2.0)
    texts, sites = run(frozen, learned(1), [TEXTS, []], chosen)
    assert sites[0].sent == sites[1].sent
    event = chosen.receipt.event
    assert isinstance(event, Gaussian)
    assert max(sites[0].sent) <= event.count == 5
    assert min(sites[0].sent) >= 1
    assert len(texts) <= 4
    assert run(frozen, learned(1), [TEXTS, []], chosen)[0] == texts
