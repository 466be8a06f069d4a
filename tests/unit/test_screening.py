"""Filters in order: reasons carry their filter's name, and what was rewritten goes on rewritten."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fl_app.types import Draft, Origin, Screened
from strategies import screening

if TYPE_CHECKING:
    from collections.abc import Sequence

ORIGIN = Origin(round=1, method="m", code="c", stream="0")
DRAFTS = [Draft(id=name, instruction=f"{name} asks Ann Lee", response="", origin=ORIGIN) for name in "abc"]


def masks(drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
    del earlier
    told = tuple(dataclasses.replace(one, instruction=one.instruction.replace("Ann Lee", "[NAME]")) for one in drafts)
    return Screened(kept=told, dropped={})


def drops_b(drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
    del earlier
    return Screened(kept=tuple(one for one in drafts if one.id != "b"), dropped={"b": "too plain"})


def test_a_masked_name_does_not_come_back() -> None:
    value = screening.screen([("pii", masks), ("taste", drops_b)], DRAFTS, [])
    assert value["kept"] == ["a", "c"]
    assert value["dropped"] == {"b": "taste: too plain"}
    left = screening.kept(value, DRAFTS)
    assert [one.instruction for one in left] == ["a asks [NAME]", "c asks [NAME]"]
    assert [one.id for one in left] == ["a", "c"]


def test_nothing_rewritten_leaves_no_key() -> None:
    value = screening.screen([("taste", drops_b)], DRAFTS, [])
    assert value.keys() == {"kept", "dropped"}
    assert screening.kept(value, DRAFTS) == (DRAFTS[0], DRAFTS[2])
