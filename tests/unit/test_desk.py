"""The data holder's desk: what it says is what a round would do, and looking changes nothing."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from clients import desk, local_round
from clients.config import read_client
from clients.local_round import Settings, Site
from fl_app.config import shared
from fl_app.origin import ROOT
from fl_app.privacy.accountants import pld
from fl_app.privacy.statement import rounded_up
from fl_app.types import Broadcast, DpReceipt, PoissonGaussian, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fl_app.types import Adapter

DELTA = 1e-5
SEARCH = {"min_noise_multiplier": 0.5, "max_noise_multiplier": 9.0}
STATEMENT = "at delta 1e-05, per record, add_or_remove_one, Poisson sampling, PLD (dp-accounting 0.6.0, grid 0.001)"


def tree(**change: Any) -> dict[str, Any]:
    learner = {"kind": change.get("kind", "dp_lora"), "steps": change.get("steps", 2)}
    return {
        "run": {"rounds": change.get("rounds", 2), "mode": change.get("mode", "simulation"), "seed": 3},
        "model": {"name": change.get("model", "tiny-random"), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": learner, "epsilon": change.get("epsilon", 2.0)},
    }


@pytest.fixture
def site(site_folder: Any) -> Site:
    site_folder.policy(limits=SEARCH)
    return Site(directory=site_folder.directory)


def train(site: Site, start: Adapter, number: int = 1, run: str = "a", **change: Any) -> Upload | Refusal:
    wanted = tree(**change)
    told = Settings(shared=shared(wanted), asked=read_client(wanted))
    message = Broadcast(run=run, round=number, adapter=start, config_digest="d")
    return local_round.guarded(site, run, number, lambda: local_round.train(site, message, told))


def files(site: Site) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in site.directory.rglob("*") if path.is_file()
    }


def look(site: Site, capsys: Any, command: str, *more: str) -> tuple[int, str]:
    """Run a command, check that it changed nothing, and return its exit code and what it printed."""
    capsys.readouterr()
    before = files(site)
    code = desk.main([command, str(site.directory), *more])
    assert files(site) == before
    return code, capsys.readouterr().out


def preflight(site: Site, capsys: Any, tmp_path: Path, **change: Any) -> tuple[int, str]:
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(tree(**change)), encoding="utf-8")
    return look(site, capsys, "preflight", "--config", str(config))


# --- before


def test_preflight_says_what_the_run_then_spends(
    site: Site, learned: Callable[[int], Adapter], tmp_path: Path, capsys: Any
) -> None:
    code, said = preflight(site, capsys, tmp_path)
    assert code == 0
    assert "nothing in the site's policy refuses it" in said
    uploads = [train(site, learned(5), number) for number in (1, 2)]
    assert all(isinstance(upload, Upload) for upload in uploads)
    last = uploads[-1]
    assert isinstance(last, Upload)
    assert f"from 0 to {rounded_up(last.spent)} of 8 {STATEMENT}, for a schedule fixed in advance" in said
    (receipt,) = last.receipts or ()
    assert isinstance(receipt.event, PoissonGaussian)
    noise = f"noise multiplier {receipt.event.noise_multiplier:g} at sample rate 0.25"
    assert f"2 rounds of 2 steps of {noise}" in said
    assert f"it would fix the schedule: every later run on this ledger goes on with {noise}" in said

    code, said = preflight(site, capsys, tmp_path, rounds=3, steps=1)  # a second run, at the noise of the first
    assert code == 0
    after = pld.epsilon([*(last.receipts or ()) * 2, *[_steps(receipt, 1)] * 3], DELTA)
    assert f"from {rounded_up(last.spent)} to {rounded_up(after)} of 8" in said
    assert "it would fix the schedule" not in said
    third = [train(site, learned(5), number, run="b", rounds=3, steps=1) for number in (1, 2, 3)][-1]
    assert isinstance(third, Upload)
    assert third.spent == after


def _steps(receipt: DpReceipt, steps: int) -> DpReceipt:
    event = receipt.event
    assert isinstance(event, PoissonGaussian)
    fresh = PoissonGaussian(
        noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate, steps=steps, clip_norm=event.clip_norm
    )
    return DpReceipt(event=fresh, unit=receipt.unit)


def test_preflight_under_a_filter_says_the_filter_s_figure_and_the_doubled_delta(
    site: Site, site_folder: Any, learned: Callable[[int], Adapter], tmp_path: Path, capsys: Any
) -> None:
    assert isinstance(train(site, learned(5)), Upload)
    site_folder.policy(limits=SEARCH, privacy={"composition": "renyi_filter"})
    code, said = preflight(site, capsys, tmp_path)
    assert code == 0
    assert "held within epsilon 8 at delta 2e-05, twice the policy's" in said
    for number in (1, 2):
        upload = train(site, learned(5), number, run="b")
    assert isinstance(upload, Upload)
    assert f"to {rounded_up(upload.spent)} of 8" in said
    assert "the site's Renyi filter" in said


def test_preflight_names_every_rule_that_refuses(site: Site, site_folder: Any, tmp_path: Path, capsys: Any) -> None:
    site_folder.policy(
        limits={**SEARCH, "max_clip_norm": 0.5, "base_models": ["0" * 64], "allowed_configs": ["1" * 64]}
    )
    code, said = preflight(site, capsys, tmp_path, steps=99, rounds=9, mode="production")
    assert code == 1
    refused = [line for line in said.splitlines() if line.startswith("would be refused: ")]
    for words in (
        "99 steps a round asked, at most 10",
        "clip norm 1 asked, at most 0.5",
        "round 1 of 9 asked, at most 5",
        "base model 86b866cdd439 is not on the list",
        "is not on the list limits.allowed_configs",
        "set limits.simulation = false",
    ):
        assert sum(words in line for line in refused) == 1, words
    assert preflight(site, capsys, tmp_path, kind="plain_lora")[0] == 1
    site_folder.policy(limits=SEARCH)
    assert preflight(site, capsys, tmp_path)[0] == 0  # the twin


def test_preflight_of_a_run_that_does_not_fit(site: Site, site_folder: Any, tmp_path: Path, capsys: Any) -> None:
    site_folder.policy(limits=SEARCH, privacy={"epsilon": 0.05})
    code, said = preflight(site, capsys, tmp_path)
    assert code == 1
    assert f"site harbour stands at epsilon 0 of 0.05 {STATEMENT}, for a schedule fixed in advance" in said
    assert "this run would not begin" in said
    assert not site.ledger_path.exists()


def test_preflight_of_a_run_without_noise_says_that_all_is_lost(
    site: Site, site_folder: Any, tmp_path: Path, capsys: Any
) -> None:
    site_folder.policy(limits={**SEARCH, "non_private": True})
    code, said = preflight(site, capsys, tmp_path, kind="plain_lora")
    assert code == 0
    assert "would make site harbour's epsilon infinite" in said


def test_preflight_sees_a_missing_model_and_an_open_directory(
    site: Site, site_folder: Any, tmp_path: Path, capsys: Any
) -> None:
    site_folder.policy(limits={**SEARCH, "simulation": False})
    assert preflight(site, capsys, tmp_path, mode="production")[0] == 0
    site.directory.chmod(0o755)
    code, said = preflight(site, capsys, tmp_path, mode="production")
    assert code == 1
    assert f"run: chmod 700 {site.directory}" in said
    code, said = preflight(site, capsys, tmp_path, mode="production", model="no-such-model")
    assert code == 1
    assert "model 'no-such-model'" in said


@pytest.mark.parametrize("name", ["rows.jsonl", "site.toml"])
def test_what_cannot_be_told_exits_2(site: Site, tmp_path: Path, capsys: Any, name: str) -> None:
    (site.directory / name).unlink()
    code, said = preflight(site, capsys, tmp_path)
    assert code == 2
    assert name in said


# --- between


def test_the_ledger_is_explained_entry_by_entry(site: Site, learned: Callable[[int], Adapter], capsys: Any) -> None:
    code, said = look(site, capsys, "ledger")
    assert (code, said.strip()) == (0, "nothing was ever reserved: there is no ledger yet")
    first = train(site, learned(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clients.dp_steps.DpAdapterLearner.__call__", lambda *_: 1 / 0)
        assert isinstance(train(site, learned(5), 2), Refusal)
    assert isinstance(first, Upload)
    code, said = look(site, capsys, "ledger")
    assert code == 0
    lines = said.splitlines()
    kinds = ["ledger of data set", "schedule fixed to", "reserved", "became the release", "reserved"]
    assert all(word in line for word, line in zip(kinds, lines, strict=False))
    assert f"for run 'a.d' round 1: 2 steps of noise multiplier {_noise(first):g} at sample rate 0.25" in lines[2]
    assert lines[2].endswith(f"PLD so far {rounded_up(first.spent)}")
    assert lines[4].endswith("; no release followed, and it stays spent")
    spent = pld.epsilon([*(first.receipts or ())] * 2, DELTA)
    assert f"spent epsilon {rounded_up(spent)} of 8 {STATEMENT}, for a schedule fixed in advance" in said
    assert "the chain is whole, and outbox and audit log agree with it" in said


def _noise(upload: Upload) -> float:
    (receipt,) = upload.receipts or ()
    assert isinstance(receipt.event, PoissonGaussian)
    return receipt.event.noise_multiplier


def test_the_steps_that_are_left_are_the_last_that_fit(
    site: Site, learned: Callable[[int], Adapter], capsys: Any
) -> None:
    upload = train(site, learned(5))
    assert isinstance(upload, Upload)
    _, said = look(site, capsys, "ledger")
    match = re.search(r"left: (\d+) more steps of noise multiplier", said)
    assert match is not None
    left = int(match.group(1))
    (receipt,) = upload.receipts or ()
    assert pld.epsilon([receipt, _steps(receipt, left)], DELTA) <= 8.0
    assert pld.epsilon([receipt, _steps(receipt, left + 1)], DELTA) > 8.0


def test_a_ledger_under_a_filter_says_the_share_and_the_promise(
    site: Site, site_folder: Any, learned: Callable[[int], Adapter], capsys: Any
) -> None:
    train(site, learned(5))
    site_folder.policy(limits=SEARCH, privacy={"composition": "renyi_filter"})
    train(site, learned(5), run="b")
    code, said = look(site, capsys, "ledger")
    assert code == 0
    assert re.search(r"Renyi filter of order 3 .*: \d+\.\d% of its budget is used", said)
    assert "held within epsilon 8 at delta 2e-05, twice the policy's" in said
    assert "from here on held by a Renyi filter of order 3" in said


def test_a_crash_in_the_middle_is_counted_and_not_mended(
    site: Site, learned: Callable[[int], Adapter], capsys: Any
) -> None:
    train(site, learned(5))
    content = site.ledger_path.read_bytes()
    site.ledger_path.write_bytes(content[:-9])
    code, _ = look(site, capsys, "ledger")  # and `look` saw that the torn line was left as it was
    assert code == 0
    assert isinstance(train(site, learned(5), 2), Upload)


@pytest.mark.parametrize("what", ["ledger", "audit log", "outbox"])
def test_what_does_not_fit_together_exits_1(
    site: Site, learned: Callable[[int], Adapter], capsys: Any, what: str
) -> None:
    train(site, learned(5))
    train(site, learned(5), 2)
    if what == "ledger":
        site.ledger_path.write_bytes(site.ledger_path.read_bytes().replace(b'"round":1', b'"round":3'))
    elif what == "audit log":
        path = site.directory / "audit.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    else:
        (place,) = site.outbox.glob("*/round-2/manifest.json")
        place.write_text(place.read_text().replace('"round": 2', '"round": 1'))
    code, said = look(site, capsys, "ledger")
    assert code == 1
    assert "restore" in said or "does not contain" in said


# --- and afterwards


def test_the_audit_log_is_shown_and_held_against_the_ledger(
    site: Site, learned: Callable[[int], Adapter], capsys: Any
) -> None:
    train(site, learned(5))
    train(site, learned(5), 2)
    train(site, learned(5), 9)
    code, said = look(site, capsys, "audit-log")
    assert code == 0
    assert "site refused refused policy run 'a' round 9" in said
    assert "the chain is whole, and holds the 2 heads that the ledger names" in said
    path = site.directory / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))  # cut at a line: the chain alone does not tell
    code, said = look(site, capsys, "audit-log")
    assert code == 1
    assert "does not contain head" in said
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"ok"', b'"no"'), *lines[3:]]))
    code, said = look(site, capsys, "audit-log")
    assert code == 1
    assert "seq 2 was changed" in said


def test_a_run_s_name_cannot_paint_the_screen(site: Site, learned: Callable[[int], Adapter], capsys: Any) -> None:
    train(site, learned(5), run="\x1b[31m[red]a[/red]\n0  2030 forged line")
    for command in ("ledger", "audit-log"):
        _, said = look(site, capsys, command)
        assert "\x1b" not in said
        assert "\n0  2030" not in said
        assert "[red]" in said


def test_the_makefile_calls_what_there_is(site: Site, capsys: Any) -> None:
    """Each target's own line, with its variables filled in."""
    calls = re.findall(r"-m clients\.desk (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [call.split()[0] for call in calls] == ["ledger", "preflight", "audit-log"]
    for call in calls[:2]:
        for name, value in {
            "SITE": str(site.directory),
            "CONFIG": "configs/smoke.toml",
            "OVERRIDES": "run.seed=1",
        }.items():
            call = call.replace(f"$({name})", value)  # noqa: PLW2901
        assert desk.main(shlex.split(call)) in (0, 1)
    with pytest.raises(SystemExit) as stopped:
        desk.main(["no-such-command", "x"])
    assert stopped.value.code == 2


def test_looking_needs_no_right_to_write(site: Site, learned: Callable[[int], Adapter], capsys: Any) -> None:
    train(site, learned(5))
    lines = [json.loads(line) for line in site.ledger_path.read_text(encoding="utf-8").splitlines()]
    site.ledger_path.chmod(0o400)
    site.ledger_path.parent.chmod(0o500)
    try:
        code, said = look(site, capsys, "ledger")
    finally:
        site.ledger_path.parent.chmod(0o700)
    assert code == 0
    assert len([line for line in said.splitlines() if re.match(r" +\d+  2", line)]) == len(lines)
