"""An attacker who knows everything but one unit sees of it what one Gaussian of sensitivity 1 shows, and no more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import stats

from clients.learners.pe_votes import PeVotes
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import votes
from fl_app.privacy.noise import SecureNoise
from fl_app.types import Adapter, CodedText, Material

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.models import FrozenModel

POPULATION = tuple(CodedText(code="c", text=text) for text in ("zz zz", "QQ!!", "0909"))
OTHERS = [("zz zz z", "a"), ("QQ!", "b"), ("zz", "c")]
PATIENT = [("zz zz", "patient"), ("zz zz zz", "patient"), ("zz zz!", "patient")]
NOISE, DRAWS = 1.5, 3000
TOLD = PublicConstants(sample_rate=1.0, expected_batch=1, max_tokens=24, max_rows_per_unit=3, unit="patient")


def measured(frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return mu as the best attacker measures it over 3,000 releases with and without the patient, and its error.

    Along the difference of the two sums a Gaussian mechanism of mu guesses right with probability Phi(mu / 2).
    """
    learner: Any = PeVotes.model_validate({"kind": "pe_votes", "embedder": {"kind": "local"}}).build(1)
    bench = Workbench(
        model=frozen, codes={}, noise=SecureNoise(), system="", material=Material(texts=POPULATION), secret=b""
    )

    def rows(texts: Sequence[tuple[str, str]]) -> PrivateRows:
        return PrivateRows([PrivateRow(instruction=text, output="", code="c", unit=unit) for text, unit in texts])

    without, with_patient = (learner._count(rows(texts), bench) for texts in (OTHERS, [*OTHERS, *PATIENT]))
    direction = with_patient - without
    start = Adapter(layers={}, alpha=1.0, base="base")
    right = 0
    for inside, total in ((False, without), (True, with_patient)):
        monkeypatch.setattr(type(learner), "_count", lambda *_, total=total: total)
        for _ in range(DRAWS):
            release = learner(rows(OTHERS), start, learner.announce(TOLD, NOISE), TOLD, bench)
            far = release.counts.astype(np.float64) - (without + with_patient) / 2
            right += (float(far @ direction) > 0) == inside
    monkeypatch.undo()
    share = right / (2 * DRAWS)
    mu = 2 * float(stats.norm.ppf(share))
    error = 2 * math.sqrt(share * (1 - share) / (2 * DRAWS)) / float(stats.norm.pdf(mu / 2))
    return mu, error


def test_a_unit_of_three_rows_shows_as_one_gaussian_of_the_announced_noise(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mu, error = measured(frozen, monkeypatch)

    assert mu == pytest.approx(1 / NOISE, abs=4 * error)


def test_three_rows_that_are_not_shrunk_show_three_times_as_much(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the measurement above would notice."""
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(votes, "bounded", lambda vote, bound: vote)
        mu, error = measured(frozen, monkeypatch)

    assert mu > 1 / NOISE + 4 * error
