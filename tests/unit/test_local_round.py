"""One round of a site: what it spends, what it refuses, what it resends, and what it never says."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import local_round, spending
from clients.config import read_client
from clients.dp_steps import DpAdapterLearner
from clients.local_round import Settings, Site
from fl_app import inference, lora, models, peft_files, wire
from fl_app.config import shared
from fl_app.errors import AdapterMismatch, BudgetSpent, LedgerCorrupt, PolicyRefusal, StillroomError
from fl_app.privacy.accountants import pld
from fl_app.privacy.chain import Committed, Planned, Reserved
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.types import AdapterRelease, Broadcast, Hello, PoissonGaussian, Probe, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.privacy.ledger import Ledger
    from fl_app.types import Adapter

DELTA = 1e-5
SEARCH = {"min_noise_multiplier": 0.5, "max_noise_multiplier": 3.0}
SECRET = "Wilhelmina Quillfeather has the grey cough"  # a canary


@pytest.fixture
def site(site_folder: Any) -> Site:
    return Site(directory=site_folder.directory)


@pytest.fixture
def start(learned: Callable[[int], Adapter]) -> Adapter:
    return learned(5)


def settings(*, rounds: int = 2, mode: str = "simulation", steps: int = 2, items: int = 1, **client: Any) -> Settings:
    tree: dict[str, Any] = {
        "run": {"rounds": rounds, "mode": mode, "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": steps}, "probe": {"items": items}, **client},
    }
    return Settings(shared=shared(tree), asked=read_client(tree))


def broadcast(adapter: Adapter, round_number: int = 1, run: str = "run-a") -> Broadcast:
    return Broadcast(run=run, round=round_number, adapter=adapter, config_digest="d")


RUN_A = "run-a.d"
"""How the site's ledger calls the run: its name and its configuration's digest."""


def ledger_of(site: Site) -> Ledger:
    return site.ledger(site.policy)


def ask(site: Site, message: Broadcast, told: Settings) -> Upload | Refusal:
    """Return what the door would send."""
    return local_round.guarded(site, message.run, message.round, lambda: local_round.train(site, message, told))


def uploaded(answer: Upload | Refusal) -> Upload:
    assert isinstance(answer, Upload), answer
    return answer


def refused(site: Site, answer: object, code: str, *words: str) -> str:
    """Check that an answer is a refusal with this code and nothing else, and return the site's log."""
    assert isinstance(answer, Refusal), answer
    assert answer.code == code
    assert re.fullmatch("[0-9a-f]{12}", answer.incident)
    log = (site.directory / "site.log").read_text(encoding="utf-8")
    assert f" {code} {answer.incident} " in log
    assert all(word in log for word in words), log
    return log


def adapter_of(upload: Upload) -> Adapter:
    assert isinstance(upload.release, AdapterRelease)
    return upload.release.adapter


