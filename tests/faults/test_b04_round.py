"""B4, the whole round: a site dies at every write of `train`, audit log included, and is asked again.

Learning is replaced by a release at hand; everything that touches the disk is what a site runs. Afterwards nothing is
under-counted, no false alarm keeps the site from going on, and the desk finds ledger, outbox and audit log in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from clients import desk, local_round
from clients.config import read_client
from clients.dp_steps import DpAdapterLearner
from clients.local_round import Settings, Site
from fl_app import audit_log, lora
from fl_app.config import shared
from fl_app.hash_chain import unseal
from fl_app.privacy.accountants import pld
from fl_app.privacy.chain import Reserved
from fl_app.types import AdapterRelease, Broadcast, Upload
from tests.faults.power import MODES, Crash, Power

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.types import Adapter

DELTA = 1e-5
TRACE = "wfwfrdwfwfwfwfrdwfrdfffnddddwfwfrdwfwfwf"
"""The calls of one round at a site that trained one before; see `power`."""


def ask(site: Site, start: Adapter, number: int) -> Any:
    """Ask for a round as the door does, but let a crash through."""
    tree: dict[str, Any] = {
        "run": {"rounds": 4, "mode": "simulation", "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": 2}},
    }
    told = Settings(shared=shared(tree), asked=read_client(tree))
    message = Broadcast(run="a", round=number, adapter=start, config_digest="d")
    return local_round.train(site, message, told)


@pytest.fixture
def site(site_folder: Any, learned: Callable[[int], Adapter], monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site that trained one round; what it learns is at hand."""
    release = AdapterRelease(adapter=learned(7))
    monkeypatch.setattr(DpAdapterLearner, "__call__", lambda *_: release)
    made = Site(directory=site_folder.directory)
    ask(made, learned(5), 1)
    return made


def test_a_round_changes_the_disk_in_these_calls(site: Site, learned: Callable[[int], Adapter]) -> None:
    power = Power(site.directory)
    with pytest.MonkeyPatch.context() as patch:
        power.install(patch)
        ask(site, learned(5), 2)
    power.close()
    assert power.trace == TRACE


@pytest.mark.bar("B4")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", range(1, len(TRACE) + 1))
def test_a_site_that_died_is_asked_again(
    site: Site, learned: Callable[[int], Adapter], capsys: Any, at: int, mode: str
) -> None:
    if mode == "torn" and TRACE[at - 1] not in "wf":
        mode = "before"  # there is nothing to tear
    power = Power(site.directory, at, mode)
    try:
        with pytest.MonkeyPatch.context() as patch:
            power.install(patch)
            with pytest.raises(Crash):
                ask(site, learned(5), 2)
        if mode == "lost":
            power.fail()
    finally:
        power.close()
    noted = [unseal(line) or {} for line in (site.directory / "audit.jsonl").read_bytes().split(b"\n")]
    trained = any((line.get("action"), line.get("round")) == ("trained", 2) for line in noted)
    before = [entry for entry in site.ledger(site.policy).entries() if isinstance(entry, Reserved)]

    upload = ask(site, learned(5), 2)

    assert isinstance(upload, Upload)
    assert lora.sha256(upload.release.adapter) == lora.sha256(learned(7))  # type: ignore[union-attr]
    assert len(before) >= 1 + trained
    after = [entry for entry in site.ledger(site.policy).entries() if isinstance(entry, Reserved)]
    assert len(after) in (len(before), len(before) + 1)  # from the outbox, or paid once more
    assert upload.spent == pld.epsilon([receipt for entry in after for receipt in entry.receipts], DELTA)
    actions = [entry.action for entry in audit_log.read(site.directory / "audit.jsonl")]
    assert actions[-1] in {"sent", "resent"}
    assert desk.main(["ledger", str(site.directory)]) == 0, capsys.readouterr().out
