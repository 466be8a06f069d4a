"""The perplexity benchmark: its figure is the standard one, its corpora do not meet, its table says what was found."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from fl_app import models
from fl_app.config import LoraSection
from fl_app.origin import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.models import FrozenModel

TEXT = "Shares of a mill fell on Monday.\n\nThe bank raised its rate by a quarter point; grain futures gained. " * 4


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: the name of a script of benchmarks/ -> its module."""
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def reference(model: Any, ids: Any, *, window: int, stride: int) -> float:
    """Return perplexity as transformers' own loss gives it, with labels of -100 where a token was scored before.

    The guide counts a token less in every window; that is right for windows that do not overlap, and done here there.
    """
    import torch

    total, count, told = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        part = ids[:, begin:end]
        labels = part.clone()
        labels[:, : -(end - told)] = -100
        with torch.no_grad():
            loss = model(part, labels=labels).loss
        valid = int((labels != -100).sum()) - 1 if begin in {told, 0} else int((labels != -100).sum())
        if valid:
            total, count = total + float(loss) * valid, count + valid
        told = end
        if end == ids.shape[1]:
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("window", "stride"), [(128, 128), (64, 64), (64, 16), (10_000, 10_000), (50, 49)])
def test_perplexity_is_that_of_the_standard_sliding_evaluation(
    frozen: FrozenModel, scripts: Any, window: int, stride: int
) -> None:
    import torch

    ids = frozen.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = scripts("distil_ppl").sliding_perplexity(frozen.model, ids, window=window, stride=stride)
    assert found == pytest.approx(reference(frozen.model, torch.tensor([ids]), window=window, stride=stride), rel=1e-5)


def test_a_shorter_window_sees_less(frozen: FrozenModel, scripts: Any) -> None:
    """The twin: perplexities of different windows are different numbers."""
    ids = frozen.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    sliding = scripts("distil_ppl").sliding_perplexity
    assert sliding(frozen.model, ids, window=16, stride=16) != pytest.approx(
        sliding(frozen.model, ids, window=200, stride=200), rel=1e-3
    )


@pytest.mark.data
def test_no_test_headline_is_private_and_no_headline_is_public(scripts: Any) -> None:
    bench = scripts("distil_ppl")
    texts = bench.read_texts(bench.DATA)
    assert len(texts.private) == len(set(texts.private)) == 3000
    assert len(texts.test) == 250
    assert not set(texts.private) & set(texts.test)
    together = "\n".join(texts.public)
    assert not any(one in together for one in (*texts.private, *texts.test))


def test_the_table_says_what_was_measured(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-computed: the geometric mean of 4 and 9 is 6."""
    record, shown = scripts("record"), scripts("distil_table")
    path = tmp_path / "results.jsonl"
    path.write_text("", encoding="utf-8")
    monkeypatch.setattr(record, "RESULTS", path)
    assert shown.table() == ["Nothing measured yet."]

    def cell(name: str, seed: int, value: float, **more: Any) -> dict[str, Any]:
        figures = {"stream": value, "headline": value + 1, "low": value - 1, "high": value + 2}
        return {"cell": name, "seed": seed, "cpu_seconds": 5, **figures, **more}

    cells = [cell("dp_sgd", 0, 4.0, epsilon=2.0), cell("dp_sgd", 1, 9.0, epsilon=2.0), cell("student", 0, 30.0)]
    setting = scripts("distil_ppl").SETTING
    line = {"kind": "distil_ppl", "commit": "abc", "setting": setting, "texts": {"private": 3, "test": 2}}
    path.write_text(json.dumps({**line, "cells": [*cells, cell("half_teacher", 0, 1.0)]}) + "\n", encoding="utf-8")
    table = shown.table()
    assert "Commit abc, seeds 0, 1, 20 seconds" in table[0]
    assert table[-2:] == [
        "| student, healed on public text | none | 30.0 | 31.0 [29.0, 32.0] |",
        "| student, DP-LoRA | 2 | 6.0 | 7.1 [3.0, 11.0] |",
    ]


def test_every_cell_has_a_row_or_is_an_ingredient(scripts: Any) -> None:
    cells = set(scripts("distil_ppl").CELLS)
    assert cells - set(scripts("distil_table").NAMES) == {"half_teacher"}


def test_the_teachers_layers_exist_where_the_students_are_cut_from(scripts: Any) -> None:
    """Block numbers and first layers lie within the models they are of."""
    setting = scripts("distil_ppl").SETTING
    assert sorted(setting["blocks"]) == setting["blocks"] == sorted(set(setting["blocks"]))
    assert setting["blocks"][-1] < 30
    assert setting["first_layer"]["student"] < len(setting["blocks"])
    LoraSection(rank=setting["rank"], alpha=1.0, targets=("q_proj",), first_layer=setting["first_layer"]["teacher"])
    assert setting["teacher"] in models.PACKAGED
