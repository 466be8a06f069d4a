"""The packaged model and the shipped adapters: what the demo rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fl_app import models, peft_files
from fl_app.origin import ROOT
from simulations.corpus.write import write_corpus
from strategies.exam import ExamSection, read_exam
from strategies.lab import Lab

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.model

NAME = "smollm2-135m-instruct"


def test_base_is_at_chance_and_the_professional_is_not(tmp_path: Path) -> None:
    frozen = models.load(NAME, "bfloat16")
    adapter = peft_files.load(ROOT / "simulations" / "corpus" / "professional", base=frozen.resolved.sha256)
    write_corpus(tmp_path)
    exam = read_exam(ExamSection(path=str(tmp_path / "exam.jsonl"), choice_items=80, free_items=0), seed=0)
    lab = Lab(
        local=frozen,
        professional=frozen,
        professional_adapter=adapter,
        professional_name="professional",
        system="",
        threads=1,
        batch_rows=32,
        public_words=frozenset(),
    )

    base = exam.score(lab.local_with(None, "base"))["choice_accuracy"]
    professional = exam.score(lab.professional)["choice_accuracy"]
    lab.close()

    assert base.low <= exam.chance <= base.high
    assert professional.low > base.high


@pytest.mark.parametrize("name", ["professional", "start"])
def test_shipped_adapters_are_for_the_packaged_model(name: str) -> None:
    frozen = models.load(NAME, "bfloat16")
    adapter = peft_files.load(ROOT / "simulations" / "corpus" / name)

    assert adapter.base == frozen.resolved.sha256
