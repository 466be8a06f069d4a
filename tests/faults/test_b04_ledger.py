"""B4: a budget that nobody can lose. Crashes at every write, random histories, many processes, bad copies, two views.

What could have been released is what reached the outbox after a granted reservation; a fresh opener must count at least
that, or refuse. The smaller promises of the ledger are in tests/privacy/test_ledger.py.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients import desk, local_round, outbox
from clients.config import read_client
from clients.local_round import Settings, Site
from fl_app import lora, peft_files
from fl_app.config import shared
from fl_app.errors import BudgetSpent, LedgerCorrupt, LedgerRefusal
from fl_app.privacy import book as rules
from fl_app.privacy import chain, renyi_filter
from fl_app.privacy import ledger as module
from fl_app.privacy.accountants import pld, prv, rdp
from fl_app.privacy.chain import Committed, Reserved
from fl_app.privacy.events import merged
from fl_app.privacy.ledger import Ledger
from fl_app.types import (
    Adapter,
    AdapterRelease,
    Broadcast,
    DpReceipt,
    Gaussian,
    LoraFactors,
    PoissonGaussian,
    Refusal,
    Upload,
)
from tests.faults.power import MODES, Crash, Power

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fl_app.privacy.book import Book

DELTA, BUDGET = 1e-5, 1.0
RECEIPT = DpReceipt(event=Gaussian(noise_multiplier=6.0, clip_norm=1.0), unit="record")  # epsilon 0.5945
BASE = "b" * 64


def adapter(seed: int) -> Adapter:
    values = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    return Adapter(layers={"m.0.q": LoraFactors(a=values, b=values.T.copy())}, alpha=8.0, base=BASE)


def opened(folder: Path, **more: Any) -> Ledger:
    return Ledger.open(folder / "ledger" / "ledger.jsonl", **{"dataset": "fingerprint", "unit": "record"} | more)


def asked(number: int, receipt: DpReceipt = RECEIPT, run: str = "r") -> dict[str, Any]:
    return {"run": run, "round_number": number, "receipts": [receipt], "epsilon": 50.0, "delta": DELTA}


# --- a crash at every write


class Story:
    """Two rounds of a site, from the first reservation to what is sent; what happened in truth stands in its fields."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.granted: list[str] = []
        self.sent: dict[int, str] = {}

    def play(self) -> None:
        ledger = opened(self.folder)
        for number in (1, 2):
            reservation = ledger.reserve(**asked(number))
            self.granted.append(reservation.id)
            self.sent[number] = self.put(number, reservation)
            ledger.commit(reservation.id, sha256=self.sent[number])

    def put(self, number: int, reservation: Any) -> str:
        box = self.folder / "outbox"
        return outbox.put(
            box,
            run="r",
            round_number=number,
            release=AdapterRelease(adapter=adapter(number)),
            survey=None,
            base_name="tiny",
            reservation=reservation,
        )


class Careless(Story):
    """The twin: it releases, then writes down what it released."""

    def play(self) -> None:
        ledger = opened(self.folder)
        for number in (1, 2):
            place = self.folder / "outbox" / "r" / f"round-{number}"
            peft_files.save(adapter(number), place, base_name="tiny")
            self.granted.append(f"release {number}")
            ledger.commit(ledger.reserve(**asked(number)).id, sha256=lora.sha256(adapter(number)))


TRACE = "dwfrdwfwfrdwfwfrdwfwfrdwfrdfffnddddwfrdwfwfrdwfwfrdwfrdfffnddddwfrdwf"
CASES = [(at, mode) for at, call in enumerate(TRACE, start=1) for mode in MODES if mode != "torn" or call in "wf"]
"""Every call of the story; only what brings bytes to the disk can be torn."""


def crashed(story: Story, at: int, mode: str) -> None:
    """Play the story until it dies, and put its disk into the state that is left."""
    power = Power(story.folder, at, mode)
    try:
        with pytest.MonkeyPatch.context() as patch:
            power.install(patch)
            with pytest.raises(Crash):
                story.play()
        if mode == "lost":
            power.fail()
    finally:
        power.close()


