"""The report of a run: all figures, all text escaped, nothing fetched, nothing assumed to be there."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app.errors import RunInvalid
from simulations.report import plots, samples, style, tables, words
from simulations.report.page import build_report, main, page_of
from simulations.report.record import Measured, read_run, read_summary

ROOT = Path(__file__).parents[2]
SITES = ("birchfield-clinic", "harbour-house", "old-mill-practice", "saint-anne")
PLD = "PLD (dp-accounting 0.6, grid 1e-3)"


def score(value: float, low: float, high: float, *, better: bool = True, chance: float | None = None) -> dict[str, Any]:
    told = {"value": value, "low": low, "high": high, "count": 120, "higher_is_better": better}
    return told if chance is None else {**told, "chance": chance}


def sitting(choice: tuple[float, float, float], rouge: float, bits: float) -> dict[str, Any]:
    return {
        "choice_accuracy": score(*choice, chance=0.25),
        "rouge_l": score(rouge, rouge - 0.03, rouge + 0.03),
        "bits_per_byte": score(bits, bits - 0.04, bits + 0.04, better=False),
    }


def realistic_summary() -> dict[str, Any]:
    phases = {"train": 41.2, "aggregate": 0.05, "synthesise": 25.1, "filter": 6.2, "distil": 20.4, "tune": 35.3}
    by_round = [phases, {**phases, "train": 39.0, "tune": 34.7, "distil": 19.7}]
    return {
        "schema": 1,
        "run": "demo-3f2a",
        "stamp": "SIMULATION - NOT PRIVATE",
        "config_digest": "9d1c" * 16,
        "commit": "3faa6f8",
        "status": "completed",
        "models": {
            "local": {"name": "smollm2-135m-instruct", "sha256": "5a" * 32},
            "professional": {"name": "qwen2.5-1.5b-instruct", "sha256": "c7" * 32},
        },
        "exam": {
            "base": sitting((0.26, 0.19, 0.34), 0.14, 1.31),
            "adapter": sitting((0.29, 0.21, 0.38), 0.17, 1.22),
            "target_round_1": sitting((0.38, 0.30, 0.47), 0.22, 1.14),
            "target_round_2": sitting((0.46, 0.38, 0.55), 0.25, 1.09),
            "professional": sitting((0.71, 0.62, 0.78), 0.33, 0.94),
        },
        "epsilon": {
            site: {
                "spent": spent,
                "budget": budget,
                "delta": 1e-05,
                "unit": "record",
                "relation": "add_or_remove_one",
                "sampling": "Poisson",
                "accountant": PLD,
                "rdp": spent * 1.076,
                "by_round": rounds,
                "noise_multiplier": [0.91] * len(rounds),
            }
            for site, spent, budget, rounds in (
                (SITES[1], 7.991, 8.0, [5.1, 7.991]),
                (SITES[0], 7.97, 8.0, [5.07, 7.97]),
                (SITES[2], 5.02, 8.0, [5.02]),
                (SITES[3], 7.95, 8.0, [5.05, 7.95]),
            )
        },
        "seconds": {"total": 280.1, "setup": 20.0, "train": 80.2, "aggregate": 0.1, "synthesise": 50.2, "filter": 12.4}
        | {"distil": 40.1, "tune": 70.0, "exam": 30.0, "broadcast": 0.2},
        "seconds_by_round": by_round,
        "bytes": {
            "up": dict.fromkeys(SITES, 1_234_567) | {SITES[2]: 617_284},
            "down": dict.fromkeys(SITES, 2_469_134),
        },
        "drafts": {
            "written": 256,
            "kept": 180,
            "dropped": {"length": 20, "near_duplicate": 31, "domain": 20, "pii": 5},
            "by_round": [
                {"written": 128, "kept": 86, "dropped": {"length": 12, "near_duplicate": 15, "domain": 12, "pii": 3}},
                {"written": 128, "kept": 94, "dropped": {"length": 8, "near_duplicate": 16, "domain": 8, "pii": 2}},
            ],
        },
        "rounds": [
            {"round": 1, "used": list(SITES), "refused": {}, "rejected": {}, "silent": []},
            {"round": 2, "used": [SITES[0], SITES[1], SITES[3]], "refused": {SITES[2]: "budget_spent"}, "silent": []},
        ],
        "left_site": [
            {
                "site": site,
                "round": turn,
                "kind": "adapter",
                "bytes": 617_284,
                "sha256": f"{index}{turn}" * 32,
                "event": "PoissonGaussian(noise_multiplier=0.91, sample_rate=0.05, steps=8, clip_norm=1.0)",
                "guarantee": f"({5.1 if turn == 1 else 8.0:.2f}, 1e-05)-DP per record, add/remove one",
            }
            for turn in (1, 2)
            for index, site in enumerate(SITES)
            if not (turn == 2 and index == 2)
        ],
        "hashes": {
            f"round_{turn}/{name}": f"{turn}f" * 32 for turn in (1, 2) for name in ("merged", "drafts", "target")
        },
        "lessons": 180,
    }


QUESTIONS = (
    "A patient on warfarin asks whether she may take ibuprofen for knee pain. What should she be told, and why?",
    "Explain to a carer how to recognise dehydration in an older person who rarely feels thirsty.",
    "Summarise the steps before a first insulin injection at home, in plain words.",
    "Which findings after a fall make you send a resident to hospital the same day?",
)
ANSWER = (
    "She should avoid it. Ibuprofen raises the risk of bleeding with warfarin in two ways: it irritates the stomach "
    "lining and it hinders platelets.\nParacetamol at the lowest useful dose is the usual first choice; her clotting "
    "should be checked again within a week if she takes it daily."
)


def realistic_run(run: Path, **changes: object) -> Path:
    """A run directory as a finished demonstration leaves it."""
    run.mkdir(parents=True)
    summary = {**realistic_summary(), **changes}
    (run / "summary.json").write_text(json.dumps({key: part for key, part in summary.items() if part is not None}))
    (run / "config.toml").write_text(
        '[run]\nrounds = 2\nmode = "simulation"\n[server.teacher]\napi_key = "sk-1"\nmax_tokens = 64\n'
    )
    reasons = ("length", "near_duplicate", "domain", "pii")
    for turn in (1, 2):
        folder = run / "rounds" / str(turn)
        folder.mkdir(parents=True)
        drafts = [
            {
                "id": f"{turn}-{index:03d}",
                "instruction": f"{QUESTIONS[index % 4]} (case {index})",
                "response": "Drink more. Drink more. " * (1 + index),
                "origin": {"round": turn, "method": "codes", "code": "c1", "stream": "s"},
            }
            for index in range(24)
        ]
        drafts[3]["instruction"] = "Ignore this <script>alert('x')</script> & <img src=x onerror=alert(1)>"
        dropped = {draft["id"]: reasons[index % 4] for index, draft in enumerate(drafts) if index < 8}
        lessons = [
            {"draft_id": draft["id"], "instruction": draft["instruction"], "answer": ANSWER, "teacher": "qwen2.5-1.5b"}
            for draft in drafts[8:]
        ]
        (folder / "drafts.jsonl").write_text("".join(json.dumps(draft) + "\n" for draft in drafts))
        (folder / "lessons.jsonl").write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons) + '{"torn": ')
        kept = [draft["id"] for draft in drafts[8:]]
        (folder / "screened.json").write_text(json.dumps({"kept": kept, "dropped": dropped}))
    return run


def built(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8").replace(words.HARD_SPACE, " ")


def test_the_page_tells_the_result_in_sentences(tmp_path: Path) -> None:
    page = built(realistic_run(tmp_path / "run"))
    assert (
        "Target answers 46 % [38, 55] of the exam after 2 rounds; the base model 26 % [19, 34], "
        "the professional 71 % [62, 78]." in page
    )
    assert (
        "Each of 4 sites spent at most epsilon 8.00 of 8 at delta 1e-5, per record, add/remove one, "
        f"Poisson sampling, {PLD}." in page
    )
    assert "The intervals of target and base do not meet" in page
    assert "SIMULATION - NOT PRIVATE" in page


@pytest.mark.parametrize(
    "figure",
    [
        *("demo-3f2a", "3faa6f8", "9d1c" * 16, "5a" * 32, "c7" * 32, "smollm2-135m-instruct", "1f" * 32),
        *("29 % [21, 38], n = 120", "0.25 [0.22, 0.28]", "1.09 [1.05, 1.13]", "guessing, 25 %", "Lower is better"),
        *("7.97 of 8", "5.02 of 8", "0.91, 0.91", "RDP", "budget_spent".replace("_", " ")),
        *("256", "180", "Near duplicate", "\N{MINUS SIGN}31", "70 %", "PII"),
        *("4 min 40 s", "1 min 20 s", "0.1 s", "1.23 MB", "2.47 MB", "617.28 kB"),
        "PoissonGaussian(<wbr>noise_multiplier=0.91, sample_rate=0.05, steps=8, clip_norm=1.0)",
        f"(5.10, 1e-05)-DP per record, add/remove one; Poisson sampling, {PLD}",
    ],
)
def test_the_page_holds_every_figure(tmp_path: Path, figure: str) -> None:
    assert figure in built(realistic_run(tmp_path / "run"))


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = built(realistic_run(tmp_path / "run"))
    assert not re.search(r"""<[^>]*\b(?:src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"<(?:script|img|link|iframe|object)\b", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_what_a_model_wrote_is_text(tmp_path: Path) -> None:
    page = built(realistic_run(tmp_path / "run"))
    assert "&lt;script&gt;" in page
    assert "onerror=alert(1)&gt;" in page
    assert "<script" not in page


def test_a_secret_in_the_configuration_is_masked(tmp_path: Path) -> None:
    page = built(realistic_run(tmp_path / "run"))
    assert "sk-1" not in page
    assert "max_tokens = 64" in page


def test_the_same_directory_gives_the_same_bytes(tmp_path: Path) -> None:
    run = realistic_run(tmp_path / "run")
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first
    assert build_report(realistic_run(tmp_path / "other")).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "report.html", "rounds", "summary.json"]


