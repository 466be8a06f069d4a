"""Keys and certificates of a deployment: a small CA of its own, a server certificate, node keys, secrets.

Every private file is created with mode 0600 and never overwritten. An organisation that has a PKI uses that instead:
any PEM certificate whose subject alternative names hold the address that the nodes dial will do.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_app.errors import DeploymentUnsafe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SECRET_BYTES = 32
"""As long as the key of the HMAC-SHA256 that Flower derives from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A certificate authority: its self-signed certificate, and the key that stays on the operator's machine."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFiles:
    """A server's certificate and its private key."""

    certificate: Path
    key: Path


def make_authority(folder: Path, *, days: int = 1825) -> Authority:
    """Make a CA in `folder` (`ca.crt`, `ca.key`) and return it. Raises: DeploymentUnsafe when there is one."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Stillroom deployment CA")])
    now = dt.datetime.now(dt.UTC)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), now, now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    made = Authority(certificate=folder / "ca.crt", key=folder / "ca.key")
    _write(made.key, _pem(key))
    _write(made.certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return made


def issue(
    authority: Authority,
    folder: Path,
    *,
    names: Sequence[str],
    days: float = 365,
    not_before: dt.datetime | None = None,
) -> ServerFiles:
    """Return a server certificate for `names` (host names and IP addresses, as the nodes dial them).

    `not_before` back-dates it; the default is five minutes ago, for clocks that run behind.
    """
    issuer = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    signer = serialization.load_pem_private_key(authority.key.read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    begin = not_before or dt.datetime.now(dt.UTC) - dt.timedelta(minutes=5)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    certificate = (
        _builder(subject, issuer.subject, key.public_key(), begin, begin + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    made = ServerFiles(certificate=folder / "server.crt", key=folder / "server.key")
    _write(made.key, _pem(key))
    _write(made.certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return made


def make_node_key(path: Path) -> Path:
    """Write a node's key to `path` and the half that the server registers to `path`.pub; return the latter."""
    key = ec.generate_private_key(ec.SECP384R1())
    return _openssh(path, key, key.public_key())


def make_signing_key(path: Path) -> Path:
    """Write a key that signs bundles (Ed25519) to `path` and its public half to `path`.pub; return the latter."""
    key = ed25519.Ed25519PrivateKey.generate()
    return _openssh(path, key, key.public_key())


def make_secret(path: Path) -> Path:
    """Write a random SuperExec secret and return its path."""
    _write(path, secrets.token_bytes(SECRET_BYTES))
    return path


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    begin: dt.datetime,
    end: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _openssh(
    path: Path,
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
    public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
) -> Path:
    """Write both halves in OpenSSH's format, the only one that Flower reads for nodes and signatures."""
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    half = path.with_name(path.name + ".pub")
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(path, private)
    _write(half, line + b"\n", mode=0o644)
    return half


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Create a file that did not exist, with its mode from the first moment. Raises: DeploymentUnsafe."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise DeploymentUnsafe(f"{path} is there already and is not replaced; move it away or name another") from None
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(content)
