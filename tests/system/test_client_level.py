"""Noise at the server, and releases without any, through the whole loop in one process.

The apps, the wire and the run directory are the real ones; the runs are as small as in `test_loop`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from typing import TYPE_CHECKING, Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from fl_app import lora, peft_files
from fl_app.errors import ConfigInvalid
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.statement import rounded_up
from fl_app.types import AdapterRelease, Broadcast, Gaussian, Upload
from simulations import launch
from simulations.progress import final_table, follow
from simulations.report.page import build_report
from strategies.aggregators.mean_factors import MeanFactors
from strategies.stages import Setting
from tests.workplace import at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMALL = (
    'simulation.partition={kind="iid", sites=2}',
    "simulation.max_rows_per_site=30",
    "simulation.policy.epsilon=2.0",
    "simulation.policy.min_noise_multiplier=0.8",
    "simulation.policy.max_noise_multiplier=5.0",
    "client.learner.steps=1",
    "server.synthesizer.drafts=6",
    "server.synthesizer.max_new_tokens=12",
    'server.filters=[{kind="near_duplicate"}]',
    "server.distiller.max_new_tokens=8",
    "server.tuner.learning_rate=0.02",
    "server.exam.choice_items=3",
    "server.exam.free_items=2",
    "server.exam.max_new_tokens=2",
)
AGGREGATOR = (
    'server.aggregator={kind="central_dp", inner={kind="mean_factors"}, clip_norm=0.5, noise_multiplier=3.0, '
    "epsilon=2.5, delta=1e-5}"
)
SITES = ("site-0", "site-1")


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own instead of build/ and runs/; the corpus, the same every time, is written once."""
    place = tmp_path_factory.mktemp("workplace")
    with at(place):
        yield place


def _play(name: str, *overrides: str) -> tuple[dict[str, Any], Path]:
    prepared = launch.prepare("configs/smoke.toml", "\n".join([*SMALL, *overrides]), run=name)
    return launch.play(prepared), prepared.directory


@pytest.fixture(scope="module")
def private() -> tuple[dict[str, Any], Path]:
    return _play("private", AGGREGATOR)


def _strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


# --- noise at the server


def test_the_run_completes_and_its_target_moves(private: tuple[dict[str, Any], Path]) -> None:
    summary, directory = private

    assert summary["status"] == "completed"
    assert summary["hashes"]["round_1/target"] != summary["hashes"]["round_2/target"]
    assert summary["exam"]["target_round_2"]["bits_per_byte"] != summary["exam"]["start"]["bits_per_byte"]
    assert lora.sha256(peft_files.load(directory / "target")) == summary["hashes"]["round_2/target"]


def test_the_ledger_of_the_run_holds_two_gaussians(private: tuple[dict[str, Any], Path]) -> None:
    path = private[1] / "client_level" / "ledger.jsonl"
    ledger = Ledger.open(path, dataset="the sites of run private+simulation", unit="site")

    assert [receipt.event for receipt in ledger.receipts()] == [Gaussian(noise_multiplier=3.0, clip_norm=0.5)] * 2
    assert ledger.committed("private", 2) == private[0]["hashes"]["round_2/merged"]


def test_the_summary_carries_the_whole_statement(private: tuple[dict[str, Any], Path]) -> None:
    """Its epsilon is composed once more with dp-accounting, without a line of ours in between."""
    told = private[0]["client_level"]
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_accounting.GaussianDpEvent(3.0), 2)

    assert told["spent"] == pytest.approx(accountant.get_epsilon(1e-5), abs=2e-3)
    assert told["by_round"][0] < told["by_round"][1] == told["spent"] < told["rdp"]
    assert (told["budget"], told["delta"], told["unit"]) == (2.5, 1e-5, "site")
    assert (told["relation"], told["sampling"], told["scope"]) == ("add_or_remove_one", "no", "this run")
    assert told["accountant"].startswith("PLD (dp-accounting")
    assert (told["noise_multiplier"], told["clip_norm"]) == ([3.0, 3.0], [0.5, 0.5])
    assert "trusted" in told["protects"]
    assert told["does_not_protect"].startswith("the uploads from this server")