def test_the_story_changes_the_disk_in_these_calls(tmp_path: Path) -> None:
    power = Power(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        power.install(patch)
        Story(tmp_path).play()
    power.close()
    assert power.trace == TRACE
    assert len(CASES) == 245


@pytest.mark.bar("B4")
@pytest.mark.parametrize(("at", "mode"), CASES)
def test_no_crash_makes_it_under_count(tmp_path: Path, at: int, mode: str) -> None:
    story = Story(tmp_path)
    crashed(story, at, mode)

    after = opened(tmp_path)  # a new process, and no help from a person
    entries = after.entries()
    reserved = [entry.id for entry in entries if isinstance(entry, Reserved)]
    assert set(story.granted) <= set(reserved)
    assert len(reserved) <= len(story.granted) + 1
    assert after.spent(DELTA) >= pld.epsilon([RECEIPT] * len(story.granted), DELTA)
    outbox.check_witnesses(tmp_path / "outbox", entries)  # what a crash leaves behind is no false alarm
    for entry in entries:
        if isinstance(entry, Committed):  # and whatever is committed can be sent again, and is the same
            number = next(e.round for e in entries if isinstance(e, Reserved) and e.id == entry.id)
            found, _ = outbox.get(tmp_path / "outbox", run="r", round_number=number, sha256=entry.sha256)
            assert isinstance(found, AdapterRelease)
            assert lora.sha256(found.adapter) == story.sent.get(number, entry.sha256) == lora.sha256(adapter(number))
    # the site goes on: the interrupted round is paid again
    again = after.reserve(**asked(2))
    after.commit(again.id, sha256=story.put(2, again))
    assert len(after.receipts()) == len(reserved) + 1
    after.verify()


def test_a_site_that_writes_afterwards_under_counts(tmp_path: Path) -> None:
    """The twin: the same crashes, the other order."""
    too_few = 0
    for at in range(1, 40):
        folder = tmp_path / str(at)
        folder.mkdir()
        story = Careless(folder)
        crashed(story, at, "after")
        too_few += len(opened(folder).receipts()) < len(story.granted)
    assert too_few > 5


# --- random histories


@functools.cache
def composed(together: tuple[DpReceipt, ...], delta: float) -> float:
    return plain_epsilon(together, delta)


plain_epsilon = pld.epsilon


def quick_epsilon(receipts: Any, delta: float) -> float:
    """PLD, asked once for each sum."""
    return composed(merged(receipts), delta)


MECHANISMS = [
    PoissonGaussian(noise_multiplier=noise, sample_rate=0.4, steps=steps, clip_norm=1.0)
    for noise, steps in ((3.0, 1), (3.0, 2), (3.0, 5), (4.0, 1))
]


class World:
    """A site with its ledger, outbox and server; `sent` is what left in truth, whatever any file says."""

    def __init__(self, folder: Path, rng: np.random.Generator, *, watched: bool) -> None:
        self.folder, self.rng, self.watched = folder, rng, watched
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.sent: list[DpReceipt] = []
        self.planned: list[DpReceipt] = []
        self.head = ""  # what the server saw last
        self.pending: list[tuple[Any, DpReceipt, str, int]] = []
        self.copies: list[dict[str, bytes]] = []
        self.round = 0
        self.ledger = self._open()

    def _open(self) -> Ledger:
        return Ledger.open(self.path, dataset="d", unit="record", clock=lambda: self.now)

    @property
    def path(self) -> Path:
        return self.folder / "ledger.jsonl"

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("ledger.jsonl*")}

    def put_back(self, copy: dict[str, bytes], names: set[str]) -> None:
        for name in names & copy.keys():
            (self.folder / name).write_bytes(copy[name])

    def check(self) -> Book:
        """What a round does before it asks for anything, and again before it sends; return the ledger's book."""
        book = self.ledger.book()
        if self.watched:
            if self.head and self.head not in {entry.hash for entry in book.entries}:
                self.ledger.verify(self.head)
                pytest.fail("verify has to see what we see")
            outbox.check_witnesses(self.folder / "outbox", book.entries)
        return book

    def reserve(self, run: str) -> None:
        self.round += 1
        event = MECHANISMS[int(self.rng.integers(len(MECHANISMS)))]
        receipt = DpReceipt(event=event, unit="record")
        book = self.check()
        request = {"run": run, "round_number": self.round, "receipts": [receipt], "epsilon": BUDGET, "delta": DELTA}
        renyi = FILTER if book.renyi or (self.rng.random() < FILTERED and not book.reserved) else None
        self.pending.append((self.ledger.reserve(**request, renyi=renyi), receipt, run, self.round))

    def commit(self) -> None:
        """Put the release into the outbox, write it down, and send it."""
        if not self.pending:
            return
        reservation, receipt, run, number = self.pending.pop()
        sha256 = f"{number:064x}"
        place = self.folder / "outbox" / run / f"round-{number}"
        place.mkdir(parents=True)
        told = {"id": reservation.id, "ledger_seq": reservation.seq, "run": run, "round": number, "sha256": sha256}
        (place / outbox.MANIFEST).write_text(json.dumps(told), encoding="ascii")
        self.ledger.commit(reservation.id, sha256=sha256)
        book = self.check()  # once more before it leaves: a copy may have been put back meanwhile
        self.sent.append(receipt)
        if book.renyi is None:
            self.planned.append(receipt)
        self.head = book.head

    def crash(self) -> None:
        """Lose the process, and as much of the last line as it pleases."""
        self.pending.clear()
        content = self.path.read_bytes()
        last = content.rstrip(b"\n").rfind(b"\n") + 1
        self.path.write_bytes(content[: int(self.rng.integers(last, len(content) + 1))])
        self.ledger = self._open()

    def step(self) -> None:
        """Do one thing at random."""
        match int(self.rng.integers(16)):
            case 0 | 1 | 2:
                self.reserve("run-a")
            case 3 | 4:
                self.reserve("run-b")
            case 5 | 6 | 7 | 8 | 9:
                self.commit()
            case 10:
                self.crash()
            case 11 | 12:
                self.copies.append(self.files())
            case 13:
                self.now += timedelta(days=int(self.rng.integers(-4000, 4000)))
                self.ledger = self._open()
            case _ if self.copies:
                both = self.rng.random() < 0.7
                names = {"ledger.jsonl", "ledger.jsonl.next"} if both else {"ledger.jsonl"}
                self.put_back(self.copies[int(self.rng.integers(len(self.copies)))], names)
                self.ledger = self._open()
            case _:
                pass


