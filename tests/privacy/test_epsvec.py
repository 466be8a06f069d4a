"""EPSVec at a site: one record moves the whole release by at most the clip, and the noise is what the receipt says.

Sums are read back from a release without noise, in the units of the mechanism: what the learner stretched by public
scales is shrunk by them again. Twins show that the usual mistakes would be seen.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clients.learners.epsvec import EpsVec, contributions
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import steering
from fl_app.errors import ConfigInvalid, PolicyRefusal
from fl_app.privacy import noise
from fl_app.privacy.accountants import pld
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import CodedText, DpReceipt, Gaussian, Material, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Adapter, VectorRelease

WIDTH, LAYERS, CODES = 64, (0, 1), ("ward/cough", "ward/rash")
CLIP, NOISE, SHARE = 0.5, 1.5, 0.2
SCALES = {0: 0.75, 1: 2.0}
TEXTS = ["it will not stop", "since Monday", "red and dry", "both knees", "at night", "after tea", "again"]
LATTICE = 1e-4
"""The lattice moves a coordinate by at most clip_norm 2^-14 / sqrt(dimension), and float32 by less."""


class Silence:
    """Noise of level 0, or of 1 everywhere; it counts what it was asked."""

    simulated = True

    def __init__(self, level: float = 0.0) -> None:
        self.level = level
        self.shapes: list[tuple[int, ...]] = []

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        self.shapes.append(shape)
        return np.full(shape, self.level)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        pytest.fail("EPSVec samples nothing")


def section(**changes: Any) -> EpsVec:
    values = {"kind": "epsvec", "layers": list(LAYERS), "clip_norm": CLIP, "count_share": SHARE}
    return EpsVec(**{**values, **changes})


def constants(**changes: Any) -> PublicConstants:
    values = {"sample_rate": 0.5, "expected_batch": 4, "max_tokens": 24, "max_rows_per_unit": 1, "unit": "record"}
    return PublicConstants(**{**values, **changes})


def material(**vectors: Any) -> Material:
    rng = np.random.default_rng(0)
    named = {
        f"{code}/{layer}/centre": rng.normal(0, 0.1, WIDTH).astype(np.float32) for code in CODES for layer in LAYERS
    }
    named |= {f"{layer}/scale": np.array([scale], np.float32) for layer, scale in SCALES.items()}
    texts = tuple(CodedText(code=code, text=f"Letter about {code}:\n") for code in CODES)
    return Material(texts=texts, vectors={name: one for name, one in {**named, **vectors}.items() if one is not None})


def a_row(text: str, code: str = CODES[0], unit: str = "") -> PrivateRow:
    return PrivateRow(instruction=text, output="", code=code, unit=unit or text)


def rows(count: int) -> list[PrivateRow]:
    return [a_row(text, CODES[n % 2]) for n, text in enumerate(TEXTS[:count])]


@pytest.fixture
def release(frozen: FrozenModel, learned: Callable[[int], Adapter]) -> Callable[..., VectorRelease]:
    def run(
        some: Sequence[PrivateRow],
        noise: Any = None,
        told: PublicConstants | None = None,
        sent: Material | None = None,
        multiplier: float = NOISE,
        **changes: Any,
    ) -> VectorRelease:
        learner, told = section(**changes).build(1), told or constants()
        bench = Workbench(model=frozen, codes={}, noise=noise or Silence(), system="", material=sent or material())
        return learner(PrivateRows(some), learned(5), learner.announce(told, multiplier), told, bench)  # type: ignore[return-value]

    return run


def mechanism(found: VectorRelease, *, clip: float = CLIP, share: float = SHARE, rows_per_unit: int = 1) -> np.ndarray:
    """Return a release as the one vector that the noise was added to, by the formulas of the module's docstring."""
    parts = [
        found.vectors[f"{code}/{layer}"].astype(np.float64) / (SCALES[layer] * math.sqrt(len(LAYERS)))
        for code in CODES
        for layer in LAYERS
    ]
    per_row = share * clip * (1 - 2.0**-13) / rows_per_unit
    return np.concatenate([*parts, *(found.vectors[f"{code}/count"].astype(np.float64) * per_row for code in CODES)])