def test_journal_record_card_and_report_say_the_same(private: tuple[dict[str, Any], Path]) -> None:
    summary, directory = private
    spent = summary["client_level"]["by_round"]
    events = [_strict(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    records = [json.loads((directory / "rounds" / str(n) / "record.json").read_text()) for n in (1, 2)]
    told = [event for event in events if event["event"] == "client_level"]
    card = (directory / "target" / "README.md").read_text()
    page = build_report(directory).read_text()

    assert [event["epsilon"] for event in told] == spent == [record["client_epsilon"] for record in records]
    assert {(event["delta"], event["unit"], event["sampling"]) for event in told} == {(1e-5, "site", "no")}
    said = f"Epsilon {rounded_up(spent[1])} of 2.5 at delta 1e-05, per site, add_or_remove_one, no sampling, PLD"
    assert said in card
    assert "Does not protect the uploads from this server" in card
    assert "per site, add/remove one, no sampling" in page
    assert "It does not protect the uploads from this server" in page


def test_the_merged_adapter_is_not_the_mean_that_the_server_saw(private: tuple[dict[str, Any], Path]) -> None:
    """By as much as the noise is: sigma * clip / sites a coordinate, over a thousand of them."""
    folder = private[1] / "rounds" / "2"
    start = peft_files.load(private[1] / "rounds" / "1" / "target")
    uploads = [
        Upload(site=site, round=2, release=AdapterRelease(adapter=peft_files.load(place)), receipts=None, spent=0.0)
        for site, place in ((site, folder / "releases" / site) for site in SITES)
    ]
    setting = Setting(run="private", mode="simulation", seed=0, rounds=2, sites=len(SITES), directory=private[1])
    stage = MeanFactors(kind="mean_factors").build(setting)
    mean = stage(uploads, Broadcast(run="private", round=2, adapter=start, config_digest="")).adapter
    merged = peft_files.load(folder / "merged")
    added = np.concatenate(
        [
            (getattr(merged.layers[name], factor) - getattr(mean.layers[name], factor)).ravel()
            for name in merged.layers
            for factor in ("a", "b")
        ]
    )

    assert float(np.std(added)) == pytest.approx(3.0 * 0.5 / 2, rel=0.1)


def test_the_same_seed_gives_the_same_noise(private: tuple[dict[str, Any], Path]) -> None:
    again, _ = _play("private-again", AGGREGATOR, "run.rounds=1")

    # One round less is another schedule for the sites, so their releases differ; the noise of entry 1 must not.
    other, _ = _play("private-once-more", AGGREGATOR, "run.rounds=1")
    assert again["hashes"] == other["hashes"]
    assert again["hashes"]["round_1/merged"] != private[0]["hashes"]["round_1/merged"]


def test_without_noise_at_the_server_there_is_no_statement() -> None:
    summary, directory = _play("plain", "run.rounds=1")

    assert summary["client_level"] is None
    assert not (directory / "client_level").exists()
    assert "Client level" not in (directory / "target" / "README.md").read_text()


def test_a_budget_that_cannot_carry_the_rounds_costs_no_site_anything() -> None:
    prepared = launch.prepare("configs/smoke.toml", "\n".join([*SMALL, AGGREGATOR, "run.rounds=9"]), run="too-many")

    with pytest.raises(ConfigInvalid, match="9 rounds at noise_multiplier = 3 would make epsilon"):
        launch.play(prepared)

    for site in prepared.federation.sites:
        assert not (site.directory / "ledger").exists()


# --- releases without noise


@pytest.fixture
def open_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites whose releases carry no receipts, as a learner without noise would send them."""
    from clients import local_round

    train = local_round.train

    def without(*arguments: Any, **more: Any) -> Upload:
        upload = train(*arguments, **more)
        return dataclasses.replace(upload, receipts=None, spent=math.inf) if upload.site == "site-1" else upload

    monkeypatch.setattr(local_round, "train", without)


@pytest.mark.usefixtures("open_sites")
def test_a_release_without_receipts_is_rejected_by_default() -> None:
    summary, _ = _play("refused", "run.rounds=1")

    assert summary["rounds"][0]["rejected"] == {"site-1": "receipt: none, so the release is not private"}
    assert summary["stamp"] == "SIMULATION - NOT PRIVATE"
    assert summary["epsilon"]["site-1"]["spent"] == "inf"  # it did leave the site


@pytest.mark.usefixtures("open_sites")
def test_an_accepted_release_without_receipts_is_told_everywhere() -> None:
    summary, directory = _play("accepted", "server.accept_non_private=true", AGGREGATOR)
    label = "not differentially private at site level (site-1)"
    card = (directory / "target" / "README.md").read_text()
    events = [_strict(line) for line in (directory / "journal.jsonl").read_text().splitlines()]

    assert [one["used"] for one in summary["rounds"]] == [[*SITES], [*SITES]]
    assert summary["stamp"] == f"SIMULATION - NOT PRIVATE; {label}"
    told = summary["epsilon"]["site-1"]
    assert (told["spent"], told["rdp"], told["private"], told["by_round"]) == ("inf", "inf", False, ["inf", "inf"])
    assert (summary["epsilon"]["site-0"]["private"], summary["client_level"]["unit"]) == (True, "site")
    assert [event["epsilon"] for event in events if event["event"] == "site" and event["site"] == "site-1"] == [
        "inf"
    ] * 2
    assert json.loads((directory / "rounds/1/releases/site-1/receipts.json").read_text()) is None
    left = [one for one in summary["left_site"] if one["site"] == "site-1"]
    assert {(one["event"], one["guarantee"].split(":")[0]) for one in left} == {
        ("none", "not differentially private at site level")
    }
    assert f"**SIMULATION - NOT PRIVATE; {label}**" in card
    assert "- site-1: infinite epsilon: it released without noise" in card
    assert "differentially private adapters" not in card.replace("\n", " ")
    for path in directory.rglob("*.json*"):
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            _strict(line)


@pytest.mark.usefixtures("open_sites")
def test_the_page_and_the_screen_show_an_infinite_epsilon() -> None:
    from rich.console import Console

    summary, directory = _play("shown", "server.accept_non_private=true", "run.rounds=1")
    console = Console(width=200, record=True, file=io.StringIO())
    follow(directory, done=lambda: True, console=console)
    console.print(final_table(summary))
    page = build_report(directory).read_text()

    assert "infinite" in console.export_text()
    assert "1 of 2 sites released without differential privacy (infinite epsilon)" in page
    assert "not differentially private at site level (site-1)" in page


def test_sites_that_would_train_what_the_server_calls_frozen_are_never_asked() -> None:
    frozen = AGGREGATOR.replace("delta=1e-5}", 'delta=1e-5, trains="b"}')

    with pytest.raises(ConfigInvalid, match=r"trains = 'b', and client\.learner moves 'both'"):
        launch.prepare("configs/smoke.toml", "\n".join([*SMALL, frozen]), run="two-minds")
