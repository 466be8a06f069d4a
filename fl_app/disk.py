"""Writes that are whole or absent, and that say what they needed when the disk is full.

A file is replaced: written beside its place, synced, renamed, and its name synced. A line is appended: what a full
disk let through of it is cut off again. Everything goes through `os.*`, so that tests can let any one call fail.
Out of scope: the ledger, which promises more (`fl_app.privacy.ledger`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING

from fl_app.errors import DiskFull, RunInvalid

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
"""No space, a file larger than it may be, a quota that is used up."""


def replace(path: Path, content: bytes) -> None:
    """Replace the file at `path` as a whole, durably; its directory is made when there is none.

    Raises: DiskFull, RunInvalid; the file is then as it was, and nothing else is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)  # noqa: PTH105 - the calls that tests interrupt are all os.*
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_names(path.parent)


def append(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Append `line` to the file at `path`. One writer at a time.

    Raises: DiskFull, RunInvalid; the file then holds what it held.
    """
    with naming(path, len(line)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write(descriptor, line)
                if sync:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def require(directory: Path, need_bytes: int) -> None:
    """Return when the disk of `directory`, which need not exist yet, has `need_bytes` free. Raises: DiskFull."""
    if free_bytes(directory) < need_bytes:
        raise DiskFull(f"{directory}: {needs(directory, need_bytes)}; free some space or choose another disk")


def free_bytes(path: Path) -> int:
    """Return what is free on the disk where `path` is, or would be."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def needs(path: Path, need_bytes: int) -> str:
    """Return how an error tells of space: what was needed at `path`, and what is free there."""
    return f"{need_bytes:,} bytes needed, {free_bytes(path):,} free there"


@contextlib.contextmanager
def naming(path: Path, need_bytes: int) -> Generator[None]:
    """Turn an `OSError` inside into one of ours that names the path, the bytes and the way out."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in FULL:
            raise DiskFull(
                f"{path} cannot be written: {reason}; {needs(path, need_bytes)}; free some space and run the same "
                "command again"
            ) from error
        raise RunInvalid(
            f"{path} cannot be written: {reason}; {need_bytes:,} bytes needed; mend the directory and run the same "
            "command again"
        ) from error


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
