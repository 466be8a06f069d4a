"""A process that dies, and a disk that forgets: what the crash tests put under the code that they look at.

`Power` counts the calls that change the disk (`os.write`, `fsync`, `replace`, `rename`, `ftruncate`) and ends the
process at one of them:

    before   nothing of the call happened
    after    all of it
    torn     half of what a write (w), or the fsync of a file (f, not of a directory: d), was to bring to the disk
    lost     all of it, and then the power fails: what no fsync made durable is gone

`lost` is the least that POSIX promises. A file's content is what its last fsync saw; a name is there when its directory
was synced after it got there. Writes of the standard library go past `os.write`, so for them the fsync is the point.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

LETTERS = {"write": "w", "fsync": "f", "replace": "r", "rename": "n", "ftruncate": "t"}
MODES = ("before", "after", "torn", "lost")


class Crash(BaseException):
    """The process is gone."""


class Power:
    """What happens to `root` when the process ends at call number `at`, counted from 1; 0 lets it live."""

    def __init__(self, root: Path, at: int = 0, mode: str = "") -> None:
        self.root, self.at, self.mode = root, at, mode
        self.trace = ""
        self._real = {name: getattr(os, name) for name in LETTERS}
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._held: list[int] = []  # an inode that is held open is never used again for another file

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Stand between the code and the disk from now on."""
        self._know(self.root)
        for name in LETTERS:
            patch.setattr(os, name, lambda *args, name=name, **more: self._call(name, *args, **more))

    def close(self) -> None:
        """Let go of every inode."""
        while self._held:
            os.close(self._held.pop())

    def _call(self, name: str, *args: Any, **more: Any) -> Any:
        self.trace += "d" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else LETTERS[name]
        here = len(self.trace) == self.at
        if here and self.mode == "before":
            raise Crash
        if here and self.mode == "torn" and name in ("write", "fsync"):
            self._tear(name, *args)
            raise Crash
        result = self._real[name](*args, **more)
        if name == "fsync":
            self._synced(args[0])
        if here and self.mode in ("after", "lost"):
            raise Crash
        return result

    def _tear(self, name: str, descriptor: int, data: bytes = b"") -> None:
        if name == "write":
            self._real["write"](descriptor, data[: len(data) // 2])
        elif stat.S_ISREG(os.fstat(descriptor).st_mode):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            safe = self._content.get(os.fstat(descriptor).st_ino, b"")
            content = path.read_bytes()
            if content.startswith(safe):
                path.write_bytes(content[: len(safe) + (len(content) - len(safe)) // 2])

    def _synced(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        inode = self._hold(path)
        if path.is_dir():
            self._names[inode] = {entry.name: self._hold(entry) for entry in path.iterdir()}
        else:
            self._content[inode] = path.read_bytes()

    def _know(self, folder: Path) -> None:
        """Take what is there already as durable."""
        for path in [folder, *folder.rglob("*")]:
            inode = self._hold(path)
            if path.is_dir():
                self._names[inode] = {entry.name: self._hold(entry) for entry in path.iterdir()}
            else:
                self._content[inode] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        self._held.append(descriptor)
        return inode

    def fail(self) -> None:
        """Put `root` into the state that was durable."""
        top = self.root.stat().st_ino
        folders = {number for names in self._names.values() for number in names.values() if self._is_folder(number)}
        for entry in self.root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._rebuild(self.root, top, folders)

    def _is_folder(self, inode: int) -> bool:
        return any(
            os.fstat(descriptor).st_ino == inode and stat.S_ISDIR(os.fstat(descriptor).st_mode)
            for descriptor in self._held
        )

    def _rebuild(self, place: Path, inode: int, folders: set[int]) -> None:
        for name, child in self._names.get(inode, {}).items():
            if child in folders:
                (place / name).mkdir()
                self._rebuild(place / name, child, folders)
            else:
                (place / name).write_bytes(self._content.get(child, b""))
