"""What a production process may not be started with: every setting that would open it, named with the way out.

The guard reads the very command line and environment that are about to run, so it cannot disagree with them:

    python -m simulations.deployment start -- flower-superlink --ssl-certfile ... --enable-supernode-auth ...

It looks at Flower's own words only; whether certificate, clock and site are sound is `preflight`'s business.
Source: reliability-and-security T10, T26 to T29; flwr 1.41, `superlink/cli/flower_superlink.py`.
"""

from __future__ import annotations

import ipaddress
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.errors import DeploymentUnsafe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

PRIVATE_FLAGS = ("--ssl-keyfile", "--superexec-auth-secret-file", "--auth-supernode-private-key")
"""Flags whose file holds a secret."""

FORBIDDEN = {
    "--insecure": "messages would travel in plain text; give certificates instead",
    "--allow-runtime-dependency-installation": "every run could install packages; leave it out",
    "--fleet-api-type": "this opens a gRPC port of its own; leave it out",
    "--fleet-api-address": "this opens a gRPC port of its own; leave it out",
    "--control-api-address": "this opens a gRPC port of its own; leave it out",
    "--health-server-address": "this opens a port without TLS; ask GET /health on the one port instead",
    "--simulation": "this SuperLink would simulate its sites; leave it out",
}
SWITCHES = (
    "--insecure",
    "--enable-supernode-auth",
    "--simulation",
    "--allow-runtime-dependency-installation",
    "--disable-runtime-dependency-installation",
)
"""Flags without a value."""

KNOWN: Mapping[str, tuple[str, ...]] = {
    "flower-superlink": (
        "--ssl-ca-certfile",
        "--ssl-certfile",
        "--ssl-keyfile",
        "--isolation",
        "--database",
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--superexec-auth-secret-file",
        "--host",
        "--port",
        "--log-file",
        "--log-rotation-interval-hours",
        "--log-rotation-backup-count",
    ),
    "flower-supernode": (
        "--root-certificates",
        "--superlink",
        "--max-retries",
        "--max-wait-time",
        "--auth-supernode-private-key",
        "--node-config",
        "--isolation",
        "--host",
        "--port",
        "--ssl-ca-certfile",
        "--ssl-certfile",
        "--ssl-keyfile",
        "--trusted-entities",
        "--superexec-auth-secret-file",
    ),
    "flower-superexec": (
        "--runtime-api-address",
        "--root-certificates",
        "--parent-pid",
        "--superexec-auth-secret-file",
    ),
}
"""Flags that may stand there. Flower also takes abbreviations (`--insec`), so whatever else stands there is refused."""

OPENED_BY_ENVIRONMENT = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One setting that must not be, and the way out."""

    setting: str
    why: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line of one of Flower's programs, read as Flower reads it."""

    program: str
    values: Mapping[str, str]

    def has(self, flag: str) -> bool:
        """Say whether a flag was given."""
        return flag in self.values


def read_command(words: Sequence[str]) -> Command:
    """Return a command line by its flags. Raises: DeploymentUnsafe for a program that is not Flower's."""
    program = Path(words[0]).name if words else ""
    if program not in KNOWN:
        raise DeploymentUnsafe(f"{program!r} is not guarded; known: {', '.join(KNOWN)}")
    values: dict[str, str] = {}
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            raise DeploymentUnsafe(f"{word!r} belongs to no flag of {program}")
        takes_next = not equals and flag not in SWITCHES and rest and not rest[0].startswith("--")
        values[flag] = rest.pop(0) if takes_next else value
    return Command(program=program, values=values)


def findings(words: Sequence[str], environment: Mapping[str, str]) -> list[Finding]:
    """Return everything about a command line and its environment that production forbids.

    Raises: DeploymentUnsafe for a program that is not Flower's.
    """
    command = read_command(words)
    rules = _RULES[command.program](command)
    return [*rules, *_unknown(command), *_secrets(command), *_environment(environment)]


