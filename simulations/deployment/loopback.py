"""A whole deployment on this machine's loopback: SuperLink, gate, nodes, and every key between them.

The processes are Flower's own, with the flags of a production deployment (each command passes `guard`): TLS from an own
CA, registered node keys, a database, process isolation with SuperExec secrets, signed bundles. Each process has its own
FLWR_HOME and its own empty working directory. Whoever uses it enters it as a context: on the way out, also by an
exception or Ctrl-C, every process that was started is ended by its id.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from fl_app.errors import RoundFailed
from fl_app.origin import ROOT
from simulations import processes
from simulations.deployment import bundle, guard, keys
from simulations.deployment.runs import Operator

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence
    from pathlib import Path

START_S = 60.0
_POLL_S = 0.2

FAST = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
"""A SuperExec asks for tasks every second unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A site's end: what its SuperNode and its SuperExec were started with, and its id at the server."""

    name: str
    identity: int
    key: Path
    command: tuple[str, ...]
    executor: tuple[str, ...]
    port: int


class Loopback:
    """A deployment under `folder`. Nothing runs until `start` is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.database = folder / "link.db"
        self.link_port, self.gate_port = processes.free_port(), processes.free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.nodes: dict[str, Node] = {}
        for place in (folder / "keys", self.logs, folder / "homes"):
            place.mkdir(parents=True, mode=0o700)
        self.authority = keys.make_authority(folder / "ca")
        self.server = keys.issue(self.authority, folder / "server", names=("127.0.0.1", "localhost"))
        self.secret = keys.make_secret(folder / "keys" / "link.secret")
        self.signer = folder / "keys" / "signing"
        keys.make_signing_key(self.signer)
        self.trust = bundle.trust_file(folder / "keys" / "trusted.yaml", folder / "keys" / "signing.pub")
        self.operator = Operator(connection="loopback", home=self._home("operator"))
        (self.operator.home / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{self.link_port}"\n'
            f'root-certificates = "{self.authority.certificate}"\n',
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        """Return the deployment, to be started."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every process, the last first."""
        for name in reversed(list(self.processes)):
            self.end(name)

    def start(self) -> None:
        """Start the SuperLink, its SuperExec and the gate. Raises: RoundFailed when one does not come up."""
        self.start_link()
        self.spawn("superexec", self.link_executor(), **FAST)
        self.start_gate()

    def start_gate(self) -> None:
        """Start the gate before the SuperLink, for the first time or again."""
        command = ["python", "-m", "simulations.deployment.gate", "--listen", f"127.0.0.1:{self.gate_port}"]
        command += [
            "--superlink",
            f"127.0.0.1:{self.link_port}",
            "--root-certificates",
            str(self.authority.certificate),
        ]
        command += ["--ssl-certfile", str(self.server.certificate), "--ssl-keyfile", str(self.server.key)]
        self.spawn("gate", command, PYTHONPATH=str(ROOT))
        self.await_port("gate", self.gate_port)

    def start_link(self) -> None:
        """Start the SuperLink, for the first time or again on the same database."""
        self.spawn("superlink", self.link_command())
        self.await_port("superlink", self.link_port)

    def link_command(self) -> list[str]:
        """Return the SuperLink's command line."""
        return [
            "flower-superlink",
            *("--ssl-ca-certfile", str(self.authority.certificate)),
            *("--ssl-certfile", str(self.server.certificate), "--ssl-keyfile", str(self.server.key)),
            "--enable-supernode-auth",
            *("--database", str(self.database), "--host", "127.0.0.1", "--port", str(self.link_port)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self.secret)),
            "--disable-runtime-dependency-installation",
        ]

    def link_executor(self) -> list[str]:
        """Return the command line of the SuperExec that starts the server's app."""
        return [
            "flower-superexec",
            *("--runtime-api-address", f"127.0.0.1:{self.link_port}"),
            *("--root-certificates", str(self.authority.certificate)),
            *("--superexec-auth-secret-file", str(self.secret)),
        ]

    def add_node(self, name: str, site: Path) -> Node:
        """Make a node's key and secret, register it, and start its SuperNode and SuperExec."""
        key = self.folder / "keys" / name
        public = keys.make_node_key(key)
        node = self.plan_node(name, site, key, identity=self.operator.register(public))
        self.nodes[name] = node
        self.start_node(node)
        return node

    def plan_node(self, name: str, site: Path, key: Path, *, identity: int = 0) -> Node:
        """Return what a node would be started with; start nothing."""
        secret = self.folder / "keys" / f"{name}.secret"
        if not secret.exists():
            keys.make_secret(secret)
        port = processes.free_port()
        shared = ("--superexec-auth-secret-file", str(secret))
        command = (
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{self.gate_port}", "--root-certificates", str(self.authority.certificate)),
            *("--auth-supernode-private-key", str(key), "--trusted-entities", str(self.trust)),
            *("--node-config", f'rows="{site}"', "--host", "127.0.0.1", "--port", str(port)),
            *("--isolation", "process", *shared),
        )
        executor = ("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}", *shared)
        return Node(name=name, identity=identity, key=key, command=command, executor=executor, port=port)

    def start_node(self, node: Node) -> None:
        """Start a node's two processes, for the first time or again."""
        self.spawn(f"{node.name}-supernode", node.command)
        self.spawn(f"{node.name}-superexec", node.executor, **FAST)

    def await_nodes(self, *names: str, timeout_s: float = START_S) -> None:
        """Wait until nodes are online (default: all). Raises: RoundFailed."""
        wanted = {self.nodes[name].identity for name in names or self.nodes}
        deadline = time.monotonic() + timeout_s
        while missing := wanted - {i for i, status in self.operator.nodes().items() if status == "online"}:
            if time.monotonic() > deadline:
                raise RoundFailed(f"{len(missing)} nodes are not online after {timeout_s:g} s; see {self.logs}")
            time.sleep(_POLL_S)

    def sign(self, root: Path) -> str:
        """Sign the bundle of `root`, hand the signature to the SuperLink, and return the bundle's SHA-256."""
        fab_hash = bundle.digest(bundle.build(root))
        bundle.attach(self.database, bundle.sign(fab_hash, self.signer))
        return fab_hash

    def spawn(self, name: str, command: Sequence[str], **more: str) -> subprocess.Popen[bytes]:
        """Start one process; Flower's own have to pass the guard. Raises: DeploymentUnsafe."""
        home = self._home(name)
        env: Mapping[str, str] = {**processes.environment(home), "PYTHONPATH": "", **more}
        if command[0].startswith("flower-"):
            guard.refuse_unsafe(command, env)
        empty = home / "cwd"
        empty.mkdir(exist_ok=True)
        started = processes.start(command, log=self.logs / f"{name}.log", cwd=empty, env=env)
        self.processes[name] = started
        return started

    def end(self, name: str) -> None:
        """End a process that was started here, and all it started."""
        processes.end(self.processes.pop(name))

    def await_port(self, name: str, port: int) -> None:
        """Wait until a process listens. Raises: RoundFailed when it ends or takes too long, naming its log."""
        deadline = time.monotonic() + START_S
        while not processes.listens(port):
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise RoundFailed(f"{name} did not start; see {self.logs / name}.log")
            time.sleep(_POLL_S)

    def _home(self, name: str) -> Path:
        home = self.folder / "homes" / name
        home.mkdir(exist_ok=True, mode=0o700)
        return home
