"""A place of their own for tests that run the whole loop: instead of build/ and runs/, with the corpus written once."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from simulations import launch

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@contextmanager
def at(place: Path) -> Generator[pytest.MonkeyPatch]:
    """Let `launch` work under `place`; the corpus, the same every time, is written once. Yields the patch."""
    write = launch.write_corpus

    def once(folder: Path) -> None:
        if not folder.exists():
            write(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "BUILD", place / "build")
        patch.setattr(launch, "RUNS", place / "runs")
        patch.setattr(launch, "write_corpus", once)
        yield patch
