"""The site's half of Private Evolution: what is counted, what one unit can move, and what is announced for it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from clients.learners import AnyLearner
from clients.learners.pe_votes import PeVotes, VoteCounter
from clients.private_rows import PrivateRow, PrivateRows
from clients.stages import PublicConstants, Workbench
from fl_app import votes
from fl_app.embeddings import LocalStates
from fl_app.errors import PolicyRefusal
from fl_app.privacy import gaussian
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import Adapter, CodedText, DpReceipt, Exponential, Gaussian, Material

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clients.stages import Learner
    from fl_app.models import FrozenModel

START = Adapter(layers={}, alpha=1.0, base="base")
CODES = ("skin", "lung")
POPULATION = tuple(
    CodedText(code=code, text=f"{code} {word}") for word in ("one", "four words of it", "!?") for code in CODES
)
NOISE = 1.5
USABLE = gaussian.usable_clip(1.0)


class Silent:
    """A noise source that adds nothing, so that a release shows the sum."""

    simulated = True

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        self.shapes.append(shape)
        return np.zeros(shape)

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        raise AssertionError("votes are not sampled")


def constants(rows_per_unit: int = 1) -> PublicConstants:
    return PublicConstants(
        sample_rate=0.5, expected_batch=4, max_tokens=24, max_rows_per_unit=rows_per_unit, unit="record"
    )


def row(text: str, code: str = "skin", unit: str = "") -> PrivateRow:
    return PrivateRow(instruction=text, output="", code=code, unit=unit or text)


def learner(**changes: Any) -> VoteCounter:
    section: dict[str, Any] = {"kind": "pe_votes", "embedder": {"kind": "local"}, **changes}
    built: Any = TypeAdapter(AnyLearner).validate_python(section).build(1)
    return built


@pytest.fixture(scope="module")
def bench(frozen: FrozenModel) -> Workbench:
    return Workbench(model=frozen, codes={}, noise=Silent(), system="", material=Material(texts=POPULATION), secret=b"")


def count(learn: Learner, rows: Sequence[PrivateRow], bench: Workbench, noise: float = NOISE) -> np.ndarray:
    told = constants()
    release: Any = learn(PrivateRows(rows), START, learn.announce(told, noise), told, bench)
    assert release.kind == learn.release_kind == "histogram"
    assert release.bins == votes.bin_names(bench.material.texts)
    assert release.counts.dtype == np.float32
    return release.counts.astype(np.float64)


def test_without_noise_the_histogram_counts_the_nearest_text_of_each_row(bench: Workbench) -> None:
    """Nearest computed here, over full cosines with the texts of other codes struck out."""
    rows = [row("skin one"), row("lung !?", "lung"), row("four words here", "lung"), row("skin one", unit="twin")]
    embed = LocalStates(kind="local").build(bench.model)
    cosine = embed([one.instruction for one in rows]) @ embed([one.text for one in POPULATION]).T
    for number, one in enumerate(rows):
        cosine[number, [place for place, text in enumerate(POPULATION) if text.code != one.code]] = -2
    expected = np.bincount(cosine.argmax(axis=1), minlength=len(POPULATION)).astype(float)
    assert expected[0] >= 2, "both rows that repeat the first text vote for it"

    assert count(learner(), rows, bench) == pytest.approx(USABLE * expected, abs=1e-3)


def test_a_row_of_a_code_without_texts_votes_nowhere(bench: Workbench) -> None:
    assert count(learner(), [row("skin one", "heart")], bench).tolist() == [0.0] * 6


def test_within_all_codes_the_nearest_text_gets_the_vote_whatever_its_code(bench: Workbench) -> None:
    found = count(learner(within="all"), [row("skin one", "heart"), row("lung four words of it", "skin")], bench)

    place = {one.text: number for number, one in enumerate(POPULATION)}
    assert found[place["skin one"]] == pytest.approx(USABLE, abs=1e-3)
    assert found[place["lung four words of it"]] == pytest.approx(USABLE, abs=1e-3)
    assert found.sum() == pytest.approx(2 * USABLE, abs=1e-3)


def test_private_texts_are_embedded_alone(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch a row's last bits depend on its neighbours, and a vote may turn on them."""
    real, seen = LocalStates.build, []

    def build(self: LocalStates, local: FrozenModel) -> Any:
        embed = real(self, local)

        def spy(texts: Sequence[str], *, alone: bool = False) -> Any:
            seen.append((tuple(texts), alone))
            return embed(texts, alone=alone)

        return spy

    monkeypatch.setattr(LocalStates, "build", build)
    count(learner(), [row("skin one"), row("lung !?", "lung")], bench)

    assert (("skin one", "lung !?"), True) in seen
    assert (tuple(one.text for one in POPULATION), False) in seen


