"""Scores a model on public sets: multiple choice by likelihood, free answers by overlap and by bits per byte.

A choice is scored by the length-normalised log-likelihood of the whole option (nats per byte) after the chat prompt;
letters and first tokens are collapsed in small models (specs `models-and-data.md` 4.4). With `calibrate`, the mean
score of each option over the set is subtracted first (batch calibration, Zhou et al. 2023), which is meaningful only
where all items share their options, such as sentiment.

Items are JSON lines: {question, choices, answer: index or text} or {question, answer: text}; rows of a corpus
({instruction, input, output, choices, answer, source}) are read as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field, field_validator

from fl_app import journal
from fl_app.config import Section
from fl_app.errors import ConfigInvalid
from fl_app.metrics.accuracy import accuracy
from fl_app.metrics.bits_per_byte import bits_per_byte
from fl_app.metrics.macro_f1 import macro_f1
from fl_app.metrics.rouge import rouge_l
from fl_app.seeds import stream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Score
    from strategies.lab import TextModel


Examined: TypeAlias = Literal["base", "start", "adapter", "target", "professional"]

EXAMINED: tuple[Examined, ...] = ("base", "start", "adapter", "target", "professional")


class ExamSection(Section):
    """[server.exam]: a file of public items, and how many of each kind are asked (0: none).

    `models` are the ones that sit it; a table of many runs asks those that are the same in all of them once.
    """

    path: str
    choice_items: Annotated[int, Field(ge=0)] = 120
    free_items: Annotated[int, Field(ge=0)] = 24
    max_new_tokens: Annotated[int, Field(ge=1)] = 48
    sources: list[str] = Field(default_factory=list)
    calibrate: bool = False
    join_input: Literal["append", "input_only"] = "append"
    models: list[Examined] = Field(default_factory=lambda: list(EXAMINED))

    @field_validator("models")
    @classmethod
    def _target_is_asked(cls, value: list[Examined]) -> list[Examined]:
        if "target" not in value:
            raise ValueError('the target is what a run is for, and its score ends every round; add "target"')
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamItem:
    """A public question. `choices` is empty for a free answer; `answer` is then the reference text."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The items of one run, chosen by the run's seed."""

    choice: tuple[ExamItem, ...]
    free: tuple[ExamItem, ...]
    max_new_tokens: int
    calibrate: bool
    models: tuple[Examined, ...] = EXAMINED

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing."""
        return float(np.mean([1 / len(item.choices) for item in self.choice])) if self.choice else 0.0

    def asks(self, name: str) -> bool:
        """Whether the model that a run calls `name` sits the exam: "base", "adapter", "target_round_3"."""
        return name in self.models or (name.startswith("target_round_") and "target" in self.models)

    def score(self, model: TextModel) -> Mapping[str, Score]:
        """Return the model's scores by metric: choice_accuracy, choice_macro_f1, rouge_l, bits_per_byte."""
        scores: dict[str, Score] = {}
        if self.choice:
            picked = self._pick(model)
            right = [int(item.answer) for item in self.choice]
            scores["choice_accuracy"] = accuracy(picked, right)
            if self.calibrate:
                scores["choice_macro_f1"] = macro_f1(picked, right, rng=stream(0, "exam", "macro_f1"))
        if self.free:
            prompts = [model.chat(item.question) for item in self.free]
            references = [str(item.answer) for item in self.free]
            likelihoods = [row[0] for row in model.option_likelihood(prompts, [[text] for text in references])]
            scores["bits_per_byte"] = bits_per_byte(
                [one.log_prob for one in likelihoods],
                [one.bytes for one in likelihoods],
                rng=stream(0, "exam", "bits_per_byte"),
            )
            if self.max_new_tokens > 1:
                greedy = np.random.default_rng(0)
                answers = model.generate(
                    prompts, max_new_tokens=self.max_new_tokens, temperature=0.0, top_p=1.0, rng=greedy
                )
                scores["rouge_l"] = rouge_l(answers, references, rng=stream(0, "exam", "rouge_l"))
        return scores

    def _pick(self, model: TextModel) -> list[int]:
        prompts = [model.chat(item.question) for item in self.choice]
        table = model.option_likelihood(prompts, [item.choices for item in self.choice])
        per_byte = [np.array([option.log_prob / max(1, option.bytes) for option in row]) for row in table]
        if self.calibrate:
            mean = np.mean(per_byte, axis=0)
            per_byte = [row - mean for row in per_byte]
        return [int(row.argmax()) for row in per_byte]


def read_exam(section: ExamSection, *, seed: int) -> Exam:
    """Return the exam of a run: a seeded choice of items of the file.

    Raises: ConfigInvalid when the file is missing, an item cannot be read, or `sources` leaves nothing.
    """
    path = Path(section.path)
    if not path.is_file():
        raise ConfigInvalid(f"server.exam.path: no file at {path!s}; expected JSON lines with question and answer")
    rows = journal.numbered_lines(path)
    kept = [(line, row) for line, row in rows if not section.sources or row.get("source") in section.sources]
    if not kept:
        known = ", ".join(sorted({str(row.get("source")) for _, row in rows}))
        raise ConfigInvalid(f"server.exam.sources {section.sources} match nothing in {path}; it holds: {known}")
    items = [_item(row, f"{path}:{line}", section) for line, row in kept]
    if section.calibrate and len({item.choices for item in items if item.choices}) > 1:
        raise ConfigInvalid("server.exam.calibrate = true needs items that share their choices; set it to false")
    return Exam(
        choice=_some([item for item in items if item.choices], section.choice_items, seed, "choice"),
        free=_some([item for item in items if not item.choices], section.free_items, seed, "free"),
        max_new_tokens=section.max_new_tokens,
        calibrate=section.calibrate,
        models=tuple(section.models),
    )


def joined(row: Mapping[str, Any], how: Literal["append", "input_only"]) -> str:
    """Return instruction and input of a corpus row as one question, or the input alone where there is one."""
    parts = [str(row["instruction"]), str(row.get("input") or "")]
    return parts[1] if how == "input_only" and parts[1] else "\n".join(part for part in parts if part)


def _some(items: Sequence[ExamItem], count: int, seed: int, name: str) -> tuple[ExamItem, ...]:
    order = stream(seed, "exam", name).permutation(len(items))[:count]
    return tuple(items[i] for i in sorted(int(i) for i in order))


def _item(row: Mapping[str, Any], where: str, section: ExamSection) -> ExamItem:
    question = row.get("question")
    if question is None and "instruction" in row:
        question = joined(row, section.join_input)
    listed = row.get("choices") or []
    if not isinstance(listed, list):
        raise ConfigInvalid(f"{where}: choices is a {type(listed).__name__}; expected a list of texts")
    choices = tuple(str(choice) for choice in listed)
    answer = row.get("answer") if choices or "output" not in row else row["output"]
    if not question or answer in (None, ""):
        raise ConfigInvalid(f"{where}: an exam item needs question and answer; found keys {', '.join(sorted(row))}")
    if choices:
        answer = _index(answer, choices, where)
    return ExamItem(id=str(row.get("id", where)), question=str(question), choices=choices, answer=answer)


def _index(answer: object, choices: tuple[str, ...], where: str) -> int:
    """Return which choice is right, given as an index or as its text."""
    if "" in choices:
        raise ConfigInvalid(f"{where}: one of its choices is empty")
    if isinstance(answer, str):
        if answer not in choices:
            raise ConfigInvalid(f"{where}: answer {answer!r} is none of its choices")
        return choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ConfigInvalid(f"{where}: answer {answer!r} is no index of its {len(choices)} choices")
    return answer
