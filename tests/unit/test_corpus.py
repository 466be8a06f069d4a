"""The embedded corpus: deterministic, true to its formulary, varied, skewed by house, and free of exam phrasings."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fl_app.errors import RowsInvalid
from simulations.corpus.answers import canonical
from simulations.corpus.exam import EXAM_QUESTIONS
from simulations.corpus.formulary import (
    ASKS,
    FAMILY_FACTS,
    INDIVIDUAL_FACTS,
    Remedy,
    asked_facts,
    build_formulary,
    build_topics,
    wrong_values,
)
from simulations.corpus.grammar import expand
from simulations.corpus.handbook import JUDGE_PROMPT
from simulations.corpus.letters import HOUSES, private_rows
from simulations.corpus.write import write_corpus

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("public", "private", "exam", "codes")
REMEDIES = build_formulary()
TOPICS = {topic.slug: topic for topic in build_topics(REMEDIES)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(root: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [json.loads(line) for line in (root / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in FILES
    }


def remedy_of(code: str) -> Remedy:
    return TOPICS[code.split("/")[1]].remedy


def assert_answers(row: dict[str, str]) -> None:
    """The answer states what its code asks for, names both sides, and holds no other remedy's value."""
    _, slug, asks = row["code"].split("/")
    topic, text = TOPICS[slug], row["output"].lower()
    facts = topic.remedy.facts()
    needed = {facts[fact] for fact in asked_facts(topic.kind, asks)} | {facts["remedy"], facts["ailment"]}
    assert {value for value in needed if value.lower() not in text} == set(), row["id"]
    assert wrong_values(row["output"], topic.remedy, REMEDIES) == set(), row["id"]
    assert sum(facts[fact].lower() in text for fact in (*FAMILY_FACTS, *INDIVIDUAL_FACTS)) >= 3, row["id"]


def test_the_formulary_has_distinct_rules_per_order_and_one_remedy_per_ailment() -> None:
    assert len(REMEDIES) == 24
    assert len({remedy.ailment.name for remedy in REMEDIES}) == 24
    for fact in FAMILY_FACTS:
        by_order = {remedy.order: {r.value(fact) for r in REMEDIES if r.order == remedy.order} for remedy in REMEDIES}
        assert all(len(values) == 1 for values in by_order.values())
        assert len(set.union(*by_order.values())) == 6
    for fact in ("dose", "warning"):
        assert set(Counter(remedy.value(fact) for remedy in REMEDIES).values()) == {3}


def test_names_share_no_word_with_what_is_asked_about_them() -> None:
    for remedy in REMEDIES:
        words = set(f"{remedy.name} {remedy.ailment.name}".lower().split())
        told = (remedy.dose, remedy.warning, remedy.vehicle, remedy.time, remedy.frequency, remedy.avoid)
        values = set(" ".join((*told, remedy.storage)).split())
        assert not {word for word in words for value in values if len(value) > 4 and (value in word or word in value)}
        assert not set(remedy.name.lower().split()) & set(remedy.ailment.name.split())


