"""A vote goes to the nearest texts of its own code, and weighs at most one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import votes
from fl_app.types import CodedText

POPULATION = (
    *(CodedText(code="skin", text="a"), CodedText(code="lung", text="b")),
    *(CodedText(code="skin", text="c"), CodedText(code="skin", text="d")),
)
NAMED = [one.code for one in POPULATION]
BALLOT = votes.Ballot.of(NAMED, np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 1]], np.float32))


def _cast(own: tuple[float, float], code: str, nearest: int) -> list[float]:
    return BALLOT.vote(np.array(own, np.float32), code, nearest=nearest).tolist()


def test_votes_by_hand() -> None:
    half = 1 / math.sqrt(2)

    assert _cast((0, 1), "skin", 1) == [0, 0, 0, 1]
    assert _cast((0, 1), "skin", 2) == [0, 0, half, half]
    assert _cast((1, 0), "skin", 2) == [half, 0, half, 0]
    assert _cast((1, 0), "lung", 1) == [0, 1, 0, 0], "the only text of its code, however far"
    assert _cast((1, 0), "lung", 2) == [0, half, 0, 0], "no second text of that code: the weight stays what it was"
    assert _cast((1, 0), "heart", 1) == [0, 0, 0, 0], "no text of that code"


def test_of_equals_the_first_gets_the_vote() -> None:
    twins = votes.Ballot.of(NAMED, np.ones((4, 2), np.float32))

    assert twins.vote(np.array([1, 0], np.float32), "skin", nearest=1).tolist() == [1, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), nearest=st.integers(1, 6), code=st.sampled_from(["skin", "lung", "heart"]))
def test_a_vote_weighs_at_most_one(seed: int, nearest: int, code: str) -> None:
    rng = np.random.default_rng(seed)
    ballot = votes.Ballot.of(NAMED, rng.normal(size=(4, 2)).astype(np.float32))

    vote = ballot.vote(rng.normal(size=2).astype(np.float32), code, nearest=nearest)

    have = len(ballot.places.get(code, ()))
    assert np.linalg.norm(vote) == pytest.approx(math.sqrt(min(have, nearest) / nearest))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), bound=st.floats(0.1, 10))
def test_a_joint_vote_is_shrunk_and_never_stretched(values: list[float], bound: float) -> None:
    vote = np.array(values)

    found = votes.bounded(vote, bound)

    assert np.linalg.norm(found) == pytest.approx(min(bound, float(np.linalg.norm(vote))))
    assert found @ vote == pytest.approx(float(np.linalg.norm(found) * np.linalg.norm(vote)))


def test_a_joint_vote_by_hand() -> None:
    assert votes.bounded(np.array([3.0, 4.0]), 4.0) == pytest.approx([2.4, 3.2])
    assert votes.bounded(np.array([3.0, 4.0]), 5.0).tolist() == [3.0, 4.0]


def test_names_of_bins_depend_on_place_code_and_text() -> None:
    names = votes.bin_names(POPULATION)
    same_text_twice = (CodedText(code="skin", text="a"), CodedText(code="skin", text="a"))

    assert len(set(names)) == 4
    assert len(set(votes.bin_names(same_text_twice))) == 2
    assert votes.bin_names(POPULATION[::-1])[::-1] != names
    assert votes.bin_names((CodedText(code="lung", text="a"),)) != names[:1]
    assert votes.bin_names((CodedText(code="skin", text="a"),)) == names[:1]
