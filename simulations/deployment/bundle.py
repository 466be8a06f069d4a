"""Signed bundles: a site runs only code that a key it trusts has signed, whatever its SuperLink sends.

A SuperNode checks signatures itself (`--trusted-entities keys.yaml`): Ed25519 over the signing time and the SHA-256 of
the bundle. What flwr 1.41 lacks outside its own hub is the way for a signature to reach the SuperLink's database, from
which it travels with the bundle. `attach` is that way: signatures lie in a table of their own beside Flower's, and a
trigger writes them into the row of the bundle whenever `flwr run` stores it. Several keys may sign one bundle, so a
site that signs what it has itself reviewed, and trusts no key but its own, has pinned one digest.

Guarantee: nothing here can make an unsigned bundle run; the check and the keys are on the site. If the table or the
trigger is lost, nodes refuse. A signature has no expiry: to withdraw a bundle, change the site's key.

Source: flwr 1.41, `supernode/start_client_internal.py` (`_verify_fab`), `supercore/corestate/sql_corestate.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from pydantic import Field, ValidationError

from fl_app.config import Section
from fl_app.errors import DeploymentUnsafe

if TYPE_CHECKING:
    from pathlib import Path

_SQL = """
CREATE TABLE IF NOT EXISTS stillroom_signature (
    fab_hash TEXT NOT NULL, key_id TEXT NOT NULL, verification TEXT NOT NULL, PRIMARY KEY (fab_hash, key_id));
DROP TRIGGER IF EXISTS stillroom_signed_insert;
DROP TRIGGER IF EXISTS stillroom_signed_update;
CREATE TRIGGER stillroom_signed_insert AFTER INSERT ON fab {body};
CREATE TRIGGER stillroom_signed_update AFTER UPDATE OF verifications ON fab {body};
"""
_BODY = """
WHEN EXISTS (SELECT 1 FROM stillroom_signature WHERE fab_hash = NEW.fab_hash) BEGIN
    UPDATE fab SET verifications = (
        SELECT json_group_object(key_id, verification) FROM (
            SELECT key_id, verification FROM stillroom_signature WHERE fab_hash = NEW.fab_hash
            UNION ALL SELECT 'valid_license', 'Valid'))
    WHERE fab_hash = NEW.fab_hash;
END
"""
# 'valid_license' is the word by which a SuperNode knows that its SuperLink deals in signatures at all; it proves
# nothing, and the node goes on to check the signature.


class Signature(Section):
    """One key's word for one bundle. `signed_at` is in Unix seconds and is part of what is signed."""

    fab_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    key_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
    signed_at: Annotated[int, Field(ge=0, lt=2**63)]
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9_=-]{1,200}$")]


def build(root: Path) -> bytes:
    """Return the bundle that `flwr run` would send from `root`, byte for byte."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(root)


def digest(bundle: bytes) -> str:
    """Return what a bundle is known by: its SHA-256."""
    return hashlib.sha256(bundle).hexdigest()


def key_id(public: Path) -> str:
    """Return the name of a public key: a hash of it, so that two sites cannot mean different keys by one name."""
    words = public.read_text(encoding="utf-8").split()
    return "fpk_" + hashlib.sha256(" ".join(words[:2]).encode()).hexdigest()[:32]


def trust_file(path: Path, *publics: Path) -> Path:
    """Write what `--trusted-entities` reads: the public keys whose signatures a node accepts."""
    lines = [f"{key_id(public)}: '{public.read_text(encoding='utf-8').strip()}'\n" for public in publics]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def sign(fab_hash: str, key: Path) -> Signature:
    """Return the signature of a bundle by its digest. `key` is an Ed25519 key in OpenSSH format, `.pub` beside it."""
    if not re.fullmatch(r"[0-9a-f]{64}", fab_hash):
        raise DeploymentUnsafe(f"{fab_hash!r} is no SHA-256 of a bundle; `deployment digest` prints it")
    private = serialization.load_ssh_private_key(key.read_bytes(), password=None)
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise DeploymentUnsafe(f"{key} is no Ed25519 key; Flower checks no other kind, see `deployment keys signing`")
    now = int(time.time())
    mark = base64.urlsafe_b64encode(private.sign(_message(fab_hash, now))).decode()
    return Signature(fab_hash=fab_hash, key_id=key_id(key.with_name(key.name + ".pub")), signed_at=now, signature=mark)


def verify(signature: Signature, public: Path) -> None:
    """Raise `DeploymentUnsafe` unless `public` made this signature."""
    loaded = serialization.load_ssh_public_key(public.read_bytes())
    if not isinstance(loaded, ed25519.Ed25519PublicKey):
        raise DeploymentUnsafe(f"{public} is no Ed25519 key")
    try:
        raw = base64.urlsafe_b64decode(signature.signature)
        loaded.verify(raw, _message(signature.fab_hash, signature.signed_at))
    except (InvalidSignature, binascii.Error):
        raise DeploymentUnsafe(f"{public} did not sign bundle {signature.fab_hash[:12]}") from None


def attach(database: Path, signature: Signature) -> None:
    """Hand a signature to a SuperLink, running or not; it travels with the bundle from its next `flwr run` on.

    Raises: DeploymentUnsafe when `database` is not a SuperLink's.
    """
    if not database.is_file():
        raise DeploymentUnsafe(f"no database at {database}; start flower-superlink --database once, it makes it")
    record = json.dumps({"signed_at": signature.signed_at, "signature": signature.signature})
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'fab'").fetchone():
            raise DeploymentUnsafe(f"{database} has no table of bundles; it is not the database of a SuperLink 1.41")
        connection.executescript(_SQL.format(body=_BODY))
        connection.execute(
            "INSERT OR REPLACE INTO stillroom_signature VALUES (?, ?, ?)",
            (signature.fab_hash, signature.key_id, record),
        )
        connection.execute("UPDATE fab SET verifications = verifications WHERE fab_hash = ?", (signature.fab_hash,))
        connection.commit()


def from_json(text: str) -> Signature:
    """Read the line that `sign` printed. Raises: DeploymentUnsafe."""
    try:
        return Signature.model_validate_json(text)
    except ValidationError:
        raise DeploymentUnsafe("this is no signature of a bundle; `deployment sign` prints one") from None


def _message(fab_hash: str, signed_at: int) -> bytes:
    """Return what is signed: eight bytes of seconds, then the digest."""
    return signed_at.to_bytes(8, "big") + bytes.fromhex(fab_hash)
