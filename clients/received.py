"""What a site keeps of its last broadcast, so that the server need not send it again: released arrays, by content.

    received/<run>/<sha256>.safetensors      one part of a broadcast (`fl_app.parts`)

Nothing here is private, and nothing is trusted: a part is used only when it has the hash that the server names. A
site that lost its copy refuses one round and is sent everything in the next. Runs do not touch each other's parts;
those of the last `RUNS` are kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app import parts, releases
from fl_app.hash_chain import is_digest

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.types import Broadcast, Floats

SUFFIX = ".safetensors"

RUNS = 4
"""Runs whose last broadcast is kept; a run that was put aside for longer is sent everything once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """The folder of a site that holds parts of its last broadcast."""

    directory: Path

    def find(self, sha256: str) -> dict[str, Floats] | None:
        """Return the arrays of this hash; None when they are not here, or not what they were."""
        if not is_digest(sha256):
            return None
        found = (_read(path, sha256) for path in sorted(self.directory.glob(f"*/{sha256}{SUFFIX}")))
        return next((arrays for arrays in found if arrays is not None), None)

    def keep(self, broadcast: Broadcast) -> None:
        """Keep the parts of a broadcast, and nothing else. Raises: DiskFull."""
        place = self.directory / hashlib.sha256(broadcast.run.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        for folder in (self.directory, place):
            folder.mkdir(mode=0o700, exist_ok=True)
        factors = [parts.part(broadcast.adapter, factor) for factor in parts.of_adapter(broadcast.adapter)]
        wanted = {parts.sha256(arrays): arrays for arrays in [*factors, *map(parts.arrays_of, broadcast.blocks)]}
        for sha256, arrays in wanted.items():
            if _read(place / f"{sha256}{SUFFIX}", sha256) is None:
                releases.save_vectors(arrays, place / f"{sha256}{SUFFIX}")
        for path in place.iterdir():
            if path.name.removesuffix(SUFFIX) not in wanted and path.is_file():
                path.unlink()
        os.utime(place)
        runs = [path for path in self.directory.iterdir() if path.is_dir()]
        for old in sorted(runs, key=lambda path: path.stat().st_mtime_ns)[:-RUNS]:
            shutil.rmtree(old, ignore_errors=True)


def _read(path: Path, sha256: str) -> dict[str, Floats] | None:
    """Return the arrays of a file; None when it is not there, or not what it was."""
    from safetensors import SafetensorError

    try:
        found = releases.load_vectors(path)
    except (OSError, ValueError, SafetensorError):
        return None
    return found if parts.sha256(found) == sha256 else None