def noise_of(upload: Upload) -> float:
    assert upload.receipts is not None
    (receipt,) = upload.receipts
    assert isinstance(receipt.event, PoissonGaussian)
    return receipt.event.noise_multiplier


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let any of: reading rows, loading the model, learning, drawing noise, fail the test."""

    def fail(*_: Any, **__: Any) -> Any:
        pytest.fail("touched what it must not touch")

    places: dict[str, tuple[Any, str]] = {
        "rows": (local_round, "read_private_rows"),
        "model": (models, "load"),
        "learner": (DpAdapterLearner, "__call__"),
        "noise": (local_round, "_noise"),
        "calibration": (spending, "least_noise"),
    }
    for name in names:
        monkeypatch.setattr(*places[name], fail)


def test_a_round_reserves_learns_commits_and_uploads(site: Site, start: Adapter) -> None:
    upload = uploaded(ask(site, broadcast(start), settings()))
    assert (upload.site, upload.round) == ("harbour", 1)
    assert upload.receipts is not None
    (receipt,) = upload.receipts
    assert receipt.unit == "record"
    assert receipt.event == PoissonGaussian(noise_multiplier=noise_of(upload), sample_rate=0.25, steps=2, clip_norm=1.0)
    assert upload.spent == pld.epsilon([receipt], DELTA)
    adapter = adapter_of(upload)
    lora.check_alike([start, adapter])
    assert lora.sha256(adapter) != lora.sha256(start)
    _, planned, reserved, committed = ledger_of(site).entries()
    assert isinstance(planned, Planned)
    assert isinstance(reserved, Reserved)
    assert isinstance(committed, Committed)
    assert (reserved.run, reserved.round, reserved.receipts) == (RUN_A, 1, (receipt,))
    assert (committed.id, committed.sha256) == (reserved.id, lora.sha256(adapter))
    assert not (site.directory / "site.log").exists()


def test_the_planned_rounds_together_use_the_budget_and_no_more(site: Site, site_folder: Any, start: Adapter) -> None:
    site_folder.policy(privacy={"epsilon": 2.0}, limits=SEARCH)
    told = settings(rounds=3)
    uploads = [uploaded(ask(site, broadcast(start, number), told)) for number in (1, 2, 3)]
    assert len({noise_of(upload) for upload in uploads}) == 1
    receipts = [receipt for upload in uploads for receipt in upload.receipts or ()]
    for number, upload in enumerate(uploads, start=1):
        assert upload.spent == pytest.approx(pld.epsilon(receipts[:number], DELTA), rel=1e-9)
    assert uploads[0].spent < uploads[1].spent < uploads[2].spent
    assert ledger_of(site).receipts() == tuple(receipts)
    assert 0.99 * 2.0 < uploads[2].spent <= 2.0
    refused(site, ask(site, broadcast(start, 4), told), "policy", "round 4 of 3")
    refused(site, ask(site, broadcast(start, 1, "run-b"), told), "budget_spent", "of epsilon 2")
    assert ledger_of(site).receipts() == tuple(receipts)


def test_a_spent_budget_is_refused_before_anything_is_touched(
    site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_folder.policy(privacy={"epsilon": 0.01})
    forbid(monkeypatch, "rows", "model", "learner", "noise")
    before = ledger_of(site).entries()
    with pytest.raises(BudgetSpent):
        local_round.train(site, broadcast(start), settings())
    refused(site, ask(site, broadcast(start), settings()), "budget_spent", "BudgetSpent: spent 0 of epsilon 0.01")
    assert ledger_of(site).entries() == before


def test_a_budget_lowered_during_a_run_is_refused_before_learning(
    site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = uploaded(ask(site, broadcast(start), settings()))
    site_folder.policy(privacy={"epsilon": first.spent * 1.01})
    forbid(monkeypatch, "learner", "noise")
    refused(site, ask(site, broadcast(start, 2), settings()), "budget_spent")
    assert len(ledger_of(site).receipts()) == 1


def test_a_noise_floor_raised_during_a_run_is_kept(site: Site, site_folder: Any, start: Adapter) -> None:
    first = uploaded(ask(site, broadcast(start), settings()))
    site_folder.policy(limits={"min_noise_multiplier": noise_of(first) + 0.1, "max_noise_multiplier": 9.0})
    refused(site, ask(site, broadcast(start, 2), settings()), "policy", "noise multiplier")
    assert len(ledger_of(site).receipts()) == 1


def test_a_second_run_continues_the_same_ledger(site: Site, site_folder: Any, start: Adapter) -> None:
    site_folder.policy(limits=SEARCH)
    told = settings(rounds=1, epsilon=1.0)
    first = uploaded(ask(site, broadcast(start, run="run-a"), told))
    second = uploaded(ask(site, broadcast(start, run="run-b"), told))
    assert 0.98 < first.spent <= 1.0  # client.epsilon caps what one run adds
    both = [*(first.receipts or ()), *(second.receipts or ())]
    assert second.spent == pld.epsilon(both, DELTA)
    assert noise_of(second) == noise_of(first)  # the schedule is fixed: another noise would be chosen by looking
    assert first.spent < second.spent < first.spent + 1.0
    assert len(both) == len(ledger_of(site).receipts()) == 2


def test_a_resend_comes_from_the_outbox(
    site: Site, start: Adapter, learned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = settings()
    first = uploaded(ask(site, broadcast(start), told))
    uploaded(ask(site, broadcast(start, 2), told))
    before = (site.directory / "ledger" / "ledger.jsonl").read_bytes()
    forbid(monkeypatch, "rows", "model", "learner", "noise", "calibration")
    again = uploaded(ask(site, broadcast(start), told))
    assert lora.sha256(adapter_of(again)) == lora.sha256(adapter_of(first))
    refused(site, ask(site, broadcast(learned(6)), told), "policy", "was answered, to another broadcast")
    assert (again.site, again.round, again.receipts) == (first.site, first.round, first.receipts)
    assert again.spent == ledger_of(site).spent(DELTA) > first.spent
    assert (site.directory / "ledger" / "ledger.jsonl").read_bytes() == before


def test_a_changed_or_lost_outbox_is_never_sent(site: Site, start: Adapter, learned: Any) -> None:
    uploaded(ask(site, broadcast(start), settings()))
    (folder,) = (site.directory / "outbox").glob("*/round-1")
    peft_files.save(learned(8), folder, base_name="tiny-random")
    refused(site, ask(site, broadcast(start), settings()), "ledger", "is not the release committed as")
    shutil.rmtree(folder)
    refused(site, ask(site, broadcast(start), settings()), "ledger", "is gone")
    assert len(ledger_of(site).receipts()) == 1


def test_runs_with_similar_names_have_their_own_outbox(site: Site, start: Adapter) -> None:
    told = settings(rounds=1, epsilon=1.0)
    names = ["a/b", "a_b", "a b", "../a", "é" * 200]
    firsts = [uploaded(ask(site, broadcast(start, run=name), told)) for name in names]
    for name, first in zip(names, firsts, strict=True):
        again = uploaded(ask(site, broadcast(start, run=name), told))
        assert lora.sha256(adapter_of(again)) == lora.sha256(adapter_of(first))
    assert {path.name for path in site.directory.iterdir()} == {
        *("rows.jsonl", "codes.jsonl", "site.toml"),
        *("ledger", "outbox", "audit.jsonl", "received"),
    }


def test_a_round_that_died_is_spent_and_paid_again(
    site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_folder.policy(limits=SEARCH)
    told = settings(rounds=2, epsilon=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(DpAdapterLearner, "__call__", lambda *_: 1 / 0)
        refused(site, ask(site, broadcast(start), told), "internal", "ZeroDivisionError")
    lost = ledger_of(site).receipts()
    assert len(lost) == 1
    upload = uploaded(ask(site, broadcast(start), told))
    assert ledger_of(site).receipts() == (*lost, *(upload.receipts or ()))
    assert upload.spent == pld.epsilon(ledger_of(site).receipts(), DELTA)
    assert not (site.directory / "outbox").exists() or len(list((site.directory / "outbox").rglob("round-*"))) == 1
    # The lost round used up what the second one was planned for.
    refused(site, ask(site, broadcast(start, 2), told), "budget_spent")


@pytest.mark.parametrize(
    ("limits", "changes", "words"),
    [
        ({"release_kinds": []}, {}, "release kind 'adapter'"),
        ({"release_kinds": ["vector", "histogram"]}, {}, "release kind 'adapter'"),
        ({"max_steps_per_round": 1}, {}, "2 steps a round asked, at most 1"),
        ({"max_rounds": 1}, {}, "at most 1 rounds"),
        ({}, {"rounds": 6}, "at most 5 rounds"),
        ({"base_models": ["0" * 64]}, {}, "is not on the list of site.toml"),
        ({"simulation": False}, {}, "run.mode is 'simulation'"),
    ],
)
def test_what_the_policy_forbids_is_refused_untouched(
    limits: dict[str, Any],
    changes: dict[str, Any],
    words: str,
    site: Site,
    site_folder: Any,
    start: Adapter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site_folder.policy(limits=limits)
    forbid(monkeypatch, "rows", "model", "learner", "noise", "calibration")
    refused(site, ask(site, broadcast(start), settings(**changes)), "policy", words)
    assert not (site.directory / "ledger").exists()


def test_a_base_on_the_list_is_trained(site: Site, site_folder: Any, start: Adapter) -> None:
    site_folder.policy(limits={"base_models": [start.base, "0" * 64]})
    uploaded(ask(site, broadcast(start), settings()))


def test_a_broadcast_for_another_base_spends_nothing(site: Site, start: Adapter) -> None:
    other = dataclasses.replace(start, base="f" * 64)
    refused(site, ask(site, broadcast(other), settings()), "policy", "base: ffffffffffff")
    assert ledger_of(site).receipts() == ()


def test_a_model_that_is_not_here_spends_nothing(site: Site, start: Adapter) -> None:
    told = settings()
    gone = told.shared.model_copy(update={"model": told.shared.model.model_copy(update={"name": "no-such-model"})})
    answer = ask(site, broadcast(start), dataclasses.replace(told, shared=gone))
    refused(site, answer, "model", "ModelMissing: model 'no-such-model'")
    assert ledger_of(site).receipts() == ()


@pytest.mark.parametrize(
    "line",
    [f'{{"instruction": "{SECRET}"', f'["{SECRET}"]', f'"{SECRET}"', f'{{"output": "{SECRET}"}}', '{"instruction": 3}'],
)
def test_a_malformed_row_is_named_by_its_line_alone(
    line: str, site: Site, site_folder: Any, start: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    good = '{"instruction": "' + SECRET + '"}'
    site_folder.rows([good, line, good])
    answer = ask(site, broadcast(start), settings())
    log = refused(site, answer, "rows", "rows.jsonl:2: ")
    for text in (log, str(answer), caplog.text):
        assert not any(word in text for word in SECRET.split() if len(word) > 4)
    assert ledger_of(site).receipts() == ()


def test_a_row_whose_key_is_no_text_is_refused_too(site: Site, site_folder: Any, start: Adapter) -> None:
    """A lone surrogate is valid JSON and cannot be written to a UTF-8 log as it is."""
    site_folder.rows(['{"\\ud800": 1}'])
    refused(site, ask(site, broadcast(start), settings()), "rows", "rows.jsonl:1: ", "\\ud800")


def test_a_site_without_rows_answers_rows(site: Site, start: Adapter) -> None:
    (site.directory / "rows.jsonl").write_text("\n\n", encoding="utf-8")
    refused(site, ask(site, broadcast(start), settings()), "rows", "holds no row")
    (site.directory / "rows.jsonl").unlink()
    refused(site, ask(site, broadcast(start), settings()), "rows", "no rows at")


def test_other_rows_under_an_old_ledger_are_refused(site: Site, site_folder: Any, start: Adapter) -> None:
    uploaded(ask(site, broadcast(start), settings()))
    site_folder.rows(['{"instruction": "another"}'])
    refused(site, ask(site, broadcast(start, 2), settings()), "ledger", "is the ledger of data set")


def test_what_a_library_says_about_a_row_stays_here(
    site: Site, start: Adapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def quotes(*_: Any) -> Any:
        raise ValueError(f"cannot tokenize {SECRET!r}")

    monkeypatch.setattr(DpAdapterLearner, "__call__", quotes)
    caplog.set_level(logging.DEBUG)
    answer = ask(site, broadcast(start), settings())
    refused(site, answer, "internal", SECRET)  # the site's own log may know
    assert isinstance(answer, Refusal)
    assert "Quillfeather" not in str(wire.pack_reply(answer)) + str(answer) + caplog.text
    assert [record.exc_info for record in caplog.records] == [None]
    assert "answers internal" in caplog.text


@pytest.mark.parametrize("error", [StillroomError, AdapterMismatch, LedgerCorrupt, PolicyRefusal, MemoryError, SECRET])
def test_no_error_of_any_kind_leaves(site: Site, error: Any) -> None:
    codes = {AdapterMismatch: "policy", LedgerCorrupt: "ledger", PolicyRefusal: "policy"}

    def answer() -> Upload:
        if isinstance(error, str):
            raise KeyError(error)
        raise error(SECRET)

    refused(site, local_round.guarded(site, "run-a", 1, answer), codes.get(error, "internal"), SECRET)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"site = 3", b"[site]\nname = '../up'", None], ids=str)
def test_a_broken_policy_is_answered_without_a_name(site: Site, start: Adapter, content: bytes | None) -> None:
    path = site.directory / "site.toml"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    answer = ask(site, broadcast(start), settings())
    refused(site, answer, "policy", "ConfigInvalid")
    assert isinstance(answer, Refusal)
    assert answer.site == "unnamed"


def test_a_log_that_cannot_be_written_keeps_nobody_from_refusing(
    site: Site, start: Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    (site.directory / "site.log").mkdir()
    answer = ask(site, broadcast(start), settings(rounds=9))
    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert "site.log cannot be written" in caplog.text


def test_a_site_folder_that_is_not_there_is_refused(tmp_path: Path, start: Adapter) -> None:
    answer = ask(Site(directory=tmp_path / "nowhere"), broadcast(start), settings())
    assert isinstance(answer, Refusal)
    assert (answer.site, answer.code) == ("unnamed", "policy")


def test_incidents_tell_rounds_apart_and_say_nothing_else(site: Site) -> None:
    def incident(run: str, number: int, reason: str) -> str:
        answer = local_round.guarded(site, run, number, lambda: (_ for _ in ()).throw(PolicyRefusal(reason)))
        assert isinstance(answer, Refusal)
        return answer.incident

    assert incident("a", 1, "one") == incident("a", 1, "two")
    assert len({incident("a", 1, ""), incident("a", 2, ""), incident("b", 1, "")}) == 3


@pytest.mark.parametrize("line", ["first_layer = 1", 'targets = ["q_proj"]'])
def test_what_a_site_declares_it_holds_a_server_to(site: Site, start: Adapter, line: str) -> None:
    """Layers that its site.toml rules out are not trained, whoever asks; the others are."""
    with (site.directory / "site.toml").open("a", encoding="utf-8") as policy:
        policy.write(f"\n[capacity]\n{line}\n")
    refused(site, ask(site, broadcast(start), settings()), "policy", "[capacity] of site.toml rules out")
    assert not ledger_of(site).receipts()

    kept = (lambda name: ".1." in name) if "first" in line else (lambda name: name.endswith("q_proj"))
    own = {name: one for name, one in start.layers.items() if kept(name)}
    assert 0 < len(own) < len(start.layers)
    uploaded(ask(site, broadcast(dataclasses.replace(start, layers=own)), settings()))


def test_hello_says_the_public_policy_and_what_is_spent(site: Site, start: Adapter) -> None:
    assert local_round.hello(site) == Hello(site="harbour", epsilon=8.0, delta=DELTA, unit="record", spent=0.0)
    upload = uploaded(ask(site, broadcast(start), settings()))
    assert local_round.hello(site).spent == upload.spent


def test_a_probe_is_bits_per_byte_of_the_public_codes(site: Site, start: Adapter, frozen: Any) -> None:
    answer = local_round.probe(site, broadcast(start, 2), settings(items=5))
    assert (answer.site, answer.round, answer.items) == ("harbour", 2, 1)
    model = lora.attach(frozen, start)
    ((likelihood,),) = inference.option_likelihood(model, frozen.tokenizer, [""], [["A cough:"]])
    assert answer.bits_per_byte == pytest.approx(-likelihood.log_prob / np.log(2) / 8)
    assert 6 < answer.bits_per_byte < 12  # a random model of 259 tokens: about log2(259) = 8.02


def test_a_probe_reads_no_row_and_asks_no_ledger(
    site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_folder.policy(privacy={"epsilon": 0.01})
    refused(site, ask(site, broadcast(start), settings()), "budget_spent")
    (site.directory / "rows.jsonl").unlink()
    forbid(monkeypatch, "rows", "learner", "noise", "calibration")
    monkeypatch.setattr(Site, "ledger", lambda *_: pytest.fail("asked the ledger"))
    assert local_round.probe(site, broadcast(start), settings()).items == 1
    assert local_round.probe(site, broadcast(start), settings(items=0)) == Probe(
        site="harbour", round=1, items=0, bits_per_byte=0.0
    )


def test_simulated_rounds_repeat_bit_by_bit(site: Site, site_folder: Any, start: Adapter, tmp_path: Path) -> None:
    copies = [Site(directory=tmp_path / name) for name in ("one", "two")]
    for other in copies:
        shutil.copytree(site.directory, other.directory)
    first = uploaded(ask(site, broadcast(start), settings()))
    assert lora.sha256(adapter_of(uploaded(ask(copies[0], broadcast(start), settings())))) == lora.sha256(
        adapter_of(first)
    )
    dataclasses.replace(site_folder, directory=copies[1].directory).policy(site={"name": "mill"})
    other_name = uploaded(ask(copies[1], broadcast(start), settings()))
    assert lora.sha256(adapter_of(other_name)) != lora.sha256(adapter_of(first))
    second = uploaded(ask(site, broadcast(start, 2), settings()))
    assert lora.sha256(adapter_of(second)) != lora.sha256(adapter_of(first))


def test_production_noise_has_no_seed(
    site: Site, site_folder: Any, start: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    site_folder.policy(limits={"simulation": False})
    site.directory.chmod(0o700)
    told = settings(mode="production")
    monkeypatch.setattr(local_round, "SimulatedNoise", lambda *_: pytest.fail("seeded noise in production"))
    hashes = []
    for copy in ("one", "two"):
        other = Site(directory=tmp_path / copy)
        shutil.copytree(site.directory, other.directory)
        np.random.seed(0)  # noqa: NPY002 - what must not matter
        torch.manual_seed(0)
        hashes.append(lora.sha256(adapter_of(uploaded(ask(other, broadcast(start), told)))))
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(("mode", "kind"), [("production", SecureNoise), ("simulation", SimulatedNoise)])
def test_the_mode_decides_the_noise(
    mode: str, kind: type, site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site serves one of the two: seeded spending may not be certified together with real spending."""
    site_folder.policy(limits={"simulation": mode == "simulation"})
    site.directory.chmod(0o700)
    seen = []
    plain = DpAdapterLearner.__call__

    def watch(self: DpAdapterLearner, *arguments: Any) -> Any:
        seen.append(arguments[-1].noise)
        return plain(self, *arguments)

    monkeypatch.setattr(DpAdapterLearner, "__call__", watch)
    uploaded(ask(site, broadcast(start), settings(mode=mode)))
    assert [type(noise) for noise in seen] == [kind]


