"""Layer 1, the whole round: two site directories whose rows differ in one unit, and everything a round leaves behind.

What is said, logged, sent and written must be the same for both, but for the adapter and for what names the rows on
the site's own disk. And the ledger has the reservation before the learner asks for its first random number.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from clients import local_round
from clients.config import read_client
from clients.local_round import Settings, Site
from clients.per_example import clipped_sum
from fl_app.config import shared
from fl_app.privacy.chain import Reserved
from fl_app.types import AdapterRelease, Broadcast, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from fl_app.types import Adapter

    Make = Callable[[int], Adapter]

ROUNDS, STEPS = 2, 2
FOR_THE_SITE_ONLY = {"dataset", "salt", "prev", "hash", "time", "id", "sha256", "audit", "ts", "object_sha256"}
"""Fields of the site's own records that name the rows, the adapter or the moment, or are drawn at random. No message
carries any of them."""
ROWS = [{"instruction": f"row {n} is mine", "output": f"dear {n}", "code": "cough"} for n in range(7)]
EXTRA = {"instruction": "and one more person with a very long story to tell " * 9, "output": "", "code": "cough"}


@dataclass(frozen=True)
class Trace:
    """All that a round leaves behind but the adapter: what it sent, said and wrote."""

    sent: list[dict[str, Any]]
    logged: list[tuple[str, int, str]]
    printed: tuple[str, str]
    files: dict[str, Any]


def settings(kind: str, mode: str = "simulation", **client: Any) -> Settings:
    tree: dict[str, Any] = {
        "run": {"rounds": ROUNDS, "mode": mode, "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": kind, "steps": STEPS}, **client},
    }
    return Settings(shared=shared(tree), asked=read_client(tree))


def written(site: Site) -> dict[str, Any]:
    """Return every file's path with its content, as far as a round may not let rows into it."""
    found: dict[str, Any] = {}
    for path in sorted(site.directory.rglob("*")):
        name = str(path.relative_to(site.directory))
        if not path.is_file() or name == "rows.jsonl":
            continue
        if path.suffix == ".safetensors":
            found[name] = path.stat().st_size
        elif name.startswith("ledger/") or name == "audit.jsonl" or path.name == "manifest.json":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in FOR_THE_SITE_ONLY} for line in lines]
        else:
            found[name] = path.read_text(encoding="utf-8")
    return found


def trace(site: Site, start: Adapter, told: Settings, caplog: Any, capfd: Any, **changes: Any) -> Trace:
    """Train all rounds of a run and return what they left."""
    caplog.clear()
    capfd.readouterr()
    sent: list[dict[str, Any]] = []
    with caplog.at_level(logging.DEBUG):
        for number in range(1, ROUNDS + 1):
            message = Broadcast(run="run-a", round=number, adapter=start, config_digest="d")
            reply: Any = local_round.guarded(
                site, "run-a", number, lambda message=message: local_round.train(site, message, told)
            )
            assert isinstance(reply, Upload | Refusal)
            fields = {name: getattr(reply, name) for name in reply.__slots__ if name != "release"}
            if isinstance(reply, Upload):
                assert isinstance(reply.release, AdapterRelease)
                adapter = reply.release.adapter
                shapes = {name: (f.a.shape, f.b.shape, f.a.dtype) for name, f in adapter.layers.items()}
                fields |= {"alpha": adapter.alpha, "base": adapter.base, "layers": shapes}
            sent.append(fields)
    logged = [(record.name, record.levelno, record.getMessage()) for record in caplog.records]
    return Trace(sent=sent, logged=logged, printed=tuple(capfd.readouterr()), files=written(site))


@pytest.fixture
def both(site_folder: Any) -> Callable[..., tuple[Site, Site]]:
    """Return a function that makes two sites, on D and on D'."""

    def make(rows: list[dict[str, Any]], more: list[dict[str, Any]], **policy: Any) -> tuple[Site, Site]:
        sites = []
        for name, lines in (("one", rows), ("two", more)):
            folder = type(site_folder)(directory=site_folder.directory.parent / name)
            folder.directory.mkdir()
            folder.policy(**policy)
            folder.rows([json.dumps(line) for line in lines])
            (folder.directory / "codes.jsonl").write_text('{"id": "cough", "text": "A cough:"}\n', encoding="utf-8")
            sites.append(Site(directory=folder.directory))
        return sites[0], sites[1]

    return make


