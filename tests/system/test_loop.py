"""The whole loop in one process, from a configuration to a target model, and everything that may go wrong on the way.

The apps are the real ones and so is every byte they exchange; only Flower's transport is `LocalGrid`. Runs are small:
two sites of 30 rows, one noisy step a round, a model that knows nothing. Most tests look at runs that fixtures made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from fl_app import lora, peft_files
from fl_app.errors import RoundFailed
from fl_app.journal import read_lines
from simulations import launch
from strategies import cohort, collected
from strategies.aggregators.mean_factors import MeanFactors
from strategies.stages import Setting
from strategies.validate import Rejection
from tests.workplace import at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fl_app.models import FrozenModel
    from simulations.launch import Prepared

SMOKE = "configs/smoke.toml"
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
"""Smaller than smoke. Its filter by length drops all that the tiny model writes, and then nothing is ever taught."""
ONE_ROUND = (*SMALL, "run.rounds=1")
MODELS = ("base", "start", "adapter", "target_round_1", "target_round_2", "professional")
PHASES = ("train", "aggregate", "synthesise", "filter", "distil", "tune", "exam", "broadcast", "total")
DONE = ("validate", "aggregate", "synthesise", "filter", "distil", "tune", "exam")
SITES = ("site-0", "site-1")


@dataclasses.dataclass(frozen=True)
class Told:
    """What a run said: how it exited, its output, and every log record of the process at level DEBUG."""

    code: int
    out: str
    err: str
    log: str
    directory: Path
    home: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own instead of build/ and runs/; the corpus, the same every time, is written once."""
    place = tmp_path_factory.mktemp("workplace")
    with at(place):
        yield place


@contextlib.contextmanager
def _listening() -> Iterator[io.StringIO]:
    """Keep all that is logged meanwhile, by anyone, from level DEBUG."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    loggers = [logging.getLogger(), logging.getLogger("flwr")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield heard
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _main(workplace: Path, name: str, overrides: tuple[str, ...], *more: str) -> Told:
    """Run the command as a user would."""
    words = ["--config", SMOKE, "--run", name, *(word for item in overrides for word in ("--override", item)), *more]
    out, err = io.StringIO(), io.StringIO()
    with _listening() as heard, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = launch.main(words)
    home = Path(more[-1]) if "--sites" in more else workplace / "build" / "sites" / name
    return Told(code, out.getvalue(), err.getvalue(), heard.getvalue(), workplace / "runs" / name, home)


def _prepare(name: str, overrides: tuple[str, ...], *, sites: Path | None = None) -> Prepared:
    return launch.prepare(SMOKE, "\n".join(overrides), run=name, sites=sites)


def _with_overrides(prepared: Prepared, *more: str, **changes: Any) -> Prepared:
    """Return the same run with other settings and fields."""
    config = {**prepared.run_config, "overrides": "\n".join([prepared.run_config["overrides"], *more])}
    return dataclasses.replace(prepared, run_config=config, **changes)


def _events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "journal.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def first(workplace: Path) -> Told:
    return _main(workplace, "first", SMALL)


@pytest.fixture(scope="module")
def again(first: Told) -> dict[str, Any]:
    """The same configuration and seed, on fresh sites and under another name."""
    return launch.play(_prepare("again", SMALL))


# --- a run that goes well


def test_a_run_completes(first: Told) -> None:
    assert first.code == 0, first.err
    assert (first.summary["status"], first.summary["error"]) == ("completed", "")
    assert [(one["round"], one["used"]) for one in first.summary["rounds"]] == [(1, [*SITES]), (2, [*SITES])]


def test_the_last_line_of_the_output_is_the_run_directory(first: Told) -> None:
    assert first.out.splitlines()[-1] == str(first.directory)
    assert first.directory.is_dir()


def test_the_run_directory_holds_what_is_documented(first: Told) -> None:
    peft = ("adapter_config.json", "adapter_model.safetensors")
    releases = [f"releases/{site}/{name}" for site in SITES for name in (*peft, "receipts.json")]
    adapters = [f"{place}/{name}" for place in ("merged", "target") for name in peft]
    texts = ["drafts.jsonl", "screened.json", "lessons.jsonl", "record.json"]
    expected = {
        *("config.toml", "digest.txt", "journal.jsonl", "summary.json", "report.html", "target/README.md"),
        *(f"target/{name}" for name in peft),
        *(f"rounds/{number}/{name}" for number in (1, 2) for name in (*releases, *adapters, *texts)),
        *(f"rounds/{number}/done/{phase}.json" for number in (1, 2) for phase in (*DONE, "publish")),
        *(f"rounds/0/done/{phase}.json" for phase in ("open", "exam")),
        *(".lock", "launch.json", "audit.jsonl"),
    }

    found = {str(path.relative_to(first.directory)) for path in first.directory.rglob("*") if path.is_file()}

    assert found == expected
    assert all((first.directory / name).stat().st_size for name in found - {".lock"})


@pytest.mark.parametrize("model", MODELS)
def test_the_summary_scores_every_model(first: Told, model: str) -> None:
    scores = first.summary["exam"][model]

    assert scores.keys() == {"choice_accuracy", "bits_per_byte", "rouge_l"}
    for score in scores.values():
        assert score["low"] <= score["value"] <= score["high"]
        assert math.isfinite(score["low"])
        assert math.isfinite(score["high"])
    assert (scores["choice_accuracy"]["count"], scores["bits_per_byte"]["count"]) == (3, 2)
    assert scores["choice_accuracy"]["chance"] == 0.25


def test_no_other_model_is_scored(first: Told) -> None:
    assert first.summary["exam"].keys() == {*MODELS}


def test_the_summary_counts(first: Told) -> None:
    summary = first.summary

    assert summary["drafts"]["written"] == 12
    assert 0 < summary["lessons"] <= summary["drafts"]["kept"] <= 12
    assert summary["seconds"].keys() >= {*PHASES}
    assert all(took >= 0 for took in summary["seconds"].values())
    for way in ("up", "down"):
        assert summary["bytes"][way].keys() == {*SITES}
        assert all(count > 0 for count in summary["bytes"][way].values())
    assert summary["stamp"] == "SIMULATION - NOT PRIVATE"
    assert summary["config_digest"] == (first.directory / "digest.txt").read_text().strip()


def test_lessons_change_the_target(first: Told) -> None:
    """What the run is for: each round's target is another one, and it says other things than the base."""
    hashes, exam = first.summary["hashes"], first.summary["exam"]

    assert hashes["round_1/target"] != hashes["round_2/target"]
    assert exam["target_round_2"]["bits_per_byte"]["value"] != exam["base"]["bits_per_byte"]["value"]


