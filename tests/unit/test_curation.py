"""The curation: every figure against one worked out by hand, no stamp lost, no private word repeated."""

from __future__ import annotations

import importlib.util
import json
import stat
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_app import text
from fl_app.errors import ConfigInvalid, RunInvalid
from fl_app.journal import STAMP
from simulations.curation import card, closeness, copies, curate, dataset, diversity, evidence, funnel, page, personal
from simulations.curation.evidence import Written

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EPSILON = {
    "spent": 1.23456,
    "budget": 2.0,
    "private": True,
    "delta": 1e-5,
    "unit": "record",
    "relation": "add_or_remove_one",
    "sampling": "Poisson",
    "accountant": "PLD",
    "spent_is_lower_bound": False,
}
DRAFTS = {
    1: [
        ("a", "cough", "abbey", "What helps a dry cough at night?", "kept"),
        ("b", "cough", "brook", "Hm?", "length: 1 words < 5"),
        ("c", "rash", "abbey", "What helps a red rash on the arm?", "kept"),
    ],
    2: [
        ("d", "rash", "brook", "Write to x@y.example about it, please", "pii: email"),
        ("e", "cough", "", "May I take sage with honey each day?", "kept"),
        ("f", "cough", "abbey", "Never judged, this one", ""),
    ],
}
LESSONS = {1: [("a", "Thyme tea."), ("c", "Call 555-0142 with it.")], 2: []}