NEIGHBOURS = {
    "one more": (ROWS, [*ROWS, EXTRA]),
    "one less, in the middle": (ROWS, [*ROWS[:3], *ROWS[4:]]),
    "alone and accompanied": (ROWS[:1], [EXTRA, *ROWS[:1]]),
    "somebody twice": (ROWS, [*ROWS, ROWS[0]]),
}


@pytest.mark.parametrize("kind", ["dp_lora", "dp_ffa_lora"])
@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_a_round_leaves_the_same_behind(
    kind: str, pair: str, both: Any, learned: Make, caplog: Any, capfd: Any
) -> None:
    one, two = both(*NEIGHBOURS[pair])
    told = settings(kind)
    base, more = (trace(site, learned(5), told, caplog, capfd) for site in (one, two))
    assert all("receipts" in fields for fields in base.sent)  # they did train
    assert base.sent[0]["spent"] < base.sent[1]["spent"]
    assert base == more
    assert [len(lines) for name, lines in base.files.items() if name == "ledger/ledger.jsonl"] == [2 + 2 * ROUNDS]


def test_a_person_with_more_rows_leaves_the_same_behind(both: Any, learned: Make, caplog: Any, capfd: Any) -> None:
    rows = [{**row, "patient": f"p{n // 2}"} for n, row in enumerate(ROWS)]
    more = [*rows, *({**EXTRA, "instruction": f"note {n}", "patient": "p9"} for n in range(5))]
    one, two = both(rows, more, privacy={"unit": "patient", "max_rows_per_unit": 3})
    told = settings("dp_lora")
    assert trace(one, learned(5), told, caplog, capfd) == trace(two, learned(5), told, caplog, capfd)


@pytest.mark.parametrize("twin", ["loss in the log", "rows in the reply", "a file", "printed"])
def test_whatever_tells_them_apart_is_caught(
    twin: str, both: Any, learned: Make, caplog: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = both(*NEIGHBOURS["one more"])
    place = [one]
    plain = clipped_sum

    def telling(model: Any, examples: Any, **options: Any) -> Any:
        found = plain(model, examples, **options)
        loss = sum(float(abs(tensor).sum()) for tensor in found.tensors)
        if twin == "loss in the log":
            logging.getLogger("stillroom").info("step, loss %f", loss)
        elif twin == "printed":
            print(loss)  # noqa: T201
        elif twin == "a file":
            (place[0].directory / "losses.txt").write_text(str(loss), encoding="utf-8")
        return found

    monkeypatch.setattr("clients.dp_steps.clipped_sum", telling)
    if twin == "rows in the reply":
        read = local_round.read_private_rows
        counts: list[int] = []

        def reading(*args: Any, **options: Any) -> Any:
            rows = read(*args, **options)
            counts.append(len(rows.examples))
            return rows

        class Telling(Upload):
            def __init__(self, **fields: Any) -> None:
                super().__init__(**{**fields, "spent": fields["spent"] + counts[-1]})

        monkeypatch.setattr(local_round, "read_private_rows", reading)
        monkeypatch.setattr(local_round, "Upload", Telling)
        Telling.__slots__ = Upload.__slots__
    told = settings("dp_lora")
    base = trace(one, learned(5), told, caplog, capfd)
    place[0] = two
    assert base != trace(two, learned(5), told, caplog, capfd)


@pytest.mark.parametrize("kind", ["dp_lora", "dp_ffa_lora"])
def test_nothing_random_is_asked_for_before_the_reservation(
    kind: str, both: Any, learned: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _ = both(ROWS, ROWS)
    reserved: list[int] = []
    plain = local_round._noise

    def noise(policy: Any, told: Any, *, entry: int) -> Any:
        entries = site.ledger(site.policy).entries()
        reserved.append(sum(isinstance(found, Reserved) for found in entries))
        return plain(policy, told, entry=entry)

    monkeypatch.setattr(local_round, "_noise", noise)
    for number in (1, 2):
        message = Broadcast(run="run-a", round=number, adapter=learned(5), config_digest="d")
        local_round.train(site, message, settings(kind))
    assert reserved == [1, 2]


def test_a_second_run_pays_on_top_of_the_first(both: Any, learned: Make) -> None:
    site, _ = both(ROWS, ROWS)
    spent = []
    for run in ("run-a", "run-b", "run-c"):
        message = Broadcast(run=run, round=1, adapter=learned(5), config_digest="d")
        spent.append(local_round.train(site, message, settings("dp_lora")).spent)
    assert spent[0] < spent[1] < spent[2]
