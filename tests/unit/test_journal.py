"""What stands in a run directory is JSON that any reader takes, infinite figures included."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from fl_app import journal
from fl_app.types import Score

if TYPE_CHECKING:
    from pathlib import Path

SCORE = Score(value=1.0, low=-math.inf, high=math.inf, count=3, higher_is_better=True)
VALUE: dict[str, Any] = {
    "spent": math.inf,
    "low": [-math.inf, 0.5, (math.nan,)],
    "score": SCORE,
    "none": None,
    "whole": 3,
    "true": True,
    "set": {"a"},
    "infinity": "Infinity",
}
PLAIN = {
    "spent": "inf",
    "low": ["-inf", 0.5, ["nan"]],
    "score": {"value": 1.0, "low": "-inf", "high": "inf", "count": 3, "higher_is_better": True},
    "none": None,
    "whole": 3,
    "true": True,
    "set": ["a"],
    "infinity": "Infinity",
}


def _strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_text_in_every_kind_of_file(tmp_path: Path) -> None:
    journal.write_json(tmp_path / "one.json", VALUE)
    journal.write_lines(tmp_path / "many.jsonl", [VALUE, VALUE])
    journal.Journal(tmp_path).event("told", **VALUE)

    assert _strict((tmp_path / "one.json").read_text()) == PLAIN
    assert [_strict(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()] == [PLAIN, PLAIN]
    told = _strict((tmp_path / "journal.jsonl").read_text())
    assert told == {"event": "told", "t": told["t"], **PLAIN}


def test_the_library_alone_would_write_what_is_no_json() -> None:
    """The twin."""
    with pytest.raises(AssertionError, match="Infinity"):
        _strict(json.dumps({"spent": math.inf}))


def test_the_report_reads_what_is_written() -> None:
    from simulations.report.fields import number_of

    assert number_of("inf") == math.inf
    assert number_of("nan") is None


@pytest.mark.parametrize("value", [b"x", object(), 1j, Score])
def test_what_does_not_belong_there_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="does not belong into a run directory"):
        journal.write_json(tmp_path / "one.json", {"value": value})
    assert list(tmp_path.iterdir()) == []
