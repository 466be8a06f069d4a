"""Every way to make private text, in the round, by configuration: it runs, is charged, resumes, and may be refused.

The tiny random model, two sites, two rounds, in process; what a method is worth is measured in benchmarks, not here.
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from fl_app import releases
from fl_app.errors import RoundFailed
from fl_app.journal import read_lines
from fl_app.privacy.accountants import pld
from fl_app.privacy.events import receipt_from_dict
from fl_app.privacy.ledger import peek
from simulations import launch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SMOKE = "configs/smoke.toml"
SMALL = (
    'model.dtype="float32"',  # in bfloat16 the decoders ask for 2^18 equal numbers, slow where a vocabulary is tiny
    'simulation.partition={kind="iid", sites=2}',
    "simulation.max_rows_per_site=24",
    "simulation.policy.min_noise_multiplier=0.3",
    "simulation.policy.max_noise_multiplier=200.0",
    "simulation.policy.max_steps_per_round=4000",
    'simulation.policy.release_kinds=["adapter", "vector", "histogram", "text"]',
    'server.filters=[{kind="near_duplicate"}]',
    "server.distiller.max_new_tokens=6",
    "server.tuner.learning_rate=0.02",
    "server.exam.choice_items=3",
    "server.exam.free_items=2",
    "server.exam.max_new_tokens=2",
    "client.probe.items=0",
)
LOCAL = '{kind="local"}'
WRITES = 'drafts=6, max_new_tokens=8, codes=""'
METHODS: dict[str, tuple[str, str, str | None]] = {
    "dp_lora": ('{kind="dp_lora", steps=1}', f'{{kind="control_codes", {WRITES}}}', "adapter"),
    "dp_distil": (
        '{kind="dp_distil", steps=1}',
        f'{{kind="control_codes", {WRITES}, voices="each_site"}}',
        "adapter",
    ),
    "private_prediction": (
        (
            '{kind="private_prediction", buckets_per_code=1, expected_units=24, tokens_per_bucket=6, batch_rows=8, '
            "texts_per_bucket=2, max_new_tokens=4, clip_norm=2.0, temperature=2.0, threshold=0.3}"
        ),
        '{kind="released_texts", codes="", max_texts=4000, learner="private_prediction"}',
        "text",
    ),
    "invisible_ink": (
        '{kind="invisible_ink", buckets_per_code=1, expected_units=4, max_new_tokens=4, top_k=20, batch_rows=8}',
        '{kind="released_texts", codes="", max_texts=4000, learner="invisible_ink"}',
        "text",
    ),
    "epsvec": (
        '{kind="epsvec", layers=[0, 1]}',
        f'{{kind="epsvec", {WRITES}, layers=[0, 1], num_negatives=2, coefficient=0.5}}',
        "vector",
    ),
    "private_evolution": (
        f'{{kind="pe_votes", embedder={LOCAL}}}',
        '{kind="private_evolution", codes="", population=8, keep=3, max_new_tokens=8, emits="population"}',
        "histogram",
    ),
    "public_only": ('{kind="dp_lora", steps=1}', f'{{kind="public_only", {WRITES}}}', None),
    "zero_shot": ('{kind="dp_lora", steps=1}', f'{{kind="zero_shot", {WRITES}}}', None),
}
"""Learner, synthesizer, and the kind of release, None where no site is asked."""

every_method = pytest.mark.parametrize("method", METHODS)
asks_sites = pytest.mark.parametrize("method", [name for name, (_, _, kind) in METHODS.items() if kind])


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of our own, and a corpus of few codes: one class a code would be a thousand otherwise."""
    place = tmp_path_factory.mktemp("workplace")
    write = launch.write_corpus

    def few(folder: Path) -> None:
        if folder.exists():
            return
        write(folder)
        lines = (folder / "codes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "codes.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
        rows = [json.loads(line) for line in (folder / "private.jsonl").read_text(encoding="utf-8").splitlines()]
        names = [json.loads(line)["id"] for line in lines[:3]]
        told = [json.dumps({**row, "code": names[number % 3]}) + "\n" for number, row in enumerate(rows)]
        (folder / "private.jsonl").write_text("".join(told), encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        patch.setattr(launch, "write_corpus", few)
        yield place


def play(workplace: Path, name: str, method: str, *more: str) -> tuple[int, Path, Path, str]:
    """Run a method as a user would; return the exit code, the run directory, the sites, and what was said."""
    learner, synthesizer, _ = METHODS[method]
    overrides = (*SMALL, f"client.learner={learner}", f"server.synthesizer={synthesizer}", *more)
    words = ["--config", SMOKE, "--run", name, *(word for item in overrides for word in ("--override", item))]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = launch.main(words)
    return code, workplace / "runs" / name, workplace / "build" / "sites" / name, out.getvalue()


@pytest.fixture(scope="module")
def played(workplace: Path) -> dict[str, tuple[int, Path, Path, str]]:
    return {method: play(workplace, method, method) for method in METHODS}


@every_method
def test_it_plays_its_rounds_and_writes(method: str, played: dict[str, Any]) -> None:
    code, run, _, said = played[method]
    assert code == 0, said
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "completed"
    for number in (1, 2):
        drafts = read_lines(run / "rounds" / str(number) / "drafts.jsonl")
        assert drafts
        assert {draft["origin"]["round"] for draft in drafts} == {number}
        assert all(draft["origin"]["prompt"] for draft in drafts)


@asks_sites
def test_what_is_charged_is_what_was_released(method: str, played: dict[str, Any]) -> None:
    """Ledger, receipts of the server and the report's figure agree, and nothing is free."""
    _, run, sites, _ = played[method]
    for site in ("site-0", "site-1"):
        book = peek(sites / site[-1] / "ledger" / "ledger.jsonl")
        assert book is not None
        assert len(book.reserved) == 2
        told = []
        for number in (1, 2):
            place = run / "rounds" / str(number) / "releases" / site
            release, _ = releases.load(place)
            assert release.kind == METHODS[method][2]
            told += [receipt_from_dict(one) for one in json.loads((place / "receipts.json").read_text())]
        assert tuple(told) == book.receipts
        spent = pld.epsilon(told, 1e-5)
        assert 0 < spent <= 8.0
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert summary["epsilon"][site]["spent"] == pytest.approx(spent)


@pytest.mark.parametrize("method", [name for name, (_, _, kind) in METHODS.items() if kind is None])
def test_the_floors_ask_no_site_and_cost_nothing(method: str, played: dict[str, Any]) -> None:
    _, run, sites, _ = played[method]
    for site in ("site-0", "site-1"):
        book = peek(sites / site[-1] / "ledger" / "ledger.jsonl")
        assert book is None or not book.reserved
        assert not (run / "rounds" / "1" / "releases" / site).exists()


@asks_sites
def test_a_policy_without_its_kind_refuses_it(method: str, workplace: Path) -> None:
    kind = METHODS[method][2]
    others = [one for one in ("adapter", "vector", "histogram", "text") if one != kind]
    code, run, sites, said = play(
        workplace, f"refused-{method}", method, "run.rounds=1", f"simulation.policy.release_kinds={json.dumps(others)}"
    )
    assert code == 1
    assert "policy" in said
    for site in ("site-0", "site-1"):
        assert f"release kind {kind!r} is not allowed" in (sites / site[-1] / "site.log").read_text(encoding="utf-8")
        book = peek(sites / site[-1] / "ledger" / "ledger.jsonl")
        assert book is None or not book.reserved
    assert not (run / "rounds" / "1" / "drafts.jsonl").exists()


@every_method
def test_a_run_that_was_stopped_goes_on_to_the_same_drafts(
    method: str, played: dict[str, Any], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the second round's wave and its drafts, and played again: the same text, nothing paid twice."""
    from strategies.pipeline import Pipeline

    synthesise = Pipeline._synthesise

    def dies(self: Pipeline, number: int, *rest: Any) -> Any:
        if number == 2:
            raise RoundFailed("stopped here")
        return synthesise(self, number, *rest)

    name = f"resumed-{method}"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "_synthesise", dies)
        assert play(workplace, name, method)[0] == 1
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert launch.main(["--resume", str(workplace / "runs" / name)]) == 0, out.getvalue()
    _, whole, _, _ = played[method]
    for number in (1, 2):
        texts = [
            [
                (draft["instruction"], draft["origin"]["code"])
                for draft in read_lines(run / "rounds" / str(number) / "drafts.jsonl")
            ]
            for run in (whole, workplace / "runs" / name)
        ]
        assert texts[0] == texts[1]
    if METHODS[method][2]:
        book = peek(workplace / "build" / "sites" / name / "0" / "ledger" / "ledger.jsonl")
        assert book is not None
        assert len(book.reserved) == 2


def test_a_learner_that_sends_something_else_is_refused_before_anything_is_asked(workplace: Path) -> None:
    learner = METHODS["epsvec"][0]
    code, _, sites, said = play(workplace, "mismatched", "dp_lora", f"client.learner={learner}")
    assert code == 2
    assert "'epsvec' sends vector, server.synthesizer.kind = 'control_codes' writes from adapter" in said
    assert "dp_lora" in said
    assert not (sites / "0" / "ledger").exists()


SURVEY = (
    'client.survey={noise_multiplier=2.0, kernel={embedder={kind="local"}, dim=64}}',
    'server.filters=[{kind="kernel_density", embedder={kind="local"}, dim=64, keep=2}]',
    'server.synthesizer.quota="survey"',
)


def test_a_survey_is_charged_once_and_steers_quota_and_selection(workplace: Path) -> None:
    code, run, sites, said = play(workplace, "surveyed", "dp_lora", *SURVEY)
    assert code == 0, said
    for site in ("site-0", "site-1"):
        first, second = (releases.load(run / "rounds" / number / "releases" / site)[1] for number in "12")
        assert first is not None
        assert second is None
        assert {name: len(one) for name, one in first.vectors.items()} == {"codes": 3, "kernel": 64}
        assert abs(first.vectors["codes"].sum() - 24) < 6 * 2.0 * (2 * 3) ** 0.5
        book = peek(sites / site[-1] / "ledger" / "ledger.jsonl")
        assert book is not None
        assert [len(entry.receipts) for entry in book.reserved] == [2, 1]
        assert book.plan is not None
        assert [type(side.event).__name__ for side in book.plan.sides] == ["Gaussian"]
    kept = json.loads((run / "rounds" / "1" / "screened.json").read_text(encoding="utf-8"))["kept"]
    assert 0 < len(kept) <= 6


def test_a_second_survey_needs_a_filter_over_the_whole_ledger(workplace: Path) -> None:
    """The plan holds one for life; the site says so in its own log, and only a code leaves."""
    _, _, sites, _ = play(workplace, "survey-1", "dp_lora", *SURVEY, "run.rounds=1", "client.epsilon=2.0")
    learner, synthesizer, _ = METHODS["dp_lora"]
    overrides = (
        *SMALL,
        f"client.learner={learner}",
        f"server.synthesizer={synthesizer}",
        *SURVEY,
        "run.rounds=1",
        "server.tuner.epochs=2",
    )
    words = ["--config", SMOKE, "--run", "survey-2", "--sites", str(sites)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = launch.main([*words, *(word for item in overrides for word in ("--override", item))])
    assert code == 1
    assert "holds 1 x gaussian with noise_multiplier 2" in (sites / "0" / "site.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (('server.synthesizer.quota="survey"',), "add [client.survey]"),
        (SURVEY[1:2], "add [client.survey.kernel]"),
        ((*SURVEY, "client.survey.kernel.dim=32"), "kernel_density.dim = 64, and client.survey.kernel.dim = 32"),
    ],
)
def test_what_reads_a_survey_and_what_makes_it_must_fit(workplace: Path, more: tuple[str, ...], told: str) -> None:
    code, _, _, said = play(workplace, f"unfit-{len(told)}", "dp_lora", *more)
    assert code == 2
    assert told in said


def test_a_survey_that_the_policy_does_not_allow_is_refused(workplace: Path) -> None:
    code, _, sites, _ = play(
        workplace, "no-survey", "dp_lora", *SURVEY, 'simulation.policy.release_kinds=["adapter", "vector"]'
    )
    assert code == 1
    assert "release kind 'histogram' is not allowed" in (sites / "0" / "site.log").read_text(encoding="utf-8")