@pytest.mark.parametrize("part", sorted(realistic_summary()))
@pytest.mark.parametrize("instead", [None, {}, [], "?", 0, {"x": None}, {"x": {"spent": 1.0, "value": 2}}, [3], [{}]])
def test_a_part_that_is_missing_or_foreign_is_not_measured(part: str, instead: object) -> None:
    if part == "schema":
        return
    summary = {**realistic_summary(), part: instead}
    assert page_of(read_summary(summary)).endswith("</html>\n")


def test_a_run_without_figures_says_so(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"run": "old-1", "status": "failed"}')
    (tmp_path / "journal.jsonl").write_text('{"event": "run_failed", "t": 3, "reason": "no site answered"}\n{"torn')
    page = built(tmp_path)
    assert "This run did not complete (failed): no site answered." in page
    assert page.count("not measured") > 10
    assert "The exam was not measured." in page
    assert "epsilon 8" not in page


def test_an_epsilon_without_its_statement_is_withheld() -> None:
    summary = realistic_summary()
    for site in summary["epsilon"].values():
        del site["sampling"]
    page = page_of(read_summary(summary))
    assert "withheld: its statement is incomplete" in page
    assert "7.97" not in page
    assert "8.00 of 8" not in page
    assert "(5.10, 1e-05)" not in page


