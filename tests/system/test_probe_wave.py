"""The last wave: sites score the target. What is no honest score is named, and the mean is of the others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fl_app import wire
from fl_app.types import Probe, Refusal
from tests.faults.hostile import Hostile, Stage, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["stage"]

HONEST = Probe(site="inn", round=1, items=1, bits_per_byte=2.0)
LONE = [("farm", 2.0), ("mill", 2.0)]


def _says(**changes: Any) -> Callable[[Message, Message], Sequence[Message]]:
    def twist(asked: Message, _: Message) -> Sequence[Message]:
        return [Message(wire.pack_reply(dataclasses.replace(HONEST, **changes)), reply_to=asked)]

    return twist


def _broken(asked: Message, _: Message) -> Sequence[Message]:
    return [Message(Error(2, "Traceback: the row says\x1b[2J"), reply_to=asked)]


def _odd(asked: Message, _: Message) -> Sequence[Message]:
    return [Message(RecordDict({"secrets": ConfigRecord({"row": "text"})}), reply_to=asked)]


def _twice(asked: Message, reply: Message) -> Sequence[Message]:
    return [reply, *_says(bits_per_byte=900.0)(asked, reply)]


def _refuses(asked: Message, _: Message) -> Sequence[Message]:
    return [Message(wire.pack_reply(Refusal(site="inn", round=1, code="rows", incident="x")), reply_to=asked)]


@pytest.mark.parametrize(
    ("twist", "told"),
    [
        (_says(), ""),
        (_says(site="farm"), "site"),
        (_says(round=2), "site"),
        (_says(bits_per_byte=1e9), "size"),
        (_broken, "error"),
        (_odd, "keys"),
    ],
    ids=["honest", "another's", "another round's", "no score", "an error", "something else"],
)
def test_a_score_that_is_none_is_named(stage: Stage, twist: Any, told: str) -> None:
    events = stage.play(Hostile(twist, wave="evaluate")).events

    probes = [event for event in events if event["event"] == "probe"]
    assert [(one["site"], one["bits_per_byte"]) for one in probes if "rule" not in one] == (
        LONE if told else [("farm", 2.0), ("inn", 2.0), ("mill", 2.0)]
    )
    assert [(one["site"], one["rule"]) for one in probes if "rule" in one] == ([("inn", told)] if told else [])
    assert "Traceback" not in str(events)


def test_a_second_score_does_not_count(stage: Stage) -> None:
    played = stage.play(Hostile(_twice, wave="evaluate"))

    assert {one["bits_per_byte"] for one in played.events if one["event"] == "probe"} == {2.0}
    strays = [(one["site"], one["rule"]) for one in played.events if one["event"] == "stray"]
    assert strays == [("inn", "duplicate")]


def test_a_site_that_refuses_has_no_score(stage: Stage) -> None:
    played = stage.play(Hostile(_refuses, wave="evaluate"))

    assert [one["site"] for one in played.events if one["event"] == "probe"] == ["farm", "mill"]