def refuse_unsafe(words: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Return the command when it may start. Raises: DeploymentUnsafe, naming every setting at once."""
    command = read_command(words)
    if found := findings(words, environment):
        lines = "".join(f"\n  {finding}" for finding in found)
        raise DeploymentUnsafe(f"{command.program} is not started in production:{lines}")
    return command


def _superlink(command: Command) -> Iterator[Finding]:
    yield from _forbidden(command, FORBIDDEN)
    for flag in ("--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile"):
        if not command.has(flag):
            yield Finding(setting=flag, why="without it there is no TLS; name the PEM file")
    if not command.has("--enable-supernode-auth"):
        yield Finding(setting="--enable-supernode-auth", why="without it any machine may join as a site; add it")
    database = command.values.get("--database", "")
    if not database or database.startswith((":", "sqlite:", "flwr-in-memory")):
        yield Finding(setting="--database", why="runs and registered sites would be lost with the process; name a file")
    yield from _isolation(command, "task processes could be taken over by anyone who reaches the port")
    if not command.has("--disable-runtime-dependency-installation"):
        why = "without it every run installs packages; add it"
        yield Finding(setting="--disable-runtime-dependency-installation", why=why)
    yield from _loopback(command, "operators' calls have no login in this version; publish through the gate")


def _supernode(command: Command) -> Iterator[Finding]:
    yield from _forbidden(command, FORBIDDEN)
    needed = {
        "--root-certificates": "without it any certificate of a public CA is taken for the server; name its CA",
        "--auth-supernode-private-key": "without it this site has no identity; make one with `deployment keys node`",
        "--trusted-entities": "without it this site runs whatever code its SuperLink sends; name the signers' keys",
        "--superlink": "without it this site looks for a server on this machine; name host:port",
    }
    yield from (Finding(setting=flag, why=why) for flag, why in needed.items() if not command.has(flag))
    if "rows=" not in command.values.get("--node-config", ""):
        yield Finding(setting="--node-config", why='without rows="/absolute/path" the site does not know its data')
    yield from _isolation(command, "other users of this machine could take over the site's task processes")
    yield from _loopback(command, "the port for task processes is for this machine alone; leave it out")


def _superexec(command: Command) -> Iterator[Finding]:
    address = command.values.get("--runtime-api-address", "")
    local = _is_loopback(address.rpartition(":")[0])
    yield from _forbidden(command, {k: v for k, v in FORBIDDEN.items() if k != "--insecure" or not local})
    if not command.has("--insecure") and not command.has("--root-certificates"):
        yield Finding(setting="--root-certificates", why="without it the server is not checked; name its CA")
    if not command.has("--superexec-auth-secret-file"):
        yield Finding(setting="--superexec-auth-secret-file", why="without it no task is had; name the shared file")


_RULES: Mapping[str, Callable[[Command], Iterator[Finding]]] = {
    "flower-superlink": _superlink,
    "flower-supernode": _supernode,
    "flower-superexec": _superexec,
}


def _forbidden(command: Command, flags: Mapping[str, str]) -> Iterator[Finding]:
    yield from (Finding(setting=flag, why=why) for flag, why in flags.items() if command.has(flag))


def _unknown(command: Command) -> Iterator[Finding]:
    for flag in command.values:
        if flag not in KNOWN[command.program] and flag not in FORBIDDEN:
            yield Finding(setting=flag, why=f"no flag of {command.program} that production uses; write flags in full")


def _isolation(command: Command, danger: str) -> Iterator[Finding]:
    if command.values.get("--isolation") != "process":
        yield Finding(setting="--isolation", why=f"{danger}; say --isolation process")
    if not command.has("--superexec-auth-secret-file"):
        yield Finding(setting="--superexec-auth-secret-file", why=f"{danger}; name a file with a shared secret")


def _loopback(command: Command, danger: str) -> Iterator[Finding]:
    host = command.values.get("--host", "127.0.0.1")
    if not _is_loopback(host):
        yield Finding(setting="--host", why=f"{host} is reached from outside: {danger}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _secrets(command: Command) -> Iterator[Finding]:
    for flag in PRIVATE_FLAGS:
        if flag in command.values:
            yield from private_file(flag, Path(command.values[flag]).expanduser())


def private_file(setting: str, path: Path) -> Iterator[Finding]:
    """Yield what is wrong with a file that holds a secret."""
    if not path.is_file():
        yield Finding(setting=setting, why=f"no file at {path}")
        return
    if path.stat().st_size == 0:
        yield Finding(setting=setting, why=f"{path} is empty")
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        yield Finding(setting=setting, why=f"{path} can be read by others (mode {mode:04o}); chmod 600 {path}")


def _environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("FLWR_TELEMETRY_ENABLED") != "0":
        yield Finding(setting="FLWR_TELEMETRY_ENABLED", why="Flower would report usage to its makers; set it to 0")
    if environment.get("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION") != "1":
        why = "runs could install packages; set it to 1"
        yield Finding(setting="FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", why=why)
    for name in OPENED_BY_ENVIRONMENT:
        if environment.get(name) == "1":
            yield Finding(setting=name, why="this opens a gRPC port of its own; unset it")