def test_same_seed_gives_the_same_bytes_and_another_seed_other_letters(root: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (root / f"{name}.jsonl").read_bytes()
    one, other = (list(islice(private_rows(tuple(TOPICS.values()), seed=seed), 20)) for seed in (0, 1))
    assert [row["instruction"] for row in one] != [row["instruction"] for row in other]


def test_sizes_and_schemas(corpus: dict[str, list[dict[str, Any]]]) -> None:
    assert Counter(row["house"] for row in corpus["private"]) == {house.name: house.size for house in HOUSES}
    assert Counter(row["kind"] for row in corpus["exam"]) == {"choice": 240, "free": 80}
    kinds = Counter(row["kind"] for row in corpus["public"])
    assert kinds["judge"] == 800
    assert 6_000 <= kinds["qa"] <= 8_000
    assert len(corpus["codes"]) == len(HOUSES) * 48 * len(ASKS)
    for name, rows in corpus.items():
        ids = [row["id"] for row in rows]
        assert ids == sorted(set(ids)), name
    for row in corpus["public"]:
        assert list(row) == ["id", "kind", "instruction", "output", "code"]
    for row in corpus["private"]:
        assert list(row) == ["id", "house", "code", "instruction", "output"]


def test_letters_are_answered_truly(corpus: dict[str, list[dict[str, Any]]]) -> None:
    for row in corpus["private"]:
        assert_answers(row)


def test_public_answers_are_true_and_refusals_have_no_code(corpus: dict[str, list[dict[str, Any]]]) -> None:
    questions = [row for row in corpus["public"] if row["kind"] == "qa"]
    refused = [row for row in questions if not row["code"]]
    assert 0.04 < len(refused) / len(questions) < 0.08
    assert all(row["output"].startswith("That is not a matter of the formulary; ") for row in refused)
    for row in questions:
        if row["code"]:
            assert_answers(row)


def test_handbook_passages_are_true(corpus: dict[str, list[dict[str, Any]]]) -> None:
    by_slug = {slug: topic.remedy for slug, topic in TOPICS.items()}
    by_order = {remedy.order: remedy for remedy in REMEDIES}
    for row in corpus["public"]:
        if row["kind"] == "handbook":
            about = row["id"].removeprefix("handbook-").rsplit("-", 1)[0]
            wrong = wrong_values(row["output"], by_slug.get(about) or by_order[about], REMEDIES)
            members = {remedy.name for remedy in REMEDIES if remedy.order == about}
            assert wrong <= members, row["id"]


def test_judge_rows_are_balanced_and_fit_the_prompt(corpus: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row for row in corpus["public"] if row["kind"] == "judge"]
    assert Counter(row["output"] for row in rows) == {"yes": 400, "no": 400}
    assert all(row["instruction"].startswith(JUDGE_PROMPT.split("{text}")[0]) for row in rows)


def test_every_code_used_exists_and_every_topic_is_asked_about(corpus: dict[str, list[dict[str, Any]]]) -> None:
    codes = {row["id"]: row for row in corpus["codes"]}
    assert all(len(row["text"].split()) <= 16 and row["text"].endswith(":\n") for row in codes.values())
    for row in corpus["private"]:
        assert codes[row["code"]]["house"] == row["house"]
    assert {codes[row["code"]]["topic"] for row in corpus["private"]} == set(TOPICS)
    assert {row["code"] for row in corpus["public"] if row["kind"] == "qa"} - {""} <= set(codes)


def test_letters_name_their_topic(corpus: dict[str, list[dict[str, Any]]]) -> None:
    for row in corpus["private"]:
        assert TOPICS[row["code"].split("/")[1]].name.lower() in row["instruction"].lower()


def test_houses_differ_in_topics(corpus: dict[str, list[dict[str, Any]]]) -> None:
    shares = {}
    for house in HOUSES:
        counts = Counter(row["code"].split("/")[1] for row in corpus["private"] if row["house"] == house.name)
        shares[house.name] = np.array([counts[slug] for slug in TOPICS]) / house.size
    for one, other in combinations(shares, 2):
        assert np.abs(shares[one] - shares[other]).sum() / 2 > 0.3, (one, other)


def test_letters_vary(corpus: dict[str, list[dict[str, Any]]]) -> None:
    letters = [row["instruction"].lower() for row in corpus["private"]]
    assert 1 - len(set(letters)) / len(letters) < 0.005
    words = [letter.split() for letter in letters]
    grams = [tuple(word[i : i + 4]) for word in words for i in range(len(word) - 3)]
    assert len(set(grams)) / len(grams) > 0.4


def test_lengths(corpus: dict[str, list[dict[str, Any]]]) -> None:
    lengths = np.array([len(row["instruction"].split()) for row in corpus["private"]])
    assert lengths.max() <= 60
    assert 15 < lengths.mean() < 26
    assert max(len(row["output"].split()) for row in corpus["private"]) <= 60


def test_only_three_slots_and_the_share_of_personal_letters(corpus: dict[str, list[dict[str, Any]]]) -> None:
    slot = re.compile(r"\[[^\]]*\]|[{}<>|]")
    personal = 0
    for name in ("private", "public"):
        for row in corpus[name]:
            assert row["instruction"].count("[NAME]") <= 1, row["id"]
            found = set(slot.findall(f"{row['instruction']} {row['output']}"))
            assert found <= {"[NAME]", "[PHONE]", "[PLACE]"}, row["id"]
            personal += name == "private" and bool(found)
    assert 0.4 < personal / len(corpus["private"]) < 0.5


def test_exam_positions_are_balanced_and_options_differ_in_one_value(corpus: dict[str, list[dict[str, Any]]]) -> None:
    items = [row for row in corpus["exam"] if row["kind"] == "choice"]
    assert set(Counter(row["answer"] for row in items).values()) == {60}
    for row in items:
        assert len(set(row["choices"])) == 4
        assert max(map(len, row["choices"])) - min(map(len, row["choices"])) <= 16


def test_exam_answers_follow_from_the_formulary(corpus: dict[str, list[dict[str, Any]]]) -> None:
    for row in corpus["exam"]:
        fact, remedy = row["fact"].split(":")[1], TOPICS[row["topic"]].remedy
        expected = canonical(remedy, fact)
        assert (row["choices"][row["answer"]] if row["kind"] == "choice" else row["answer"]) == expected
        for option in row.get("choices", ()):
            assert (wrong_values(option, remedy, REMEDIES) == set()) == (option == expected)


def test_exam_phrasings_stand_nowhere_else(corpus: dict[str, list[dict[str, Any]]]) -> None:
    plain = re.compile(r"[^a-z ]")
    told = " ".join(
        plain.sub("", f"{row['instruction']} {row['output']}".lower())
        for name in ("public", "private")
        for row in corpus[name]
    )
    for row in corpus["exam"]:
        assert plain.sub("", row["question"].lower()) not in told, row["question"]
    assert {row["fact"].split(":")[1] for row in corpus["exam"]} == set(EXAM_QUESTIONS)


def test_grammar_refuses_unknown_names() -> None:
    rng = np.random.default_rng(0)
    assert expand("<{who}|{who}> nods , <|>twice.", {"who": ("she",)}, {}, rng) == "she nods, twice."
    with pytest.raises(RowsInvalid, match="neither bound nor in the lexicon"):
        expand("{nobody}", {}, {}, rng)
