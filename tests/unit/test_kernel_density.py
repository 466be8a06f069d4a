"""Drafts near the sites' private texts stay, by the noisy sum alone; without a sum the round has no result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fl_app.embeddings import LocalStates
from fl_app.errors import RoundFailed
from fl_app.kernel_features import kernel_features
from fl_app.kernel_sum import KernelSumSection
from fl_app.types import Draft, Origin, VectorRelease
from strategies.filters import AnyFilter
from strategies.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fl_app.models import FrozenModel
    from fl_app.types import Screened

PRIVATE = ["zz zz zz", "zz zz zz zz", "zz zz"]
NEAR, FAR = ["zz zz zz zz zz", "zz zz z"], ["QQ!! QQ!!", "aaaaaaaaaaaa", "0909 0909"]
DIM, BANDWIDTH, SEED = 2048, 0.4, 3


@pytest.fixture
def lab(frozen: FrozenModel) -> Iterator[Lab]:
    one = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=None,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=4,
        public_words=frozenset(),
    )
    yield one
    one.close()


def survey(
    frozen: FrozenModel, texts: Sequence[str], *, noise: float = 0.0, seed: int = SEED, **changes: Any
) -> VectorRelease:
    """What a site would send: the sum of its texts' features, and noise."""
    vectors = LocalStates(kind="local").build(frozen)(texts, alone=True)
    total = kernel_features(vectors, DIM, changes.pop("bandwidth", BANDWIDTH), seed, **changes).sum(axis=0)
    noisy = total + noise * np.random.default_rng(0).standard_normal(DIM)
    return VectorRelease(vectors={"kernel": noisy.astype(np.float32)})


def drafts(texts: Sequence[str], codes: Sequence[str] = ()) -> list[Draft]:
    named = codes or ["c"] * len(texts)
    return [
        Draft(id=f"d{n}", instruction=text, response="", origin=Origin(round=1, method="m", code=code, stream=str(n)))
        for n, (text, code) in enumerate(zip(texts, named, strict=True))
    ]


def screen(lab: Any, found: Sequence[Draft], **changes: Any) -> Screened:
    tree: dict[str, Any] = {"kind": "kernel_density", "embedder": {"kind": "local"}, "keep": 2}
    tree |= {"dim": DIM, "bandwidth": BANDWIDTH, "seed": SEED, **changes}
    section: Any = TypeAdapter(AnyFilter).validate_python(tree)
    return section.build(lab)(found, ())


def test_drafts_near_private_text_stay_in_their_order(lab: Lab, frozen: FrozenModel) -> None:
    lab.surveys = {"abbey": survey(frozen, PRIVATE)}

    found = screen(lab, drafts([FAR[0], NEAR[0], FAR[1], NEAR[1], FAR[2]]))

    assert [one.instruction for one in found.kept] == NEAR
    assert set(found.dropped) == {"d0", "d2", "d4"}
    assert all(reason.startswith("kernel_density: ") for reason in found.dropped.values())


def test_far_ones_stay_where_the_private_texts_are_far(lab: Lab, frozen: FrozenModel) -> None:
    """The twin of the test above: the same drafts, another survey."""
    lab.surveys = {"abbey": survey(frozen, [FAR[0], FAR[0], FAR[2]])}

    found = screen(lab, drafts([FAR[0], NEAR[0], FAR[1], NEAR[1], FAR[2]]))

    assert [one.instruction for one in found.kept] == [FAR[0], FAR[2]]


def test_a_seed_that_is_not_the_sites_makes_the_sum_mean_nothing(lab: Lab, frozen: FrozenModel) -> None:
    """With the right seed the two near ones win always; with 20 wrong ones they do not."""
    lab.surveys = {"abbey": survey(frozen, PRIVATE)}
    found = drafts([*FAR, *NEAR])

    wins = [[one.instruction for one in screen(lab, found, seed=100 + n).kept] == NEAR for n in range(20)]

    assert sum(wins) < 15


def test_the_kernel_is_the_configured_one(lab: Lab, frozen: FrozenModel) -> None:
    found, told = drafts([*FAR, *NEAR]), {"kernel": "laplacian", "bandwidth": 8.0}
    for seed in range(5):
        lab.surveys = {"abbey": survey(frozen, PRIVATE, seed=seed, **told)}
        assert [one.instruction for one in screen(lab, found, seed=seed, **told).kept] == NEAR


