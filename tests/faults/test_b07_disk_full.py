"""B7, a full disk: at every call that changes something, and under a real limit of the kernel.

Whatever could not be written: the error names the file, what it needed and the way out on one line; every file there is
is whole; the ledger has counted what was learned; and with space again the same work goes on to the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from fl_app import disk, journal, lora, peft_files
from fl_app.errors import DiskFull, RunInvalid, StillroomError
from fl_app.origin import ROOT
from fl_app.types import Upload
from tests.faults import full_disk
from tests.faults.full_disk import FullDisk, ask, goes_on, lasting, make_site, serve, torn
from tests.faults.teacher import RNG, Teacher, completion, distiller, drafts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

bar = pytest.mark.bar("B7")
SIZES = (0, 1, 100, 500, 1000, 2000, 4000, 8000, 16_000, 10_000_000)
"""From nothing to enough; the tiny model's adapter has about 10 kB, a ledger of one round 1.5 kB."""


def count(record: Callable[[str, object], None], wrong: dict[int, str], of: int) -> None:
    record("bar", {"name": "B7", "passed": of - len(wrong), "of": of})
    assert wrong == {}


def test_a_site_at_every_call(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    adapter = full_disk.some_adapter(1)

    def trial(full_from: int) -> tuple[int, str]:
        site = make_site(tmp_path / f"site-{full_from}")
        with full_disk.counting_learners(adapter) as calls:
            with pytest.MonkeyPatch.context() as patch:
                full = FullDisk(patch, site.directory, full_from)
                answer = ask(site, adapter)
            said = full_disk.site_complaint(site, answer, len(calls)) or goes_on(site, adapter)
        if full_from == 0:
            assert isinstance(answer, Upload), "the twin: with space, it is an upload"
        shutil.rmtree(site.directory)
        return full.calls, said

    points, said = trial(0)
    assert said == ""
    assert points > 20
    wrong = {n: said for n in range(1, points + 1) if (said := trial(n)[1])}
    count(record_property, wrong, points)


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return full_disk.prepared(tmp_path_factory.mktemp("prepared"))


def server_trials(
    tmp_path: Path, run_config: dict[str, str], chosen: Callable[[int], bool]
) -> tuple[dict[int, str], int]:
    """Return what went wrong at which of the chosen calls, and how many were tried."""

    def trial(full_from: int) -> tuple[int, str]:
        """Play until the disk is full, look at what is there, and play again."""
        directory, said = tmp_path / f"run-{full_from}", ""
        with pytest.MonkeyPatch.context() as patch:
            full = FullDisk(patch, directory, full_from)
            try:
                serve(directory, run_config)
                said = "" if full_from == 0 else "nothing is said"
            except StillroomError as error:
                said = "" if one_line(str(error), directory) else f"says {error}"
            except OSError as error:
                said = f"raises {error!r}"
        left = torn(directory)
        if full_from:
            with pytest.MonkeyPatch.context() as patch:
                FullDisk(patch, directory)
                serve(directory, run_config)
        found = lasting(directory)
        shutil.rmtree(directory)
        if full_from == 0:
            reference.update(found)
        return full.calls, said or "; ".join(left) or ("" if found == reference else "another result when it went on")

    reference: dict[str, bytes] = {}
    trial(0)  # the sites train once, and answer from their outboxes from now on
    points, said = trial(0)
    assert said == ""
    assert points > 100
    tried = [n for n in range(1, points + 1) if chosen(n)]
    return {n: said for n in tried if (said := trial(n)[1])}, len(tried)


def test_a_server_at_every_seventh_call(
    tmp_path: Path, run_config: dict[str, str], record_property: Callable[[str, object], None]
) -> None:
    wrong, tried = server_trials(tmp_path, run_config, lambda n: n % 7 == 1)
    count(record_property, wrong, tried)


@pytest.mark.slow
def test_a_server_at_every_other_call(
    tmp_path: Path, run_config: dict[str, str], record_property: Callable[[str, object], None]
) -> None:
    wrong, tried = server_trials(tmp_path, run_config, lambda n: n % 7 != 1)
    count(record_property, wrong, tried)


def one_line(said: str, directory: Path) -> bool:
    return bool(re.search(r"[\d,]+ bytes needed, [\d,]+ free there; free some space", said)) and (
        str(directory) in said and "No space left" in said and said.isprintable()
    )


@pytest.fixture(scope="module")
def limited() -> dict[str, dict[str, str]]:
    """What went wrong on each side at each size, in a process of its own."""
    command = [sys.executable, "-m", "tests.faults.full_disk", *map(str, SIZES)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@bar
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", ["site", "server"])
def test_under_a_limit_of_the_kernel(side: str, size: int, limited: dict[str, dict[str, str]]) -> None:
    assert limited[side][str(size)] == ""


# --- single writers


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda folder: journal.write_text(folder / "digest.txt", "new"),
    "json": lambda folder: journal.write_json(folder / "summary.json", {"a": 1}),
    "lines": lambda folder: journal.write_lines(folder / "drafts.jsonl", [{"a": 1}]),
    "toml": lambda folder: journal.write_toml(folder / "config.toml", {"a": 1}),
    "event": lambda folder: journal.Journal(folder).event("x", a=1),
    "adapter": lambda folder: peft_files.save(full_disk.some_adapter(2), folder, base_name="tiny-random"),
}


@bar
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT], ids=["ENOSPC", "EFBIG", "EDQUOT"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_leaves_what_was_there(name: str, fault: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for writer in WRITERS.values():
        writer(tmp_path)
    before = content(tmp_path)
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 1:
            return write(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull, match=r"cannot be written: .*; [\d,]+ bytes needed, [\d,]+ free there") as caught:
        WRITERS[name](tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert content(tmp_path) == before


@bar
def test_a_directory_that_may_not_be_written_is_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(RunInvalid, match=r"cannot be written: Permission denied; .* mend the directory"):
        journal.write_text(tmp_path / "x", "y")


@bar
def test_a_full_disk_costs_at_most_the_answer_that_it_met(tmp_path: Path) -> None:
    """The professional's answers are on disk one by one; what could not be kept is asked again, nothing else."""
    teacher, cache = Teacher(), tmp_path / "cache" / "answers.jsonl"
    asked = [f"Question {n}?" for n in range(6)]
    try:
        teacher.script = lambda question, _: completion(f"On {question} rest.")
        with pytest.MonkeyPatch.context() as patch:
            full = FullDisk(patch, tmp_path)
            stage = distiller(teacher.url, cache=cache)
            stage(drafts(*asked[:3]), RNG)
            full.full_from = full.calls + 2
            with pytest.raises(DiskFull, match=r"answers\.jsonl cannot be written: .* bytes needed"):
                stage(drafts(*asked), RNG)
        lessons = distiller(teacher.url, cache=cache)(drafts(*asked), RNG)
    finally:
        teacher.close()
    assert [lesson.answer for lesson in lessons] == [f"On {question} rest." for question in asked]
    assert [teacher.counts[question] for question in asked] == [1, 1, 1, 2, 1, 1]
    assert [json.loads(line)["text"] for line in cache.read_text().splitlines()] == [one.answer for one in lessons]


# --- before anything is written


@bar
@pytest.mark.parametrize(("free", "need", "enough"), [(1199, 1000, False), (1200, 1000, True), (0, 1, False)])
def test_a_run_does_not_begin_without_a_fifth_to_spare(
    free: int, need: int, enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "not" / "there" / "yet"
    monkeypatch.setattr(disk, "free_bytes", lambda _: free)
    if enough:
        journal.check_space(place, need)
        return
    with pytest.raises(DiskFull, match=r"not/there/yet: [\d,]+ bytes needed, [\d,]+ free there; free some space"):
        journal.check_space(place, need)
    assert list(tmp_path.iterdir()) == []


@bar
def test_the_estimate_is_above_what_a_run_takes_and_not_far(tmp_path: Path, run_config: dict[str, str]) -> None:
    serve(tmp_path / "run", run_config)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    adapter = lora.num_bytes(peft_files.load(tmp_path / "run" / "target"))
    estimate = journal.run_bytes(rounds=1, sites=2, adapter_bytes=adapter, text_bytes=9 * 1000)
    assert used <= estimate <= used + journal.FIXED_BYTES + 8 * journal.FILE_BYTES
    ten = journal.run_bytes(rounds=10, sites=2, adapter_bytes=adapter, text_bytes=9 * 1000)
    assert ten - estimate == 9 * (4 * (adapter + journal.FILE_BYTES) + 9000)


def test_free_space_is_that_of_the_nearest_directory_there_is(tmp_path: Path) -> None:
    free = disk.free_bytes(tmp_path / "a" / "b")
    assert 0 < free <= shutil.disk_usage(tmp_path).total
