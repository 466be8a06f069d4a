"""What a site keeps of its last broadcast, so that the server need not send it again: released arrays, by content.

    received/<sha256>.safetensors      one part of a broadcast (`fl_app.parts`)

Nothing here is private, and nothing is trusted: a part is used only when it has the hash that the server names. A
site that lost its copy refuses one round and is sent everything in the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app import parts, releases
from fl_app.hash_chain import is_digest

if TYPE_CHECKING:
    from pathlib import Path

    from fl_app.types import Broadcast, Floats

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """The folder of a site that holds parts of its last broadcast."""

    directory: Path

    def find(self, sha256: str) -> dict[str, Floats] | None:
        """Return the arrays of this hash; None when they are not here, or not what they were."""
        path = self.directory / f"{sha256}{SUFFIX}"
        if not is_digest(sha256) or not path.is_file():
            return None
        from safetensors import SafetensorError

        try:
            found = releases.load_vectors(path)
        except (OSError, ValueError, SafetensorError):
            return None
        return found if parts.sha256(found) == sha256 else None

    def keep(self, broadcast: Broadcast) -> None:
        """Keep the parts of a broadcast, and nothing else. Raises: DiskFull."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        factors = [parts.part(broadcast.adapter, factor) for factor in parts.of_adapter(broadcast.adapter)]
        wanted = {parts.sha256(arrays): arrays for arrays in [*factors, *map(parts.arrays_of, broadcast.blocks)]}
        for sha256, arrays in wanted.items():
            if self.find(sha256) is None:
                releases.save_vectors(arrays, self.directory / f"{sha256}{SUFFIX}")
        for path in self.directory.iterdir():
            if path.name.removesuffix(SUFFIX) not in wanted:
                path.unlink()
