"""Is it unbreakable? The cases of every reliability bar, counted.

    python benchmarks/faults.py              every case that is not slow; recorded
    python benchmarks/faults.py --all        the slow ones too (soak, real processes); recorded
    python benchmarks/faults.py tests/faults/test_b06_teacher.py      those cases alone, and nothing is recorded

The cases are the tests of `tests/faults`, run in this process. An item marked `bar("B7")` is one case. An item that
stands for many, such as 10,000 configurations, gives its count itself, as the property `bar`:
`record_property("bar", {"name": "B9", "passed": 9998, "of": 10000})`.

| the item                                       | counts as                                             |
| ---------------------------------------------- | ----------------------------------------------------- |
| passes                                         | passed, or what its property says                     |
| fails, errs, is skipped or expected to fail    | not passed; a property that claims all passed is void |
| gives neither marker nor property, and passes  | nothing: it tests the tests                           |
| gives neither, and does not pass               | one case not passed, of the bar in its file's name    |
| is a file that cannot be read                  | the same                                              |

The last line is one JSON object, {"B1": {"passed": 61, "of": 61}, ...}; a complete run appends it to `results.jsonl`
as kind "faults". The exit code is 0 only when everything passed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

ROOT = Path(__file__).resolve().parent.parent
CASES = "tests/faults"
QUICK = "not slow and not model and not data"
EVERYTHING = "not model and not data"
_NAME = re.compile(r"B(\d+)([a-z]?)")
_FILE = re.compile(r"test_b(\d+)")


@dataclass(slots=True)
class _Item:
    """One pytest item: the bar of its marker or file, whether all its phases passed, and the counts it gave itself."""

    bar: str
    marked: bool
    passed: bool = True
    called: bool = False
    given: dict[str, Counter[str]] = field(default_factory=dict)


class BarCounter:
    """A pytest plugin that counts cases by bar; `table()` is the result."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, str], _Item] = {}
        self._unreadable: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note the bar of every item."""
        for item in items:
            marker = item.get_closest_marker("bar")
            name = str(marker.args[0]) if marker and marker.args else ""
            self._items[_key(item)] = _Item(bar=name or _of_file(item.path), marked=bool(name))

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Forget what is not run."""
        for item in items:
            self._items.pop(_key(item), None)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Count a file that cannot be read, or that skips itself, as one case that did not pass."""
        report = yield
        if not report.passed:
            self._unreadable[_of_file(collector.path)] += 1
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of an item."""
        item = self._items[_key(report)]
        item.passed = item.passed and report.passed and not hasattr(report, "wasxfail")
        item.called = item.called or report.when == "call"
        given: dict[str, Counter[str]] = {}
        for name, value in report.user_properties:  # each report holds all that were given so far
            if name == "bar":
                one: Any = value
                given.setdefault(str(one["name"]), Counter()).update(passed=int(one["passed"]), of=int(one["of"]))
        item.given = given or item.given

    def table(self) -> dict[str, dict[str, int]]:
        """Return cases passed and run by bar, in order of their numbers."""
        table: dict[str, Counter[str]] = {}
        for item in self._items.values():
            passed = item.passed and item.called
            for name, counts in item.given.items():
                claimed = counts["passed"] if passed or counts["passed"] < counts["of"] else 0
                table.setdefault(name, Counter()).update(passed=claimed, of=counts["of"])
            if not item.given and (item.marked or not passed):
                table.setdefault(item.bar, Counter()).update(passed=int(passed), of=1)
        for name, count in self._unreadable.items():
            table.setdefault(name, Counter()).update(of=count)
        return {name: {"passed": table[name]["passed"], "of": table[name]["of"]} for name in sorted(table, key=_order)}


def _key(one: pytest.Item | pytest.TestReport) -> tuple[str, str]:
    """Return what names an item: outside of the root its node id lacks the file."""
    return one.location[0], one.nodeid


def _of_file(path: Path) -> str:
    found = _FILE.match(path.name)
    return f"B{int(found[1])}" if found else "none"


def _order(name: str) -> tuple[int, str]:
    found = _NAME.fullmatch(name)
    return (int(found[1]), found[2]) if found else (sys.maxsize, name)


def verdict(table: dict[str, dict[str, int]], exit_code: int) -> int:
    """Return 0 when pytest is content, at least one case ran, and every case passed; else 1."""
    complete = bool(table) and all(one["passed"] == one["of"] for one in table.values())
    return 0 if exit_code == 0 and complete else 1


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the slow cases too")
    parser.add_argument("tests", nargs="*", help="files or items; then nothing is recorded")
    arguments = parser.parse_args(argv)
    import record  # beside this file; `benchmarks` is also a package that Opacus installs

    commit, began, counter = record.commit(), time.monotonic(), BarCounter()
    chosen = arguments.tests or [str(ROOT / CASES)]
    words = ["-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    code = int(pytest.main([*words, "-m", EVERYTHING if arguments.all else QUICK, *chosen], plugins=[counter]))
    table = counter.table()
    if not arguments.tests:
        seconds = round(time.monotonic() - began)
        record.append({"kind": "faults", "commit": commit, "all": arguments.all, "bars": table, "seconds": seconds})
    sys.stdout.flush()
    print(json.dumps(table), flush=True)
    return verdict(table, code)


if __name__ == "__main__":
    sys.exit(main())