FILTER = renyi_filter.fix(epsilon=BUDGET, delta=DELTA)
FILTERED = 0.3
SEQUENCES = 10_000


def played(folder: Path, seed: int, *, watched: bool, steps: int) -> World:
    """Play one random history; a refusal is followed by what an administrator would do: the newest copy, or nothing."""
    folder.mkdir()
    world = World(folder, np.random.default_rng([seed, 4]), watched=watched)
    newest = world.files()
    for _ in range(steps):
        try:
            world.step()
        except BudgetSpent:
            pass
        except LedgerCorrupt:
            world.put_back(newest, set(newest))  # the way out that the message names
            world.ledger = world._open()
        except LedgerRefusal:
            pass  # another mechanism than planned
        try:
            book = world.check()
        except LedgerCorrupt:
            continue
        newest = world.files()
        if watched:
            counted = book.spent(quick_epsilon(book.receipts, DELTA), DELTA)
            assert counted >= quick_epsilon(world.sent, DELTA)
    return world


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one."""
    shared_memory = Path("/dev/shm")  # noqa: S108 - a folder of our own in it, with a random name
    if not os.access(shared_memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        yield Path(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same answers, sooner: every sum composed once, nothing synced."""
    monkeypatch.setattr(pld, "epsilon", quick_epsilon)
    monkeypatch.setattr(rules.pld, "epsilon", quick_epsilon)
    monkeypatch.setattr(module.os, "fsync", lambda _: None)
    read_once = functools.lru_cache(maxsize=1000)(chain.read_chain)
    for place in (chain, module):
        monkeypatch.setattr(place, "read_chain", lambda content, path: list(read_once(content, path)))
    kept: dict[Any, float] = {}
    spent = renyi_filter.RenyiFilter.spent

    def once(self: Any, receipts: Any) -> float:
        key = (self, merged(receipts))
        if key not in kept:
            kept[key] = spent(self, receipts)
        return kept[key]

    monkeypatch.setattr(renyi_filter.RenyiFilter, "spent", once)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_no_random_history_exceeds_the_budget(memory: Path, record_property: Callable[[str, object], None]) -> None:
    passed = 0
    for seed in range(SEQUENCES):
        folder = memory / str(seed)
        world = played(folder, seed, watched=True, steps=14)
        assert quick_epsilon(world.sent, DELTA) <= BUDGET, seed
        assert len(merged(world.planned)) <= 1, seed  # what no filter held is of one mechanism
        shutil.rmtree(folder)
        passed += 1
    record_property("bar", {"name": "B4", "passed": passed, "of": SEQUENCES})


