"""Ten seconds before a site's process starts: is the server the right one, are clock, keys and site sound?

Flower's own messages for these cases range from "Server disconnected without sending a response" to retrying for ever
in silence. Here every check has a name, and the first that fails says which one it was and what to do.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from clients.config import read_policy
from fl_app.errors import DeploymentUnsafe

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 5.0

MAX_SKEW_S = 5.0
"""A node's signed timestamp may lie this far in the future (flwr 1.41, SYSTEM_TIME_TOLERANCE) and 305 s in the past."""

EXPIRES_SOON_DAYS = 14

_CHECKS = {
    "certificate has expired": (
        "expired certificate",
        "the server's certificate has expired; its operator issues a new one (`deployment keys server`)",
    ),
    "certificate is not yet valid": ("certificate not yet valid", "set this machine's clock, or wait"),
    "mismatch": ("wrong name", "the server's certificate is not for this address; dial a name that stands in it"),
    "not valid for": ("wrong name", "the server's certificate is not for this address; dial a name that stands in it"),
    "unable to get local issuer": (
        "wrong CA",
        "the server's certificate is not signed by the CA in --root-certificates; ask its operator for ca.crt",
    ),
    "self-signed certificate": (
        "wrong CA",
        "the server's certificate is not signed by the CA in --root-certificates; ask its operator for ca.crt",
    ),
    "certificate signature failure": (
        "wrong CA",
        "the server's certificate is not signed by the CA in --root-certificates; ask its operator for ca.crt",
    ),
    "wrong version number": ("no TLS", "this server speaks plain HTTP; a production SuperLink speaks TLS"),
}
"""What OpenSSL says -> the check that failed and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is dialled."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def read_address(text: str) -> Address:
    """Return host and port. Raises: DeploymentUnsafe."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise DeploymentUnsafe(f"{text!r} is no address; write host:port, without https://")
    return Address(host=host.strip("[]"), port=int(port))


def check_server(address: Address, root_certificates: Path, *, timeout_s: float = TIMEOUT_S) -> float:
    """Return by how many seconds the server's clock is ahead of ours.

    Raises: DeploymentUnsafe naming the check that failed: reachable, TLS, CA, name, expiry, clock.
    """
    trust = _trust(root_certificates)
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=timeout_s) as plain,
            trust.wrap_socket(plain, server_hostname=address.host) as secure,
        ):
            date = _date(secure, address)
    except ssl.SSLError as error:
        check, way_out = _reason(error)
        raise DeploymentUnsafe(f"{address}: {check}: {way_out}") from None
    except OSError as error:
        raise DeploymentUnsafe(
            f"{address}: not reachable ({error.strerror or error}); is the server up, is the port open?"
        ) from None
    ahead = (date - datetime.now(UTC)).total_seconds() if date else 0.0
    if not -MAX_SKEW_S - 1 < ahead < MAX_SKEW_S:  # the header has whole seconds
        raise DeploymentUnsafe(f"{address}: clock: it is {ahead:+.0f} s ahead of ours; synchronise both (NTP)")
    return ahead


def check_plain(address: Address, *, timeout_s: float = TIMEOUT_S) -> None:
    """Raise `DeploymentUnsafe` when a node that speaks plain HTTP dials a server that speaks TLS."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE  # only the protocol is asked; nothing is sent
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=timeout_s) as plain,
            blind.wrap_socket(plain),
        ):
            pass
    except (ssl.SSLError, OSError):
        return
    raise DeploymentUnsafe(f"{address}: this SuperLink speaks TLS; remove --insecure and name its CA")


def check_certificate(certificate: Path, key: Path) -> None:
    """Raise `DeploymentUnsafe` unless a server certificate is in date, has names, and belongs to its key."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise DeploymentUnsafe(f"--ssl-certfile, --ssl-keyfile: {error}") from None
    now = datetime.now(UTC)
    if not loaded.not_valid_before_utc <= now < loaded.not_valid_after_utc:
        raise DeploymentUnsafe(
            f"--ssl-certfile: {certificate} is valid from {loaded.not_valid_before_utc} to "
            f"{loaded.not_valid_after_utc}; issue a new one (`deployment keys server`)"
        )
    if private.public_key() != loaded.public_key():
        raise DeploymentUnsafe(f"--ssl-keyfile: {key} is not the key of {certificate}")
    try:
        loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        raise DeploymentUnsafe(
            f"--ssl-certfile: {certificate} has no subject alternative name; no node takes it"
        ) from None


def check_site(directory: Path) -> None:
    """Raise `DeploymentUnsafe` unless a site directory is fit for production; what the rows say is not looked at."""
    if read_policy(directory).limits.simulation:
        raise DeploymentUnsafe(
            f"{directory}/site.toml: limits.simulation is true, so seeded noise would be taken; set it to false"
        )
    for name in ("", "rows.jsonl", "site.toml"):
        place = directory / name
        if not place.exists():
            raise DeploymentUnsafe(f"no {name} in {directory}; see docs/deployment.md")
        if (mode := stat.S_IMODE(place.stat().st_mode)) & 0o007:
            raise DeploymentUnsafe(f"{place} is open to every user of this machine (mode {mode:04o}); chmod o= {place}")


def _trust(root_certificates: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(root_certificates))
    except (OSError, ssl.SSLError) as error:
        raise DeploymentUnsafe(f"--root-certificates: {root_certificates} cannot be read ({error})") from None


def _date(secure: ssl.SSLSocket, address: Address) -> datetime | None:
    """Ask for what nobody publishes, and read the clock in the answer."""
    secure.sendall(f"GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
    reply = http.client.HTTPResponse(secure)
    try:
        reply.begin()
        stamp = reply.getheader("date")
    except http.client.HTTPException:
        return None
    return parsedate_to_datetime(stamp) if stamp else None


def _reason(error: ssl.SSLError) -> tuple[str, str]:
    said = str(error)
    for words, found in _CHECKS.items():
        if words in said.lower() or words in said:
            return found
    return "TLS", f"the handshake failed ({said}); is this the SuperLink?"
