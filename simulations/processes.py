"""Processes that we start and end by their id: their environment, a port that is free, an end that leaves nobody.

Whatever starts Flower's programs on this machine (simulated runs, the deployment smoke) starts them from here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of every process we start: no telemetry, no update check, no `uv sync` of gigabytes per run, one torch thread."""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process of Flower whose FLWR_HOME is `home`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path, **more}


def start(command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own (Ctrl-C is ours to pass on); what it says goes to `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [tool(command[0]), *command[1:]], cwd=cwd, env=env, stdout=sink, stderr=sink, start_new_session=True
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours and all it started: first politely, then for good."""
    ours = [process.pid, *_descendants(process.pid)]
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pid in ours[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def tool(name: str) -> str:
    """Return a program of this virtual environment, or the name as it is."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Say whether somebody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _descendants(pid: int) -> list[int]:
    return list(_walk(pid, _children()))


def _walk(pid: int, children: Mapping[int, list[int]]) -> Iterator[int]:
    for child in children.get(pid, []):
        yield child
        yield from _walk(child, children)


def _children() -> dict[int, list[int]]:
    """Return the children of every process, from /proc (Linux) or nothing elsewhere."""
    found: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue
        found.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    return found
