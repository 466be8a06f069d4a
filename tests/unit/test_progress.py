"""Progress of a run: what the journal told is on the screen, and an epsilon only under its statement."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.spinner import Spinner

from simulations import progress
from simulations.progress import RunView, final_table, follow, picture

STATED = {"delta": 1e-05, "unit": "record", "relation": "add_or_remove_one", "sampling": "Poisson", "accountant": "PLD"}
SITES = ["harbour-house", "old-mill", "saint-anne"]


def journal(stated: dict[str, Any]) -> list[dict[str, Any]]:
    """Round 1 of two, finished, and round 2 in its training."""
    start = {"event": "run_started", "t": 0.0, "run": "demo-3f2a", "rounds": 2, "sites": SITES, **stated}
    start |= {"model": "smollm2-135m-instruct", "stamp": "SIMULATION - NOT PRIVATE"}
    trained = {"event": "site", "t": 40.0, "round": 1, "site": SITES[0], "state": "trained", "code": ""}
    return [
        start,
        {"event": "round_started", "t": 1.0, "round": 1},
        {"event": "phase_started", "t": 1.0, "round": 1, "phase": "train"},
        {**trained, "epsilon": 5.101, "budget": 8.0, "bytes": 1234567},
        {"event": "site", "t": 41.0, "round": 1, "site": SITES[1], "state": "refused", "code": "budget_spent"},
        {"event": "site", "t": 41.5, "round": 1, "site": SITES[2], "state": "silent"},
        {"event": "phase_finished", "t": 42.0, "round": 1, "phase": "train", "seconds": 41.0},
        {"event": "something_new", "t": 42.5},
        {"event": "phase_finished", "t": 60.0, "round": 1, "phase": "synthesise", "seconds": 18.0},
        {"event": "round_finished", "t": 99.0, "round": 1, "drafts_written": 128, "drafts_kept": 86}
        | {"epsilon": {SITES[0]: 5.101}, "exam": {"value": 0.38}},
        {"event": "round_started", "t": 99.5, "round": 2},
        {"event": "phase_started", "t": 99.5, "round": 2, "phase": "train"},
        {"event": "phase_progress", "t": 120.0, "round": 2, "phase": "train", "done": 3, "total": 8},
    ]


def written(run: Path, events: list[dict[str, Any]], torn: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + torn, encoding="utf-8")
    return run


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, record=True, width=110, height=40, legacy_windows=False)


def shown(run: Path, *, terminal: bool, done: Callable[[], bool] = lambda: True) -> str:
    recorder = console(terminal=terminal)
    follow(run, done=done, console=recorder)
    return recorder.export_text().replace("\N{NO-BREAK SPACE}", " ")


def test_the_picture_holds_what_the_journal_told(tmp_path: Path) -> None:
    told = shown(written(tmp_path / "run", journal(STATED)), terminal=True)
    for part in (
        *("Stillroom run demo-3f2a", "smollm2-135m-instruct", "SIMULATION - NOT PRIVATE", "round 2/2", "train 3/8"),
        *(
            "harbour-house",
            "5.11 of 8",
            "1.23 MB",
            "epsilon at delta 1e-5, per record, add/remove one, Poisson sampling, PLD",
        ),
        *("drafts kept 86, dropped 42, of 128", "exam 38 %", "2 min 00 s"),
    ):
        assert part in told, part


def test_states_of_sites_are_shown_while_their_round_lasts(tmp_path: Path) -> None:
    told = shown(written(tmp_path / "run", journal(STATED)[:6]), terminal=True)
    for part in ("trained", "refused (budget spent)", "silent"):
        assert part in told


@pytest.mark.parametrize("terminal", [True, False])
def test_no_epsilon_without_its_statement(tmp_path: Path, *, terminal: bool) -> None:
    told = shown(written(tmp_path / "run", journal({})), terminal=terminal)
    assert "5.1" not in told
    assert "64 %" in told


def test_a_site_may_carry_its_own_statement(tmp_path: Path) -> None:
    events = journal({})
    events[3] |= STATED
    assert "5.11 of 8" in shown(written(tmp_path / "run", events), terminal=True)


def test_without_a_terminal_there_is_a_line_per_phase(tmp_path: Path) -> None:
    told_with = "at delta 1e-5, per record, add/remove one, Poisson sampling, PLD"
    end = [{"event": "run_finished", "t": 200.0}]
    told = shown(written(tmp_path / "run", journal(STATED) + end), terminal=False)
    assert told.splitlines() == [
        "run demo-3f2a: 2 rounds, 3 sites; smollm2-135m-instruct; SIMULATION - NOT PRIVATE",
        "round 1/2  train  41 s  1 trained, 1 refused, 1 silent",
        "round 1/2  synthesise  18 s",
        "round 1/2  finished  drafts kept 86, dropped 42  exam 38 %",
        f"    One site spent at most epsilon 5.11 of 8 {told_with}.",
        "run demo-3f2a finished after 3 min 20 s",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_says_why(tmp_path: Path, *, terminal: bool) -> None:
    events = [*journal(STATED), {"event": "run_failed", "t": 130.0, "reason": "2 of 3 sites\x1b[2J needed"}]
    told = shown(written(tmp_path / "run", events), terminal=terminal)
    assert "failed: 2 of 3 sites\N{REPLACEMENT CHARACTER}[2J needed" in told


@pytest.mark.parametrize("terminal", [True, False])
def test_a_journal_that_grows_is_followed_and_a_torn_line_is_read_once_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, terminal: bool
) -> None:
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 0.0)
    run, lines = tmp_path / "run", [json.dumps(event) + "\n" for event in journal(STATED)]
    text, looks = "".join(lines), iter(range(100))

    def done() -> bool:
        look = next(looks)
        if look == 1:
            run.mkdir()
        if look >= 1:  # 97 bytes more at every look: most looks end inside a line.
            (run / "journal.jsonl").write_text(text[: 97 * look], encoding="utf-8")
        return 97 * look > len(text)

    told = shown(run, terminal=terminal, done=done)
    assert told.count("dropped 42") >= 1
    if not terminal:
        assert told.count("dropped 42") == 1


@pytest.mark.parametrize("torn", ['{"event": "run_fin', '{"event": "run_finished"}', "\xff", "[1, 2]"])
def test_a_torn_last_line_is_left_alone(tmp_path: Path, torn: str) -> None:
    told = shown(written(tmp_path / "run", journal(STATED), torn), terminal=False)
    assert "finished after" not in told


def test_a_run_started_again_is_read_from_its_start(tmp_path: Path) -> None:
    run = written(tmp_path / "run", journal(STATED))
    looks = iter((False, True))

    def done() -> bool:
        over = next(looks)
        if over:
            written(run, [{"event": "run_started", "t": 0, "run": "again", "rounds": 1, "sites": 2}])
        return over

    assert "run again: 1 round, 2 sites" in shown(run, terminal=False, done=done)


def test_no_journal_at_all(tmp_path: Path) -> None:
    assert "Waiting for the journal" in shown(tmp_path / "nowhere", terminal=True)
    assert shown(tmp_path / "nowhere", terminal=False) == ""


def test_names_are_text_not_markup() -> None:
    view, recorder = RunView(), console(terminal=True)
    view.take({"event": "site", "site": "[red]odd[/red]", "state": "trained"})
    recorder.print(picture(view, elapsed=1.0, spinner=Spinner("dots")))
    assert "[red]odd[/red]" in recorder.export_text()


def summary() -> dict[str, Any]:
    choice = {"value": 0.46, "low": 0.38, "high": 0.55, "count": 120, "higher_is_better": True, "chance": 0.25}
    return {
        "stamp": "SIMULATION - NOT PRIVATE",
        "exam": {"base": {"choice_accuracy": {**choice, "value": 0.4}}, "target_round_1": {"choice_accuracy": choice}},
        "epsilon": {site: {"spent": 7.99, "budget": 8.0, **STATED} for site in SITES},
        "seconds": {"total": 280.1, "train": 80.2},
    }


def final(told: dict[str, Any]) -> str:
    recorder = console(terminal=True)
    recorder.print(final_table(told))
    return recorder.export_text().replace("\N{NO-BREAK SPACE}", " ")


def test_the_final_table_holds_exam_epsilon_and_seconds() -> None:
    told = final(summary())
    for part in (
        "Target, round 1",
        "46 % [38, 55]",
        "7.99 of 8",
        "delta 1e-5",
        "per record",
        "1 min 20 s",
        "4 min 40 s",
    ):
        assert part in told, part


def test_the_final_table_withholds_and_does_without() -> None:
    told = summary()
    del told["epsilon"][SITES[0]]["accountant"]
    told["epsilon"][SITES[1]]["delta"] = 1e-06
    text = final(told)
    assert "withheld" in text
    assert "delta 1e-6" in text
    assert final({}).count("not measured") == 3
