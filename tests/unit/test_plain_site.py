"""A site whose policy lets a learner run without noise: it is asked twice, and its ledger never forgets it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from clients import local_round
from clients.config import ClientSection
from clients.local_round import Settings, Site
from fl_app import lora, wire
from fl_app.config import SharedConfig
from fl_app.types import AdapterRelease, Broadcast, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.types import Adapter
SHARED = SharedConfig.model_validate(
    {
        "run": {"rounds": 3, "seed": 1, "mode": "simulation"},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
    }
)
PLAIN, PRIVATE = {"kind": "plain_lora", "steps": 2}, {"kind": "dp_lora", "steps": 2}


def ask(site: Site, start: Adapter, learner: dict[str, Any], *, number: int = 1, run: str = "a") -> Upload | Refusal:
    told = Settings(shared=SHARED, asked=ClientSection.model_validate({"learner": learner}))
    message = Broadcast(run=run, round=number, adapter=start, config_digest="d")
    return local_round.guarded(site, run, number, lambda: local_round.train(site, message, told))


@pytest.fixture
def site(site_folder: Any) -> Site:
    return Site(directory=site_folder.directory)


@pytest.fixture
def start(learned: Callable[[int], Adapter]) -> Adapter:
    return learned(1)


def test_a_policy_that_says_nothing_refuses_it(site: Site, start: Adapter) -> None:
    answer = ask(site, start, PLAIN)
    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert "limits.non_private = false" in (site.directory / "site.log").read_text(encoding="utf-8")
    assert not site.ledger(site.policy).receipts()


def test_a_release_without_receipt_costs_everything(
    site: Site, site_folder: Any, start: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_folder.policy(limits={"non_private": True})
    upload = ask(site, start, PLAIN)
    assert isinstance(upload, Upload)
    assert upload.receipts is None
    assert upload.spent == math.inf
    assert wire.unpack_reply(wire.pack_reply(upload)).spent == math.inf
    assert local_round.hello(site).spent == math.inf
    # the answer comes again from the outbox, and says the same of itself
    monkeypatch.setattr(local_round, "read_private_rows", lambda *_, **__: pytest.fail("rows were read again"))
    again = ask(site, start, PLAIN)
    assert isinstance(again, Upload)
    assert isinstance(upload.release, AdapterRelease)
    assert isinstance(again.release, AdapterRelease)
    assert (again.receipts, again.spent) == (None, math.inf)
    assert lora.sha256(again.release.adapter) == lora.sha256(upload.release.adapter)


def test_nothing_private_can_be_promised_afterwards(site: Site, site_folder: Any, start: Adapter) -> None:
    site_folder.policy(limits={"non_private": True})
    private = ask(site, start, PRIVATE, run="before")
    assert isinstance(private, Upload)
    assert private.spent < 1
    assert isinstance(ask(site, start, PLAIN), Upload)
    answer = ask(site, start, PRIVATE, run="after")
    assert isinstance(answer, Refusal)
    assert answer.code == "budget_spent"
    assert isinstance(ask(site, start, PLAIN, number=2), Upload)  # there is no more to lose


def test_a_ledger_held_by_a_filter_does_not_let_it_pass(site: Site, site_folder: Any, start: Adapter) -> None:
    site_folder.policy(limits={"non_private": True}, privacy={"composition": "renyi_filter"})
    answer = ask(site, start, PLAIN)
    assert isinstance(answer, Refusal)
    assert answer.code == "budget_spent"
    kinds = [json.loads(line)["kind"] for line in (site.directory / "ledger" / "ledger.jsonl").read_text().splitlines()]
    assert "reserve" not in kinds


def test_a_row_limit_beyond_the_models_positions_is_refused_before_anything_is_spent(
    site: Site, site_folder: Any, start: Adapter
) -> None:
    site_folder.policy(constants={"max_tokens": 1025})  # the tiny model has 1024 positions
    answer = ask(site, start, PRIVATE)
    assert isinstance(answer, Refusal)
    assert answer.code == "policy"
    assert not site.ledger(site.policy).receipts()


def test_a_lone_surrogate_does_not_make_a_round_fail(site: Site, site_folder: Any, start: Adapter) -> None:
    site_folder.rows(['{"id": "1", "instruction": "broken \\ud83d letter", "output": "", "code": ""}'] * 9)
    assert isinstance(ask(site, start, PRIVATE), Upload)


@pytest.mark.parametrize("clip_norm", [1e-30, 1e-320, 1e39, 0.0, float("nan")])
def test_a_clip_norm_that_float32_cannot_keep_is_refused(clip_norm: float) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="clip_norm"):
        ClientSection.model_validate({"learner": {**PRIVATE, "clip_norm": clip_norm}})