@pytest.mark.usefixtures("quick")
def test_three_hundred_histories_hold_and_without_witnesses_some_do_not(memory: Path) -> None:
    """The quick look, and its twin: who trusts the files alone is robbed by a copy of both of them."""
    watched = [played(memory / f"w{seed}", seed, watched=True, steps=25) for seed in range(300)]
    trusting = [played(memory / f"t{seed}", seed, watched=False, steps=25) for seed in range(300)]
    over = [[quick_epsilon(world.sent, DELTA) > BUDGET for world in worlds] for worlds in (watched, trusting)]
    assert sum(over[0]) == 0
    assert sum(over[1]) > 3
    assert sum(len(world.sent) > 0 for world in watched) > 200  # and they do train


# --- many processes


def _spend_until_refused(folder: Path, name: str, granted: Any) -> None:
    ledger = opened(folder)
    for number in range(1, 40):
        try:
            reservation = ledger.reserve(**asked(number, run=name) | {"epsilon": BUDGET})
        except BudgetSpent:
            return
        granted.put(reservation.id)
        ledger.commit(reservation.id, sha256=f"{number:064x}")


@pytest.mark.bar("B4")
def test_eight_processes_share_one_budget_and_lose_nothing(tmp_path: Path) -> None:
    fit = next(n for n in range(1, 50) if pld.epsilon([RECEIPT] * (n + 1), DELTA) > BUDGET)
    opened(tmp_path)
    context = multiprocessing.get_context("fork")
    granted = context.SimpleQueue()
    workers = [context.Process(target=_spend_until_refused, args=(tmp_path, f"run-{n}", granted)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 8
    ids = []
    while not granted.empty():
        ids.append(granted.get())
    reserved = [entry.id for entry in opened(tmp_path).entries() if isinstance(entry, Reserved)]
    assert sorted(ids) == sorted(reserved)
    assert len(set(ids)) == len(ids) == fit  # as many as one process alone would have got


# --- bad copies, at a site


@pytest.fixture
def site(site_folder: Any) -> Site:
    return Site(directory=site_folder.directory)


def ask(site: Site, start: Adapter, number: int = 1, *, run: str = "a", head: str = "") -> Upload | Refusal:
    tree: dict[str, Any] = {
        "run": {"rounds": 4, "mode": "simulation", "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": 2}},
    }
    told = Settings(shared=shared(tree), asked=read_client(tree))
    message = Broadcast(run=run, round=number, adapter=start, config_digest="d", head=head)
    return local_round.guarded(site, run, number, lambda: local_round.train(site, message, told))


def changed(site: Site) -> None:
    content = site.ledger_path.read_bytes()
    site.ledger_path.write_bytes(content.replace(b'"round":1', b'"round":7'))


def foreign(site: Site) -> None:
    rows = site.directory / "rows.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"instruction": "one more"}\n')


def gone(site: Site) -> None:
    shutil.rmtree(site.ledger_path.parent)


def older(site: Site) -> None:
    content = site.ledger_path.read_bytes()
    site.ledger_path.write_bytes(b"".join(content.splitlines(keepends=True)[:-2]))


def older_with_next(site: Site) -> None:
    lines = site.ledger_path.read_bytes().splitlines(keepends=True)[:-2]
    site.ledger_path.write_bytes(b"".join(lines))
    site.ledger_path.with_name("ledger.jsonl.next").write_bytes(lines[-1])


@pytest.mark.bar("B4")
@pytest.mark.parametrize("trouble", [changed, foreign, gone, older, older_with_next])
def test_a_bad_ledger_is_refused_and_explained(
    site: Site, learned: Callable[[int], Adapter], trouble: Callable[[Site], None], capsys: Any
) -> None:
    for number in (1, 2):
        assert isinstance(ask(site, learned(5), number), Upload)
    assert desk.main(["ledger", str(site.directory)]) == 0
    trouble(site)
    files = {path: path.read_bytes() for path in site.ledger_path.parent.glob("*")}

    answer = ask(site, learned(5), 3)

    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"
    log = (site.directory / "site.log").read_text(encoding="utf-8")
    assert "restore the newest copy" in log or "their own path" in log
    if files:  # fail closed, and leave the evidence
        assert {path: path.read_bytes() for path in files} == files
    capsys.readouterr()
    assert desk.main(["ledger", str(site.directory)]) == 1
    said = capsys.readouterr().out
    assert "LedgerCorrupt" in said
    assert "restore the newest copy" in said or "their own directory" in said


@pytest.mark.bar("B4")
def test_a_ledger_without_the_head_that_the_server_kept_is_refused(
    site: Site, learned: Callable[[int], Adapter], site_folder: Any
) -> None:
    """Both files and the outbox rolled back: nobody here can tell, whoever kept the head can."""
    assert isinstance(ask(site, learned(5)), Upload)
    shutil.copytree(site.directory, site.directory.with_name("copy"))
    assert isinstance(ask(site, learned(5), 2), Upload)
    kept = site.ledger(site.policy).head
    assert isinstance(ask(site, learned(5), 3, head=kept), Upload)  # the twin: it is there
    shutil.rmtree(site.directory)
    site.directory.with_name("copy").rename(site.directory)
    before = site.ledger_path.read_bytes()
    answer = ask(site, learned(5), 3, head=kept)
    assert isinstance(answer, Refusal)
    assert answer.code == "ledger"
    assert "rolled back" in (site.directory / "site.log").read_text(encoding="utf-8")
    assert site.ledger_path.read_bytes() == before
    assert isinstance(ask(site, learned(5), 3), Upload)  # the twin: without the head it would go on


# --- two views of one ledger


@pytest.mark.bar("B4")
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rounds"),
    [(1.1, 0.05, 40, 5), (0.8, 0.01, 200, 3), (4.0, 0.25, 10, 20), (2.0, 1.0, 1, 9)],
)
def test_two_accountants_agree_on_a_ledger(tmp_path: Path, noise: float, rate: float, steps: int, rounds: int) -> None:
    """PLD and PRV compose by other means: within 2 %, and RDP, which is looser, below neither."""
    event = PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
    for number in range(rounds):
        opened(tmp_path).reserve(**asked(number, DpReceipt(event=event, unit="record")))
    receipts = opened(tmp_path).receipts()
    one, other = pld.epsilon(receipts, DELTA), prv.epsilon(receipts, DELTA)
    assert math.isclose(one, other, rel_tol=0.02), (one, other)
    assert rdp.epsilon(receipts, DELTA) >= one * (1 - 1e-6)
    assert opened(tmp_path).spent(DELTA) == one
