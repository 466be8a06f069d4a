"""Start one of Flower's programs, guarded; say in plain words why it ended.

The program stays a child: signals are passed on, its output is passed through, and its exit code is ours. What Flower
says by number (`[code: 2004]`) or not at all is said again in words, on the last line.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.errors import DeploymentUnsafe
from simulations import processes
from simulations.deployment import guard, preflight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from simulations.deployment.guard import Command

_KEY = "key never registered or withdrawn, clock off, or another SuperExec secret"
SAID: Mapping[str, str] = {
    r"code: 2004|Failed to activate SuperNode": (
        "the server does not take this key: it was never registered, or was withdrawn, or another node is online "
        "with it (after a crash the same node has to wait 60 s); the operator sees it in `flwr supernode ls`"
    ),
    r"401 Unauthorized|Invalid SuperNode authentication": f"the server does not accept our authentication: {_KEY}",
    r"certificate verify failed|SSL/TLS handshake error": "the server's certificate was not accepted",
    r"Heartbeat failed unexpectedly": "the server does not know this node any more; the operator registers it again",
    # what Flower says when it ends itself because a call was answered 401; it then exits with 0
    r"terminated gracefully": f"the server does not accept our authentication any more: {_KEY}",
}
"""What a program says before it ends unasked -> what it means."""

UNASKED = 3
"""The exit code of a program that ended with 0 although nobody had asked it to."""

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def prepare(words: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Return the command after every check that needs no running server of ours.

    Raises: DeploymentUnsafe, naming the setting, file or check that failed.
    """
    values = guard.read_command(words).values
    if "--insecure" in values and "--superlink" in values:
        preflight.check_plain(preflight.read_address(values["--superlink"]))
    command = guard.refuse_unsafe(words, environment)
    if command.program == "flower-superlink":
        preflight.check_certificate(Path(values["--ssl-certfile"]), Path(values["--ssl-keyfile"]))
    if command.program == "flower-supernode":
        site = rows_of(values["--node-config"])
        if os.access(site / "site.toml", os.R_OK):  # else another user's, whose own unit checks it
            preflight.check_site(site)
        if not Path(values["--trusted-entities"]).is_file():
            raise DeploymentUnsafe(f"--trusted-entities: no file at {values['--trusted-entities']}")
        preflight.check_server(preflight.read_address(values["--superlink"]), Path(values["--root-certificates"]))
    return command


def rows_of(node_config: str) -> Path:
    """Return the site directory that a node's configuration names. Raises: DeploymentUnsafe."""
    found = re.search(r"""(?:^|\s)rows=(["'])(.+?)\1""", node_config)
    if not found or not Path(found.group(2)).is_absolute():
        raise DeploymentUnsafe(f'--node-config {node_config!r}: write rows="/absolute/path"')
    return Path(found.group(2))


def run(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start a program that `prepare` has passed, and return its exit code when it ends. Output is passed through.

    Guarantee: 0 only when it was asked to end. A SuperNode whose key is withdrawn says that it "terminated gracefully"
    and exits with 0 (flwr 1.41), which no supervisor would restart and no operator notice.
    """
    command = [processes.tool(words[0]), *words[1:]]
    given = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # the bundle, not our checkout
    asked: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for child in started:
            child.send_signal(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    meaning = ""
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        started.append(child)
        if asked:  # between the first line of this function and here
            child.terminate()
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            meaning = explain(line.decode("utf-8", "replace")) or meaning
        code = child.wait()
    if asked:
        return 0 if code >= 0 else 128 - code
    sys.stderr.write(f"stillroom: {words[0]} ended by itself (exit {code}): {meaning or 'see above'}\n")
    return (code or UNASKED) if code >= 0 else 128 - code


def explain(line: str) -> str:
    """Return what a line of a program's output means, if it is one of those that need explaining."""
    return next((meaning for said, meaning in SAID.items() if re.search(said, line)), "")