def test_a_release_without_privacy_is_infinite() -> None:
    summary = realistic_summary()
    summary["epsilon"][SITES[0]]["spent"] = math.inf
    page = page_of(read_summary(summary))
    assert "1 of 4 sites released without differential privacy (infinite epsilon)." in page
    assert "infinite, over budget" in page


def test_drafts_that_nobody_accounts_for_are_shown() -> None:
    summary = realistic_summary()
    del summary["drafts"]["dropped"]["pii"]
    assert "Not accounted for" in page_of(read_summary(summary))


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"schema": 2}'])
def test_no_readable_summary_no_report(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(RunInvalid, match=r"summary\.json"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_every_plot_is_xml_with_a_title_and_a_description(tmp_path: Path) -> None:
    page = built(realistic_run(tmp_path / "run"))
    found = re.findall(r'<svg role="img".*?</svg>(?=</figure>|</td>|<ul|<figcaption)', page, flags=re.DOTALL)
    assert len(found) == 3 + 1 + 1 + 1 + 8
    for markup in found:
        svg = ET.fromstring(markup)  # noqa: S314 - our own output
        assert [child.tag for child in svg[:2]] == ["title", "desc"]
        assert all(child.text for child in svg[:2])


def test_the_exam_plot_puts_values_where_they_belong() -> None:
    scores = {"base": Measured(value=0.2, low=0.0, high=0.4), "target_round_1": Measured(value=0.8, low=0.6, high=1.0)}
    svg = ET.fromstring(plots.exam_plot("choice_accuracy", scores).markup)  # noqa: S314 - our own output
    # The axis runs from 0 to 1 over 112..250, so 0.2 stands at 139.6 and 0.8 at 222.4.
    assert [dot.get("cx") for dot in svg.iter("circle")] == ["139.60", "222.40"]


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=6))
def test_an_axis_holds_every_value(values: list[float]) -> None:
    axis = plots.nice_axis([Measured(value=value) for value in values], left=0, right=100)
    slack = 1e-6 * max(1.0, *(abs(value) for value in values))
    assert axis.low - slack <= min(values)
    assert max(values) <= axis.high + slack
    assert 2 <= len(axis.ticks()) <= plots.TICKS + 1


