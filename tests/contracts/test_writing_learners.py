"""Learners that write keep their prices: a unit moves a draw as announced, and no pen draws more than was paid for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from clients.learners import AnyLearner, invisible_ink, private_prediction
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import private_decoding as pd
from fl_app.errors import LedgerRefusal, PolicyRefusal
from fl_app.privacy import events
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import BoundedRange, CodedText, DpReceipt, Exponential, Material, TextRelease

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from clients.stages import Learner
    from fl_app.models import FrozenModel
    from fl_app.types import Adapter

CODES = {"cough": "A cough:", "rash": "Of a rash:"}
COMMON: dict[str, Any] = {"buckets_per_code": 2, "expected_units": 3.0, "max_new_tokens": 5, "batch_rows": 16}
AMIN: dict[str, Any] = {"kind": "private_prediction", "tokens_per_bucket": 7, "texts_per_bucket": 3, **COMMON}
DRAFTED = {**AMIN, "threshold": 0.5, "threshold_noise": 0.3}
CUT = {**AMIN, "public_top": 30}
INK: dict[str, Any] = {"kind": "invisible_ink", "texts_per_bucket": 2, "top_k": 20, **COMMON}
CASES = [
    pytest.param(AMIN, id="amin"),
    pytest.param(DRAFTED, id="drafted"),
    pytest.param(CUT, id="cut"),
    pytest.param(INK, id="ink"),
]
every_writer = pytest.mark.parametrize("options", CASES)


def section(options: dict[str, Any]) -> Any:
    return TypeAdapter(AnyLearner).validate_python(options)


def constants(**changes: Any) -> PublicConstants:
    values = {"sample_rate": 0.5, "expected_batch": 4, "max_tokens": 24, "max_rows_per_unit": 1, "unit": "record"}
    return PublicConstants(**{**values, **changes})


def some_rows(count: int, *, text: str = "row") -> PrivateRows:
    code = ("cough", "rash")
    return PrivateRows(
        [PrivateRow(instruction=f"{text} {n}", output="", code=code[n % 2], unit=str(n)) for n in range(count)]
    )


def receipts_of(learner: Learner, told: PublicConstants, noise: float = 2.0) -> tuple[DpReceipt, ...]:
    return learner.announce(told, learner.noise if learner.noise is not None else noise)


class CountingNoise(SimulatedNoise):
    """Seeded noise that counts what is asked of it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(stream(seed, "counted"))
        self.gumbels = self.laplaces = 0

    def gumbel(self, shape: tuple[int, ...]) -> np.ndarray:
        self.gumbels += 1
        return super().gumbel(shape)

    def laplace(self, shape: tuple[int, ...]) -> np.ndarray:
        self.laplaces += 1
        return super().laplace(shape)