def _run(folder: Path, *, stamp: str = STAMP, mode: str = "simulation", rounds: Any = None, **summary: Any) -> Path:
    """Write a run directory by hand."""
    folder.mkdir()
    told = {
        "schema": 1,
        "run": "hand-made",
        "stamp": stamp,
        "status": "completed",
        "config_digest": "ab" * 32,
        "models": {
            "local": {"name": "smollm2-135m-instruct", "sha256": "cd" * 32},
            "professional": {"name": "Dr. <Sage>", "sha256": "ef" * 32},
        },
        "epsilon": {"abbey": EPSILON},
        **summary,
    }
    (folder / "summary.json").write_text(json.dumps(told))
    (folder / "config.toml").write_text(
        f'[run]\nmode = "{mode}"\n[client.learner]\nkind = "dp_lora"\n[server.aggregator]\nkind = "mean_factors"\n'
        '[server.synthesizer]\nkind = "control_codes"\n[server.distiller]\nkind = "professional"\n'
        '[[server.filters]]\nkind = "length"\n[[server.filters]]\nkind = "domain"\n[[server.filters]]\nkind = "pii"\n'
    )
    for number, drafts in (DRAFTS if rounds is None else rounds).items():
        place = folder / "rounds" / str(number)
        place.mkdir(parents=True)
        lines = [
            {
                "id": name,
                "instruction": words,
                "response": "",
                "origin": {"code": code, "method": "control_codes", "round": number, "stream": "0", "voice": voice},
            }
            for name, code, voice, words, _ in drafts
        ]
        (place / "drafts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        verdict = {
            "kept": [name for name, *_, fate in drafts if fate == "kept"],
            "dropped": {name: fate for name, *_, fate in drafts if ":" in fate},
        }
        (place / "screened.json").write_text(json.dumps(verdict))
        taught = [
            {"draft_id": name, "instruction": words, "answer": answer, "teacher": "Dr. <Sage>"}
            for name, answer in LESSONS.get(number, [])
            for own, _, _, words, _ in drafts
            if own == name
        ]
        (place / "lessons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in taught))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return _run(tmp_path / "run")


@pytest.fixture
def found(run: Path) -> evidence.Evidence:
    return evidence.read(run)


def _written(*texts: str) -> list[Written]:
    return [
        Written(id=str(n), round=1, code="c", voice="", method="m", text=one, response="", fate="kept")
        for n, one in enumerate(texts)
    ]


# --- funnel


def test_the_funnel_by_hand(found: evidence.Evidence) -> None:
    flows = funnel.funnel(found)

    assert flows.all == funnel.Flow(
        written=6, dropped={"length": 1, "domain": 0, "pii": 1}, kept=3, undecided=1, lessons=2
    )
    assert list(flows.all.dropped) == ["length", "domain", "pii"]
    assert {name: (one.written, one.kept, one.lessons) for name, one in flows.by_round.items()} == {
        "1": (3, 2, 2),
        "2": (3, 1, 0),
    }
    assert {name: (one.written, one.kept, one.lessons) for name, one in flows.by_code.items()} == {
        "cough": (4, 2, 1),
        "rash": (2, 1, 1),
    }
    assert {name: (one.written, one.kept, one.undecided) for name, one in flows.by_voice.items()} == {
        "abbey": (3, 2, 1),
        "brook": (2, 0, 0),
        "merged adapter": (1, 1, 0),
    }


def test_a_draft_of_one_id_in_two_rounds_is_taught_where_it_was(tmp_path: Path) -> None:
    twice = {1: [("a", "cough", "", "What helps?", "kept")], 2: [("a", "cough", "", "What helps?", "kept")]}

    flows = funnel.funnel(evidence.read(_run(tmp_path / "run", rounds=twice)))

    assert [one.lessons for one in flows.by_round.values()] == [1, 0]


# --- diversity


def test_distinct_by_hand() -> None:
    texts = ["a b a b", "A b, c"]  # words: a b a b | a b c

    assert diversity.distinct(texts, 1) == 3 / 7
    assert diversity.distinct(texts, 2) == 3 / 5  # ab ba ab | ab bc
    assert diversity.distinct(texts, 3) == 3 / 3  # aba bab | abc
    assert diversity.distinct(["a"], 2) is None
    assert diversity.distinct([], 1) is None


def test_equal_texts_have_self_bleu_100_and_strangers_nearly_none() -> None:
    assert diversity.self_bleu(["Rest and drink warm tea."] * 3)[0] == 100.0
    value, _ = diversity.self_bleu(["one two three four five", "six seven eight nine ten"])
    assert value is not None
    assert value < 10


def test_self_bleu_by_hand() -> None:
    """Precisions 4/5, 3/4, 2/3, 1/2 for both texts, no brevity penalty: (1/5)^(1/4)."""
    value, told = diversity.self_bleu(["a b c d e", "a b c d f"])

    assert value == pytest.approx(100 * 0.2**0.25, abs=1e-3)
    assert "tok:13a" in told
    assert diversity.self_bleu(["alone"]) == (None, "")


def test_self_bleu_reads_a_draw_of_many_texts_and_says_how_many() -> None:
    texts = [f"text number {n} of very many" for n in range(diversity.SAMPLE + 5)]

    one = diversity.diversity(texts, np.random.default_rng(0))

    assert (one.texts, one.compared, one.mean_words) == (diversity.SAMPLE + 5, diversity.SAMPLE, 6.0)
    nothing = diversity.diversity([], np.random.default_rng(0))
    assert (nothing.texts, nothing.mean_words, nothing.self_bleu, nothing.compared) == (0, None, None, 0)
    assert set(nothing.distinct.values()) == {None}


# --- near copies

SECRET = "Agnes Thornberry of the old mill coughs since Martinmas and sleeps badly now"


def test_a_planted_run_is_found_and_not_quoted() -> None:
    planted = "I wonder: the old mill coughs since Martinmas, and sleeps? Who can say."
    drafts = _written("Nothing of that kind was ever written here", planted)

    one = copies.scan(drafts, ["A row about other things.", SECRET])

    assert (one.drafts, one.rows, one.longest) == (2, 2, 8)  # the old mill coughs since martinmas and sleeps
    assert one.at_least == {"8": 1, "13": 0, "50": 0}
    assert one.nearest == (copies.Near(draft="1", words=13, longest=8, beyond_public=8),)
    assert one.overlap == 4 / (4 + 9)  # five-word runs: 4 of the first's 4... none; of the second's 9, four
    told = repr(one).lower()
    assert not any(word in told for word in text.words(SECRET) if len(word) > 3)


def test_public_text_excuses_what_it_contains_and_no_more() -> None:
    drafts = _written("the old mill coughs since Martinmas", "sleeps badly now and the old mill coughs since Martinmas")
    public = ["As we know, the old mill coughs since Martinmas."]

    one = copies.scan(drafts, [SECRET, "sleeps badly now and the old mill coughs"], public)

    assert [(near.draft, near.longest, near.beyond_public) for near in one.nearest] == [("1", 8, 8), ("0", 6, 0)]
    assert one.whole == 1
    assert (one.at_least["8"], one.at_least_beyond_public["8"]) == (1, 1)
    assert copies.scan(drafts[:1], [SECRET], public).beyond_public == 0


def test_short_runs_and_runs_over_two_rows_are_none() -> None:
    drafts = _written("one two three four and five six seven eight")

    one = copies.scan(drafts, ["one two three four", "five six seven eight", "four and five six"])

    assert (one.longest, one.overlap, one.nearest) == (0, 0.0, ())
    assert copies.scan([], ["a b c d e"]).overlap is None


def _longest_by_all_pairs(own: Sequence[str], row: Sequence[str]) -> int:
    """The oracle: the textbook table of common suffixes."""
    table = np.zeros((len(own) + 1, len(row) + 1), int)
    for i, left in enumerate(own):
        for j, right in enumerate(row):
            table[i + 1, j + 1] = table[i, j] + 1 if left == right else 0
    longest = int(table.max())
    return longest if longest >= copies.SHORTEST else 0


_TEXTS = st.lists(st.text(alphabet="ab ", min_size=1, max_size=40), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(drafts=_TEXTS, corpus=_TEXTS)
def test_the_longest_run_is_that_of_the_table_of_common_suffixes(drafts: list[str], corpus: list[str]) -> None:
    spaced = [" ".join(one.replace(" ", "")) for one in drafts], [" ".join(one.replace(" ", "")) for one in corpus]

    one = copies.scan(_written(*spaced[0]), spaced[1])

    best = {
        str(n): max(_longest_by_all_pairs(text.words(draft), text.words(row)) for row in spaced[1])
        for n, draft in enumerate(spaced[0])
    }
    assert {near.draft: near.longest for near in one.nearest} == {name: run for name, run in best.items() if run}


# --- personal data


def test_answers_are_looked_at_as_well(found: evidence.Evidence) -> None:
    figures = curate.figures_of(found)

    assert (figures.personal["questions"].texts, figures.personal["questions"].by_kind) == (3, {})
    assert (figures.personal["answers"].by_kind, figures.personal["answers"].flagged) == ({"phone": 1}, (1,))


def test_words_of_public_text_are_no_names() -> None:
    texts = ["Ask Harrow Elm about it.", "Dear Agnes, what helps?"]

    assert personal.scan(texts).by_kind == {"name": 1}
    assert personal.scan(texts, ["what helps about it"]).by_kind == {"name": 2}
    assert personal.scan(texts, ["harrow elm what helps about it"]).by_kind == {"name": 1}


# --- the card and the stamp


def test_the_card_says_what_must_be_said(found: evidence.Evidence) -> None:
    told = card.card(found, curate.figures_of(found))

    assert told.index(STAMP) < told.index("## Columns")
    assert "epsilon 1.235 of 2.0 at delta 1e-05, per record, add_or_remove_one, Poisson sampling, PLD" in told
    assert "learner `dp_lora`, combined by `mean_factors`" in told
    assert "| local | smollm2-135m-instruct | `cdcdcdcdcdcdcdcd` | Apache-2.0 |" in told
    assert f"| professional | Dr. <Sage> | `efefefefefefefef` | {card.UNKNOWN} |" in told
    assert "3 questions that passed every filter, of 6 drafts; 2 of them with an answer" in told
    assert all(limit in told for limit in card.LIMITS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"spent": "inf", "private": False}, "abbey: **no guarantee**"),
        ({"accountant": None}, "abbey: **withheld**: the statement lacks accountant"),
        ({"spent_is_lower_bound": True}, "abbey: epsilon at least 1.235"),
    ],
)
def test_an_epsilon_is_told_with_its_statement_or_not_at_all(tmp_path: Path, change: Any, told: str) -> None:
    entry = {key: value for key, value in {**EPSILON, **change}.items() if value is not None}
    found = evidence.read(_run(tmp_path / "run", epsilon={"abbey": entry}))

    text_of_card = card.card(found, curate.figures_of(found))

    assert told in text_of_card
    assert ("1.235" in text_of_card) == ("epsilon" in told)