# --- sensitivity


@settings(max_examples=200, deadline=None)
@given(
    clip=st.floats(1e-6, 1e6),
    share=st.floats(0.01, 0.99),
    size=st.floats(-30, 30),
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(0, 5), st.integers(1, 40)),
)
def test_no_contribution_is_longer_than_the_clip(
    clip: float, share: float, size: float, seed: int, shape: tuple[int, int]
) -> None:
    differences = np.random.default_rng(seed).standard_normal(shape) * 10.0**size
    added = contributions(differences, clip_norm=clip, count_share=share)
    norms = np.linalg.norm(added, axis=1)
    assert added.shape == (shape[0], shape[1] + 1)
    assert (norms <= clip * (1 + 1e-12)).all()
    assert added[:, -1] == pytest.approx(clip * share)
    room = clip * math.sqrt(1 - share**2)
    for one, of in zip(added[:, :-1], differences, strict=True):
        length = np.linalg.norm(of)
        assert one == pytest.approx(of * min(1.0, room / length), rel=1e-9)  # cut along its own direction, or kept


def test_what_one_clip_by_layer_keeps_the_joint_clip_keeps() -> None:
    """Rows within clip / sqrt(k) in every layer are within the clip jointly; the reverse fails."""
    rng = np.random.default_rng(0)
    layers = rng.standard_normal((500, 4, 8))
    layers *= rng.uniform(0, 1, (500, 4, 1)) / np.linalg.norm(layers, axis=2, keepdims=True) / 2  # each <= 1 / sqrt(4)
    flat = layers.reshape(500, 32)
    room = math.sqrt(1 - SHARE**2)
    assert contributions(room * flat, clip_norm=1.0, count_share=SHARE)[:, :-1] == pytest.approx(room * flat)
    lopsided = np.zeros((1, 32))
    lopsided[0, 0] = 0.9  # beyond 1 / 2 in its layer, and still whole here
    assert contributions(lopsided, clip_norm=1.0, count_share=SHARE)[0, 0] == pytest.approx(0.9)


def test_a_row_without_a_number_adds_nothing() -> None:
    bad = np.ones((3, 4))
    bad[1, 2], bad[2, 0] = np.nan, np.inf
    added = contributions(bad, clip_norm=1.0, count_share=0.5)
    assert not added[1:].any()
    assert added[0, -1] == 0.5


@pytest.mark.parametrize("clip", [0.05, CLIP, 50.0], ids=["cut", "usual", "loose"])
def test_a_record_more_or_less_moves_the_release_by_at_most_the_clip(
    release: Callable[..., VectorRelease], clip: float
) -> None:
    everybody = mechanism(release(rows(6), clip_norm=clip), clip=clip)
    moves = [
        np.linalg.norm(mechanism(release(rows(6)[:n] + rows(6)[n + 1 :], clip_norm=clip), clip=clip) - everybody)
        for n in range(6)
    ]
    assert max(moves) <= clip * (1 + 1e-6)
    if clip == 0.05:
        assert min(moves) >= 0.99 * clip  # every row reaches a small clip: whoever sent less would be seen
    if clip == 50.0:
        assert SHARE * clip <= max(moves) < 0.5 * clip  # the twin: nobody reaches a loose one but with the count


