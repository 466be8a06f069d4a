"""The runner of long tables: it goes on where it stopped, repeats nothing, and says what a run cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from fl_app.origin import ROOT

if TYPE_CHECKING:
    from pathlib import Path


class Number(NamedTuple):
    """A cell."""

    value: int

    @property
    def name(self) -> str:
        return f"number-{self.value}"


class Runner:
    """A table of numbers in a folder of its own; number 2 fails."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        self.cells, self.patch, self.began = importlib.import_module("cells"), monkeypatch, []
        self.recorded: list[dict[str, Any]] = []
        record = importlib.import_module("record")
        monkeypatch.setattr(record, "append", lambda line: self.recorded.append(line) or line)
        monkeypatch.setattr(record, "lines", lambda kind: [one for one in self.recorded if one["kind"] == kind])
        monkeypatch.setattr(record, "commit", lambda: "c0ffee")
        self.table = self.cells.Table(
            kind="numbers",
            work=folder / "numbers",
            cells=[Number(value=value) for value in (3, 1, 2)],
            measure=self.measure,
            cell_of=lambda line: Number(value=line["value"]),
        )

    def measure(self, cell: Number) -> dict[str, Any]:
        self.began.append(cell.value)
        return {**cell._asdict(), "wall_s": 1, **({"failed": "two"} if cell.value == 2 else {})}

    def call(self, *words: str) -> None:
        self.patch.setattr("sys.argv", ["table", "--jobs", "1", *words])
        assert self.table.main("A table.") == 0


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path, monkeypatch)


def test_a_second_call_does_what_is_left_in_order_and_repeats_no_failure(runner: Runner) -> None:
    runner.call("--only", "number-1")
    assert runner.began == [1]
    runner.call()
    assert runner.began == [1, 3, 2]
    runner.call()
    assert runner.began == [1, 3, 2]
    assert [len(one["cells"]) for one in runner.recorded] == [1, 3]  # the third call had nothing new to say
    last = runner.recorded[-1]
    assert last["kind"] == "numbers"
    assert [(one["value"], one["commit"], one.get("failed")) for one in last["cells"]] == [
        (1, "c0ffee", None),
        (3, "c0ffee", None),
        (2, "c0ffee", "two"),
    ]


def test_no_cell_begins_after_its_time_and_a_list_begins_none(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.call("--minutes", "-1")
    runner.call("--list")
    assert "0 cells done, 3 left\nnumber-3\nnumber-1\nnumber-2\n" in capsys.readouterr().out
    assert runner.began == runner.recorded == []


def test_a_run_that_cannot_begin_says_why_and_what_it_cost(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[run]\nrounds = 0\n", encoding="utf-8")
    played = runner.cells.play(tmp_path / "config.toml", "never")
    costs = played.costs()
    assert "ConfigInvalid" in costs["failed"]
    assert "run" not in costs
    assert 0 < costs["cpu_s"] < 2 * played.wall_s + 1