@pytest.mark.parametrize("stamp", ["", "PRIVATE", "SIMULATION"])
def test_a_simulation_whose_stamp_was_taken_off_is_not_read(tmp_path: Path, stamp: str) -> None:
    with pytest.raises(RunInvalid, match=r"has the stamp .*is not of mode production: a stamp is not to be taken off"):
        evidence.read(_run(tmp_path / "run", stamp=stamp))


def test_a_site_without_noise_needs_a_stamp_in_production_too(tmp_path: Path) -> None:
    open_site = {"abbey": {**EPSILON, "spent": "inf", "private": False}}

    with pytest.raises(RunInvalid, match="infinite epsilon at abbey"):
        evidence.read(_run(tmp_path / "one", stamp="", mode="production", epsilon=open_site))
    clean = evidence.read(_run(tmp_path / "two", stamp="", mode="production"))
    assert "stamp" not in card.card(clean, curate.figures_of(clean))
    assert "stamp" not in dataset.rows(clean)[0]


# --- the dataset


def test_the_dataset_comes_back_as_it_was_written(found: evidence.Evidence, tmp_path: Path) -> None:
    import datasets

    told = card.card(found, curate.figures_of(found))
    folder = dataset.write(found, told, tmp_path / "release")

    back = datasets.load_from_disk(str(folder / "dataset"))
    expected = [
        {
            "draft_id": name,
            "question": question,
            "answer": answer,
            "code": code,
            "round": number,
            "method": "control_codes",
            "voice": voice,
            "teacher": teacher,
            "stamp": STAMP,
        }
        for name, question, answer, code, number, voice, teacher in (
            ("a", "What helps a dry cough at night?", "Thyme tea.", "cough", 1, "abbey", "Dr. <Sage>"),
            ("c", "What helps a red rash on the arm?", "Call 555-0142 with it.", "rash", 1, "abbey", "Dr. <Sage>"),
            ("e", "May I take sage with honey each day?", "", "cough", 2, "", ""),
        )
    ]
    assert back.to_list() == expected
    assert [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()] == expected
    assert back.info.description.startswith(STAMP)
    assert (folder / "README.md").read_text() == told


