"""What a site has released, kept on its own disk: a resend comes from here, never from a second training.

Each release is a folder that appears as a whole, its files (`fl_app.releases`) and `manifest.json` together:

    {"id": reservation, "ledger_seq": its line, "round", "run", "sha256": the release's, "answers": the broadcast's}

So the outbox is the ledger's witness. A folder is made after its reservation is on disk and before anything leaves; a
ledger that does not hold the reservation of a folder is an older copy, whoever put it back, and with whatever `.next`.

Out of scope: an owner who removes folders along with lines; whoever keeps a head sees that (`privacy.ledger`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app import releases
from fl_app.errors import LedgerCorrupt, PolicyRefusal, RunInvalid
from fl_app.privacy.chain import WAY_OUT, Committed, Reserved

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fl_app.privacy.chain import Entry
    from fl_app.privacy.ledger import Reservation
    from fl_app.types import Release, VectorRelease

MANIFEST = "manifest.json"


def put(
    outbox: Path,
    *,
    run: str,
    round_number: int,
    release: Release,
    survey: VectorRelease | None,
    base_name: str,
    reservation: Reservation,
    answers: str = "",
) -> str:
    """Write the release of one round as a whole and return its hash.

    `answers` is the hash of the broadcast that it was trained from (`releases.broadcast_sha256`).
    """
    target = _place(outbox, run, round_number)
    for place in (outbox, target.parent):
        place.mkdir(exist_ok=True, mode=0o700)
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    sha256 = releases.sha256(release, survey)
    releases.save(release, survey, folder, base_name=base_name)
    manifest = {
        "id": reservation.id,
        "ledger_seq": reservation.seq,
        "run": run,
        "round": round_number,
        "sha256": sha256,
        "answers": answers,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, sort_keys=True) + "\n", encoding="ascii")
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    for place in (target, target.parent, outbox, outbox.parent):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return sha256


def get(
    outbox: Path, *, run: str, round_number: int, sha256: str, answers: str = ""
) -> tuple[Release, VectorRelease | None]:
    """Return the release that the ledger committed as `sha256`, and the survey beside it if there was one.

    Raises: LedgerCorrupt when it is gone or is not what was committed; PolicyRefusal when it `answers` another
    broadcast: two runs under one name went different ways, and an old answer would be averaged with new ones.
    """
    place = _place(outbox, run, round_number)
    try:
        release, survey = releases.load(place)
    except RunInvalid:
        raise LedgerCorrupt(
            f"round {round_number} of run {run} was committed, but {place} is gone; restore it"
        ) from None
    if releases.sha256(release, survey) != sha256:
        raise LedgerCorrupt(f"{place} is not the release committed as {sha256[:12]}; restore it from a backup")
    told = _answered(place)
    if answers and told and told != answers:
        raise PolicyRefusal(
            f"round {round_number} of run {run} was answered, to another broadcast ({told[:12]}, now {answers[:12]}); "
            "a run that begins anew needs a name of its own"
        )
    return release, survey


def _answered(place: Path) -> str:
    """Return what a release in the outbox answers; empty in folders of before this was kept."""
    said: Any = json.loads((place / MANIFEST).read_text(encoding="ascii"))
    return str(said.get("answers", ""))


def check_witnesses(outbox: Path, entries: Sequence[Entry]) -> None:
    """Return when the ledger holds the reservation of every release in the outbox, and committed no other for it.

    Raises: LedgerCorrupt naming the release that the ledger does not know.
    """
    reserved = {e.id: (e.run, e.round, e.seq) for e in entries if isinstance(e, Reserved)}
    committed = {e.id: e.sha256 for e in entries if isinstance(e, Committed)}
    for place in sorted(outbox.glob(f"*/round-*/{MANIFEST}")):
        try:
            said: Any = json.loads(place.read_text(encoding="ascii"))
            release = (said["run"], said["round"], said["ledger_seq"])
            known = reserved.get(said["id"]) == release
            same = committed.get(said["id"], said["sha256"]) == said["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise LedgerCorrupt(f"{place} cannot be read; restore it from a backup") from None
        if not known or not same:
            raise LedgerCorrupt(
                f"{place.parent} was released, but the ledger {'knows another' if known else 'does not know it'}: the "
                f"ledger was rolled back; {WAY_OUT}"
            )


def _place(outbox: Path, run: str, round_number: int) -> Path:
    """Return the directory of a release."""
    return outbox / folder_name(run) / f"round-{round_number}"


def folder_name(run: str) -> str:
    """Return the name of a run's folder; one that is no plain folder name gets a hash behind what is left of it."""
    safe = "".join(c if (c.isascii() and c.isalnum()) or c in "-_" else "_" for c in run)[:80]
    if safe != run:
        safe += "." + hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return safe
