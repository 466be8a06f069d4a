"""Drafts through every filter in order, and what came of it as a phase keeps it and reads it back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Draft
    from strategies.stages import Filter


def screen(filters: Sequence[tuple[str, Filter]], drafts: Sequence[Draft], earlier: Sequence[Draft]) -> dict[str, Any]:
    """Return the ids that every filter keeps, a reason for every other one, and what was rewritten on the way.

    A reason starts with the name of its filter. What a filter rewrites (`pii` masks names) keeps the id that it came
    with; `rewritten` is there only when there is any.
    """
    left = tuple(drafts)
    dropped: dict[str, str] = {}
    for name, one in filters:
        screened = one(left, earlier)
        for draft, reason in screened.dropped.items():
            dropped[draft] = reason if reason.startswith(name) else f"{name}: {reason}"
        left = screened.kept
    came = {draft.id: draft.instruction for draft in drafts}
    rewritten = {draft.id: draft.instruction for draft in left if draft.instruction != came[draft.id]}
    value: dict[str, Any] = {"kept": [draft.id for draft in left], "dropped": dropped}
    return value | ({"rewritten": rewritten} if rewritten else {})


def kept(value: Mapping[str, Any], drafts: Sequence[Draft]) -> tuple[Draft, ...]:
    """Return the drafts that `screen` kept, as the filters left them."""
    names, rewritten = set(value["kept"]), value.get("rewritten", {})
    return tuple(
        dataclasses.replace(draft, instruction=rewritten.get(draft.id, draft.instruction))
        for draft in drafts
        if draft.id in names
    )
