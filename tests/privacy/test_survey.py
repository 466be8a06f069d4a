"""The survey: one Gaussian over counts and kernel sums, whose sensitivity is what the receipt says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from clients.survey import CLIP, SurveySection
from fl_app.config import parse
from fl_app.errors import ConfigInvalid
from fl_app.privacy import gaussian
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.types import DpReceipt, Gaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.models import FrozenModel

CODES = {"c-b": "B:", "c-a": "A:", "c-c": "C:"}
KERNEL = {"embedder": {"kind": "local"}, "dim": 32}
BOTH = {"noise_multiplier": 2.0, "kernel": KERNEL}


class Silent:
    """Noise that is none, to see what it would be added to."""

    simulated = True

    def normal(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return np.zeros(shape)


def rows(*told: tuple[str, str], units: Sequence[str] = ()) -> PrivateRows:
    names = units or [str(number) for number in range(len(told))]
    return PrivateRows(
        [
            PrivateRow(instruction=text, output="", code=code, unit=unit)
            for (text, code), unit in zip(told, names, strict=True)
        ]
    )


def constants(per_unit: int = 1) -> PublicConstants:
    return PublicConstants(sample_rate=0.5, expected_batch=4, max_tokens=24, max_rows_per_unit=per_unit, unit="record")


def bench(frozen: FrozenModel, noise: Any) -> Workbench:
    return Workbench(model=frozen, codes=CODES, noise=noise, system="")


SOME = (("a first letter", "c-a"), ("a second letter", "c-c"), ("a third one", "c-c"), ("of no code", "unknown"))


def totals(frozen: FrozenModel, told: Any, monkeypatch: pytest.MonkeyPatch, per_unit: int = 1) -> np.ndarray[Any, Any]:
    """Return what the noise is added to, all parts as one vector."""
    seen: list[Any] = []
    release = gaussian.release

    def watched(parts: Any, **settings: Any) -> Any:
        seen.append(np.concatenate([part.ravel() for part in parts]))
        return release(parts, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(gaussian, "release", watched)
        parse(SurveySection, BOTH).build()(told, constants(per_unit), bench(frozen, Silent()))
    (one,) = seen
    return one


def test_counts_stand_in_the_order_of_their_ids_and_in_rows(frozen: FrozenModel) -> None:
    survey = parse(SurveySection, {"noise_multiplier": 2.0}).build()
    for per_unit in (1, 3):
        found = survey(rows(*SOME), constants(per_unit), bench(frozen, Silent()))
        assert found.vectors.keys() == {"codes"}
        np.testing.assert_allclose(found.vectors["codes"], [1, 0, 2], atol=1e-3)


def test_counts_and_kernel_sums_together_keep_their_units(frozen: FrozenModel) -> None:
    found = parse(SurveySection, BOTH).build()(rows(*SOME), constants(), bench(frozen, Silent())).vectors
    alone = [
        parse(SurveySection, BOTH).build()(rows(one), constants(), bench(frozen, Silent())).vectors for one in SOME
    ]
    np.testing.assert_allclose(found["codes"], [1, 0, 2], atol=1e-3)
    np.testing.assert_allclose(found["kernel"], sum(one["kernel"] for one in alone), atol=1e-2)
    assert all(np.linalg.norm(one["kernel"]) == pytest.approx(1, abs=1e-2) for one in alone)


def test_a_row_moves_the_whole_vector_by_the_clip_and_no_more(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(len(SOME)):
        fewer = [one for number, one in enumerate(SOME) if number != place]
        moved = np.linalg.norm(totals(frozen, rows(*SOME), monkeypatch) - totals(frozen, rows(*fewer), monkeypatch))
        assert moved <= gaussian.usable_clip(CLIP) * (1 + 1e-9)
        assert moved > 0.7  # a row without a public code still has its features


def test_a_unit_of_several_rows_moves_it_by_no_more_than_one_row(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three rows alike and under one code: the worst case, which reaches the clip. The twin does not divide."""
    same = [("the same letter", "c-a")] * 3
    units = ["unit"] * 3
    nothing = totals(frozen, rows(), monkeypatch, per_unit=3)
    moved = totals(frozen, rows(*same, units=units), monkeypatch, per_unit=3) - nothing
    assert np.linalg.norm(moved) == pytest.approx(gaussian.usable_clip(CLIP), rel=1e-6)
    undivided = totals(frozen, rows(*same, units=units), monkeypatch, per_unit=1)
    assert np.linalg.norm(undivided) > 2.9 * CLIP


def test_the_noise_is_what_the_receipt_says_in_rows(frozen: FrozenModel) -> None:
    """Per released count: noise * k / sqrt(weight); chi-square over 2,000 of them, and a twin at 1.1 that must fail."""
    survey = parse(SurveySection, {"noise_multiplier": 3.0, "kernel": {**KERNEL, "dim": 2000}}).build()
    assert survey.announce(constants(2)) == DpReceipt(
        event=Gaussian(noise_multiplier=3.0, clip_norm=1.0), unit="record"
    )
    noise = SimulatedNoise(np.random.default_rng(7))
    silent = survey(rows(*SOME), constants(2), bench(frozen, Silent())).vectors["kernel"]
    noisy = survey(rows(*SOME), constants(2), bench(frozen, noise)).vectors["kernel"]
    std = 3.0 * 2 / math.sqrt(0.5)
    total = float((((noisy - silent) / std) ** 2).sum())
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], len(noisy))
    assert low < total < high
    assert not low < total / 1.1**2 * 1.1**4 < high


def test_two_surveys_never_share_their_noise(frozen: FrozenModel) -> None:
    survey = parse(SurveySection, {"noise_multiplier": 3.0}).build()
    first, second = (survey(rows(*SOME), constants(), bench(frozen, SecureNoise())).vectors["codes"] for _ in range(2))
    assert not np.array_equal(first, second)


def test_an_empty_site_sends_noise_alone(frozen: FrozenModel) -> None:
    found = parse(SurveySection, BOTH).build()(rows(), constants(), bench(frozen, SecureNoise())).vectors
    assert {name: one.shape for name, one in found.items()} == {"codes": (3,), "kernel": (32,)}
    assert found["codes"].any()


def test_kinds_follow_what_is_asked() -> None:
    assert parse(SurveySection, BOTH).build().release_kinds == ("histogram", "vector")
    assert parse(SurveySection, {**BOTH, "codes": False}).build().release_kinds == ("vector",)
    with pytest.raises(ConfigInvalid, match="nothing is asked; leave the table out"):
        parse(SurveySection, {"noise_multiplier": 2.0, "codes": False})
