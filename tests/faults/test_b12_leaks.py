"""B12, leaks: forty secrets of a site and five of its environment, and nowhere but in the site's own rows and log.

A case is one run, with all there is of it: what the sites sent, what they were sent, what the teacher was asked, the
run directory with its report, every log of the process at level DEBUG, what was printed, what was raised, temporary
files and caches, and in the site's own directory the ledger, the outbox and the audit log, which others may see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from flwr.common.serde import recorddict_to_proto

from clients import local_round, outbox
from clients.dp_steps import DpAdapterLearner
from fl_app import lora, peft_files, sequences
from fl_app.errors import StillroomError
from fl_app.origin import ROOT
from fl_app.privacy import gaussian
from fl_app.privacy.ledger import Ledger
from simulations import launch
from simulations.local_grid import FIRST_NODE, LocalGrid
from simulations.report.page import build_report
from tests.conftest import POLICY
from tests.faults.secrets import Planted, files_under, found, planted, rows_of
from tests.faults.teacher import Teacher, completion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

bar = pytest.mark.bar("B12")
OURS, THEIRS = planted(1), planted(2)
"""Of the site that meets the fault, and of another."""

SMALL = """
simulation.partition={kind="iid", sites=2}
simulation.max_rows_per_site=12
run.rounds=1
client.learner.steps=1
client.probe.items=1
server.synthesizer.drafts=3
server.synthesizer.max_new_tokens=8
server.filters=[]
server.tuner.epochs=1
server.exam.choice_items=1
server.exam.free_items=0
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that a run may write to lies under one directory."""
    place = tmp_path_factory.mktemp("workplace")
    write = launch.write_corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        patch.setattr(launch, "write_corpus", lambda folder: None if folder.exists() else write(folder))
        for name in ("tmp", "cache"):
            (place / name).mkdir()
        patch.setattr(tempfile, "tempdir", str(place / "tmp"))
        patch.setenv("TMPDIR", str(place / "tmp"))
        yield place


def make_site(folder: Path, name: str, secrets: Planted, rows: int) -> Path:
    """Write a site's directory, whose own name is a secret, with more secret names in it."""
    home = folder / secrets.files[0]
    home.mkdir(parents=True, mode=0o700)
    tree = {**POLICY, "site": {"name": name}}
    (home / "site.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows_of(secrets, rows))]
    (home / "rows.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (home / "codes.jsonl").write_text('{"id": "cough", "text": "A cough:"}\n', encoding="utf-8")
    for other in secrets.files[1:]:
        (home / f"{other}.txt").write_text(other, encoding="utf-8")
    return home


@dataclasses.dataclass
class Told:
    """All that a run said, by place; the sites' own directories; the replies as they were sent."""

    places: dict[str, bytes]
    homes: list[Path]
    replies: list[Any]
    failure: str


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """Keep all that any logger says meanwhile, at level DEBUG, with the tracebacks."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    loggers = [logging.getLogger(), logging.getLogger("flwr"), logging.getLogger("transformers")]
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


def play(
    workplace: Path, name: str, *more: str, rows: tuple[int, int] = (16, 24), break_site: Any = None, run: str = ""
) -> Told:
    """Play a run of two sites, keep everything it said, and read all that it wrote. `run` is its name, else `name`."""
    from flwr.app import Context, RecordDict

    from fl_app import client_app, server_app

    sites = workplace / "sites" / name
    place = f'run.directory="{workplace / "runs" / name}"'
    homes = [make_site(sites / "a", "harbour", OURS, rows[0]), make_site(sites / "b", "mill", THEIRS, rows[1])]
    if break_site is not None:
        break_site(homes[0])
    out, err, failure = io.StringIO(), io.StringIO(), ""
    sent: list[bytes] = []
    with listening() as heard, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        prepared = launch.prepare("configs/smoke.toml", "\n".join([SMALL, place, *more]), run=run or name)
        grid = LocalGrid(client_app.app, nodes=2, run_config=prepared.run_config)
        for node, home in enumerate(homes):
            grid._contexts[FIRST_NODE + node].node_config["rows"] = str(home)
        push = grid.push_messages

        def remember(messages: Any) -> Any:
            listed = list(messages)
            sent.extend(recorddict_to_proto(message.content).SerializeToString() for message in listed)
            return push(listed)

        grid.push_messages = remember  # type: ignore[method-assign]
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(prepared.run_config))
        try:
            server_app.app(grid, context)
        except StillroomError as error:
            failure = f"{type(error).__name__}: {error}"
        if (prepared.directory / "summary.json").is_file():
            build_report(prepared.directory)
    replies = {
        f"reply {n}": recorddict_to_proto(reply.content).SerializeToString() if reply.has_content() else b"error"
        for n, reply in enumerate(grid.replies)
    }
    errors = {f"error {n}": str(reply.error).encode() for n, reply in enumerate(grid.replies) if reply.has_error()}
    private = [home / file for home in homes for file in ("rows.jsonl", "site.toml", "codes.jsonl", "site.log")]
    private += [home / f"{one}.txt" for home, who in zip(homes, (OURS, THEIRS), strict=True) for one in who.files[1:]]
    places = {
        "log": heard.getvalue().encode(),
        "stdout": out.getvalue().encode(),
        "stderr": err.getvalue().encode(),
        "raised": failure.encode(),
        **{f"sent {n}": content for n, content in enumerate(sent)},
        **replies,
        **errors,
        **files_under(prepared.directory, workplace / "tmp", workplace / "cache"),
        **files_under(*homes, leave_out=private),
    }
    return Told(places=places, homes=homes, replies=grid.replies, failure=failure)


def leaks(told: Told) -> list[str]:
    return found((*OURS.all, *THEIRS.all), told.places)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    for name, value in OURS.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))


# --- a run that goes well


@bar
@pytest.mark.usefixtures("environment")
def test_a_run_that_goes_well_tells_nothing(workplace: Path) -> None:
    """With a teacher outside, whose key is one of the secrets."""
    teacher = Teacher()
    try:
        teacher.script = lambda *_: completion("Rest well.")
        options = f'kind="endpoint", base_url="{teacher.url}", model="m", max_total_tokens=90000, timeout_s=9.0'
        cache = workplace / "cache" / "answers.jsonl"
        endpoint = f'server.distiller={{{options}, api_key_env="TEACHER_KEY", cache="{cache}"}}'
        told = play(workplace, "well", endpoint)
    finally:
        teacher.close()
    assert told.failure == ""
    assert len([reply for reply in told.replies if reply.has_content()]) == 6, "two sites, three waves"
    assert teacher.keys == {f"Bearer {OURS.environment['TEACHER_KEY']}"}, "the teacher has the key, in the header"
    told.places["asked"] = json.dumps(teacher.requests).encode()
    assert leaks(told) == []
    rows = {"rows": (told.homes[0] / "rows.jsonl").read_bytes(), "name": str(told.homes[0]).encode()}
    rows |= {"names": "".join(path.name for path in told.homes[0].iterdir()).encode()}
    seen = {hit.split(" (")[0] for hit in found(OURS.site, rows)}
    assert seen == set(OURS.site), "the twin: all forty are there to be found"
    assert len(OURS.site) == 40
    assert len(OURS.environment) == 5


# --- something raises, with a row's text in its message


def text_of(rows: Any) -> str:
    return " ".join(f"{row.instruction} {row.output} {row.code} {row.unit}" for row in rows.examples)


def everything(home: Path) -> str:
    return (home / "rows.jsonl").read_text(encoding="utf-8")[:2000] + str(home)


def at_home(home: Path) -> Callable[[str], bool]:
    """Whether a text speaks of this site: the same code also runs for the other one, and for the server."""
    marks = [*OURS.texts[:14], *OURS.labels, str(home)]
    return lambda text: any(mark in text for mark in marks)


def raising(plain: Any, error: type[BaseException], home: Path, *, when: Callable[..., bool]) -> Any:
    def broken(*arguments: Any, **options: Any) -> Any:
        if when(*arguments, **options):
            raise error(everything(home))
        return plain(*arguments, **options)

    return broken


class Cases:
    """Ways to fail at the first site. Each patches something so that it raises an error that quotes the site's rows."""

    @staticmethod
    def tokenizer(patch: pytest.MonkeyPatch, home: Path) -> None:
        ours = at_home(home)
        when = lambda _t, _p, text, **_: ours(text)  # noqa: E731
        patch.setattr(sequences, "encode", raising(sequences.encode, KeyError, home, when=when))

    @staticmethod
    def learner(patch: pytest.MonkeyPatch, home: Path) -> None:
        ours, plain = at_home(home), DpAdapterLearner.__call__
        when = lambda _self, rows, *_: ours(text_of(rows))  # noqa: E731
        patch.setattr(DpAdapterLearner, "__call__", raising(plain, ValueError, home, when=when))

    @staticmethod
    def memory(patch: pytest.MonkeyPatch, home: Path) -> None:
        ours, plain = at_home(home), DpAdapterLearner.__call__
        when = lambda _self, rows, *_: ours(text_of(rows))  # noqa: E731
        patch.setattr(DpAdapterLearner, "__call__", raising(plain, MemoryError, home, when=when))

    @staticmethod
    def noise(patch: pytest.MonkeyPatch, home: Path) -> None:
        patch.setattr(gaussian, "release", raising(gaussian.release, RuntimeError, home, when=once()))

    @staticmethod
    def safetensors(patch: pytest.MonkeyPatch, home: Path) -> None:
        when = lambda _adapter, folder, **_: str(home) in str(folder)  # noqa: E731
        patch.setattr(peft_files, "save", raising(peft_files.save, OSError, home, when=when))

    @staticmethod
    def outbox(patch: pytest.MonkeyPatch, home: Path) -> None:
        when = lambda folder, **_: str(home) in str(folder)  # noqa: E731
        patch.setattr(outbox, "put", raising(outbox.put, PermissionError, home, when=when))

    @staticmethod
    def reserve(patch: pytest.MonkeyPatch, home: Path) -> None:
        when = lambda ledger, **_: str(home) in str(ledger._path)  # noqa: E731
        patch.setattr(Ledger, "reserve", raising(Ledger.reserve, RuntimeError, home, when=when))

    @staticmethod
    def commit(patch: pytest.MonkeyPatch, home: Path) -> None:
        when = lambda ledger, *_, **__: str(home) in str(ledger._path)  # noqa: E731
        patch.setattr(Ledger, "commit", raising(Ledger.commit, OSError, home, when=when))

    @staticmethod
    def rows(patch: pytest.MonkeyPatch, home: Path) -> None:
        when = lambda path, **_: str(home) in str(path)  # noqa: E731
        read = local_round.read_private_rows
        patch.setattr(local_round, "read_private_rows", raising(read, UnicodeError, home, when=when))

    @staticmethod
    def model(patch: pytest.MonkeyPatch, home: Path) -> None:
        attach, calls = lora.attach, once(after=0)
        inside = lambda *_, **__: "client_app" in "".join(frames()) and calls()  # noqa: E731
        patch.setattr(lora, "attach", raising(attach, AssertionError, home, when=inside))

    @staticmethod
    def probe(patch: pytest.MonkeyPatch, home: Path) -> None:
        patch.setattr(local_round, "probe", raising(local_round.probe, LookupError, home, when=once()))

    @staticmethod
    def hello(patch: pytest.MonkeyPatch, home: Path) -> None:
        when = lambda site: str(home) in str(site.directory)  # noqa: E731
        patch.setattr(local_round, "hello", raising(local_round.hello, NotImplementedError, home, when=when))


def once(*, after: int = 0) -> Callable[..., bool]:
    calls: list[int] = []

    def when(*_: Any, **__: Any) -> bool:
        calls.append(1)
        return len(calls) == after + 1

    return when


def frames() -> list[str]:
    names, frame = [], sys._getframe(2)
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    return names


CASES = [name for name in vars(Cases) if not name.startswith("_")]


@bar
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("case", CASES)
def test_an_error_that_quotes_a_row_stays_at_its_site(
    case: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = getattr(Cases, case)
    told = play(
        workplace, f"raises-{case}", "server.network.wait_s=0.2", break_site=lambda home: fault(monkeypatch, home)
    )
    logs = [home / "site.log" for home in told.homes if (home / "site.log").is_file()]
    known = [hit for log in logs for hit in found(OURS.texts, {"site.log": log.read_bytes()})]
    assert known, "the fault was met, and the site's own log says what it was"
    assert leaks(told) == []


def _ledger(home: Path) -> None:
    (home / "ledger").mkdir(mode=0o700)
    (home / "ledger" / "ledger.jsonl").write_text(json.dumps({"id": OURS.texts[0]}) + "\n")


BROKEN_FILES = {
    "a row": lambda home: (home / "rows.jsonl").write_text(everything(home)[:500] + "\n{", encoding="utf-8"),
    "a key": lambda home: (home / "rows.jsonl").write_text(json.dumps({OURS.columns[0]: OURS.texts[0]}) + "\n"),
    "a code": lambda home: (home / "codes.jsonl").write_text(f'{{"id": "{OURS.labels[0]}", "text": {OURS.texts[0]}'),
    "the policy": lambda home: (home / "site.toml").write_text(f'[site]\nname = "{OURS.texts[0]}"\n'),
    "no policy": lambda home: (home / "site.toml").write_text(f"{OURS.texts[0]} = = {OURS.keys[0]}"),
    "the ledger": _ledger,
}


@bar
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("what", BROKEN_FILES)
def test_a_broken_file_of_a_site_is_not_quoted(what: str, workplace: Path) -> None:
    name = f"broken-{what.replace(' ', '-')}"
    told = play(workplace, name, "server.network.wait_s=0.2", break_site=BROKEN_FILES[what])
    if what == "the ledger":
        told.places = {place: content for place, content in told.places.items() if not place.endswith("ledger.jsonl")}
    assert leaks(told) == []
    assert (told.homes[0] / "site.log").is_file()


# --- a crash

CRASH = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.faults import test_b12_leaks as b12
from clients.dp_steps import DpAdapterLearner
place = Path({place!r})
b12.launch.BUILD, b12.launch.RUNS = place / "build", place / "runs"
def crash(self, rows, *_):
    if b12.OURS.labels[1] in b12.text_of(rows):
        text = b12.text_of(rows)
        os._exit(137)
DpAdapterLearner.__call__ = crash
b12.play(place, "crash")
"""


@bar
def test_a_crash_leaves_nothing_outside_the_site(tmp_path: Path) -> None:
    """The process dies while the rows are in its memory, without a chance to clean up."""
    for name in ("tmp", "cache"):
        (tmp_path / name).mkdir()
    places = {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", CRASH.format(root=str(ROOT), place=str(tmp_path))],
        env={**os.environ, **places, **OURS.environment},
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 137, run.stderr[-800:]
    home = tmp_path / "sites" / "crash" / "a" / OURS.files[0]
    assert b"reserve" in (home / "ledger" / "ledger.jsonl").read_bytes(), "it died after the ledger had reserved"
    inside = [path for path in (tmp_path / "sites").rglob("*") if path.is_file() and "ledger" not in str(path)]
    written = files_under(tmp_path, leave_out=[path for path in inside if path.name != "audit.jsonl"])
    paths = {name: content.partition(b"\0")[2] for name, content in written.items() if "/sites/" in name}
    places_ = {**written, **paths, "stdout": run.stdout, "stderr": run.stderr}
    assert found((*OURS.all, *THEIRS.all), places_) == []


# --- two data sets, one answer


def is_ours(reply: Any) -> bool:
    return reply.metadata.src_node_id == FIRST_NODE


COMPUTED = {"sha256", "bits_per_byte"}


def fields(reply: Any) -> dict[str, Any]:
    """Return a reply as plain values, without the release and what is computed from it.

    A probe's score is computed from the broadcast, and the broadcast from the releases.
    """
    assert reply.has_content()
    plain: dict[str, Any] = {}
    for name, record in reply.content.items():
        if name == "arrays":
            plain[name] = {
                key: (array.dtype, array.shape, array.stype, len(array.data)) for key, array in record.items()
            }
        else:
            plain[name] = {key: value for key, value in record.items() if key not in COMPUTED}
    told = reply.metadata
    return {"records": plain, "type": told.message_type, "group": told.group_id, "ttl": told.ttl > 0}


@bar
def test_replies_are_equal_for_data_sets_of_different_sizes(workplace: Path) -> None:
    """Every field but the adapter: 9 rows and 80 rows, of other texts, columns and labels."""
    few, many = (play(workplace, f"size-{rows}", rows=(rows, 16), run="size") for rows in (9, 80))
    assert few.failure == many.failure == ""
    asked = [[fields(reply) for reply in told.replies if is_ours(reply)] for told in (few, many)]
    assert len(asked[0]) == 3
    assert asked[0] == asked[1]
    sizes = [
        [len(recorddict_to_proto(reply.content).SerializeToString()) for reply in told.replies if is_ours(reply)]
        for told in (few, many)
    ]
    assert sizes[0] == sizes[1]


def test_replies_tell_a_difference_where_there_is_one(workplace: Path) -> None:
    """The twin: another policy is public, and shows."""

    def richer(home: Path) -> None:
        tree = {**POLICY, "site": {"name": "harbour"}, "privacy": {**POLICY["privacy"], "epsilon": 9.0}}
        (home / "site.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")

    one, other = play(workplace, "same"), play(workplace, "richer", break_site=richer)
    assert fields(one.replies[0]) != fields(other.replies[0])


# --- the twins of the search


@pytest.mark.parametrize("place", ["log", "reply", "file", "file name", "stderr"])
def test_the_search_finds_a_secret_that_was_planted(
    place: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = OURS.texts[14]
    plain = DpAdapterLearner.__call__

    def leaky(self: Any, rows: Any, *more: Any) -> Any:
        if OURS.labels[1] in text_of(rows):
            if place == "log":
                logging.getLogger("transformers.x").debug("row: %s", [row.instruction for row in rows.examples])
            elif place == "file":
                Path(tempfile.mkstemp()[1]).write_text(json.dumps({"text": text_of(rows)}))
            elif place == "file name":
                (workplace / "cache" / OURS.labels[1]).touch()
            elif place == "stderr":
                print(text_of(rows), file=sys.stderr)  # noqa: T201
            elif place == "reply":
                raise SystemExit(text_of(rows))
        return plain(self, rows, *more)

    monkeypatch.setattr(DpAdapterLearner, "__call__", leaky)
    if place == "reply":  # a door without its guard, as Flower's own would answer
        monkeypatch.setattr(local_round, "guarded", lambda _s, _r, _n, work: _answer_with_text(work))
    told = play(workplace, f"twin-{place.replace(' ', '-')}", "server.network.wait_s=0.2")
    hits = leaks(told)
    assert any((OURS.labels[1] if place == "file name" else secret) in hit for hit in hits)
    for path in (*(workplace / "cache").iterdir(), *(workplace / "tmp").iterdir()):
        if path.is_file():
            path.unlink()


def _answer_with_text(work: Callable[[], Any]) -> Any:
    from fl_app.types import Refusal

    try:
        return work()
    except SystemExit as error:
        return Refusal(site="harbour", round=1, code="internal", incident=str(error))


@pytest.mark.parametrize("form", ["as it is", "JSON", "UTF-16", "URL", "hex", "base64+0", "base64+1", "base64+2"])
def test_the_search_sees_through(form: str) -> None:
    import base64
    from urllib.parse import quote

    secret = OURS.texts[14]
    raw = secret.encode()
    spelled = {
        "as it is": raw.upper(),
        "JSON": json.dumps({"x": secret}).encode(),
        "UTF-16": secret.encode("utf-16"),
        "URL": quote(f"/x/{secret}").encode(),
        "hex": raw.hex().encode(),
        "base64+0": base64.b64encode(raw + b"more"),
        "base64+1": base64.b64encode(b"x" + raw + b"more"),
        "base64+2": base64.b64encode(b"xy" + raw + b"more"),
    }
    assert found([secret], {"place": b"before " + spelled[form] + b" after"})
    assert not found([secret], {"place": b"nothing of the kind"})
