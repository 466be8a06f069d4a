"""The table of federated methods: its errors, closed forms, splits and intervals, and what its page may say."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app import lora, peft_files, releases
from fl_app.origin import ROOT
from fl_app.types import Adapter, AdapterRelease, LoraFactors
from simulations.corpora import CorpusRow

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"blocks.0.q_proj": (5, 3), "blocks.1.v_proj": (4, 6)}
"""Layer -> (d_in, d_out)."""
S_IN, S_OUT = 9, 9


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the scripts of benchmarks/ as modules, by name."""
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def adapter(rng: np.random.Generator, rank: int = 2, alpha: float = 6.0) -> Adapter:
    layers = {
        name: LoraFactors(
            a=rng.standard_normal((rank, d_in)).astype(np.float32),
            b=rng.standard_normal((d_out, rank)).astype(np.float32),
        )
        for name, (d_in, d_out) in SHAPES.items()
    }
    return Adapter(layers=layers, alpha=alpha, base="b" * 64)


def dense(one: Adapter) -> np.ndarray:
    return np.concatenate([lora.delta(one, name).ravel() for name in sorted(one.layers)])


def write_round(folder: Path, uploads: list[Adapter], merged: Adapter, blocks: list[Adapter]) -> None:
    for site, one in enumerate(uploads):
        releases.save(AdapterRelease(adapter=one), None, folder / "releases" / f"site-{site}", base_name="x")
    peft_files.save(merged, folder / "merged", base_name="x")
    if blocks:
        peft_files.save(merged, folder / "start", base_name="x")
    for number, block in enumerate(blocks):
        peft_files.save(block, folder / "blocks" / str(number), base_name="x")


def test_the_error_of_a_round_is_the_dense_one(scripts: Any, tmp_path: Path) -> None:
    figures, rng = scripts("aggregators_figures"), np.random.default_rng(3)
    uploads = [adapter(rng), adapter(rng, rank=1, alpha=2.0), adapter(rng)]
    merged = adapter(rng)
    write_round(tmp_path, uploads, merged, [])
    exact = np.mean([dense(one) for one in uploads], axis=0)
    wanted = np.linalg.norm(dense(merged) - exact) / np.linalg.norm(exact)
    assert figures.product_error(tmp_path) == pytest.approx(wanted, rel=1e-6)


def test_blocks_count_with_the_start(scripts: Any, tmp_path: Path) -> None:
    figures, rng = scripts("aggregators_figures"), np.random.default_rng(4)
    uploads = [adapter(rng), adapter(rng)]
    start = adapter(rng)
    rest = lora.stacked([*uploads, start], [0.5, 0.5, -1.0])
    write_round(tmp_path / "whole", uploads, start, [rest])
    write_round(tmp_path / "half", uploads, start, [lora.stacked([rest], [0.5])])
    assert figures.product_error(tmp_path / "whole") < 1e-6
    missed = np.linalg.norm(0.5 * dense(rest)) / np.linalg.norm(np.mean([dense(one) for one in uploads], axis=0))
    assert figures.product_error(tmp_path / "half") == pytest.approx(missed, rel=1e-5)


def test_a_sum_of_nothing_has_no_relative_error(scripts: Any, tmp_path: Path) -> None:
    one = adapter(np.random.default_rng(5))
    layers = {name: dataclasses.replace(part, b=np.zeros_like(part.b)) for name, part in one.layers.items()}
    zero = dataclasses.replace(one, layers=layers)
    write_round(tmp_path, [zero, zero], zero, [])
    assert scripts("aggregators_figures").product_error(tmp_path) is None


