"""The exam: which items are read and asked, and scores that were computed by hand."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app.config import parse
from fl_app.errors import ConfigInvalid, StillroomError
from fl_app.inference import Likelihood
from strategies.exam import Exam, ExamItem, ExamSection, read_exam

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CHOICE = {"id": "c1", "question": "Which herb?", "choices": ["thyme", "sage"], "answer": 1}
FREE = {"id": "f1", "question": "What helps?", "answer": "Rest."}


class FakeModel:
    """Knows the log-likelihood of (question, text) pairs, and what it would write after a question."""

    name = "fake"

    def __init__(self, nats: Mapping[tuple[str, str], float], written: Mapping[str, str] | None = None) -> None:
        self._nats = nats
        self._written = written or {}
        self.asked: list[dict[str, Any]] = []

    def chat(self, user: str) -> str:
        return f"<user>{user}<assistant>"

    def option_likelihood(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Likelihood]]:
        return [
            [Likelihood(log_prob=self._nats[_asked(prompt), text], tokens=1, bytes=len(text.encode())) for text in row]
            for prompt, row in zip(prompts, options, strict=True)
        ]

    def generate(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        self.asked.append(settings)
        return [self._written[_asked(prompt)] for prompt in prompts]


def _asked(prompt: str) -> str:
    assert prompt.startswith("<user>")
    return prompt.removeprefix("<user>").removesuffix("<assistant>")


def _write(folder: Path, *rows: Any) -> Path:
    path = folder / "exam.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def _read(path: Path, *, seed: int = 0, **changes: Any) -> Exam:
    return read_exam(ExamSection(path=str(path), **changes), seed=seed)


def _item(name: str, choices: tuple[str, ...] = (), answer: int | str = 0) -> ExamItem:
    return ExamItem(id=name, question=name, choices=choices, answer=answer)


def _exam(*, choice: Sequence[ExamItem] = (), free: Sequence[ExamItem] = (), **changes: Any) -> Exam:
    settings = {"max_new_tokens": 8, "calibrate": False, **changes}
    return Exam(choice=tuple(choice), free=tuple(free), **settings)


# --- reading


def test_items_with_question_and_answer(tmp_path: Path) -> None:
    exam = _read(_write(tmp_path, CHOICE, {**CHOICE, "id": "c2", "answer": "thyme"}, FREE))

    assert exam.choice == (
        ExamItem(id="c1", question="Which herb?", choices=("thyme", "sage"), answer=1),
        ExamItem(id="c2", question="Which herb?", choices=("thyme", "sage"), answer=0),
    )
    assert exam.free == (ExamItem(id="f1", question="What helps?", choices=(), answer="Rest."),)


@pytest.mark.parametrize(
    ("join_input", "question"), [("append", "Judge the mood.\nProfits fell."), ("input_only", "Profits fell.")]
)
def test_rows_of_a_corpus(tmp_path: Path, join_input: str, question: str) -> None:
    row = {"instruction": "Judge the mood.", "input": "Profits fell.", "output": "Bad.", "source": "news"}
    path = _write(tmp_path, row, {**row, "choices": ["bad", "good"], "answer": "bad"})

    exam = _read(path, join_input=join_input)

    assert exam.free == (ExamItem(id=f"{path}:1", question=question, choices=(), answer="Bad."),)
    assert exam.choice == (ExamItem(id=f"{path}:2", question=question, choices=("bad", "good"), answer=0),)


def test_an_input_that_is_empty_adds_no_line(tmp_path: Path) -> None:
    exam = _read(_write(tmp_path, {"instruction": "What helps?", "input": "", "output": "Rest."}))

    assert exam.free[0].question == "What helps?"


def test_a_line_separator_inside_a_text_is_no_end_of_line(tmp_path: Path) -> None:
    exam = _read(_write(tmp_path, '{"question": "One\u2028two\x85three?", "answer": "Yes."}'))

    assert exam.free[0].question == "One\u2028two\x85three?"


def test_only_the_sources_that_are_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path, {**FREE, "source": "a"}, {**FREE, "id": "f2", "source": "b"}, {**FREE, "id": "f3"})

    assert [item.id for item in _read(path, sources=["b"]).free] == ["f2"]
    with pytest.raises(ConfigInvalid, match=r"sources \['c'\] match nothing in .*exam\.jsonl; it holds: None, a, b"):
        _read(path, sources=["c"])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"answer": "Rest."}, "an exam item needs question and answer; found keys answer"),
        ({"question": "", "answer": "Rest."}, "needs question and answer"),
        ({"question": "What helps?"}, "needs question and answer; found keys question"),
        ({"question": "What helps?", "answer": ""}, "needs question and answer"),
        ({"instruction": "What helps?", "output": ""}, "needs question and answer"),
        ({**CHOICE, "answer": "mint"}, "answer 'mint' is none of its choices"),
        ({**CHOICE, "answer": 2}, "answer 2 is no index of its 2 choices"),
        ({**CHOICE, "answer": -1}, "answer -1 is no index of its 2 choices"),
        ({**CHOICE, "answer": 0.5}, "answer 0.5 is no index of its 2 choices"),
        ({**CHOICE, "answer": True}, "answer True is no index of its 2 choices"),
        ({**CHOICE, "answer": [1]}, r"answer \[1\] is no index of its 2 choices"),
        ({**CHOICE, "choices": ["thyme", ""]}, "one of its choices is empty"),
        ({**CHOICE, "choices": "thyme"}, "choices is a str; expected a list"),
        ('{"question": ', "not JSON"),
        ("[1]", "expected an object, found list"),
    ],
)
def test_an_item_that_cannot_be_read_is_named_by_file_and_line(tmp_path: Path, row: Any, why: str) -> None:
    """The bad item is the third line: one of a source that is not asked for and a blank line come before it."""
    if isinstance(row, dict):
        row = {**row, "source": "a"}
    path = _write(tmp_path, {**FREE, "source": "b"}, "", row, {**FREE, "source": "a"})

    with pytest.raises(StillroomError, match=rf"exam\.jsonl:3: .*{why}"):
        _read(path, sources=["a"])


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"server\.exam\.path: no file at .*nowhere\.jsonl"):
        _read(tmp_path / "nowhere.jsonl")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"exam\.jsonl"):
        _read(_write(tmp_path))


def test_calibration_needs_items_that_share_their_choices(tmp_path: Path) -> None:
    other = {**CHOICE, "id": "c2", "choices": ["sage", "thyme"]}
    alike, mixed = (tmp_path / name for name in ("alike", "mixed"))
    alike.mkdir()
    mixed.mkdir()

    assert _read(_write(alike, CHOICE, {**CHOICE, "id": "c2"}, FREE), calibrate=True).calibrate
    with pytest.raises(ConfigInvalid, match=r"server\.exam\.calibrate = true needs items that share their choices"):
        _read(_write(mixed, CHOICE, other), calibrate=True)


# --- choosing


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    choice = [{**CHOICE, "id": f"c{n:02}"} for n in range(50)]
    free = [{**FREE, "id": f"f{n:02}"} for n in range(50)]
    return _write(tmp_path, *choice, *free)


def test_the_seed_chooses_the_items_and_the_file_orders_them(hundred: Path) -> None:
    exam = _read(hundred, seed=3, choice_items=8, free_items=5)
    chosen = [item.id for item in (*exam.choice, *exam.free)]

    assert (len(exam.choice), len(exam.free)) == (8, 5)
    assert chosen == sorted(chosen)
    assert exam == _read(hundred, seed=3, choice_items=8, free_items=5)
    assert exam != _read(hundred, seed=4, choice_items=8, free_items=5)


def test_more_free_items_do_not_change_the_choice(hundred: Path) -> None:
    one, other = (_read(hundred, choice_items=8, free_items=count) for count in (5, 20))

    assert one.choice == other.choice
    assert {item.id for item in one.free} < {item.id for item in other.free}


def test_none_and_all(hundred: Path) -> None:
    exam = _read(hundred, choice_items=0, free_items=1000)

    assert exam.choice == ()
    assert [item.id for item in exam.free] == [f"f{n:02}" for n in range(50)]
    assert _exam().score(FakeModel({})) == {}


# --- scoring


def test_chance_is_the_expected_share_of_right_guesses() -> None:
    """(1/2 + 1/4) / 2."""
    assert _exam(choice=[_item("a", ("x", "y")), _item("b", ("w", "x", "y", "z"))]).chance == 0.375
    assert _exam().chance == 0.0


PREFERS_THE_SECOND = {("q1", "yes"): -3.0, ("q1", "no!!"): -3.6, ("q2", "yes"): -6.0, ("q2", "no!!"): -2.0}
"""Nats per byte: q1 (-1.0, -0.9), q2 (-2.0, -0.5). As sums, q1 would go to the first option."""


def test_a_choice_is_scored_per_byte() -> None:
    items = [_item("q1", ("yes", "no!!"), 1), _item("q2", ("yes", "no!!"), 0)]

    score = _exam(choice=items).score(FakeModel(PREFERS_THE_SECOND))["choice_accuracy"]

    assert (score.value, score.count, score.higher_is_better) == (0.5, 2, True)


def test_bytes_are_not_characters() -> None:
    """Two characters of four bytes at -2.4 are -0.6 a byte and beat two bytes at -1.4; per character they would not."""
    items = [_item("q", ("éé", "ee"), 0)]

    score = _exam(choice=items).score(FakeModel({("q", "éé"): -2.4, ("q", "ee"): -1.4}))["choice_accuracy"]

    assert score.value == 1.0


def test_calibration_takes_away_what_the_model_prefers_anyway() -> None:
    """Means per option (-1.5, -0.7); what is left is q1 (0.5, -0.2), q2 (-0.5, 0.2): first, then second."""
    items = [_item("q1", ("yes", "no!!"), 0), _item("q2", ("yes", "no!!"), 1)]
    model = FakeModel(PREFERS_THE_SECOND)

    calibrated = _exam(choice=items, calibrate=True).score(model)
    plain = _exam(choice=items).score(model)

    assert calibrated["choice_accuracy"].value == 1.0
    assert calibrated["choice_macro_f1"].value == 1.0
    assert plain["choice_accuracy"].value == 0.5
    assert "choice_macro_f1" not in plain


def test_macro_f1_by_hand() -> None:
    """Calibrated picks are 0 and 1, both right answers 0: F1 of 0 is 2 * 1 / (1 + 2), of 1 it is 0; mean 1/3."""
    items = [_item("q1", ("yes", "no!!"), 0), _item("q2", ("yes", "no!!"), 0)]

    score = _exam(choice=items, calibrate=True).score(FakeModel(PREFERS_THE_SECOND))["choice_macro_f1"]

    assert score.value == pytest.approx(1 / 3)


def test_a_free_answer_is_scored_by_bits_per_byte_and_overlap() -> None:
    """Bits: 4 over 4 bytes and 5 over 2 bytes, in all 9 over 6. Overlap: one answer word for word, one not at all."""
    items = [_item("q1", answer="rest"), _item("q2", answer="no")]
    nats = {("q1", "rest"): -4 * math.log(2), ("q2", "no"): -5 * math.log(2)}
    model = FakeModel(nats, {"q1": "Rest", "q2": "yes"})

    scores = _exam(free=items).score(model)

    assert scores.keys() == {"bits_per_byte", "rouge_l"}
    assert scores["bits_per_byte"].value == pytest.approx(1.5)
    assert not scores["bits_per_byte"].higher_is_better
    assert scores["rouge_l"].value == pytest.approx(0.5)
    assert [(asked["max_new_tokens"], asked["temperature"]) for asked in model.asked] == [(8, 0.0)]


def test_one_token_is_too_short_for_an_overlap() -> None:
    model = FakeModel({("q", "rest"): -1.0})

    assert _exam(free=[_item("q", answer="rest")], max_new_tokens=1).score(model).keys() == {"bits_per_byte"}
    assert model.asked == []


def test_intervals_do_not_depend_on_when_they_are_computed() -> None:
    items = [_item(f"q{n}", answer="rest") for n in range(6)]
    model = FakeModel({(f"q{n}", "rest"): -float(n) for n in range(6)}, {f"q{n}": "rest" for n in range(6)})

    one, other = _exam(free=items).score(model), _exam(free=items).score(model)

    assert one == other
    assert one["bits_per_byte"].low < one["bits_per_byte"].value < one["bits_per_byte"].high
    assert np.isfinite([score.value for score in one.values()]).all()


def test_only_the_models_that_are_named_sit_it() -> None:
    asked = _exam(models=("target", "adapter"))

    names = ("base", "start", "adapter", "professional", "target_round_1", "target_round_12")
    assert [name for name in names if asked.asks(name)] == ["adapter", "target_round_1", "target_round_12"]


def test_without_the_target_there_is_no_exam(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r'server\.exam\.models.*add "target"'):
        parse(ExamSection, {"path": str(tmp_path), "models": ["base"]}, where="server.exam")
