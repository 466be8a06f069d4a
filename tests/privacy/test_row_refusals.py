"""No row may make a round fail, and no public setting may leave a mechanism without its arithmetic.

Each case was found by attacking the code: the refusal, or the one token always drawn, told exactly of one row.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import spending
from clients.learners.invisible_ink import InvisibleInk, Pen
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from clients.survey import SurveySection
from fl_app import models, private_decoding
from fl_app.config import parse
from fl_app.embeddings import LocalStates
from fl_app.errors import BudgetSpent, ConfigInvalid, LedgerRefusal, PolicyRefusal
from fl_app.kernel_sum import KernelSumSection
from fl_app.privacy.accountants import bounded_range, pld
from fl_app.privacy.book import Asked, Book
from fl_app.privacy.chain import Header, Reserved
from fl_app.privacy.noise import SecureNoise
from fl_app.types import BoundedRange, DpReceipt, Exponential, Gaussian, PoissonGaussian

if TYPE_CHECKING:
    from fl_app.models import FrozenModel

INK = {"kind": "invisible_ink", "buckets_per_code": 1, "expected_units": 4.0}
CONSTANTS = PublicConstants(sample_rate=0.5, expected_batch=4, max_tokens=24, max_rows_per_unit=1, unit="record")


def receipt(event: Any) -> DpReceipt:
    return DpReceipt(event=event, unit="record")


def test_a_bucket_for_a_vanishing_number_of_units_is_refused() -> None:
    """At expected_units 1e-40 the clip underflowed, and one row in an empty bucket always drew the same token."""
    with pytest.raises(ConfigInvalid, match="expected_units"):
        parse(InvisibleInk, INK | {"expected_units": 1e-40})
    learner = parse(InvisibleInk, INK | {"temperature": 0.05}).build(1)
    with pytest.raises(PolicyRefusal, match=r"a clip of .* is left for every score"):
        learner.announce(CONSTANTS, 1e6)
    with pytest.raises(PolicyRefusal, match=r"a clip of .* is left"):
        Pen(section=parse(InvisibleInk, INK), span=1e-9, row_weight=1.0)


def test_at_the_least_clip_a_row_still_leaves_the_draw_random() -> None:
    scores = np.linspace(-4, 4, 50, dtype=np.float32)
    section = parse(InvisibleInk, INK | {"top_k": 50, "texts_per_bucket": 100})
    pen = Pen(section=section, span=private_decoding.LEAST_BOUND, row_weight=1.0)
    drawn = set()
    for _ in range(40):
        pen.begin(scores)
        pen.add(scores[None, ::-1].copy())
        drawn.add(pen.draw(SecureNoise()))
    assert len(drawn) > 3


def test_features_that_overflow_add_nothing_and_refuse_nobody(
    frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bandwidth of 1.6e-308 made some rows' features NaN, and the round failed where such a row was."""
    kernel = {"embedder": {"kind": "local"}, "dim": 32}
    with pytest.raises(ConfigInvalid, match="bandwidth"):
        parse(SurveySection, {"noise_multiplier": 2.0, "kernel": {**kernel, "bandwidth": 1.6e-308}})

    def broken(self: KernelSumSection, texts: Any, embed: Any, *, alone: bool = False) -> Any:
        del embed, alone
        rows = np.full((len(texts), self.dim), self.dim**-0.5, np.float32)
        rows[0, 0] = np.nan
        return rows

    monkeypatch.setattr(KernelSumSection, "features", broken)
    rows = PrivateRows([PrivateRow(instruction=name, output="", code="c", unit=name) for name in "ab"])
    bench = Workbench(model=frozen, codes={"c": "C:"}, noise=SecureNoise(), system="")
    survey = parse(SurveySection, {"noise_multiplier": 0.5, "kernel": kernel}).build()
    assert np.isfinite(survey(rows, CONSTANTS, bench).vectors["kernel"]).all()


def test_a_private_text_without_a_direction_is_a_row_of_zeros(frozen: FrozenModel) -> None:
    import torch

    embed: Any = LocalStates(kind="local").build(frozen)
    inner = embed.model

    def spoiled(**inputs: Any) -> Any:
        found = inner(**inputs).last_hidden_state.clone()
        return SimpleNamespace(last_hidden_state=torch.full_like(found, torch.nan))

    object.__setattr__(embed, "model", spoiled)
    assert not embed(["a letter"], alone=True).any()


def test_what_a_site_would_read_must_fit_the_model(frozen: FrozenModel) -> None:
    config = frozen.model.config.get_text_config()
    models.check_positions(frozen, config.max_position_embeddings)
    with pytest.raises(PolicyRefusal, match="positions"):
        models.check_positions(frozen, config.max_position_embeddings + 1)
    text = SimpleNamespace(max_position_embeddings=512, sliding_window=32)
    other: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text)),
        resolved=SimpleNamespace(name="windowed"),
    )
    models.check_positions(other, 40)
    with pytest.raises(PolicyRefusal, match=r"windowed has 32 \(window\)"):
        models.check_positions(other, 40, whole_cache=True)


@pytest.mark.parametrize("span", [30.0, 33.3, 40.0, 99.0])
def test_a_huge_span_is_an_infinite_epsilon_and_no_crash(span: float) -> None:
    found = pld.epsilon([receipt(BoundedRange(span=span))], 1e-5)
    assert found == pytest.approx(span, rel=0.6) if span <= bounded_range.MOST else found == np.inf
    if span > bounded_range.MOST:
        with pytest.raises(LedgerRefusal, match="no private one"):
            bounded_range.loss(span, 1, 1e-3)


@pytest.mark.parametrize(
    ("event", "fine"),
    [
        (Gaussian(noise_multiplier=0.9, clip_norm=1.0), False),
        (Gaussian(noise_multiplier=1.0, clip_norm=1.0), True),
        (Exponential(epsilon=2.0), False),
        (Exponential(epsilon=0.5), True),
        (BoundedRange(span=1.5), False),
    ],
)
def test_the_noise_floor_is_of_every_mechanism(event: Any, fine: bool) -> None:
    policy: Any = SimpleNamespace(limits=SimpleNamespace(min_noise_multiplier=1.0))
    if fine:
        spending._check_beside(policy, receipt(event))
    else:
        with pytest.raises(PolicyRefusal, match="of every mechanism"):
            spending._check_beside(policy, receipt(event))


def test_sides_do_not_launder_an_older_ledger_of_several_mechanisms() -> None:
    def steps(noise: float, count: int) -> DpReceipt:
        return receipt(PoissonGaussian(noise_multiplier=noise, sample_rate=0.01, steps=count, clip_norm=1.0))

    def line(seq: int, one: DpReceipt) -> Reserved:
        return Reserved(seq=seq, hash="", time="", id=str(seq), run="r", round=seq, receipts=(one,))

    first, second = steps(0.8, 100), steps(2.0, 3000)
    header = Header(seq=0, hash="", time="", dataset="d", unit="record")
    book = Book(entries=[header, line(1, first), line(2, second)])
    asked = {"run": "r", "round_number": 3, "receipts": (steps(0.8, 1),), "epsilon": 50.0, "delta": 1e-5}
    with pytest.raises(LedgerRefusal, match="one mechanism"):
        book.admit(Asked(**asked, promise=50.0, renyi=None, sides=(second,)))
    alone = Book(entries=[header, line(1, first)])
    _, planned = alone.admit(Asked(**asked, promise=50.0, renyi=None, sides=(second,)))  # the twin
    assert planned is not None
    with pytest.raises(BudgetSpent):
        alone.admit(Asked(**asked | {"epsilon": 1.0}, promise=50.0, renyi=None))
