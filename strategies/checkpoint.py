"""Which phases of a run are done, and what they made: a run that was stopped goes on behind the last of them.

    rounds/<n>/done/<phase>.json    {"files": {path: sha256}, "phase", "prev", "round", "seconds", "value"}

A phase counts as done from the moment its file has its name, and not before: artefacts are written and synced first,
the file is renamed into its place last, and its directory is synced. `files` binds every artefact by its content,
`prev` the whole of what came before, so a run cannot go on from something else than what it made.

| found                                              | what happens                             |
|----------------------------------------------------|------------------------------------------|
| no file for a phase                                | the phase is computed (again)            |
| file and artefacts whole, `prev` right             | the phase is read, nothing is computed   |
| an artefact gone or changed, another past, garbage | RunInvalid, naming it and the way out    |
| another process has the run open                   | RunInvalid                               |

Source: ours; write-ahead and commit by rename as in any journalled store. Flower has no resume (specs `flower.md` 6).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_app import disk, journal
from fl_app.errors import RunInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Made:
    """What a phase has made: files and folders that are whole on disk, and a value that JSON can hold.

    `seconds`, where it is not None, is the time to tell instead of the phase's own (a wave's, which came before it).
    """

    files: Sequence[Path] = ()
    value: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a finished phase left: its value, and how long it took when it was computed."""

    value: Mapping[str, Any]
    seconds: float


class Checkpoint:
    """The finished phases of one run in its directory; holds the directory alone until `close`.

    Phases are looked up and committed in the order in which the run goes through them.
    """

    def __init__(self, directory: Path, *, run: str, config_digest: str) -> None:
        """Raises: RunInvalid when another process plays this run, or it is of another configuration; DiskFull."""
        self._directory = directory
        self._head = hashlib.sha256(f"{run}/{config_digest}".encode()).hexdigest()
        with disk.naming(directory / ".lock", 0):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = (directory / ".lock").open("a", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RunInvalid(f"another process plays the run in {directory}; wait for it, or end it first") from None
        known = directory / "digest.txt"
        if known.is_file() and known.read_text(encoding="utf-8").strip() != config_digest:
            self.close()
            raise RunInvalid(
                f"{directory} holds a run of another configuration (digest {known.read_text().strip()[:12]}, this is "
                f"{config_digest[:12]}); resume it with the configuration it began with, or choose another directory"
            )

    def close(self) -> None:
        """Let others open the run. Safe to call twice."""
        self._lock.close()

    def find(self, number: int, phase: str) -> Done | None:
        """Return what a phase left, None when it is not done. Raises: RunInvalid."""
        path = self._place(number, phase)
        if not path.is_file():
            return None
        way_out = f"restore it from a copy, or remove {path} and all of later phases to compute them again"
        try:
            entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            files: dict[str, str] = entry["files"]
            done = Done(value=entry["value"], seconds=float(entry["seconds"]))
            prev = str(entry["prev"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunInvalid(f"{path} cannot be read ({type(error).__name__}: {error}); {way_out}") from None
        if prev != self._head:
            raise RunInvalid(f"{path} belongs behind another past than this run's; {way_out}")
        for name, sha256 in files.items():
            artefact = self._directory / name
            if not artefact.is_file():
                raise RunInvalid(f"{artefact} is gone, and {phase} of round {number} was done; {way_out}")
            if journal.file_sha256(artefact) != sha256:
                raise RunInvalid(f"{artefact} is not what {phase} of round {number} made; {way_out}")
        self._head = _link(entry)
        return done

    def stands(self, number: int, phase: str) -> bool:
        """Whether a phase was declared done; `find` also looks at what it left."""
        return self._place(number, phase).is_file()

    def commit(
        self, number: int, phase: str, *, files: Iterable[Path], value: Mapping[str, Any], seconds: float
    ) -> Done:
        """Declare a phase done and return what `find` would. `files` are whole and synced already.

        A folder stands for all files in it.
        """
        named = sorted(path for file in files for path in (file.rglob("*") if file.is_dir() else [file]))
        entry = {
            "files": {
                str(path.relative_to(self._directory)): journal.file_sha256(path) for path in named if path.is_file()
            },
            "phase": phase,
            "prev": self._head,
            "round": number,
            "seconds": seconds,
            "value": value,
        }
        journal.write_json(self._place(number, phase), entry)  # `disk` has synced the artefacts, names included
        found = self.find(number, phase)
        assert found is not None
        return found

    def _place(self, number: int, phase: str) -> Path:
        return self._directory / "rounds" / str(number) / "done" / f"{phase}.json"


def _link(entry: Mapping[str, Any]) -> str:
    """Return the hash that the next phase names: everything but the time it took."""
    told = {key: value for key, value in entry.items() if key != "seconds"}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