@pytest.mark.parametrize(
    ("method", "up", "down"),
    [
        # per site, in numbers; r = 2, sum of d_in = 9, of d_out = 9, three rounds
        ("fedit", 3 * 36, 3 * 36),
        ("ffa_lora", 3 * 18, 36 + 2 * 18),
        ("rolora", 18 + 18 + 18, 36 + 18 + 18),
        ("flora", 3 * 36, 36 + 2 * (18 + 2 * 36)),
        ("fedex_lora", 3 * 36, 36 + 2 * (36 + 36)),
        ("fed_sb", 3 * 2 * 4, 36 + 3 * 2 * 4),
        ("fedask", 3 * 18, 3 * 36),
    ],
)
def test_closed_forms_by_hand(scripts: Any, method: str, up: int, down: int) -> None:
    rng = np.random.default_rng(6)
    rounds = [[adapter(rng), adapter(rng)] for _ in range(3)]
    found = scripts("aggregators_figures").closed_form(method, rounds)
    assert found == {"up": 2 * 4 * up, "down": 2 * 4 * down}


def test_shards_are_equal_and_hold_few_labels(scripts: Any) -> None:
    bench = scripts("aggregators")
    rows = [CorpusRow(id=str(n), instruction="", output="", code="abc"[n % 3]) for n in range(300)]
    sites = bench.sharded(rows, 0)
    assert sorted(Counter(sites).values()) == [60] * 5
    labels = [{row.code for row, mine in zip(rows, sites, strict=True) if mine == site} for site in set(sites)]
    assert sum(map(len, labels)) < 5 * 3
    assert sites == bench.sharded(rows, 0)
    assert sites != bench.sharded(rows, 1)


def test_every_cell_has_a_name_of_its_own_and_is_found_again(scripts: Any) -> None:
    bench = scripts("aggregators")
    cells = bench.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert all(cell.seed != bench.LOCKED_SEED for cell in cells)
    line = {**dataclasses.asdict(cells[5]), "wall_s": 3}
    assert bench.cell_of(line) == cells[5]
    assert {cell.name for cell in scripts("aggregators_rates").cells()}.isdisjoint(cell.name for cell in cells)