def test_a_record_replaced_moves_it_by_up_to_twice_the_clip(
    frozen: FrozenModel, release: Callable[..., VectorRelease]
) -> None:
    """The factor 2, which the paper's code charges as 1: two rows on either side of a centre, one for the other.

    Ours states add-or-remove, where the same two rows cost the clip once each.
    """
    clip, share, pair = 1e-3, 0.01, ("it will not stop", "since Monday")
    states = steering.representations(
        frozen.model,
        frozen.tokenizer,
        [f"Letter about {CODES[0]}:\n"] * 2,
        pair,
        layers=LAYERS,
        max_text_tokens=24,
        batch_rows=1,
    )
    between = material(**{f"{CODES[0]}/{layer}/centre": states[layer].mean(axis=0) for layer in LAYERS})

    def of(*texts: str) -> np.ndarray:
        found = release([a_row(text) for text in texts], sent=between, clip_norm=clip, count_share=share)
        return mechanism(found, clip=clip, share=share)

    first, second, nobody = of(pair[0]), of(pair[1]), of()
    assert np.linalg.norm(first - nobody) == pytest.approx(clip, rel=1e-3)
    assert np.linalg.norm(second - nobody) == pytest.approx(clip, rel=1e-3)
    assert 1.99 * clip < np.linalg.norm(first - second) <= 2 * clip * (1 + 1e-6)


@pytest.mark.parametrize("per_unit", [1, 2, 4])
def test_all_rows_of_a_unit_share_one_clip(release: Callable[..., VectorRelease], per_unit: int) -> None:
    told = constants(max_rows_per_unit=per_unit, unit="patient")
    alike = [a_row("it will not stop", unit="a")] * per_unit  # alike, so that their norms add up
    clip = 0.01
    found = mechanism(release(alike, told=told, clip_norm=clip), clip=clip, rows_per_unit=per_unit)
    assert np.linalg.norm(found) == pytest.approx(clip, rel=1e-3)
    assert np.linalg.norm(found) <= clip * (1 + 1e-6)
    # The twin: counted as units of one row each they would reach per_unit times the clip.
    single = mechanism(release(alike, clip_norm=clip), clip=clip)
    assert np.linalg.norm(single) == pytest.approx(per_unit * clip, rel=1e-3)


def test_counts_are_in_rows_whatever_the_unit(release: Callable[..., VectorRelease]) -> None:
    for per_unit in (1, 3):
        found = release(rows(7), told=constants(max_rows_per_unit=per_unit, unit="patient"))
        assert [float(found.vectors[f"{code}/count"][0]) for code in CODES] == pytest.approx([4, 3], abs=0.02)


# --- classes


def test_a_row_moves_its_own_class_and_no_other(release: Callable[..., VectorRelease]) -> None:
    before, after = release(rows(4)), release([*rows(4), a_row("again", CODES[1])])
    for name, vector in before.vectors.items():
        moved = not np.array_equal(vector, after.vectors[name])
        assert moved == name.startswith(CODES[1]), name


def test_rows_of_a_class_that_is_not_asked_for_add_nothing(release: Callable[..., VectorRelease]) -> None:
    stray = [a_row("lost", ""), a_row("lost", "elsewhere"), a_row("lost", "ward/cough/0")]
    assert mechanism(release([*rows(3), *stray])).tobytes() == mechanism(release(rows(3))).tobytes()


def test_the_sites_sum_is_the_sum_over_all_their_rows(release: Callable[..., VectorRelease]) -> None:
    apart = [mechanism(release(part)) for part in (rows(7)[:3], rows(7)[3:4], [], rows(7)[4:])]
    together = mechanism(release(rows(7)))
    assert np.linalg.norm(together) > CLIP  # there is something to add up
    assert sum(apart) == pytest.approx(together, abs=5 * LATTICE * CLIP / math.sqrt(len(together)))


def test_a_vector_is_the_sum_of_the_differences_where_nothing_is_cut(
    frozen: FrozenModel, release: Callable[..., VectorRelease]
) -> None:
    """The oracle: transformers' own hidden states of the text after its prompt, minus the centre."""
    import torch

    found, expected = release(rows(5), clip_norm=1e3), np.zeros(WIDTH)
    for row in rows(5):
        if row.code == CODES[0]:
            prompt = f"Letter about {CODES[0]}:\n"
            ids = frozen.tokenizer(prompt + row.instruction[:24])["input_ids"]  # bytes: a token each
            with torch.inference_mode():
                states = frozen.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1][
                    0, len(prompt) :
                ]
            expected += states.mean(0).numpy() - material().vectors[f"{CODES[0]}/0/centre"]
    assert found.vectors[f"{CODES[0]}/0"] == pytest.approx(expected, abs=0.02)  # a lattice for a clip of 1000
    assert np.abs(expected).max() > 1