def test_no_dataset_without_its_stamp_and_none_over_other_files(found: evidence.Evidence, tmp_path: Path) -> None:
    told = card.card(found, curate.figures_of(found))
    with pytest.raises(RunInvalid, match="the card does not hold the stamp"):
        dataset.write(found, told.replace(STAMP, ""), tmp_path / "release")
    assert not list(tmp_path.glob("*release*"))

    dataset.write(found, told, tmp_path / "release")
    dataset.write(found, told, tmp_path / "release")  # its own is replaced
    (tmp_path / "release" / "thesis.tex").write_text("mine")
    with pytest.raises(RunInvalid, match="holds other files"):
        dataset.write(found, told, tmp_path / "release")
    assert (tmp_path / "release" / "thesis.tex").read_text() == "mine"


# --- the whole command


def test_the_command_keeps_private_rows_out_of_everything_but_the_holder_s_report(run: Path, tmp_path: Path) -> None:
    site = tmp_path / "sites" / "0"
    site.mkdir(parents=True)
    row = {"id": "r1", "instruction": "Quixley asks: what helps a red rash on the arm, and when?", "output": SECRET}
    (site / "rows.jsonl").write_text(json.dumps(row) + "\n")
    reference = tmp_path / "public.jsonl"
    reference.write_text(json.dumps({"instruction": "What helps a dry cough at noon?", "output": "Sage."}) + "\n")

    arguments = ["--run", str(run), "--reference", str(reference), "--rows", str(tmp_path / "sites")]
    assert curate.main(arguments) == 0

    report = json.loads((run / "curation" / "report.json").read_text())
    assert (report["private_copies"], report["stamp"]) == (None, STAMP)
    assert report["public_copies"]["longest"] == 6  # what helps a dry cough at
    holder = json.loads((run / "curation_holder" / "report.json").read_text())
    assert (holder["private_copies"]["longest"], holder["private_copies"]["drafts"]) == (8, 6)
    assert holder["private_copies"]["nearest"][0]["draft"] == "c"
    assert holder["stamp"] == f"{curate.HOLDER_STAMP}; {STAMP}"
    assert stat.S_IMODE((run / "curation_holder").stat().st_mode) == 0o700
    for file in (one for place in ("curation", "curation_holder") for one in (run / place).rglob("*") if one.is_file()):
        content = file.read_bytes()
        assert b"Quixley" not in content
        assert b"Thornberry" not in content
        assert file.parent.name == "curation_holder" or b"DATA HOLDER" not in content