def test_several_nearest_share_one_vote(bench: Workbench) -> None:
    found = count(learner(nearest=2), [row("skin one")], bench)

    assert np.sort(found)[-2:] == pytest.approx([USABLE / math.sqrt(2)] * 2, abs=1e-3)
    assert np.count_nonzero(np.abs(found) > 1e-3) == 2


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.tuples(st.text(max_size=12), st.sampled_from([*CODES, "heart"])), min_size=1, max_size=5),
    nearest=st.integers(1, 4),
)
def test_adding_a_unit_moves_the_histogram_by_at_most_one(
    bench: Workbench, texts: list[tuple[str, str]], nearest: int
) -> None:
    """A unit of up to five rows of any codes, with and without it, for any number of nearest."""
    others = [row("skin one"), row("lung four", "lung"), row("skin !!")]
    unit = [row(text, code, unit="patient 7") for text, code in texts]
    learn = learner(nearest=nearest)

    moved = count(learn, [*others, *unit], bench) - count(learn, others, bench)

    lattice = gaussian.lattice_step(1.0, len(POPULATION)) * math.sqrt(len(POPULATION))
    assert np.linalg.norm(moved) <= USABLE + lattice
    assert np.linalg.norm(moved) <= 1.0


def test_the_rows_of_a_unit_are_shrunk_together(bench: Workbench) -> None:
    """The twin of the test above: the same rows as units of their own move the histogram by more than one."""
    alone = count(learner(), [row("skin one", unit="a"), row("skin one", unit="b"), row("lung !?", "lung")], bench)
    joint = count(learner(), [row("skin one", unit="a"), row("skin one", unit="a")], bench)

    assert np.linalg.norm(alone) > 2
    assert joint.sum() == pytest.approx(USABLE, abs=1e-3)


def test_noise_of_the_announced_size_lands_in_every_bin(bench: Workbench) -> None:
    """2,000 releases of 6 bins; a chi-square of 12,000 degrees lies within 4 of its standard deviations."""
    learn, rows = learner(), [row("skin one")]
    quiet = count(learn, rows, bench)
    total, draws = learn._count(PrivateRows(rows), bench), 2000
    noise = SimulatedNoise(stream(1, "noise"))
    found = np.array(
        [gaussian.release([total], clip_norm=1.0, noise_multiplier=NOISE, noise=noise)[0] for _ in range(draws)]
    )
    one = count(learn, rows, dataclasses.replace(bench, noise=SimulatedNoise(stream(1, "noise"))))

    assert one == pytest.approx(found[0], abs=1e-5), "the release is that mechanism at the announced noise"
    square = (((found - quiet) / NOISE) ** 2).sum()
    assert square == pytest.approx(6 * draws, abs=4 * math.sqrt(2 * 6 * draws))


def test_the_number_of_draws_depends_on_public_numbers_only(bench: Workbench) -> None:
    for rows in ([row("skin one")], [row("lung !?", "lung", unit=str(n)) for n in range(9)]):
        silent = Silent()
        count(learner(), rows, dataclasses.replace(bench, noise=silent))
        assert silent.shapes == [(len(POPULATION),)]


def test_what_is_announced_is_one_gaussian_of_sensitivity_one() -> None:
    learn = learner()

    (receipt,) = learn.announce(constants(), 2.5)

    assert receipt == DpReceipt(event=Gaussian(noise_multiplier=2.5, clip_norm=1.0, count=1), unit="record")
    assert (learn.private, learn.steps, learn.clip_norm, learn.noise) == (True, 1, 1.0, None)
    assert learner(noise_multiplier=3.0).noise == 3.0


@pytest.mark.parametrize(
    "receipts",
    [
        (),
        (DpReceipt(event=Gaussian(noise_multiplier=NOISE, clip_norm=2.0), unit="record"),),
        (DpReceipt(event=Gaussian(noise_multiplier=NOISE, clip_norm=1.0, count=2), unit="record"),),
        (DpReceipt(event=Gaussian(noise_multiplier=NOISE, clip_norm=1.0), unit="patient"),),
        (DpReceipt(event=Exponential(epsilon=1.0), unit="record"),),
        (DpReceipt(event=Gaussian(noise_multiplier=NOISE, clip_norm=1.0), unit="record"),) * 2,
    ],
)
def test_receipts_of_something_else_are_refused(bench: Workbench, receipts: tuple[DpReceipt, ...]) -> None:
    with pytest.raises(PolicyRefusal, match="not announced"):
        learner()(PrivateRows([row("skin one")]), START, receipts, constants(), bench)


def test_a_vote_on_nothing_is_refused(bench: Workbench) -> None:
    with pytest.raises(PolicyRefusal, match="no texts to vote on"):
        count(learner(), [row("skin one")], dataclasses.replace(bench, material=Material()))


@pytest.mark.parametrize("wrong", [{"nearest": 0}, {"noise_multiplier": 0.0}, {"embedder": {"kind": "hashed"}}])
def test_sections_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PeVotes(**{"kind": "pe_votes", "embedder": {"kind": "local"}, **wrong})