def test_every_lesson_points_to_a_draft_that_was_kept(first: Told) -> None:
    for number in (1, 2):
        folder = first.directory / "rounds" / str(number)
        kept = json.loads((folder / "screened.json").read_text())["kept"]
        drafts = {row["id"]: row for row in _lines(folder / "drafts.jsonl")}
        lessons = _lines(folder / "lessons.jsonl")
        assert lessons
        assert [row["draft_id"] for row in lessons] == [one for one in kept if one in {r["draft_id"] for r in lessons}]
        assert all(row["instruction"] == drafts[row["draft_id"]]["instruction"] for row in lessons)
        assert {row["origin"]["round"] for row in drafts.values()} == {number}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_journal_tells_the_phases_in_order(first: Told) -> None:
    events = _events(first.directory)
    phases = [(event["round"], event["phase"]) for event in events if event["event"] == "phase_finished"]
    server = ("validate", "aggregate", "synthesise", "filter", "distil", "tune", "exam")

    assert phases == [
        (0, "exam"),
        *((number, phase) for number in (1, 2) for phase in ("train", *server)),
        (2, "broadcast"),
    ]
    assert events[0]["event"] == "run_started"
    assert events[-1]["event"] == "run_finished"
    assert [event["t"] for event in events] == sorted(event["t"] for event in events)


def test_sites_score_the_last_target_on_public_text(first: Told) -> None:
    probes = [event for event in _events(first.directory) if event["event"] == "probe"]

    assert [(event["site"], event["items"]) for event in probes] == [(site, 2) for site in SITES]
    assert all(0 < event["bits_per_byte"] < 20 for event in probes)


def test_merged_is_the_mean_of_the_releases(first: Told) -> None:
    from fl_app.types import AdapterRelease, Broadcast, Upload

    folder = first.directory / "rounds" / "2"
    uploads = [
        Upload(
            site=site,
            round=2,
            release=AdapterRelease(adapter=peft_files.load(folder / "releases" / site)),
            receipts=None,
            spent=0.0,
        )
        for site in SITES
    ]

    answered = Broadcast(
        run="first", round=2, adapter=peft_files.load(first.directory / "rounds/1/target"), config_digest=""
    )
    setting = Setting(run="first", mode="simulation", seed=0, rounds=2, sites=len(SITES), directory=first.directory)
    stage = MeanFactors(kind="mean_factors").build(setting)
    assert lora.sha256(stage(uploads, answered).adapter) == first.summary["hashes"]["round_2/merged"]
    assert lora.sha256(peft_files.load(folder / "merged")) == first.summary["hashes"]["round_2/merged"]


