"""What a site has released, kept on its own disk: a resend comes from here, never from a second training."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app import lora
from fl_app.errors import LedgerCorrupt
from fl_app.types import AdapterRelease

if TYPE_CHECKING:
    from fl_app.types import Adapter


def put(outbox: Path, *, run: str, round_number: int, adapter: Adapter, base_name: str) -> str:
    """Write the release of one round as a whole and return its hash."""
    target = _place(outbox, run, round_number)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    lora.save_peft(adapter, folder, base_name=base_name)
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    for place in (target.parent, outbox):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return lora.sha256(adapter)


def get(outbox: Path, *, run: str, round_number: int, sha256: str) -> AdapterRelease:
    """Return the release that the ledger committed as `sha256`.

    Raises: LedgerCorrupt when it is gone or is not what was committed.
    """
    place = _place(outbox, run, round_number)
    if not (place / "adapter_config.json").is_file():
        raise LedgerCorrupt(f"round {round_number} of run {run} was committed, but {place} is gone; restore it")
    adapter = lora.load_peft(place)
    if lora.sha256(adapter) != sha256:
        raise LedgerCorrupt(f"{place} is not the release committed as {sha256[:12]}; restore it from a backup")
    return AdapterRelease(adapter=adapter)


def _place(outbox: Path, run: str, round_number: int) -> Path:
    """Return the directory of a release; a run whose name is no plain folder name gets a hash behind what is left."""
    safe = "".join(c if (c.isascii() and c.isalnum()) or c in "-_" else "_" for c in run)[:80]
    if safe != run:
        safe += "." + hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return outbox / safe / f"round-{round_number}"
