"""The runner of `make faults`: what counts as a case, what as passed, and when it exits with 0."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fl_app.origin import ROOT

if TYPE_CHECKING:
    from pathlib import Path

MARKED = """
import pytest
@pytest.mark.bar("B7")
@pytest.mark.parametrize("size", range(3))
def test_whole(size): pass
def test_twin(): pass
"""
FAILING = """
import pytest
@pytest.fixture
def broken(): raise OSError("no")
@pytest.fixture
def breaks_later():
    yield
    raise OSError("late")
@pytest.mark.bar("B12")
def test_fails(): assert False
@pytest.mark.bar("B12")
def test_errs(broken): pass
@pytest.mark.bar("B12")
def test_errs_afterwards(breaks_later): pass
@pytest.mark.bar("B12")
def test_skipped(): pytest.skip("not here")
@pytest.mark.bar("B12")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.mark.bar("B12")
def test_passes(): pass
"""
GIVEN = """
import pytest
def test_honest(record_property):
    record_property("bar", {"name": "B9", "passed": 998, "of": 1000})
    assert 998 == 1000
def test_all(record_property): record_property("bar", {"name": "B9", "passed": 50, "of": 50})
@pytest.mark.bar("B9")
def test_property_wins(record_property): record_property("bar", {"name": "B9b", "passed": 7, "of": 7})
def test_claims_all_and_fails(record_property):
    record_property("bar", {"name": "B9", "passed": 10, "of": 10})
    assert False
def test_fails_before_it_counts(record_property): assert False
"""
SLOW = """
import pytest
@pytest.mark.slow
@pytest.mark.bar("B10")
def test_long(): pass
@pytest.mark.bar("B10")
def test_short(): pass
"""


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("faults_runner", ROOT / "benchmarks" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def counted(folder: Path, files: dict[str, str], *more: str) -> tuple[int, dict[str, dict[str, int]]]:
    """Run the runner as a user would, on files of our own, and return its exit code and its last line."""
    for name, source in files.items():
        (folder / name).write_text(source, encoding="utf-8")
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *more, *(str(folder / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_every_marked_item_is_a_case_and_a_twin_is_none(tmp_path: Path) -> None:
    assert counted(tmp_path, {"test_b07_x.py": MARKED}) == (0, {"B7": {"passed": 3, "of": 3}})


def test_what_does_not_pass_counts_and_is_not_passed(tmp_path: Path) -> None:
    code, table = counted(tmp_path, {"test_b12_x.py": FAILING, "test_b07_x.py": MARKED})
    assert (code, table) == (1, {"B7": {"passed": 3, "of": 3}, "B12": {"passed": 1, "of": 6}})
    assert list(table) == ["B7", "B12"], "by number, not by letters"


def test_an_item_may_stand_for_many_cases(tmp_path: Path) -> None:
    code, table = counted(tmp_path, {"test_b09_x.py": GIVEN})
    assert code == 1
    assert table == {"B9": {"passed": 998 + 50, "of": 1000 + 50 + 10 + 1}, "B9b": {"passed": 7, "of": 7}}


def test_slow_cases_are_counted_when_they_are_run(tmp_path: Path) -> None:
    assert counted(tmp_path, {"test_b10_x.py": SLOW}) == (0, {"B10": {"passed": 1, "of": 1}})
    assert counted(tmp_path, {"test_b10_x.py": SLOW}, "--all") == (0, {"B10": {"passed": 2, "of": 2}})


@pytest.mark.parametrize(
    "source", ["import nowhere_at_all", "import pytest\npytest.skip('x', allow_module_level=True)"]
)
def test_a_file_that_cannot_be_read_is_a_case_that_failed(source: str, tmp_path: Path) -> None:
    code, table = counted(tmp_path, {"test_b11_x.py": source, "test_b07_x.py": MARKED})
    assert (code, table["B11"]) == (1, {"passed": 0, "of": 1})


@pytest.mark.parametrize(
    ("table", "exit_code", "expected"),
    [
        ({"B1": {"passed": 2, "of": 2}}, 0, 0),
        ({"B1": {"passed": 1, "of": 2}}, 0, 1),
        ({"B1": {"passed": 2, "of": 2}}, 1, 1),
        ({}, 0, 1),
        ({}, 5, 1),
    ],
)
def test_the_verdict(table: Any, exit_code: int, expected: int) -> None:
    assert runner().verdict(table, exit_code) == expected


def test_only_a_complete_run_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import record

    module, kept = runner(), []
    monkeypatch.setattr(record, "append", kept.append)
    monkeypatch.setattr(module, "CASES", str(tmp_path))
    monkeypatch.setattr(module.pytest, "main", lambda *_, **__: 0)
    monkeypatch.setattr(module.BarCounter, "table", lambda _: {"B1": {"passed": 1, "of": 1}})

    assert module.main(["somewhere/test_b01_x.py"]) == 0
    assert kept == []
    assert module.main([]) == 0
    (line,) = kept
    assert (line["kind"], line["bars"], line["all"]) == ("faults", {"B1": {"passed": 1, "of": 1}}, False)
    assert line["commit"]


def test_the_page_is_made_of_the_last_complete_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import record
    import reliability

    monkeypatch.setattr(record, "lines", lambda _: [])
    assert "Nothing has been counted yet." in reliability.page()
    quick = {"commit": "b", "seconds": 3, "all": False, "bars": {"B1": {"passed": 9, "of": 9}}}
    whole = {"commit": "a", "seconds": 4, "all": True, "bars": {"B9": {"passed": 9999, "of": 10000}}}
    monkeypatch.setattr(record, "lines", lambda _: [whole, quick])
    page = reliability.page()
    assert "Commit a, with the slow cases, 4 seconds." in page
    assert "| B9 | generated configurations: refused with a way out, or read | 9,999 | 10,000 |" in page
    monkeypatch.setattr(record, "lines", lambda _: [quick])
    assert "Commit b, without the slow cases, 3 seconds." in reliability.page()