def test_a_row_is_read_up_to_the_sites_own_limit(release: Callable[..., VectorRelease]) -> None:
    told = constants(max_tokens=8)
    whole = [mechanism(release([a_row(text)], told=told)).tobytes() for text in ("it itches a lot", "it itche")]
    assert whole[0] == whole[1] != mechanism(release([a_row("it itch")], told=told)).tobytes()


def test_rows_are_read_one_at_a_time(frozen: FrozenModel, release: Callable[..., VectorRelease]) -> None:
    """In a batch, or at a width that others set, a row would move others by rounding, and no clip bounds that."""
    shapes: list[tuple[int, ...]] = []
    handle = frozen.model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape))
    )
    try:
        release(rows(7))
    finally:
        handle.remove()
    lengths = [len(f"Letter about {row.code}:\n{row.instruction[:24]}") for row in rows(7)]
    assert sorted(shapes) == sorted((1, length) for length in lengths)


# --- names, shapes, empty sites


@pytest.mark.parametrize("count", [0, 1, 7])
def test_names_shapes_and_draws_never_depend_on_the_rows(release: Callable[..., VectorRelease], count: int) -> None:
    quiet = Silence()
    found = release(rows(count), quiet)
    expected = {f"{code}/{layer}": (WIDTH,) for code in CODES for layer in LAYERS} | {
        f"{code}/count": (1,) for code in CODES
    }
    assert {name: one.shape for name, one in found.vectors.items()} == expected
    assert all(one.dtype == np.float32 for one in found.vectors.values())
    assert quiet.shapes == [(2 * WIDTH + 1,)] * 2  # by class: all layers and the count


def test_a_site_without_a_row_sends_noise(release: Callable[..., VectorRelease]) -> None:
    found = mechanism(release([], SimulatedNoise(stream(0, "noise"))))
    assert (found != 0).mean() > 0.99
    assert not mechanism(release([])).any()


# --- noise


def _chi_square(values: np.ndarray, deviation: float) -> float:
    """Return how likely a sum of squares at least as odd as this is, two-sided, for that standard deviation."""
    below = stats.chi2.cdf(float(((values / deviation) ** 2).sum()), len(values))
    return float(2 * min(below, 1 - below))