@given(st.text())
def test_any_text_is_safe_in_markup(text: str) -> None:
    element = ET.fromstring(f"<p>{tables.render(text)}</p>")  # noqa: S314 - our own output
    assert not list(element)


def test_an_epsilon_is_rounded_up() -> None:
    assert [words.epsilon_figure(value) for value in (7.991, 7.99, 1.1, 0.0, 1e-9)] == [
        "8.00",
        "7.99",
        "1.10",
        "0.00",
        "0.01",
    ]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ((0.46, 0.38, 0.55), "do not meet"),
        ((0.30, 0.22, 0.38), "does not show that the target differs. The target cannot be told from guessing"),
        ((0.10, 0.05, 0.15), "worse than the base model"),
    ],
)
def test_the_verdict_follows_the_intervals(target: tuple[float, float, float], told: str) -> None:
    summary = realistic_summary()
    summary["exam"]["target_round_2"] = sitting(target, 0.2, 1.0)
    assert told in words.verdict(read_summary(summary))


def test_samples_are_spread_over_reasons_and_rounds(tmp_path: Path) -> None:
    record = read_run(realistic_run(tmp_path / "run"))
    assert len(record.drop_samples) == len(record.lesson_samples) == samples.SAMPLES
    assert {each.reason for each in record.drop_samples} == {"length", "near_duplicate", "domain", "pii"}
    assert [each.round for each in record.lesson_samples] == [1, 2, 1, 2, 1, 2]


def test_sites_under_different_statements_share_no_sentence() -> None:
    record = read_summary(realistic_summary())
    told = record.sites[0].statement
    assert told is not None
    mixed = (replace(record.sites[0], statement=replace(told, delta=1e-6)), *record.sites[1:])
    assert "differ" in words.spending(mixed)
    assert "1e-6" in page_of(replace(record, sites=mixed))


@pytest.mark.parametrize("scheme", [style.LIGHT, style.DARK])
def test_text_has_contrast(scheme: str) -> None:
    colours = dict(re.findall(r"--([\w-]+):#([0-9a-f]{6})", scheme))
    for ink, ground in (("ink", "page"), ("soft", "page"), ("soft", "card"), ("hero", "page"), ("lost", "card")):
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for ink, ground in (("over", "page"), ("warn-ink", "warn-page"), ("bad-ink", "bad-page")):
        assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    for part in [*(name for name in colours if name.startswith("p-")), "hero", "hero-soft", "other", "lost"]:
        assert contrast(colours[part], colours["page"]) >= 3, part


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance of sRGB."""
    lights = sorted((luminance(one), luminance(other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = realistic_run(tmp_path / "run")
    command = [sys.executable, "-m", "simulations.report.page", str(run)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(run / "report.html")
    assert main([str(tmp_path)]) == 1
    assert "no report" in capsys.readouterr().out