@pytest.fixture
def write(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> Callable[..., TextRelease]:
    """Return a function that lets a learner write from rows."""

    def run(options: dict[str, Any], rows: PrivateRows, noise: Any, **changes: Any) -> TextRelease:
        learner = section(options).build(1)
        told = constants()
        receipts = changes.pop("receipts", None) or receipts_of(learner, told, changes.pop("multiplier", 2.0))
        values: dict[str, Any] = {"codes": CODES, "system": "", "material": Material(), "secret": b"salt", **changes}
        bench = Workbench(model=frozen, noise=noise, **values)
        release = learner(rows, learned(5), receipts, told, bench)
        assert isinstance(release, TextRelease)
        assert release.kind == learner.release_kind
        return release

    return run


# --- what is announced


@every_writer
def test_receipts_are_for_the_units_and_the_draws_of_a_bucket(options: dict[str, Any]) -> None:
    learner = section(options).build(1)
    found = receipts_of(learner, constants(unit="patient"))
    assert learner.private
    assert {receipt.unit for receipt in found} == {"patient"}
    events.check_together(found)
    main = found[0].event
    assert isinstance(main, BoundedRange)
    assert main.count == learner.steps
    noise = events.noise_of(main)
    assert noise is not None
    assert learner.announce(constants(unit="patient"), noise) == found


def test_the_span_of_private_prediction_is_the_papers() -> None:
    """c = 10, s = 255, temperature 2: 2 c / (s tau); with a drafter, 2 / (s sigma) for each threshold."""
    options = {**AMIN, "expected_units": 255.0, "threshold": 0.5, "threshold_noise": 0.2}
    learner = section(options).build(1)
    draws, thresholds = receipts_of(learner, constants(max_rows_per_unit=3))
    assert draws.event == BoundedRange(span=round(20 / 510, 9), count=7)
    assert thresholds.event == Exponential(epsilon=pytest.approx(2 / 51), count=7)
    assert learner.clip_norm == 10
    assert section({**options, "threshold": 0.0}).build(1).announce(constants(), learner.noise) == (
        DpReceipt(event=draws.event, unit="record"),
    )


def test_the_noise_of_private_prediction_is_fixed_and_of_invisible_ink_is_not() -> None:
    fixed, free = section(AMIN).build(1), section(INK).build(1)
    assert free.noise is None
    assert fixed.noise == pytest.approx(3 * 2 / 20)
    with pytest.raises(PolicyRefusal, match="clip_norm"):
        fixed.announce(constants(), 2 * fixed.noise)
    (less,), (more,) = free.announce(constants(), 2.0), free.announce(constants(), 4.0)
    assert (less.event.span, more.event.span, less.event.count) == (0.5, 0.25, 10)
    with pytest.raises(LedgerRefusal):
        free.announce(constants(), 0.0)


@every_writer
def test_other_receipts_are_refused(options: dict[str, Any], write: Callable[..., TextRelease]) -> None:
    learner = section(options).build(1)
    right = receipts_of(learner, constants())
    wrong: list[tuple[DpReceipt, ...]] = [
        (DpReceipt(event=BoundedRange(span=right[0].event.span, count=learner.steps + 1), unit="record"), *right[1:]),
        (DpReceipt(event=right[0].event, unit="patient"), *right[1:]),
        (*right, right[0]),
        (DpReceipt(event=Exponential(epsilon=1.0), unit="record"),),
    ]
    noise = CountingNoise()
    for receipts in wrong:
        with pytest.raises(PolicyRefusal):
            write(options, some_rows(3), noise, receipts=receipts)
    assert (noise.gumbels, noise.laplaces) == (0, 0)
    with pytest.raises(PolicyRefusal):
        learner(some_rows(1), None, (), constants(), None)


# --- what is written


@every_writer
def test_texts_are_under_known_codes_and_within_the_limits(
    options: dict[str, Any], write: Callable[..., TextRelease]
) -> None:
    release = write(options, some_rows(9), CountingNoise())
    assert {text.code for text in release.texts} == set(CODES)
    assert len(release.texts) <= 2 * 2 * options["texts_per_bucket"]
    assert all(text.text and len(text.text) <= options["max_new_tokens"] for text in release.texts)


@every_writer
def test_same_noise_same_texts(options: dict[str, Any], write: Callable[..., TextRelease]) -> None:
    first = write(options, some_rows(9), CountingNoise(1))
    assert write(options, some_rows(9), CountingNoise(1)).texts == first.texts
    assert write(options, some_rows(9), CountingNoise(2)).texts != first.texts


@every_writer
def test_no_draw_beyond_the_plan_however_many_rows(
    options: dict[str, Any], write: Callable[..., TextRelease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All draws of a site: at most `steps` for each of four buckets. Empty buckets write as well."""
    monkeypatch.setattr("clients.decoding.hmac.new", _all_in_one)
    learner = section(options).build(1)
    for count in (0, 1, 30):
        noise = CountingNoise(count)
        release = write(options, some_rows(count), noise)
        assert noise.gumbels > 0
        if "threshold" not in options:
            assert noise.gumbels <= 4 * learner.steps
            assert noise.laplaces == 0
        else:
            assert noise.laplaces <= noise.gumbels + 4 * learner.steps
        assert release.texts


def _all_in_one(*_: Any) -> Any:
    class Zero:
        @staticmethod
        def digest() -> bytes:
            return bytes(32)

    return Zero


def test_the_cap_ends_a_text_in_the_middle(write: Callable[..., TextRelease], frozen: FrozenModel) -> None:
    """Seven tokens a bucket, five a text: without an end token the second text has two."""
    noise = CountingNoise(4)
    release = write({**AMIN, "clip_norm": 1e-3}, some_rows(0), noise)
    assert noise.gumbels == 4 * 7  # random bytes: neither an end token nor a stop in this stream
    assert len(release.texts) <= 8


def test_more_noise_brings_invisible_ink_to_public_text(write: Callable[..., TextRelease]) -> None:
    """At a span of 1e-6 the records say nothing: the texts are those of no records at all. At 20 they say a lot."""
    nobody, somebody = some_rows(0), some_rows(12, text="mine is different")
    quiet, loud = (
        [write(INK, rows, CountingNoise(3), multiplier=m).texts for rows in (nobody, somebody)] for m in (1e6, 0.05)
    )
    assert quiet[0] == quiet[1]
    assert loud[0] != loud[1]


def test_the_servers_texts_stand_in_the_public_prompt(write: Callable[..., TextRelease]) -> None:
    shot = Material(texts=tuple(CodedText(code=code, text="of another kind") for code in CODES))
    assert (
        write(INK, some_rows(0), CountingNoise(1), material=shot).texts
        != write(INK, some_rows(0), CountingNoise(1)).texts
    )


@every_writer
def test_a_site_without_codes_is_refused(options: dict[str, Any], write: Callable[..., TextRelease]) -> None:
    with pytest.raises(PolicyRefusal, match="control code"):
        write(options, some_rows(3), CountingNoise(), codes={})


# --- one pen: what a unit moves, and what is counted


def drawn_scores(
    pen: Any, blocks: Sequence[np.ndarray], public: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """Return the scores whose softmax a pen draws its next private token from."""
    seen: list[np.ndarray] = []

    def spy(scores: np.ndarray, noise: Any) -> int:
        seen.append(np.array(scores))
        return 0

    monkeypatch.setattr(pd, "draw", spy)
    pen.begin(public)
    for block in blocks:
        pen.add(block)
    pen.draw(SimulatedNoise(stream(0, "pen")))
    monkeypatch.undo()
    return seen[-1]


def ink_pen(span: float, weight: float = 1.0, **changes: Any) -> invisible_ink.Pen:
    return invisible_ink.Pen(section=section({**INK, **changes}), span=span, row_weight=weight)


def amin_pen(span: float, weight: float = 1.0, **changes: Any) -> private_prediction.Pen:
    return private_prediction.Pen(section=section({**AMIN, **changes}), span=span, vocabulary=8, row_weight=weight)


def log_range(left: np.ndarray, right: np.ndarray) -> float:
    ratios = np.log(pd.softmax(left)) - np.log(pd.softmax(right))
    return float(ratios.max() - ratios.min())


@pytest.mark.parametrize("rows_of_unit", [1, 3])
@pytest.mark.parametrize("kind", ["amin", "cut", "ink"])
def test_a_unit_moves_a_draw_within_the_announced_span(
    kind: str, rows_of_unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit of k rows, all shouting, in buckets of none to 40 others: log-ratios stay within the span, and fill it."""
    rng = stream(0, "units", kind)
    learner = section({"amin": AMIN, "cut": {**AMIN, "public_top": 5}, "ink": INK}[kind]).build(1)
    span = receipts_of(learner, constants(), 0.8)[0].event.span
    widest = 0.0
    for trial in range(60):
        make = {"amin": amin_pen, "cut": lambda s, w: amin_pen(s, w, public_top=5), "ink": ink_pen}[kind]
        public = None if kind == "amin" else rng.normal(0, 2, 8).astype(np.float32)
        spread = (1.0, 80.0)[trial % 2]
        others = rng.normal(0, spread, (int(rng.integers(0, 41)), 8)).astype(np.float32)
        unit = np.tile(rng.normal(0, spread, 8), (rows_of_unit, 1)).astype(np.float32)
        with_it = drawn_scores(make(span, 1 / rows_of_unit), [others, unit], public, monkeypatch)
        without = drawn_scores(make(span, 1 / rows_of_unit), [others], public, monkeypatch)
        widest = max(widest, log_range(with_it, without))
    assert 0.98 * span < widest <= span


def test_rows_that_count_whole_would_move_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: three rows of a unit at full weight."""
    loud = np.array([[90, -90, 0, 0, 0, 0, 0, 0]] * 3, np.float32)
    public = np.zeros(8, np.float32)
    with_it, without = (drawn_scores(ink_pen(0.5, 1.0), [block], public, monkeypatch) for block in (loud, loud[:0]))
    assert log_range(with_it, without) == pytest.approx(3 * 0.5, rel=1e-3)


def test_the_mask_of_invisible_ink_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the references are ordered, and without them, the same tokens may be drawn."""
    rng = stream(0, "mask")
    public = rng.normal(0, 2, 40).astype(np.float32)
    rows = rng.normal(0, 9, (6, 40)).astype(np.float32)
    masks: list[list[int]] = []
    for part in (rows, rows[::-1], rows[:2], rows[:0]):
        pen = ink_pen(1.0, top_k=10)
        drawn_scores(pen, [part], public, monkeypatch)
        masks.append(pen._mask.tolist())
    assert masks[0] == masks[1] == masks[2] == masks[3]
    margin = 2 * (1.0 * 3 / 2) / 3  # C = span B temperature / 2 = 1.5
    assert masks[0] == np.flatnonzero(public >= np.sort(public)[-10] - margin).tolist()
    assert 10 < len(masks[0]) < 40


def test_the_clip_of_invisible_ink_follows_the_noise_up_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens, one reference far away: its difference is cut to C = span B temperature / 2, or to max_clip."""
    public, far = np.zeros(2, np.float32), np.array([[50, -50]], np.float32)
    for span, clip in ((1.0, 1.5), (0.2, 0.3), (80.0, 20.0)):
        moved = drawn_scores(ink_pen(span), [far], public, monkeypatch)
        assert moved == pytest.approx([clip / 3, -clip / 3], rel=2e-4)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 9),
    threshold=st.sampled_from([0.01, 0.4, 2.0]),
    noise=st.floats(1e-3, 5),
    tries=st.integers(1, 60),
)
def test_the_ledger_of_a_pen(seed: int, rows: int, threshold: float, noise: float, tries: int) -> None:
    """Thresholds are paid when drawn; there are at most as many as private tokens allowed, fired or not."""
    rng = stream(seed, "ledger")
    pen = amin_pen(3.0, threshold=threshold, threshold_noise=noise)
    source = SimulatedNoise(rng)
    for _ in range(tries):
        if pen.spent:
            break
        pen.begin(rng.normal(0, 1, 8).astype(np.float32))
        pen.add(rng.normal(0, 3, (rows, 8)).astype(np.float32))
        before = pen.private_tokens
        assert 0 <= pen.draw(source) < 8
        assert pen.private_tokens - before in (0, 1)
        assert 1 <= pen.thresholds <= pen.private_tokens + 1
        assert pen.thresholds <= 7
    assert pen.private_tokens <= 7
    if pen.spent:
        assert pen.thresholds == pen.private_tokens == 7
        with pytest.raises(AssertionError):
            pen.draw(source)
    plan = 7 * (pd.zcdp_of_token(3.0) + pd.zcdp_of_threshold(pd.threshold_epsilon(3, noise)))
    spent = pen.private_tokens * pd.zcdp_of_token(3.0) + pen.thresholds * pd.zcdp_of_threshold(
        pd.threshold_epsilon(3, noise)
    )
    assert spent <= plan * (1 + 1e-12)


def test_a_threshold_that_never_fires_is_paid_for_and_kept() -> None:
    """A run that began costs; it goes on over texts until a distance passes it."""
    pen = amin_pen(3.0, threshold=2.0, threshold_noise=1e-4)
    same = np.zeros(8, np.float32)
    for _ in range(20):
        pen.begin(same)
        pen.add(np.tile(same, (3, 1)))
        pen.draw(SecureNoise())
    assert (pen.thresholds, pen.private_tokens) == (1, 0)


def test_where_the_rows_disagree_the_token_is_theirs() -> None:
    """Three of an expected three say token 5, the public prompt says 2: distance 2, threshold 0.5."""
    pen = amin_pen(60.0, threshold=0.5, threshold_noise=1e-3, clip_norm=90.0, tokens_per_bucket=5)
    rows, public = np.zeros((3, 8), np.float32), np.zeros(8, np.float32)
    rows[:, 5], public[2] = 90, 90
    for _ in range(5):
        pen.begin(public)
        pen.add(rows)
        assert pen.draw(SecureNoise()) == 5
    assert (pen.thresholds, pen.private_tokens) == (5, 5)
    pen = amin_pen(60.0, threshold=0.5, threshold_noise=1e-3, clip_norm=90.0)
    pen.begin(public)
    pen.add(np.tile(public, (3, 1)))
    assert pen.draw(SecureNoise()) == 2
    assert pen.private_tokens == 0


def test_public_draws_follow_their_own_temperature() -> None:
    from scipy import stats

    pen = amin_pen(3.0, threshold=2.0, threshold_noise=1e-4, public_temperature=0.7)
    public = np.array([1, 0.5, 0, -0.5, -1, -9, -9, -9], np.float32)
    counts = np.zeros(8)
    source = SimulatedNoise(stream(2, "public"))
    for _ in range(4000):
        pen.begin(public)
        pen.add(np.tile(public, (3, 1)))
        counts[pen.draw(source)] += 1
    right, wrong = (pd.softmax(public[:5].astype(np.float64) / t) for t in (0.7, 0.8))
    assert stats.chisquare(counts[:5], right * counts[:5].sum()).pvalue > 1e-4
    assert stats.chisquare(counts[:5], wrong * counts[:5].sum()).pvalue < 1e-4


def test_an_empty_bucket_draws_evenly_or_from_public_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn_scores(amin_pen(3.0), [], None, monkeypatch).tolist() == [0.0] * 8
    public = np.array([1, 2, 3, 4], np.float32)
    assert drawn_scores(ink_pen(1.0), [], public, monkeypatch).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_scores_that_are_no_numbers_move_no_more_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = np.full((1, 8), np.nan, np.float32)
    public = np.arange(8).astype(np.float32)
    assert drawn_scores(ink_pen(1.0), [bad], public, monkeypatch).tolist() == public.tolist()
    assert math.isclose(
        float(np.abs(drawn_scores(amin_pen(3.0), [bad], None, monkeypatch)).max()), 10 / 3 / 2 * 0.9, rel_tol=0.2
    )
