"""What a site keeps of a run for itself: a directory of its own, one file a round, never read by anything that sends.

    <site>/personal/<run>/round-<n>.safetensors

Each file appears whole. Of a run the file of the last round stays, and the one before it: a round that is broken off
begins again from there, and gives the same once more. It is the owner's to delete; a run then goes on from the
broadcast.

Out of scope: what a learner puts here; what it cost (the round's own receipts, on the ledger before anything is put).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from fl_app import releases
from fl_app.errors import RunInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fl_app.types import Floats

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDrawer:
    """A `clients.stages.Drawer` in a directory, for one run."""

    directory: Path

    def latest(self, before: int) -> Mapping[str, Floats] | None:
        """Return the arrays of the last round before this one. Raises: RunInvalid when their file cannot be read."""
        rounds = [number for number in self._rounds() if number < before]
        if not rounds:
            return None
        path = self._path(rounds[-1])
        try:
            return releases.load_vectors(path)
        except (OSError, SafetensorError):
            raise RunInvalid(f"{path} cannot be read; restore it, or delete it to begin from the broadcast") from None

    def put(self, round_number: int, arrays: Mapping[str, Floats]) -> None:
        """Keep the arrays of a round, and of earlier ones the last. Raises: DiskFull, RunInvalid."""
        for place in (self.directory.parent, self.directory):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        releases.save_vectors(arrays, self._path(round_number))
        for number in [one for one in self._rounds() if one < round_number][:-1]:
            with contextlib.suppress(OSError):
                self._path(number).unlink()

    def _rounds(self) -> list[int]:
        numbers = (path.stem.removeprefix("round-") for path in self.directory.glob(f"round-*{SUFFIX}"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def _path(self, round_number: int) -> Path:
        return self.directory / f"round-{round_number}{SUFFIX}"