def test_figures_that_read_rows_are_not_written_beside_the_release(run: Path, found: evidence.Evidence) -> None:
    figures = curate.with_private_rows(curate.figures_of(found), found, [{"instruction": SECRET}], [])

    with pytest.raises(RunInvalid, match="hold what private rows told"):
        curate.write(run, found, figures)
    assert not (run / "curation").exists()


def test_the_page_is_stamped_and_escapes_what_models_wrote(found: evidence.Evidence) -> None:
    told = page.page_of(found, curate.figures_of(found), STAMP)

    assert told.index(STAMP) < told.index("<main>")
    assert "Dr. &lt;Sage&gt;" in told
    assert "Dr. <Sage>" not in told
    assert "3 of 6 drafts would be released" in told
    assert "http" not in told.replace("http-equiv", "")


@pytest.mark.parametrize("rounds", [{}, {1: []}], ids=["no round", "a round without drafts"])
def test_a_run_without_drafts_has_a_report(tmp_path: Path, rounds: Any) -> None:
    run = _run(tmp_path / "run", rounds=rounds)

    assert curate.main(["--run", str(run)]) == 0

    report = json.loads((run / "curation" / "report.json").read_text())
    assert report["funnel"]["all"]["written"] == 0
    assert "No draft was written" in (run / "curation" / "report.html").read_text()
    assert (run / "curation" / "release" / "data.jsonl").read_text() == ""


def test_what_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curate.main(["--run", str(tmp_path / "nowhere")]) == 2
    run = _run(tmp_path / "run")
    assert curate.main(["--run", str(run), "--rows", str(tmp_path)]) == 2
    assert "no rows.jsonl with rows in it" in " ".join(capsys.readouterr().err.split())
    (run / "config.toml").unlink()
    assert curate.main(["--run", str(run)]) == 2


# --- MAUVE


class ByLength:
    """Features: two directions, a text with an even number of words goes one way, another the other, with a wobble."""

    name = "two directions"

    def __call__(self, texts: Sequence[str]) -> Any:
        rng = np.random.default_rng(len(texts))
        even = np.array([len(one.split()) % 2 == 0 for one in texts])
        rows = np.where(even[:, None], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]) + rng.normal(
            0, 0.05, (len(texts), 4)
        )
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


EVEN, ODD = ["two words"] * 60, ["three whole words"] * 60


def test_mauve_without_its_package_or_with_few_texts_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if closeness.mauve(EVEN[:3], ODD, ByLength(), 0).why.startswith("3 texts"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    one = closeness.mauve(EVEN, ODD, ByLength(), 0)

    assert one.value is None
    assert "pip install mauve-text" in one.why
    assert (one.texts_a_side, one.buckets, one.scaling, one.features) == (60, 6, 5.0, "two directions")


def test_mauve_of_equal_sets_is_near_one_and_of_disjoint_ones_near_none() -> None:
    pytest.importorskip("mauve")
    same = closeness.mauve(EVEN + ODD, (EVEN + ODD) * 2, ByLength(), 0)
    apart = closeness.mauve(EVEN, ODD, ByLength(), 0)

    assert same.value is not None
    assert apart.value is not None
    assert same.value.low > 0.8
    assert same.ceiling is not None
    assert apart.ceiling is None
    assert apart.value.high < 0.05
    assert same.value.low <= same.value.value <= same.value.high
    assert closeness.mauve(EVEN, ODD, ByLength(), 0) == apart


def test_features_that_are_no_unit_vectors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(ByLength):
        def __call__(self, texts: Sequence[str]) -> Any:
            return 2 * super().__call__(texts)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(ConfigInvalid, match=r"gave shape \(60, 4\) for 60 texts, norms from 2"):
        closeness.mauve(EVEN, ODD, Long(), 0)
