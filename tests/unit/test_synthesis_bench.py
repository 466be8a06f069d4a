"""The page of the synthesis table: what it says of seeds, and of cells without a figure."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from fl_app.origin import ROOT


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("synthesis_table")


def cell(method: str, seed: int, mauve: float | None, **more: Any) -> dict[str, Any]:
    return {
        "corpus": "finance", "rows": 250, "epsilon": 8.0, "method": method, "seed": seed, "commit": "c", "kept": 3,
        "written": 4, "bytes": {"up": {"a": 1_000_000}}, "spent": {"site-0": 8.0}, "cpu_s": 120.0,
        "mauve_small": mauve and [mauve, mauve - 0.1, mauve + 0.1],
        "exam_target": {"choice_accuracy": [0.5, 0.4, 0.6]}, **more,
    }  # fmt: skip


def told(table: Any, monkeypatch: pytest.MonkeyPatch, cells: list[dict[str, Any]]) -> str:
    found = {"synthesis": [{"cells": cells}], "distil_ppl": []}
    monkeypatch.setattr(table.record, "lines", lambda kind: found.get(kind, []))
    return table.page()


def test_methods_with_several_seeds_are_told_apart_or_not(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        *(cell("invisible_ink", seed, 0.9 + seed / 100) for seed in range(3)),
        *(cell("dp_lora", seed, 0.3 + seed / 100) for seed in range(3)),
        *(cell("private_prediction", seed, 0.6 + seed / 4) for seed in range(3)),
        cell("epsvec", 0, 0.99),  # one seed: in the table, in no comparison
        cell("zero_shot", 0, 0.99, rows=0, epsilon=0.0),
    ]
    page = told(table, monkeypatch, cells)
    (row,) = [line for line in page.splitlines() if line.startswith("| 250 | 8 | MAUVE, 36 a side")]
    _, _, _, _, best, below, level, _ = (part.strip() for part in row.split("|"))
    assert best == "InvisibleInk at the site"
    assert below == "DP-LoRA, then sampling (0.600 [0.600, 0.600])"
    assert level.startswith("private prediction at the site (0.060 [")
    exam = next(line for line in page.splitlines() if line.startswith("| 250 | 8 | exam"))
    assert [part.strip() for part in exam.split("|")][5:7] == [
        "-",
        "InvisibleInk at the site (0.000 [0.000, 0.000]); private prediction at the site (0.000 [0.000, 0.000])",
    ]


def test_without_seeds_there_is_no_comparison(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = told(table, monkeypatch, [cell("dp_lora", 0, 0.3), cell("epsvec", 0, None)])
    assert "Over seeds" not in page
    assert "| 250 | 8 | dataset vectors (EPSVec) | 3 / 4 | - | - | - |" in page


def test_minutes_are_of_the_processor_and_absent_where_not_measured(
    table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = cell("epsvec", 0, 0.2)
    del old["cpu_s"]
    page = told(table, monkeypatch, [cell("dp_lora", 0, 0.3), old])
    assert "| 2.0 | 1.00 |" in page
    assert "| - | 1.00 |" in page


def test_nothing_measured_is_said(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.record, "lines", lambda _: [])
    assert "Nothing measured yet." in table.page()