def test_an_interval_is_students(scripts: Any) -> None:
    table = scripts("over_seeds")
    one = table.interval([1.0, 2.0, 3.0])
    assert (one.mean, one.low, one.high) == pytest.approx(
        (2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )
    assert not table.interval([5.0]).apart
    assert table.interval([1.0, 1.1, 1.2]).apart


def test_a_rate_is_the_best_that_was_tuned_and_none_is_guessed(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, record = scripts("aggregators"), scripts("record")

    def tuned(method: str, rate: float, bits: float, **more: Any) -> dict[str, Any]:
        return {**cell(method, 100, bits), "rate": rate, **more}

    told = [
        tuned("fedit", 1e-2, 2.0),
        tuned("fedit", 3e-2, 1.9),
        tuned("fedit", 1e-1, 1.0, failed="no"),
        tuned("fedit", 3e-3, 1.5, private=True),
        tuned("fedit", 1e-3, 1.0, corpus="embedded"),
        tuned("flora", 5e-3, 3.0),
    ]
    known = {"aggregators_rates": [{"cells": []}, {"cells": told}]}
    monkeypatch.setattr(record, "lines", lambda kind: known[kind])

    def rate(method: str, corpus: str = "small", *, private: bool = False) -> float:
        one = bench.Cell(corpus=corpus, split="iid", private=private, method=method, seed=0)
        return bench.tuned_rate(one, "both")

    assert rate("fedex_lora") == 3e-2  # by its schedule
    assert rate("flora") == 5e-3  # its own
    assert rate("fedex_lora", private=True) == 3e-3
    assert rate("fedex_lora", "finance", private=True) == rate("fedit", "embedded") == 1e-3
    told.clear()
    with pytest.raises(LookupError, match="run benchmarks/aggregators_rates"):
        rate("fedit")


def cell(method: str, seed: int, score: float, *, corpus: str = "small") -> dict[str, Any]:
    metric = "choice_accuracy" if corpus == "finance" else "bits_per_byte"
    return {
        "corpus": corpus,
        "split": "iid",
        "private": False,
        "method": method,
        "seed": seed,
        "rate": 0.0,
        "exam": {metric: [score, score - 1, score + 1]},
        "error": [0.1, 0.2],
        "bytes": {"up": 10, "down": 20},
        "closed_form": None,
        "cpu_s": 1.0,
        "epsilon": [math.inf],
        "commit": "c0ffee",
    }


def test_the_best_is_by_the_sign_of_the_metric_and_level_is_paired(scripts: Any) -> None:
    """Seeds differ by much more than methods do: unpaired, nobody would be told apart."""
    table = scripts("aggregators_table")
    scores = {"fedit": (0.0, 0.01, 0.0), "ffa_lora": (-0.3, -0.3, -0.3), "flora": (-0.5, 0.3, -0.31)}
    for corpus, best in (("small", "ffa_lora"), ("finance", "fedit")):
        cells = [
            cell(method, seed, base + moved, corpus=corpus)
            for method, told in scores.items()
            for seed, (base, moved) in enumerate(zip((1.0, 3.0, 9.0), told, strict=True))
        ]
        (group,) = table.groups_of([*cells, {**cell("rolora", 0, -9.0, corpus=corpus), "failed": "no"}])
        metric = group.metrics[0]
        assert group.best(metric) == best
        assert group.level_with(best, metric) == ["flora"]
        assert group.difference("ffa_lora", "fedit", metric).apart
        assert "rolora" not in group.lines


def test_the_lightest_keeps_nine_tenths_of_the_gain(scripts: Any) -> None:
    """Base 3.0, best 2.0: 2.09 keeps enough, 2.11 does not, whatever it sends."""
    table = scripts("aggregators_table")
    scores = {"fedit": (2.0, 90), "ffa_lora": (2.09, 40), "fed_sb": (2.11, 1), "flora": (2.05, 60)}
    cells = [
        {**cell(method, 0, score), "bytes": {"up": up, "down": 1}, "exam_base": {"bits_per_byte": [3.0, 3.0, 3.0]}}
        for method, (score, up) in scores.items()
    ]
    (group,) = table.groups_of(cells)
    assert group.lightest("bits_per_byte") == "ffa_lora"
    for one in cells:
        one["exam_base"] = {"bits_per_byte": [1.5, 1.5, 1.5]}  # nobody gained
    assert table.groups_of(cells)[0].lightest("bits_per_byte") is None
    for one in cells:
        del one["exam_base"]
    assert table.groups_of(cells)[0].lightest("bits_per_byte") is None


def test_the_page_fills_itself_in(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table, record = scripts("aggregators_table"), scripts("record")
    cells = [
        cell(method, seed, 2.0 + seed + gap) for method, gap in (("fedit", 0.0), ("flora", 0.5)) for seed in (0, 1)
    ]
    known: dict[str, Any] = {"aggregators": [{"cells": cells}]}
    monkeypatch.setattr(record, "lines", lambda kind: known.get(kind, []))
    page = table.page()
    assert "| Small model, letters, rows at random, no DP | FedIT | 2.500 [" in page
    assert "The largest error of a round is" in page
    assert "1.0e-01 to 2.0e-01" in page
    known.clear()
    assert "Nothing measured yet." in table.page()


def test_noise_energy_follows_its_formula_for_every_case(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over draws lie within five standard errors of the closed form; with a wrong count of sites, far off."""
    noise = scripts("aggregators_noise")
    monkeypatch.setattr(noise, "DRAWS", 200)
    shapes = {"blocks.0.q_proj": (30, 12), "blocks.1.v_proj": (16, 40)}
    spec = lora.LoraSpec(shapes=shapes, rank=4, alpha=8.0, base="b" * 64)
    for case in noise.CASES:
        rng = np.random.default_rng(7)
        start = noise.started(dataclasses.replace(spec, core="core" in case.noisy), rng)
        drawn = noise.energy(case, start, 3, rng)
        error = np.std(drawn, ddof=1) / math.sqrt(len(drawn))
        assert abs(np.mean(drawn) - noise.formula(case, start, 3)) < 5 * error
        assert abs(np.mean(drawn) - noise.formula(case, start, 2)) > 5 * error
