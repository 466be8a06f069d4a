"""A disk that is full from the n-th call on, for one directory; and rounds of a site and of a server to meet it with.

Run as a script it does the same under a real limit of the kernel, on the size of a file (RLIMIT_FSIZE), and prints what
happened as JSON: `python -m tests.faults.full_disk SIZE [SIZE ...]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w
from flwr.app import ArrayRecord

from clients import local_round
from clients.config import read_client
from clients.dp_steps import DpAdapterLearner
from clients.local_round import Settings, Site
from fl_app import client_app, lora, lora_start, models, peft_files
from fl_app.config import LoraSection, read_tree, shared
from fl_app.errors import StillroomError
from fl_app.seeds import stream
from fl_app.types import (
    Adapter,
    AdapterRelease,
    Broadcast,
    Draft,
    Lesson,
    LoraFactors,
    Origin,
    Refusal,
    Upload,
)
from simulations.local_grid import LocalGrid
from strategies.config import build_pipeline, read_server
from strategies.knowledge import Knowledge
from tests.conftest import POLICY, ROWS
from tests.faults.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Generator

    import pytest

CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class FullDisk:
    """Patches the calls of `os` that change something under `folder`; `calls` counts them.

    From call number `full_from` on each raises ENOSPC; a write that is the first to do so has let half of its bytes
    through. 0: never.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, full_from: int = 0) -> None:
        self.calls = 0
        self.full_from = full_from
        self._folder = str(folder)
        self._descriptors: set[int] = set()
        self._plain = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "replace", "rename")}
        for name in self._plain:
            patch.setattr(os, name, getattr(self, name))

    def _counts(self) -> bool:
        self.calls += 1
        return bool(self.full_from) and self.calls >= self.full_from

    def _ours(self, path: Any) -> bool:
        return isinstance(path, str | Path) and str(path).startswith(self._folder)

    def open(self, path: Any, flags: int, *more: Any, **options: Any) -> int:
        ours = self._ours(path) and bool(flags & CHANGING)
        if ours and self._counts():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        descriptor: int = self._plain["open"](path, flags, *more, **options)
        if self._ours(path):
            self._descriptors.add(descriptor)
        else:
            self._descriptors.discard(descriptor)
        return descriptor

    def write(self, descriptor: int, content: Any) -> int:
        if descriptor in self._descriptors and self._counts():
            if self.calls == self.full_from and len(content) > 1:
                return self._plain["write"](descriptor, bytes(content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._plain["write"](descriptor, content)

    def fsync(self, descriptor: int) -> None:
        if descriptor not in self._descriptors:
            self._plain["fsync"](descriptor)
        elif self._counts():  # else it is believed: no power fails here, and waiting for a disk is most of a trial
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def mkdir(self, path: Any, *more: Any, **options: Any) -> None:
        self._named("mkdir", path, path, *more, **options)

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        self._named("replace", target, source, target, **options)

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        self._named("rename", target, source, target, **options)

    def _named(self, name: str, place: Any, *arguments: Any, **options: Any) -> None:
        if self._ours(place) and self._counts():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
        self._plain[name](*arguments, **options)


# --- a site


def make_site(folder: Path) -> Site:
    folder.mkdir(mode=0o700)
    (folder / "site.toml").write_text(tomli_w.dumps(POLICY), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "codes.jsonl").write_text('{"id": "cough", "text": "A cough:"}\n', encoding="utf-8")
    return Site(directory=folder)


def some_adapter(seed: int) -> Adapter:
    """Return an adapter of the tiny model that has learned something."""
    frozen = models.load("tiny-random", "float32")
    spec = lora.spec_of(frozen, LoraSection(rank=4, alpha=8.0, targets=("q_proj", "v_proj")))
    start, rng = lora_start.initial(spec, stream(seed, "adapter")), np.random.default_rng(seed)
    layers = {
        name: LoraFactors(a=one.a, b=rng.normal(0, 0.1, one.b.shape).astype(np.float32))
        for name, one in start.layers.items()
    }
    return dataclasses.replace(start, layers=layers)


def settings() -> Settings:
    tree: dict[str, Any] = {
        "run": {"rounds": 1, "mode": "simulation", "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]},
        "client": {"learner": {"kind": "dp_lora", "steps": 1}},
    }
    return Settings(shared=shared(tree), asked=read_client(tree))


def ask(site: Site, adapter: Adapter) -> Upload | Refusal:
    message = Broadcast(run="run-a", round=1, adapter=adapter, config_digest="d" * 64)
    return local_round.guarded(site, "run-a", 1, lambda: local_round.train(site, message, settings()))


def learned(site: Site) -> int:
    """Return how many reservations the ledger holds."""
    return len(site.ledger(site.policy).receipts())


def releases(site: Site) -> list[Path]:
    return sorted((site.directory / "outbox").glob("*/round-*"))


@contextlib.contextmanager
def counting_learners(says: Adapter | None = None) -> Generator[list[int]]:
    """Keep count of the learners that ran; with `says` they learn nothing and say that, which takes no time."""
    plain, calls = DpAdapterLearner.__call__, []

    def learn(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        return plain(self, *arguments) if says is None else AdapterRelease(adapter=says)

    DpAdapterLearner.__call__ = learn  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        DpAdapterLearner.__call__ = plain  # type: ignore[method-assign]


def site_complaint(site: Site, answer: Any, trainings: int) -> str:
    """Return what a site has done wrong on a full disk; empty when nothing. Asked when there is space again."""
    if not isinstance(answer, Upload | Refusal):
        return f"answers {answer!r}"
    if learned(site) < trainings:
        return f"{trainings} trainings, {learned(site)} in the ledger"
    for place in releases(site):
        try:
            peft_files.load(place)
        except Exception as error:  # noqa: BLE001 - whatever a torn file makes a library say
            return f"{place} is torn: {error}"
    return ""


def goes_on(site: Site, adapter: Adapter) -> str:
    """Return why the site does not go on now that there is space; empty when it does, twice with the same release."""
    first, again = ask(site, adapter), ask(site, adapter)
    if not isinstance(first, Upload) or not isinstance(again, Upload):
        return f"does not go on: {first} {again}\n" + (site.directory / "site.log").read_text()
    assert isinstance(first.release, AdapterRelease)
    assert isinstance(again.release, AdapterRelease)
    same = lora.sha256(first.release.adapter) == lora.sha256(again.release.adapter)
    return "" if same else "sent two releases for one round"


# --- a server


class _Stages:
    """A synthesiser, a professional and a tuner that say the same every time."""

    def __init__(self, target: Adapter) -> None:
        self.target = target

    def synthesise(self, _adapter: Any, _rng: Any, number: int) -> list[Draft]:
        origin = Origin(round=number, method="m", code="c", stream="0")
        return [Draft(id=f"{number}-{n}", instruction=f"Ask {n}?", response="", origin=origin) for n in range(9)]

    def distil(self, drafts: Any, _rng: Any) -> list[Lesson]:
        return [Lesson(draft_id=d.id, instruction=d.instruction, answer="Rest." * 20, teacher="t") for d in drafts]

    def tune(self, *_: Any) -> Adapter:
        return self.target


def serve(directory: Path, run_config: Any) -> None:
    """Play the run of a configuration to its end in a run directory, with stages that cost nothing.

    Its sites have trained at the first call; at every later one they answer from their outboxes.
    """
    overrides = f'{run_config["overrides"]}\nrun.directory="{directory}"'
    tree = read_tree(run_config["config"], overrides)
    server = read_server(tree)
    pipeline = build_pipeline(tree, shared(tree), server, run="run-a")
    still = _Stages(_other(pipeline.start, 9))
    pipeline.stages = dataclasses.replace(
        pipeline.stages, synthesizer=Writer(still.synthesise), filters=(), distiller=still.distil, tuner=still.tune
    )
    grid = LocalGrid(client_app.app, nodes=2, run_config=run_config)
    answer = grid._answer

    def with_room(message: Any) -> Any:
        """Let a site answer on a disk of its own."""
        with file_limit(resource.RLIM_INFINITY):
            return answer(message)

    grid._answer = with_room  # type: ignore[method-assign]
    Knowledge(pipeline, server.network).start(grid, ArrayRecord())


def _other(adapter: Adapter, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    layers = {
        name: LoraFactors(a=one.a, b=rng.normal(0, 0.1, one.b.shape).astype(np.float32))
        for name, one in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def torn(directory: Path) -> list[str]:
    """Return the files of a run directory that are not whole, or should not be there."""
    found: list[str] = []
    for path in sorted(one for one in directory.rglob("*") if one.is_file()):
        try:
            if re.fullmatch(r"\..+\.\d+", path.name):
                found.append(f"{path} was left behind")
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl":
                text = path.read_text(encoding="utf-8")
                assert text.endswith("\n") or not text
                [json.loads(line) for line in text.splitlines()]
            elif path.suffix == ".toml":
                tomllib.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors" and (path.parent / "adapter_config.json").is_file():
                peft_files.load(path.parent)
        except Exception as error:  # noqa: BLE001 - whatever a torn file makes a library say
            found.append(f"{path}: {error}")
    return found


def lasting(directory: Path) -> dict[str, bytes]:
    """Return the artefacts of a run that do not tell the time."""
    timed = {"journal.jsonl", "summary.json", "record.json", "config.toml", "report.html", "audit.jsonl"}
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in timed and path.parent.name != "done"
    }


# --- under a limit of the kernel


@contextlib.contextmanager
def file_limit(size: int) -> Generator[None]:
    """Let no file grow beyond `size` bytes; Python ignores SIGXFSZ, so a write raises EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size == resource.RLIM_INFINITY else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _limited_site(folder: Path, size: int) -> str:
    site, adapter = make_site(folder / f"site-{size}"), some_adapter(1)
    with counting_learners() as calls:
        with file_limit(size):
            answer = ask(site, adapter)
        return site_complaint(site, answer, len(calls)) or goes_on(site, adapter)


def _limited_server(folder: Path, size: int, reference: dict[str, bytes], run_config: Any) -> str:
    directory, said = folder / f"run-{size}", ""
    try:
        with file_limit(size):
            serve(directory, run_config)
    except StillroomError as error:
        said = str(error)
        if "\n" in said or str(directory) not in said or "bytes needed" not in said:
            return f"says {said!r}"
    if left := torn(directory):
        return "; ".join(left)
    if said:
        serve(directory, run_config)
    return "" if lasting(directory) == reference else "another result when it went on"


def main() -> None:
    """Print {side: {size: complaint}} for every size, empty where nothing is wrong."""
    sizes = [int(size) for size in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = {size: _limited_site(folder, size) for size in sizes}
        run_config = prepared(folder)
        serve(folder / "plain", run_config)
        reference = lasting(folder / "plain")
        server = {size: _limited_server(folder, size, reference, run_config) for size in sizes}
    print(json.dumps({"site": site, "server": server}))  # noqa: T201 - what a test reads


def prepared(folder: Path) -> dict[str, str]:
    """Return the run-config of a small simulation whose corpus and sites lie in `folder`."""
    from simulations import launch

    build, runs = launch.BUILD, launch.RUNS
    launch.BUILD, launch.RUNS = folder / "build", folder / "runs"
    try:
        small = """
            simulation.partition={kind="iid", sites=2} simulation.max_rows_per_site=12 run.rounds=1
            simulation.policy.min_noise_multiplier=4.0 simulation.policy.max_noise_multiplier=5.0
            client.learner.steps=1 client.probe.items=1 server.network.poll_s=0.001
            server.exam.choice_items=0 server.exam.free_items=0
        """
        config = dict(launch.prepare("configs/smoke.toml", small, run="full-disk").run_config)
        return {**config, "overrides": config["overrides"] + '\nserver.professional.public_text=""'}
    finally:
        launch.BUILD, launch.RUNS = build, runs


if __name__ == "__main__":
    main()