def test_the_target_loads_with_peft_and_says_the_same(first: Told, frozen: FrozenModel) -> None:
    import torch
    from peft import PeftModel

    ids = torch.tensor([frozen.tokenizer("What helps a cough?", add_special_tokens=False)["input_ids"]])
    target = peft_files.load(first.directory / "target")
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(frozen.replica().model, first.directory / "target")(input_ids=ids).logits
        ours = lora.attach(frozen, target)(input_ids=ids).logits
        bare = frozen.model(input_ids=ids).logits

    assert torch.equal(loaded, ours)
    assert not torch.allclose(loaded, bare, atol=1e-3)
    assert lora.sha256(target) == first.summary["hashes"]["round_2/target"]


# --- what it costs


def test_epsilon_grows_from_round_to_round_within_the_budget(first: Told) -> None:
    for site in SITES:
        spent = first.summary["epsilon"][site]
        assert 0 < spent["by_round"][0] < spent["by_round"][1] == spent["spent"] <= spent["budget"] == 2.0
        assert spent["delta"] == 1e-5


@pytest.mark.parametrize("index", [0, 1])
def test_epsilon_is_what_the_accountant_makes_of_the_ledger(first: Told, index: int) -> None:
    """The file is read as JSON and composed with dp-accounting, without a line of ours in between."""
    ledger = _lines(first.home / str(index) / "ledger" / "ledger.jsonl")
    receipts = [receipt for line in ledger for receipt in line.get("receipts", [])]
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for receipt in receipts:
        event = receipt["event"]
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(
                event["sample_rate"], dp_accounting.GaussianDpEvent(event["noise_multiplier"])
            ),
            event["steps"],
        )

    assert len(receipts) == 2
    assert {receipt["event"]["sample_rate"] for receipt in receipts} == {0.1}
    spent = first.summary["epsilon"][f"site-{index}"]["spent"]
    assert spent == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)


# --- the same again


def test_the_same_seed_gives_the_same_hashes(first: Told, again: dict[str, Any]) -> None:
    assert again["hashes"] == first.summary["hashes"]
    names = ("merged", "target", "drafts.jsonl", "screened.json", "lessons.jsonl", *(f"releases/{s}" for s in SITES))
    assert again["hashes"].keys() == {f"round_{number}/{name}" for number in (1, 2) for name in names}


def test_the_same_seed_gives_the_same_bytes(first: Told, again: dict[str, Any], workplace: Path) -> None:
    other = workplace / "runs" / "again"
    names = [
        path.relative_to(first.directory)
        for path in first.directory.rglob("*")
        if path.name in {"drafts.jsonl", "lessons.jsonl", "screened.json", "receipts.json"} or "adapter_" in path.name
    ]

    assert len(names) == 2 * (3 + 2 + 2 * (2 + 2)) + 2
    for name in names:
        assert (first.directory / name).read_bytes() == (other / name).read_bytes(), name
    assert again["exam"] == first.summary["exam"]
    assert again["epsilon"] == first.summary["epsilon"]


def test_another_seed_gives_another_run(first: Told) -> None:
    other = launch.play(_prepare("other-seed", (*SMALL, "run.seed=1")))

    same = [name for name, value in first.summary["hashes"].items() if other["hashes"][name] == value]
    assert same == []


# --- nothing private anywhere


def _secrets(home: Path) -> list[str]:
    planted = json.loads((home.with_name(f"{home.name}-simulation") / "planted.json").read_text(encoding="utf-8"))
    return [identity["text"] for identity in planted["identities"]]


def _forms(secret: str) -> set[bytes]:
    """Return how a text may stand in a file: as it is, or escaped for JSON."""
    return {secret.encode(), json.dumps(secret)[1:-1].encode()}


def _holding(secrets: list[str], content: bytes) -> list[str]:
    return [secret for secret in secrets if any(form in content for form in _forms(secret))]


