"""What `make bench-decoding` compares does the same work, and what it records is what the page reads."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from fl_app import inference, lora, lora_start, models, peft_files
from fl_app.config import LoraSection
from fl_app.origin import ROOT
from fl_app.seeds import stream

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("decoding")


def test_all_decoders_with_an_adapter_per_row_write_the_same_tokens(bench: Any) -> None:
    made = bench.make("tiny-random", "float32", "all", 16, 6)
    for adapter in made.adapters:
        for factors in adapter.layers.values():
            factors.b[:] *= 30  # 0.01 is small on purpose: here adapters must change what is written

    written = {name: bench.DECODERS[name](made)() for name in ("per_row", "peft_mixed", "one_by_one")}

    assert written["per_row"] == written["peft_mixed"] == written["one_by_one"]
    assert written["per_row"] != bench.plain(made)()
    assert written["per_row"] != bench.own_one(made)()
    assert bench.own_one(made)() == bench.one_adapter(made)()
    assert bench.plain_static(made)() == bench.plain(made)()
    assert made.index == [row // 2 for row in range(16)]


def test_a_run_leaves_a_line_that_becomes_a_section(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    results.touch()
    monkeypatch.setattr(bench.record, "RESULTS", results)
    monkeypatch.setattr(
        "sys.argv",
        ["decoding.py", "--model", "tiny-random", "--repeats", "1", "--new-tokens", "2", "--cases", "float32-qv"],
    )

    assert bench.main() == 0

    (line,) = [json.loads(one) for one in results.read_text().splitlines()]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert (line["kind"], list(line["cases"])) == ("decoding", ["float32-qv"])
    assert set(line["cases"]["float32-qv"]["tokens_per_s"]) == set(bench.DECODERS)
    told = importlib.import_module("performance").page()
    assert "## Decoding" in told
    assert f"| {line['commit']} |" in told


def test_rows_that_leave_are_measured_on_a_run(bench: Any, tmp_path: Path) -> None:
    frozen = models.load("tiny-random", "bfloat16")
    start = lora_start.initial(
        lora.spec_of(frozen, LoraSection(rank=2, alpha=4.0, targets=("q_proj",))), stream(0, "start")
    )
    folder = tmp_path / "rounds" / "1"
    peft_files.save(start, folder / "merged", base_name="tiny-random")
    (tmp_path / "summary.json").write_text(json.dumps({"models": {"local": {"name": "tiny-random"}}}))
    drafts = [{"origin": {"prompt": f"A letter, number {n}"}} for n in range(6)]
    (folder / "drafts.jsonl").write_text("".join(json.dumps(draft) + "\n" for draft in drafts))
    ending, before = importlib.import_module("ending"), inference.SHRINK

    found = ending.measure(tmp_path, 4, 1)

    assert (found["rows"], found["texts"]) == (4, 8)
    assert found["same_texts"]["loop"] == 8
    assert set(found["over_generate"]) == {"loop", "leaving"}
    assert before == inference.SHRINK
