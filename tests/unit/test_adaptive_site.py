"""A site whose policy says renyi_filter: it calibrates under the filter, says so truthfully, and cannot slip out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from clients import local_round
from clients.config import read_client, read_policy
from clients.local_round import Settings, Site
from fl_app import lora
from fl_app.config import shared
from fl_app.errors import ConfigInvalid
from fl_app.privacy import renyi_filter
from fl_app.privacy.accountants import pld
from fl_app.privacy.chain import Filtered
from fl_app.types import Broadcast, PoissonGaussian, Refusal, Upload
from strategies.validate import broken_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.lora import LoraSpec
    from fl_app.privacy.renyi_filter import RenyiFilter
    from fl_app.types import Adapter, DpReceipt

DELTA = 1e-5
SEARCH = {"min_noise_multiplier": 0.5, "max_noise_multiplier": 9.0}


@pytest.fixture
def site(site_folder: Any) -> Site:
    return Site(directory=site_folder.directory)


@pytest.fixture
def start(learned: Callable[[int], Adapter]) -> Adapter:
    return learned(5)


def adaptive(site_folder: Any, *, composition: str = "renyi_filter", epsilon: float = 8.0) -> None:
    site_folder.policy(privacy={"composition": composition, "epsilon": epsilon}, limits=SEARCH)


def ask(site: Site, start: Adapter, number: int = 1, run: str = "run-a", **client: Any) -> Upload | Refusal:
    tree: dict[str, Any] = {
        "run": {"rounds": 2, "mode": "simulation", "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": 2}, **client},
    }
    told = Settings(shared=shared(tree), asked=read_client(tree))
    message = Broadcast(run=run, round=number, adapter=start, config_digest="d")
    return local_round.guarded(site, run, number, lambda: local_round.train(site, message, told))


def uploaded(answer: Upload | Refusal) -> Upload:
    assert isinstance(answer, Upload), answer
    return answer


def noise_of(upload: Upload) -> float:
    (receipt,) = upload.receipts or ()
    assert isinstance(receipt.event, PoissonGaussian)
    return receipt.event.noise_multiplier


def refused(site: Site, answer: Upload | Refusal, code: str, words: str) -> None:
    assert isinstance(answer, Refusal), answer
    assert answer.code == code
    assert words in (site.directory / "site.log").read_text(encoding="utf-8")


def held(site: Site, epsilon: float = 8.0) -> RenyiFilter:
    found = site.ledger(site.policy).filter("renyi_filter", epsilon=epsilon, delta=DELTA)
    assert found is not None
    return found


def test_fixed_schedule_unless_the_policy_says_otherwise(site: Site, site_folder: Any, start: Adapter) -> None:
    assert read_policy(site.directory).privacy.composition == "fixed_schedule"
    upload = uploaded(ask(site, start))
    assert upload.spent == pld.epsilon(upload.receipts or (), DELTA)
    assert not any(isinstance(entry, Filtered) for entry in site.ledger(site.policy).entries())
    site_folder.policy(privacy={"composition": "renyi"})
    with pytest.raises(ConfigInvalid, match=r"privacy\.composition"):
        read_policy(site.directory)


def test_the_planned_rounds_fill_the_filter_and_no_more(
    site: Site, site_folder: Any, start: Adapter, spec: LoraSpec
) -> None:
    adaptive(site_folder)
    hello = local_round.hello(site)
    assert hello.spent == 0.0
    receipts: list[DpReceipt] = []
    for number in (1, 2):
        upload = uploaded(ask(site, start, number))
        # the server's check, with PLD: the claim is never below it, and never above the budget
        asked = Broadcast(run="run-a", round=number, adapter=start, config_digest="d")
        assert broken_rule(upload, broadcast=asked, spec=spec, site=hello, earlier=receipts) is None
        receipts += upload.receipts or ()
        assert pld.epsilon(receipts, DELTA) < upload.spent == held(site).epsilon_equivalent(receipts) <= 8.0
        hello = dataclasses.replace(hello, spent=upload.spent)
        assert local_round.hello(site).spent == upload.spent
        # the twin: a claim by a cheaper rule than PLD is refused
        lower = dataclasses.replace(upload, spent=pld.epsilon(receipts, DELTA) * 0.999)
        poorer = dataclasses.replace(hello, spent=0.0)
        broken = broken_rule(lower, broadcast=asked, spec=spec, site=poorer, earlier=receipts[:-1])
        assert "receipt: adds up to" in str(broken)
    assert 0.99 < held(site).used(receipts) <= 1.0
    refused(site, ask(site, start, run="run-b"), "budget_spent", "Renyi filter of order 3")
    assert site.ledger(site.policy).receipts() == tuple(receipts)


def test_the_filter_asks_for_more_noise_than_a_fixed_schedule(
    site: Site, site_folder: Any, start: Adapter, tmp_path: Any
) -> None:
    site_folder.policy(limits=SEARCH)
    plain = noise_of(uploaded(ask(site, start)))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("rows.jsonl", "codes.jsonl"):
        (other / name).write_bytes((site.directory / name).read_bytes())
    adaptive(dataclasses.replace(site_folder, directory=other))
    assert plain < noise_of(uploaded(ask(Site(directory=other), start))) < 1.3 * plain


def test_a_second_run_chosen_after_the_first_is_held_by_the_same_filter(
    site: Site, site_folder: Any, start: Adapter
) -> None:
    adaptive(site_folder)
    first = uploaded(ask(site, start, epsilon=1.5))
    second = uploaded(ask(site, start, run="run-b"))  # what is left, at a noise nobody planned
    assert noise_of(second) < noise_of(first)
    both = [*(first.receipts or ()), *(second.receipts or ())]
    assert held(site).admits(both)
    assert second.spent == held(site).epsilon_equivalent(both)
    assert pld.epsilon(first.receipts or (), DELTA) <= 1.5  # a run's cap is by PLD
    assert sum(isinstance(entry, Filtered) for entry in site.ledger(site.policy).entries()) == 1


def test_no_policy_slips_out_of_the_filter(site: Site, site_folder: Any, start: Adapter) -> None:
    adaptive(site_folder)
    upload = uploaded(ask(site, start))
    before = site.ledger(site.policy).entries()
    adaptive(site_folder, composition="fixed_schedule")
    refused(site, ask(site, start, 2), "ledger", "no fixed schedule certifies")
    assert local_round.hello(site).spent == upload.spent  # what was spent stays the filter's figure
    adaptive(site_folder, epsilon=9.0)
    refused(site, ask(site, start, 2), "ledger", "may be lowered, not raised")
    assert site.ledger(site.policy).entries() == before
    adaptive(site_folder, epsilon=7.9)
    refused(site, ask(site, start, 2), "budget_spent", "for epsilon 7.9")
    adaptive(site_folder)
    uploaded(ask(site, start, 2))


def test_a_site_may_begin_with_a_fixed_schedule_and_go_on_under_a_filter(
    site: Site, site_folder: Any, start: Adapter
) -> None:
    site_folder.policy(limits=SEARCH)
    first = uploaded(ask(site, start, epsilon=1.5))
    adaptive(site_folder)
    assert local_round.hello(site).spent == first.spent  # nothing was chosen after looking yet
    second = uploaded(ask(site, start, run="run-b"))
    both = [*(first.receipts or ()), *(second.receipts or ())]
    assert second.spent == held(site).epsilon_equivalent(both)  # and everything is charged
    assert held(site) == renyi_filter.fix(epsilon=8.0, delta=DELTA)


def test_a_resend_says_the_same(site: Site, site_folder: Any, start: Adapter) -> None:
    adaptive(site_folder)
    first = uploaded(ask(site, start))
    again = uploaded(ask(site, start))
    assert (again.receipts, again.spent) == (first.receipts, first.spent)
    assert lora.sha256(first.release.adapter) == lora.sha256(again.release.adapter)  # type: ignore[union-attr]