@pytest.mark.parametrize("run", ["first", "second"], ids=["a run that went well", "a run that was refused"])
def test_a_planted_identity_stands_in_the_rows_and_nowhere_else(run: str, request: pytest.FixtureRequest) -> None:
    made: Any = request.getfixturevalue(run)
    told: Told = made if run == "first" else made[0]
    secrets = _secrets(told.home)
    rows = b"".join(path.read_bytes() for path in told.home.glob("*/rows.jsonl"))
    written = [path for folder in (told.directory, told.home) for path in folder.rglob("*") if path.is_file()]

    assert len(secrets) > 10
    assert _holding(secrets, rows) == secrets, "the search would miss some"
    assert _holding(secrets, (told.out + told.err + told.log).encode()) == []
    for path in written:
        if path.name != "rows.jsonl":
            assert _holding(secrets, path.read_bytes()) == [], path


def test_the_listener_hears_everyone() -> None:
    """The twin of the test above, for what is logged."""
    with _listening() as heard:
        logging.getLogger("stillroom.site").debug("one")
        logging.getLogger("flwr").debug("another")

    assert {"one", "another"} <= {*heard.getvalue().splitlines()}


# --- sites in trouble


class SteppedTime:
    """A clock that only waiting moves: what a slow machine computes takes no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


FIVE = (*ONE_ROUND, 'simulation.partition={kind="iid", sites=5}', "server.network.quorum=0.4")


@pytest.fixture(scope="module")
def troubled(workplace: Path) -> tuple[Prepared, dict[str, Any]]:
    """Five sites: two train, one raises, one stays silent, one has a row that cannot be read."""
    prepared = _prepare("troubled", (*FIVE, "server.network.reply_timeout_s=1.0"))
    shutil.copytree(prepared.federation.root, workplace / "two-of-five", ignore=shutil.ignore_patterns("[234]"))
    with (prepared.federation.root / "4" / "rows.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"instruction": 3, "output": "Dear Miss Malformed"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "time", SteppedTime())
        summary = launch.play(prepared, faults={2: "raises", 3: "silent"})
    return prepared, summary


def test_a_round_survives_sites_in_trouble(troubled: tuple[Prepared, dict[str, Any]]) -> None:
    (record,) = troubled[1]["rounds"]

    assert record == {
        "round": 1,
        "used": ["site-0", "site-1"],
        "refused": {"site-4": "rows"},
        "rejected": {"site-2": "error: code 2"},
        "silent": ["site-3"],
    }


def test_the_journal_names_every_site_and_its_trouble(troubled: tuple[Prepared, dict[str, Any]]) -> None:
    events = [event for event in _events(troubled[0].directory) if event["event"] == "site"]

    assert {event["site"]: (event["state"], event.get("code")) for event in events} == {
        "site-0": ("trained", None),
        "site-1": ("trained", None),
        "site-2": ("rejected", "error: code 2"),
        "site-3": ("silent", None),
        "site-4": ("refused", "rows"),
    }


def test_sites_in_trouble_leave_no_trace_in_the_merged_adapter(
    troubled: tuple[Prepared, dict[str, Any]], workplace: Path
) -> None:
    """A federation of the two sound sites alone, same rows, same names."""
    prepared = troubled[0]
    directory = workplace / "runs" / "two-of-five"
    config = {**prepared.run_config, "sites": str(workplace / "two-of-five"), "run": "two-of-five"}
    two = _with_overrides(
        dataclasses.replace(prepared, run_config=config),
        "server.network.sites=2",
        f'run.directory="{directory}"',
        directory=directory,
        federation=dataclasses.replace(prepared.federation, sites=prepared.federation.sites[:2]),
    )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cohort, "time", SteppedTime())
        alone = launch.play(two)

    assert alone["rounds"][0]["silent"] == []
    assert alone["hashes"]["round_1/merged"] == troubled[1]["hashes"]["round_1/merged"]
    assert alone["hashes"]["round_1/target"] == troubled[1]["hashes"]["round_1/target"]


def test_a_malformed_row_costs_its_site_nothing_and_is_not_quoted(troubled: tuple[Prepared, dict[str, Any]]) -> None:
    prepared, summary = troubled
    site = prepared.federation.root / "4"

    assert summary["epsilon"]["site-4"]["spent"] == 0.0
    assert "receipts" not in (site / "ledger" / "ledger.jsonl").read_text()
    log = (site / "site.log").read_text()
    assert "rows.jsonl:31" in log
    assert "Malformed" not in log


# --- the budget outlives the run


@pytest.fixture(scope="module")
def second(first: Told, workplace: Path) -> tuple[Told, dict[str, bytes]]:
    """Another run on the sites of the first, whose budget is spent; and their ledgers before it."""
    before = {site: (first.home / site / "ledger" / "ledger.jsonl").read_bytes() for site in ("0", "1")}
    return _main(workplace, "second", SMALL, "--sites", str(first.home)), before


def test_a_spent_budget_fails_the_next_run(second: tuple[Told, dict[str, bytes]]) -> None:
    told = second[0]

    assert told.code == 1
    assert told.summary["status"] == "failed"
    assert "budget_spent" in told.summary["error"]
    reason = "round 1: 0 of 2 sites sent a sound upload, 1 needed (refused: site-0: budget_spent, site-1: budget_spent"
    followed, said = [line for line in told.err.splitlines() if "sound upload" in line]
    assert followed.startswith(f"run second failed: {reason}")
    assert said.startswith(f"RoundFailed: {reason}")
    assert "Traceback" not in told.err
    assert told.out.splitlines()[-1] == str(told.directory)


def test_a_run_that_fails_tells_its_journal(second: tuple[Told, dict[str, bytes]]) -> None:
    events = _events(second[0].directory)

    assert (events[-1]["event"], events[-1]["error"]) == ("run_failed", "RoundFailed")
    assert {event["code"] for event in events if event["event"] == "site"} == {"budget_spent"}


def test_a_refused_round_leaves_the_ledgers_as_they_were(first: Told, second: tuple[Told, dict[str, bytes]]) -> None:
    for site, before in second[1].items():
        assert (first.home / site / "ledger" / "ledger.jsonl").read_bytes() == before
        assert second[0].summary["epsilon"][f"site-{site}"]["spent"] == pytest.approx(
            first.summary["epsilon"][f"site-{site}"]["spent"]
        )


def test_play_raises_what_the_server_raised(first: Told) -> None:
    with pytest.raises(RoundFailed, match="budget_spent"):
        launch.play(_prepare("third", SMALL, sites=first.home))


def test_a_capped_run_leaves_budget_for_the_next() -> None:
    capped = (*ONE_ROUND, "simulation.policy.epsilon=8.0", "client.epsilon=3.0")
    prepared = _prepare("capped-1", capped)
    home = prepared.federation.root
    ledger = home / "0" / "ledger" / "ledger.jsonl"

    one = launch.play(prepared)
    before = ledger.read_bytes()
    other = launch.play(_prepare("capped-2", capped, sites=home))

    for site in SITES:
        spent = [summary["epsilon"][site]["spent"] for summary in (one, other)]
        assert 2.0 < spent[0] <= 3.0 < spent[1] <= 6.0
    assert ledger.read_bytes().startswith(before)


def test_a_run_may_start_from_an_adapter(first: Told) -> None:
    """The last target of one run is where another begins, and what its sites are sent."""
    start = first.directory / "target"
    summary = launch.play(_prepare("from-a-target", (*ONE_ROUND, f'lora.start="{start}"')))

    assert summary["exam"]["start"] == first.summary["exam"]["target_round_2"]
    assert summary["exam"]["base"] == first.summary["exam"]["base"]
    assert summary["exam"]["start"] != summary["exam"]["base"]
    assert summary["hashes"]["round_1/target"] != first.summary["hashes"]["round_2/target"]


# --- two sides that read different things


def test_a_site_that_reads_another_configuration_refuses() -> None:
    from flwr.app import Context, RecordDict

    from fl_app import client_app, server_app
    from simulations.local_grid import LocalGrid

    prepared = _prepare("two-minds", ONE_ROUND)
    theirs = _with_overrides(prepared, "client.learner.steps=2").run_config
    grid = LocalGrid(client_app.app, nodes=2, run_config=theirs)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(prepared.run_config))

    with pytest.raises(RoundFailed, match=r"refused: site-0: policy, site-1: policy"):
        server_app.app(grid, context)

    assert "another configuration" in (prepared.federation.root / "0" / "site.log").read_text()
    assert "receipts" not in (prepared.federation.root / "0" / "ledger" / "ledger.jsonl").read_text()


# --- what cannot even begin


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("server.tuner.learning_rat=1.0",), "unknown key server.tuner.learning_rat (did you mean 'learning_rate'?)"),
        (("client.learner.stepz=1",), "unknown key client.learner.stepz (did you mean 'steps'?)"),
        (("simulation.gird='ray'",), "unknown key simulation.gird (did you mean 'grid'?)"),
        (("sever.threads=2",), "unknown table [sever] (did you mean 'server'?)"),
        (("run.rounds",), "override 'run.rounds' is not key=value"),
        (('simulation.corpus="nowhere.jsonl"',), "nowhere.jsonl"),
        (('model.name="no-such-model"',), "model 'no-such-model'"),
        (('server.professional.model="no-such-teacher"',), "model 'no-such-teacher'"),
        (('run.mode="production"',), "run.mode is not 'simulation'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_begin_exits_2_with_one_line_that_names_it(
    workplace: Path, overrides: tuple[str, ...], told: str
) -> None:
    result = _main(workplace, "cannot-begin", (*ONE_ROUND, *overrides))

    assert result.code == 2
    assert told in result.err
    assert len(result.err.splitlines()) == 1
    assert result.out == ""
    assert not result.directory.exists()
    assert not result.home.exists()


def test_a_corpus_without_rows_exits_2(workplace: Path) -> None:
    corpus = workplace / "empty.jsonl"
    corpus.write_text("")
    more = (f'simulation.corpus="{corpus}"', 'simulation.code_column="topic"')

    result = _main(workplace, "no-rows", (*ONE_ROUND, *more))

    assert result.code == 2
    assert "empty.jsonl holds no rows" in result.err
    assert not result.home.exists()


def test_a_rejected_site_is_reported_and_what_it_spent_counts(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = collected.broken_rule

    def strict(upload: Any, **more: Any) -> Any:
        injected = Rejection(site="site-1", rule="shape", reason="injected")
        return injected if upload.site == "site-1" else plain(upload, **more)

    monkeypatch.setattr(collected, "broken_rule", strict)
    summary = launch.play(_prepare("rejected", ONE_ROUND))

    (first,) = summary["rounds"]
    assert (first["used"], first["rejected"]) == (["site-0"], {"site-1": "shape: injected"})
    assert summary["epsilon"]["site-1"]["spent"] == summary["epsilon"]["site-0"]["spent"] > 0


def test_a_corpus_of_ones_own_becomes_sites_with_codes_from_a_column(workplace: Path) -> None:
    corpus = workplace / "own.jsonl"
    rows = [{"instruction": f"Question {i}?", "output": "Yes.", "ward": f"ward {i % 2}"} for i in range(12)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = workplace / "own-exam.jsonl"
    exam.write_text(json.dumps({"question": "Yes?", "choices": ["yes", "no"], "answer": 0}) + "\n")
    more = (
        f'simulation.corpus="{corpus}"',
        'simulation.code_column="ward"',
        "simulation.plant_share=0.0",
        'simulation.code_text="A note from {value}:"',
        'simulation.partition={kind="column", column="ward"}',
        f'server.exam.path="{exam}"',
    )

    prepared = _prepare("own-corpus", (*ONE_ROUND, *more))

    codes = [read_lines(site.directory / "codes.jsonl") for site in prepared.federation.sites]
    assert codes == [[{"id": f"ward {i}", "text": f"A note from ward {i}:"} for i in range(2)]] * 2
    rows_there = [read_lines(site.directory / "rows.jsonl") for site in prepared.federation.sites]
    assert [{row["code"] for row in site} for site in rows_there] == [{"ward 0"}, {"ward 1"}]


def test_a_configuration_that_is_not_there_exits_2() -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = launch.main(["--config", "configs/nowhere.toml"])

    assert code == 2
    assert "configs/nowhere.toml; configs/ holds: " in err.getvalue()
    assert "smoke.toml" in err.getvalue()


def test_a_name_that_is_taken_exits_2(first: Told, workplace: Path) -> None:
    before = (first.directory / "journal.jsonl").read_bytes()

    result = _main(workplace, "first", SMALL)

    assert result.code == 2
    assert "holds a run already; choose another name with --run" in result.err
    assert (first.directory / "journal.jsonl").read_bytes() == before


def test_other_settings_on_sites_of_an_earlier_run_exit_2(first: Told, workplace: Path) -> None:
    """The ledgers of those sites are about their rows; other rows in the same place would inherit them."""
    result = _main(workplace, "other-rows", (*SMALL, "run.seed=7"), "--sites", str(first.home))

    assert result.code == 2
    assert str(first.home) in result.err
    assert not np.any([path.name == "journal.jsonl" for path in (workplace / "runs" / "other-rows").rglob("*")])
