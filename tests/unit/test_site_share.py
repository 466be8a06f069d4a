"""The share of a voice: nobody beyond it, nothing dropped that could stay, and a second pass changes nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app.types import Draft, Origin
from strategies.filters.site_share import SiteShare, SiteShareFilter, shares

if TYPE_CHECKING:
    from collections.abc import Sequence

CAPS = st.sampled_from([1.0, 1.1, 1.2, 1.25, 1.5, 2.0, 3.0, 7.5])
COUNTS = st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 60), min_size=1, max_size=7)


def _drafts(voices: Sequence[str]) -> tuple[Draft, ...]:
    return tuple(
        Draft(
            id=f"d{number}",
            instruction=f"text {number}",
            response="",
            origin=Origin(round=1, method="m", code="c", stream=str(number), voice=voice),
        )
        for number, voice in enumerate(voices)
    )


def _filter(**options: float) -> SiteShareFilter:
    return SiteShareFilter(section=SiteShare.model_validate({"kind": "site_share", **options}))


@settings(max_examples=300, deadline=None)
@given(wrote=COUNTS, cap=CAPS)
def test_no_voice_holds_more_than_its_share_and_none_falls_silent(wrote: dict[str, int], cap: float) -> None:
    kept = shares(wrote, max_share=cap)

    most = Fraction(str(cap)) / len(wrote) * sum(kept.values())
    assert kept.keys() == wrote.keys()
    assert all(1 <= kept[voice] <= min(most, wrote[voice]) for voice in wrote)
    assert shares(kept, max_share=cap) == kept, "idempotent"


@settings(max_examples=100, deadline=None)
@given(wrote=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 6), min_size=1, max_size=4), cap=CAPS)
def test_no_other_choice_keeps_more(wrote: dict[str, int], cap: float) -> None:
    """Against all choices there are."""
    part = Fraction(str(cap)) / len(wrote)
    choices = itertools.product(*(range(count + 1) for count in wrote.values()))

    best = max(sum(one) for one in choices if max(one) <= part * sum(one))

    assert sum(shares(wrote, max_share=cap).values()) == best


@pytest.mark.parametrize(
    ("wrote", "cap", "kept"),
    [
        ({"a": 3, "b": 3, "c": 3}, 1.5, {"a": 3, "b": 3, "c": 3}),
        ({"a": 100, "b": 1}, 1.5, {"a": 3, "b": 1}),  # 3 of 4 is 0.75
        ({"a": 100, "b": 2, "c": 2}, 1.5, {"a": 4, "b": 2, "c": 2}),  # 4 of 8 is 1.5 / 3; 5 of 9 is more
        ({"a": 9, "b": 1, "c": 1, "d": 1, "e": 1}, 1.5, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}),  # 2 of 6 is > 0.3
        ({"a": 30, "b": 30, "c": 1, "d": 1, "e": 8}, 1.5, {"a": 6, "b": 6, "c": 1, "d": 1, "e": 6}),
        ({"a": 50}, 1.5, {"a": 50}),
        ({"a": 4, "b": 9}, 1.0, {"a": 4, "b": 4}),
        ({"a": 9, "b": 1}, 2.0, {"a": 9, "b": 1}),
        ({}, 1.5, {}),
    ],
)
def test_shares_by_hand(wrote: dict[str, int], cap: float, kept: dict[str, int]) -> None:
    assert shares(wrote, max_share=cap) == kept


def test_a_share_is_the_decimal_that_was_written() -> None:
    """1.4 / 3 of 45 is 21; in floats it is a little less, in either order of the operations."""
    wrote = {"a": 21, "b": 12, "c": 12}

    assert (int(1.4 / 3 * 45), int(1.4 * 45 / 3)) == (20, 20)
    assert shares(wrote, max_share=1.4) == wrote


def test_a_voice_keeps_its_first_drafts() -> None:
    drafts = _drafts("aabaaaa")

    result = _filter()(drafts, ())

    assert [draft.id for draft in result.kept] == ["d0", "d1", "d2", "d3"]
    assert result.dropped == {f"d{n}": "site_share: beyond 3 of 4 drafts" for n in (4, 5, 6)}


def test_what_was_kept_before_is_not_counted() -> None:
    drafts = _drafts("ab")

    assert _filter()(drafts, _drafts("a" * 50)).kept == drafts


def test_the_merged_adapter_is_one_voice_and_not_capped() -> None:
    drafts = _drafts(["", "", ""])

    assert _filter()(drafts, ()).kept == drafts


def test_with_too_few_voices_left_nothing_is_kept() -> None:
    """A site that is alone after the other filters would teach the round by itself."""
    drafts = _drafts("aaa")

    result = _filter(min_voices=2)(drafts, ())

    assert result.kept == ()
    assert Counter(result.dropped.values()) == {"site_share: voices left 1 < 2": 3}
    assert _filter(min_voices=2)(_drafts("ab"), ()).kept == _drafts("ab")


@settings(max_examples=100, deadline=None)
@given(voices=st.lists(st.sampled_from("abcde"), max_size=60), cap=CAPS)
def test_kept_is_a_subsequence_and_a_second_pass_drops_nothing(voices: list[str], cap: float) -> None:
    drafts = _drafts(voices)
    stage = _filter(max_share=cap)

    result = stage(drafts, ())

    assert result.kept == tuple(draft for draft in drafts if draft.id not in result.dropped)
    assert len(result.kept) + len(result.dropped) == len(drafts)
    again = stage(result.kept, ())
    assert (again.kept, again.dropped) == (result.kept, {})
