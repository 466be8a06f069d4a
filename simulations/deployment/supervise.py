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

    from simulations.deployment.guard import Command

SAID: Mapping[str, str] = {
    r"code: 2004|Failed to activate SuperNode": (
        "the server does not take this key: it was never registered, or was unregistered, or another node is online "
        "with it (after a crash the same node has to wait 60 s); the operator sees it in `flwr supernode ls`"
    ),
    r"401 Unauthorized|Invalid SuperNode authentication|SuperExec auth": (
        "the server does not accept our authentication: key unregistered, clock off, or another SuperExec secret"
    ),
    r"certificate verify failed|SSL/TLS handshake error": "the server's certificate was not accepted",
    r"Heartbeat failed unexpectedly": "the server does not know this node any more; the operator registers it again",
}
"""What a program says before it ends -> what it means."""

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def prepare(words: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Return the command after every check that needs no running server of ours.

    Raises: DeploymentUnsafe, naming the setting, file or check that failed.
    """
    command = guard.refuse_unsafe(words, environment)
    values = command.values
    if command.program == "flower-superlink":
        preflight.check_certificate(Path(values["--ssl-certfile"]), Path(values["--ssl-keyfile"]))
    if command.program == "flower-supernode":
        preflight.check_site(rows_of(values["--node-config"]))
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


def run(words: Sequence[str]) -> int:
    """Start a program that `prepare` has passed, and return its exit code when it ends. Output is passed through."""
    environment = {**os.environ, **processes.ENVIRONMENT}
    command = [processes.tool(words[0]), *words[1:]]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        for number in _PASSED_ON:
            signal.signal(number, lambda caught, _frame: child.send_signal(caught))
        assert child.stdout is not None
        meaning = ""
        for line in child.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            meaning = explain(line.decode("utf-8", "replace")) or meaning
        code = child.wait()
    if code and meaning:
        sys.stderr.write(f"stillroom: {meaning}\n")
    return code if code >= 0 else 128 - code


def explain(line: str) -> str:
    """Return what a line of a program's output means, if it is one of those that need explaining."""
    return next((meaning for said, meaning in SAID.items() if re.search(said, line)), "")