def test_the_noise_has_the_deviation_of_the_receipt_in_every_coordinate(release: Callable[..., VectorRelease]) -> None:
    """1e5 coordinates, each N(0, (noise_multiplier * clip_norm)^2); the twins are the usual slips."""
    draws = SimulatedNoise(stream(1, "noise"))
    per_release = len(CODES) * (len(LAYERS) * WIDTH + 1)
    vectors = [mechanism(release([], draws)) for _ in range(-(-100_000 // per_release))]
    values = np.concatenate(vectors)
    assert len(values) >= 100_000
    assert _chi_square(values, NOISE * CLIP) > 1e-4
    assert stats.kstest(values / (NOISE * CLIP), "norm").pvalue > 1e-4
    for slip in (
        NOISE * CLIP * 1.02,
        NOISE * CLIP / 1.02,
        NOISE,  # the clip norm forgotten
        NOISE * CLIP * math.sqrt(1 - SHARE**2),  # the vector's part of the clip taken for the whole
        NOISE * CLIP / math.sqrt(len(LAYERS)),  # shared between layers
    ):
        assert _chi_square(values, slip) < 1e-6
    # Blocks for layers, classes and counts: each coordinate alone as well, over the releases.
    table = np.stack(vectors)
    worst = min(_chi_square(column, NOISE * CLIP) for column in table.T)
    assert worst > 1e-4 / table.shape[1]
    assert min(_chi_square(column, 1.3 * NOISE * CLIP) for column in table.T) < 1e-4 / table.shape[1]


def test_the_rows_are_still_under_the_noise(release: Callable[..., VectorRelease]) -> None:
    """Noise of one everywhere: what is left is the sum of the rows, not something of the noise's making."""
    plain, lifted = mechanism(release(rows(5))), mechanism(release(rows(5), Silence(1.0)))
    assert lifted - plain == pytest.approx(np.full_like(plain, NOISE * CLIP), abs=1e-4 * CLIP)


def test_noise_never_comes_twice(release: Callable[..., VectorRelease], monkeypatch: pytest.MonkeyPatch) -> None:
    """No seed of anybody's reaches production noise; with the keys replaced by one key it would, which is the twin."""
    import torch

    def run() -> bytes:
        np.random.seed(42)  # noqa: NPY002 - the legacy state is what a careless library would draw from
        torch.manual_seed(42)
        return mechanism(release(rows(3), SecureNoise())).tobytes()

    assert len({run() for _ in range(5)}) == 5
    monkeypatch.setattr(noise.os, "urandom", bytes)
    assert len({run() for _ in range(3)}) == 1


def test_same_simulated_stream_same_release(release: Callable[..., VectorRelease]) -> None:
    found = [mechanism(release(rows(5), SimulatedNoise(stream(seed, "noise")))).tobytes() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


# --- receipts and what they cost


def test_the_receipt_is_one_gaussian(release: Callable[..., VectorRelease]) -> None:
    learner = section().build(1)
    event = Gaussian(noise_multiplier=2.5, clip_norm=CLIP, count=1)
    expected = (DpReceipt(event=event, unit="patient", relation="add_or_remove_one"),)
    assert learner.announce(constants(unit="patient", sample_rate=0.01), 2.5) == expected
    assert (learner.steps, learner.clip_norm, learner.noise) == (1, CLIP, None)
    assert (learner.release_kind, learner.private) == ("vector", True)


@pytest.mark.parametrize("change", ["none", "two", "clip", "count", "unit", "poisson"])
def test_receipts_of_something_else_are_refused(
    frozen: FrozenModel, learned: Callable[[int], Adapter], change: str
) -> None:
    learner = section().build(1)
    (receipt,) = learner.announce(constants(), NOISE)
    assert isinstance(receipt.event, Gaussian)
    others = {
        "none": (),
        "two": (receipt, receipt),
        "clip": (dataclasses.replace(receipt, event=dataclasses.replace(receipt.event, clip_norm=2 * CLIP)),),
        "count": (dataclasses.replace(receipt, event=dataclasses.replace(receipt.event, count=2)),),
        "unit": (dataclasses.replace(receipt, unit="other"),),
        "poisson": (
            dataclasses.replace(
                receipt, event=PoissonGaussian(noise_multiplier=NOISE, sample_rate=0.5, steps=1, clip_norm=CLIP)
            ),
        ),
    }
    quiet = Silence()
    bench = Workbench(model=frozen, codes={}, noise=quiet, system="", material=material())
    with pytest.raises(PolicyRefusal, match="were not announced by this learner"):
        learner(PrivateRows(rows(3)), learned(5), others[change], constants(), bench)
    assert not quiet.shapes


def _exact_delta(mu: float, epsilon: float) -> float:
    """Return delta(epsilon) of a Gaussian of that mu: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""
    normal = stats.norm
    return float(normal.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + normal.logcdf(-mu / 2 - epsilon / mu)))


@pytest.mark.parametrize("multiplier", [0.7, 1.5, 4.0, 20.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_the_certificate_is_that_of_one_gaussian_not_of_a_gaussian_by_layer(multiplier: float, delta: float) -> None:
    """The closed form is the oracle. k releases with a clip each are mu = sqrt(k) / m, and the PLD agrees there too."""
    receipts = section().build(1).announce(constants(), multiplier)
    epsilon = pld.epsilon(receipts, delta)
    assert _exact_delta(1 / multiplier, epsilon) == pytest.approx(delta, rel=2e-2)
    assert _exact_delta(1 / multiplier, epsilon - 1e-3) > delta * (1 - 1e-6)  # within the accountant's grid
    assert _exact_delta(1 / multiplier, epsilon + 1e-6) <= delta
    by_layer = DpReceipt(event=Gaussian(noise_multiplier=multiplier, clip_norm=CLIP, count=4), unit="record")
    four = pld.epsilon((by_layer,), delta)
    assert _exact_delta(math.sqrt(4) / multiplier, four + 1e-6) <= delta
    assert _exact_delta(math.sqrt(4) / multiplier, four - 2e-3) > delta * (1 - 1e-6)
    assert four > 1.5 * epsilon  # the twin: to charge one for four would be seen


# --- material


@pytest.mark.parametrize(
    ("vectors", "told"),
    [
        ({"ward/rash/1/centre": None}, "'ward/rash/1/centre' is missing, expected 64 numbers"),
        ({"0/scale": None}, "'0/scale' is missing"),
        ({"ward/cough/0/centre": np.zeros(63, np.float32)}, r"is of shape \(63,\)"),
        ({"ward/cough/0/centre": np.full(64, np.nan, np.float32)}, "not finite"),
        ({"1/scale": np.zeros(1, np.float32)}, r"scales \[0.75, 0.0\] of layers \[0, 1\] are outside"),
        ({"1/scale": -np.ones(1, np.float32)}, "are outside"),
        ({"1/scale": np.full(1, 1e30, np.float32)}, "are outside"),
    ],
)
def test_material_that_describes_no_class_is_refused(
    release: Callable[..., VectorRelease], vectors: dict[str, Any], told: str
) -> None:
    quiet = Silence()
    with pytest.raises(PolicyRefusal, match=told):
        release(rows(3), quiet, sent=material(**vectors))
    assert not quiet.shapes


@pytest.mark.parametrize("codes", [(), ("ward/cough", "ward/cough")])
def test_no_class_or_one_twice_is_refused(release: Callable[..., VectorRelease], codes: tuple[str, ...]) -> None:
    texts = tuple(CodedText(code=code, text="x") for code in codes)
    with pytest.raises(PolicyRefusal, match=rf"has {len(codes)} prompts for {len(set(codes))} classes"):
        release(rows(3), sent=dataclasses.replace(material(), texts=texts))


def test_a_layer_that_the_model_has_not_is_refused(release: Callable[..., VectorRelease]) -> None:
    with pytest.raises(ConfigInvalid, match=r"layers \[0, 2\]: name one or more of 0 to 1"):
        release(rows(3), layers=[0, 2])


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_whatever_the_server_sends_the_clip_holds(frozen: FrozenModel, factor: float, seed: int) -> None:
    """Hostile material: any centres and scales within bounds. A record still moves the sum by at most the clip."""
    rng = np.random.default_rng(seed)
    sent = {
        f"{code}/{layer}/centre": (factor * rng.normal(0, 1, WIDTH)).astype(np.float32)
        for code in CODES
        for layer in LAYERS
    }
    scales = {layer: float(10 ** rng.uniform(-3, 3)) for layer in LAYERS}
    sent |= {f"{layer}/scale": np.array([scale], np.float32) for layer, scale in scales.items()}
    learner = section().build(1)
    bench = Workbench(model=frozen, codes={}, noise=Silence(), system="", material=material(**sent))
    receipts = learner.announce(constants(), NOISE)
    found = learner(PrivateRows(rows(1)), None, receipts, constants(), bench)  # type: ignore[arg-type]
    total = 0.0
    for name, one in found.vectors.items():  # type: ignore[union-attr]
        last = name.rpartition("/")[2]
        by = SHARE * CLIP if last == "count" else 1 / (float(np.float32(scales[int(last)])) * math.sqrt(2))
        total += float(((one.astype(np.float64) * by) ** 2).sum())
    assert SHARE * CLIP * 0.999 < math.sqrt(total) <= CLIP * (1 + 1e-4)