def test_noise_as_large_as_the_sum_drowns_it(lab: Lab, frozen: FrozenModel) -> None:
    """The density of a near text is at most 3; noise of 0.01 leaves the order, noise of 1000 does not always."""
    found, wins = drafts([*FAR, *NEAR]), []
    for seed in range(10):
        for noise in (0.01, 1000.0):
            lab.surveys = {"abbey": survey(frozen, PRIVATE, noise=noise, seed=seed)}
            wins.append([one.instruction for one in screen(lab, found, seed=seed).kept] == NEAR)

    assert all(wins[0::2])
    assert not all(wins[1::2])


def test_the_sites_sums_are_added(lab: Lab, frozen: FrozenModel) -> None:
    """One site alone has more texts of the far kind; with the other's the near kind wins."""
    lab.surveys = {"abbey": survey(frozen, [FAR[0], FAR[0], NEAR[0]])}
    assert [one.instruction for one in screen(lab, drafts([FAR[0], NEAR[0]]), keep=1).kept] == [FAR[0]]

    lab.surveys = {**lab.surveys, "brook": survey(frozen, [NEAR[0]] * 4)}
    assert [one.instruction for one in screen(lab, drafts([FAR[0], NEAR[0]]), keep=1).kept] == [NEAR[0]]


def test_every_code_has_its_own_places(lab: Lab, frozen: FrozenModel) -> None:
    lab.surveys = {"abbey": survey(frozen, PRIVATE)}
    found = drafts([*NEAR, FAR[0], FAR[1]], ["skin", "skin", "lung", "lung"])

    by_code = screen(lab, found, keep=1)
    by_all = screen(lab, found, keep=2, by="all")

    assert {one.origin.code for one in by_code.kept} == {"skin", "lung"}
    assert {one.origin.code for one in by_all.kept} == {"skin"}


def test_the_survey_is_read_when_the_drafts_are_judged(lab: Lab, frozen: FrozenModel) -> None:
    """A filter is built before any site has answered."""
    tree = {"kind": "kernel_density", "embedder": {"kind": "local"}, "keep": 1, "dim": DIM, "bandwidth": BANDWIDTH}
    stage = TypeAdapter[Any](AnyFilter).validate_python({**tree, "seed": SEED}).build(lab)
    with pytest.raises(RoundFailed, match=r"no site has sent a survey.*Way out"):
        stage(drafts(FAR), ())

    lab.surveys = {"abbey": VectorRelease(vectors={"codes": np.ones(3, np.float32)})}
    with pytest.raises(RoundFailed, match="no site has sent a survey"):
        stage(drafts(FAR), ())

    lab.surveys = {"abbey": survey(frozen, PRIVATE)}
    assert len(stage(drafts(FAR), ()).kept) == 1


def test_a_survey_of_another_length_is_refused(lab: Lab, frozen: FrozenModel) -> None:
    lab.surveys = {"abbey": survey(frozen, PRIVATE)}

    with pytest.raises(RoundFailed, match=r"dim = 64, and the surveys are of length 2048"):
        screen(lab, drafts(FAR), dim=64)


@pytest.mark.parametrize("wrong", [{"dim": 7}, {"keep": 0}, {"bandwidth": 0.0}, {"kernel": "cosine"}])
def test_sections_that_make_no_sense_are_refused(wrong: dict[str, Any], lab: Lab) -> None:
    with pytest.raises(ValidationError):
        screen(lab, [], **wrong)


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("embedder", {"kind": "minilm"}),
        ("embedder", {"kind": "local", "max_tokens": 64}),
        ("dim", 2048),
        ("bandwidth", 0.9),
        ("kernel", "laplacian"),
        ("seed", 1),
    ],
)
def test_two_sums_are_the_same_in_every_key_or_not_at_all(key: str, other: Any) -> None:
    one = KernelSumSection.model_validate({"embedder": {"kind": "local"}})
    wanted = TypeAdapter[Any](AnyFilter).validate_python(
        {"kind": "kernel_density", "keep": 7, "embedder": {"kind": "local"}}
    )

    assert wanted.same_sum(one) == one.same_sum(wanted) == ""
    assert wanted.same_sum(KernelSumSection.model_validate({"embedder": {"kind": "local"}, key: other})) == key
