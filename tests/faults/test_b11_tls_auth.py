"""B11: nobody gets in who should not. One real deployment on loopback, twelve ways to be refused; slow.

Where a process is refused it ends by itself within fifteen seconds, with an exit code that is not 0 and a message that
names the check; and when all is over the honest node has answered throughout.
"""

from __future__ import annotations

import base64
import datetime as dt
import os
import re
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.constant import TASK_TOKEN_HEADER

from fl_app.errors import RoundFailed
from fl_app.origin import ROOT
from simulations import processes
from simulations.deployment import bundle, keys
from simulations.deployment.loopback import Loopback

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from simulations.deployment.loopback import Node

pytestmark = pytest.mark.slow
CASE = pytest.mark.bar("B11")

LIMIT_S = 15.0
POLICY = {
    "site": {"name": "honest"},
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "unit": "record"},
    "constants": {"sample_rate": 0.25, "expected_batch": 4, "max_tokens": 24},
    "limits": {
        "min_noise_multiplier": 1.0,
        "max_noise_multiplier": 4.0,
        "max_steps_per_round": 10,
        "max_rounds": 5,
        "release_kinds": ["adapter"],
    },
}
PROBE = {
    "pyproject.toml": """
[project]
name = "probe"
version = "{version}"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41.0"]
[tool.flwr.app]
publisher = "stillroom"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["probe_app/*.py", "LICENSE"]
[tool.flwr.app.components]
serverapp = "probe_app.server:app"
clientapp = "probe_app.client:app"
[tool.flwr.app.config]
node = ""
""",
    "LICENSE": "none",
    "probe_app/__init__.py": "",
    "probe_app/client.py": """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)
""",
    "probe_app/server.py": """
import time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    node = int(context.run_config["node"])
    pending = list(grid.push_messages([Message(RecordDict(), node, "query", ttl=90)]))
    while not (replies := list(grid.pull_messages(pending))):
        time.sleep(0.3)
    if replies[0].has_error():
        raise RuntimeError(f"the node answers error code {replies[0].error.code}")
""",
}
"""An app that asks one node one question and fails unless it answers."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    said: str
    seconds: float


def _command(words: Sequence[str]) -> subprocess.Popen[str]:
    """Start `deployment start -- ...` as a site operator would."""
    env = {**os.environ, **processes.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "simulations.deployment", "start", "--", *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen[Any], began: float) -> Ended:
    """Wait for a process to end by itself, at most the limit and a grace that makes the failure readable."""
    try:
        said, _ = process.communicate(timeout=2 * LIMIT_S)
    except subprocess.TimeoutExpired:
        processes.end(process)
        pytest.fail(f"still running after {2 * LIMIT_S:g} s: {process.args}")
    return Ended(code=process.returncode, said=said, seconds=time.monotonic() - began)


def start(words: Sequence[str]) -> Ended:
    began = time.monotonic()
    return _ended(_command(words), began)


def refused(ended: Ended, *words: str) -> None:
    """Assert that a process was refused in time and said why."""
    assert ended.code != 0
    assert ended.seconds < LIMIT_S
    for word in words:
        assert word in ended.said


def swap(command: Sequence[str], **changes: str | None) -> list[str]:
    """Return a command line with the values of flags changed, or the flag taken out (None)."""
    changed = list(command)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        at = changed.index(flag)
        changed[at : at + 2] = [] if value is None else [flag, value]
    return changed


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "honest"
    folder.mkdir(mode=0o700)
    for name, text in (("site.toml", tomli_w.dumps(POLICY)), ("rows.jsonl", "{}\n")):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Iterator[Loopback]:
    """One SuperLink, its gate, and an honest node that is online."""
    with Loopback(tmp_path_factory.mktemp("b11") / "deployment") as made:
        made.start()
        made.add_node("honest", site)
        made.await_nodes()
        yield made


@pytest.fixture
def stranger(deployment: Loopback, site: Path, tmp_path: Path) -> Node:
    """A node that was never registered; everything else about it is right."""
    key = tmp_path / "stranger"
    keys.make_node_key(key)
    name = f"stranger-{tmp_path.name}"
    return deployment.plan_node(name, site, key)


@pytest.fixture
def honest(deployment: Loopback) -> Iterator[Node]:
    """The honest node; whatever the test does, it must be online afterwards, in the same process."""
    node = deployment.nodes["honest"]
    process = deployment.processes["honest-supernode"]
    assert process.poll() is None
    yield node
    assert process.poll() is None
    assert deployment.operator.nodes()[node.identity] == "online"


def link_log(deployment: Loopback) -> str:
    return (deployment.logs / "superlink.log").read_text(encoding="utf-8", errors="replace")


def gate_with(deployment: Loopback, name: str, files: keys.ServerFiles) -> int:
    """Start one more gate before the same SuperLink, with another certificate."""
    port = processes.free_port()
    command = ["python", "-m", "simulations.deployment.gate", "--listen", f"127.0.0.1:{port}"]
    command += ["--superlink", f"127.0.0.1:{deployment.link_port}"]
    command += ["--root-certificates", str(deployment.authority.certificate)]
    command += ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
    deployment.spawn(name, command, PYTHONPATH=str(ROOT))
    deployment.await_port(name, port)
    return port


def test_an_honest_node_is_let_in(deployment: Loopback, honest: Node) -> None:
    """The control of all that follows: the same command, unchanged, is online."""
    assert deployment.operator.nodes() == {honest.identity: "online"}


@CASE
def test_1_a_node_in_plain_text(stranger: Node, honest: Node) -> None:
    words = [*swap(stranger.command, root_certificates=None), "--insecure"]
    refused(start(words), "this SuperLink speaks TLS")


def test_1_flower_itself_does_not_serve_plain_text(deployment: Loopback, honest: Node) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://127.0.0.1:{deployment.gate_port}/v1/fleet/activate-node", timeout=5)


@CASE
def test_2_a_server_of_another_ca(deployment: Loopback, stranger: Node, honest: Node, tmp_path: Path) -> None:
    other = keys.make_authority(tmp_path / "other")
    refused(start(swap(stranger.command, root_certificates=str(other.certificate))), "wrong CA")


@CASE
def test_3_a_node_without_a_key(deployment: Loopback, stranger: Node, honest: Node) -> None:
    refused(start(swap(stranger.command, auth_supernode_private_key=None)), "--auth-supernode-private-key")


def test_3_flower_itself_registers_no_node_that_registers_itself(
    deployment: Loopback, stranger: Node, honest: Node
) -> None:
    """Without a key a SuperNode invents one and registers it. Straight at the SuperLink: the gate has no such call."""
    words = swap(stranger.command, auth_supernode_private_key=None, superlink=f"127.0.0.1:{deployment.link_port}")
    began = time.monotonic()
    env = {**os.environ, **processes.ENVIRONMENT}
    command = [processes.tool(words[0]), *words[1:]]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        refused(_ended(process, began), "Failed to initialize the connection")
    assert list(deployment.operator.nodes()) == [honest.identity]


@CASE
def test_4_a_key_that_was_never_registered(deployment: Loopback, stranger: Node, honest: Node) -> None:
    refused(start(stranger.command), "the server does not take this key: it was never registered")
    assert '"POST /v1/fleet/activate-node HTTP/1.1" 4' in link_log(deployment)
    assert list(deployment.operator.nodes()) == [honest.identity]


@CASE
def test_5_a_key_that_was_withdrawn(deployment: Loopback, stranger: Node, honest: Node) -> None:
    node = deployment.operator.register(stranger.key.with_name(stranger.key.name + ".pub"))
    process = _command(stranger.command)
    deadline = time.monotonic() + 60
    while deployment.operator.nodes()[node] != "online":
        assert process.poll() is None
        assert time.monotonic() < deadline
    deployment.operator.unregister(node)
    refused(_ended(process, time.monotonic()), "the server does not accept our authentication any more")
    refused(start(stranger.command), "the server does not take this key")


@CASE
def test_6_an_expired_certificate(deployment: Loopback, stranger: Node, honest: Node, tmp_path: Path) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=3)
    files = keys.issue(deployment.authority, tmp_path, names=("127.0.0.1",), days=1, not_before=past)
    port = gate_with(deployment, "expired", files)
    refused(start(swap(stranger.command, superlink=f"127.0.0.1:{port}")), "expired certificate")


@CASE
def test_7_a_certificate_for_another_name(deployment: Loopback, stranger: Node, honest: Node, tmp_path: Path) -> None:
    files = keys.issue(deployment.authority, tmp_path, names=("elsewhere.example", "10.1.2.3"))
    port = gate_with(deployment, "elsewhere", files)
    refused(start(swap(stranger.command, superlink=f"127.0.0.1:{port}")), "wrong name")


@CASE
def test_8_one_key_twice(deployment: Loopback, stranger: Node, honest: Node) -> None:
    twin = swap(stranger.command, auth_supernode_private_key=str(honest.key))
    refused(start(twin), "another node is online with it")


@CASE
def test_9_a_replayed_header(deployment: Loopback, honest: Node) -> None:
    """A header seen on the wire is good for 305 s (Flower's tolerance), for this node alone, and then no more."""
    assert _replayed(deployment, honest, age_s=0.0) == httpx.codes.OK
    assert _replayed(deployment, honest, age_s=290.0) == httpx.codes.OK  # the window that only TLS closes
    assert _replayed(deployment, honest, age_s=306.0) == httpx.codes.UNAUTHORIZED
    assert _replayed(deployment, honest, age_s=-10.0) == httpx.codes.UNAUTHORIZED
    assert _replayed(deployment, honest, age_s=0.0, node=honest.identity + 1) == httpx.codes.UNAUTHORIZED
    assert '"POST /v1/fleet/send-node-heartbeat HTTP/1.1" 401' in link_log(deployment)


@CASE
def test_10_a_bundle_that_nobody_signed(deployment: Loopback, honest: Node, tmp_path: Path) -> None:
    """The node answers that the bundle is invalid (code 7) and runs nothing; signed, the same bundle runs."""
    unsigned, signed = _app(tmp_path / "unsigned", "0.1.0"), _app(tmp_path / "signed", "0.2.0")
    foreign = tmp_path / "foreign"
    keys.make_signing_key(foreign)
    fab_hash = bundle.digest(bundle.build(unsigned))

    assert "error code 7" in _asked(deployment, unsigned, honest)
    bundle.attach(deployment.database, bundle.sign(fab_hash, foreign))  # signed, but not by a key of this site
    assert "error code 7" in _asked(deployment, unsigned, honest)
    deployment.sign(signed)
    assert _asked(deployment, signed, honest) == ""

    said = (deployment.logs / "honest-supernode.log").read_text(encoding="utf-8")
    assert "App verification is not supported by the connected SuperLink" in said
    assert "FAB verification failed" in said


@CASE
def test_11_a_task_process_without_the_secret(deployment: Loopback, honest: Node, tmp_path: Path) -> None:
    other = keys.make_secret(tmp_path / "other.secret")
    words = swap(deployment.link_executor(), superexec_auth_secret_file=str(other))
    refused(start(words), "another SuperExec secret")
    assert runtime(deployment, "acquire-task", {}) == httpx.codes.UNAUTHORIZED
    for path in ("pull-task-input", "pull-messages", "push-messages", "push-task-output"):
        assert runtime(deployment, path, {}) == httpx.codes.UNAUTHORIZED
        assert runtime(deployment, path, {TASK_TOKEN_HEADER: "0" * 64}) == httpx.codes.UNAUTHORIZED
    assert '"POST /v1/runtime/acquire-task HTTP/1.1" 401' in link_log(deployment)


@CASE
def test_12_an_insecure_setting_in_production(deployment: Loopback, honest: Node) -> None:
    refused(start([*deployment.link_command(), "--insecure"]), "--insecure: messages would travel in plain text")
    refused(start(swap(deployment.link_command(), host="0.0.0.0")), "publish through the gate")  # noqa: S104 - refused


@pytest.mark.parametrize(
    "path",
    ["/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/register-node", "/docs"],
)
def test_the_gate_publishes_nothing_else(deployment: Loopback, honest: Node, path: str) -> None:
    """Straight at the SuperLink each of these is answered otherwise, so the gate is what stands between."""
    through = _post(deployment.gate_port, deployment, path, b"", {})
    assert through.status_code == httpx.codes.NOT_FOUND
    assert through.text == "not published by this gate\n"
    assert _post(deployment.link_port, deployment, path, b"", {}).status_code != httpx.codes.NOT_FOUND


def test_the_gate_takes_no_giant(deployment: Loopback, honest: Node) -> None:
    reply = _post(deployment.gate_port, deployment, "/v1/fleet/push-object", b"0" * (16 * 2**20 + 1), {})
    assert reply.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE


def runtime(deployment: Loopback, path: str, headers: dict[str, str]) -> int:
    """Call the task processes' side of the SuperLink, on loopback, and return the status."""
    return _post(deployment.link_port, deployment, f"/v1/runtime/{path}", b"", headers).status_code


def _post(port: int, deployment: Loopback, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    trust = ssl.create_default_context(cafile=str(deployment.authority.certificate))
    headers = {"content-type": "application/protobuf", "accept": "application/protobuf", **headers}
    return httpx.post(f"https://127.0.0.1:{port}{path}", content=body, headers=headers, verify=trust, timeout=30)


def _replayed(deployment: Loopback, honest: Node, *, age_s: float, node: int = 0) -> int:
    """Send a heartbeat as a node whose header was signed `age_s` ago, and return the answer's status."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.node_pb2 import Node as ProtoNode
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

    key = load_ssh_private_key(honest.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    stamp = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age_s)).isoformat()
    headers = {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public_key_to_bytes(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, stamp.encode())).decode(),
        TIMESTAMP_HEADER: stamp,
    }
    beat = SendNodeHeartbeatRequest(node=ProtoNode(node_id=node or honest.identity), heartbeat_interval=30)
    return _post(
        deployment.gate_port, deployment, "/v1/fleet/send-node-heartbeat", beat.SerializeToString(), headers
    ).status_code


def _app(folder: Path, version: str) -> Path:
    for name, text in PROBE.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(version=version) if name == "pyproject.toml" else text, encoding="utf-8")
    return folder


def _asked(deployment: Loopback, app: Path, node: Node) -> str:
    """Run the probe and return what failed, or nothing."""
    run_id = deployment.operator.submit(app, {"node": str(node.identity)})
    try:
        deployment.operator.wait(run_id, timeout_s=120, hint=lambda: True)
    except RoundFailed as error:
        found = re.search(r"error code \d+", f"{error} {deployment.operator.log(run_id)}")
        return found.group() if found else str(error)
    return ""