def test_production_is_refused_where_simulation_is_allowed(site: Site, start: Adapter) -> None:
    refused(site, ask(site, broadcast(start), settings(mode="production")), "policy", "allows simulation")


def test_a_run_name_used_again_for_another_configuration_is_another_run(site: Site, start: Adapter) -> None:
    told = settings(rounds=1, epsilon=1.0)
    first = uploaded(ask(site, broadcast(start), told))
    other = dataclasses.replace(broadcast(start), config_digest="another")
    second = uploaded(ask(site, other, told))

    assert second.spent > first.spent
    assert lora.sha256(adapter_of(second)) != lora.sha256(adapter_of(first))


def test_units_of_a_column_are_bounded_before_learning(
    site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"row {n}", "patient": patient} for n, patient in enumerate("aaabbc")]
    site_folder.rows([json.dumps(row) for row in rows])
    site_folder.policy(privacy={"unit": "patient", "max_rows_per_unit": 2})
    seen = []
    plain = DpAdapterLearner.__call__

    def watch(self: DpAdapterLearner, *arguments: Any) -> Any:
        seen.extend((row.instruction, row.unit) for row in arguments[0].examples)
        seen.append(arguments[3].max_rows_per_unit)
        return plain(self, *arguments)

    monkeypatch.setattr(DpAdapterLearner, "__call__", watch)
    upload = uploaded(ask(site, broadcast(start), settings()))
    assert seen == [("row 0", "a"), ("row 1", "a"), ("row 3", "b"), ("row 4", "b"), ("row 5", "c"), 2]
    assert [receipt.unit for receipt in upload.receipts or ()] == ["patient"]
