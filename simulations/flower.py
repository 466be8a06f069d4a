"""A simulated run through Flower's own door: a private SuperLink, `flwr run`, Ray actors; everything ended by its id.

`flwr run` by itself leaves a SuperLink running for ever, whose working directory shadows the bundle of every later
run, and it exits 0 when the run failed (specs `flower.md` 2). So a run gets a SuperLink of its own, started in an
empty directory on a free port, and the run's own journal and summary say how it ended.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.errors import RoundFailed
from fl_app.origin import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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

_START_S, _POLL_S = 60.0, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    home: Path
    process: subprocess.Popen[bytes]


class FlowerRun:
    """One run on Ray. `workers` actors of one core each; results do not depend on their number."""

    def __init__(self, run_config: Mapping[str, str], *, sites: int, workers: int) -> None:
        self._run_config = run_config
        self._federation = (
            f"num-supernodes={sites} client-resources-num-cpus=1 client-resources-num-gpus=0.0 "
            f"init-args-num-cpus={workers} verbose=false"
        )

    def play(self, directory: Path) -> None:
        """Run to the end; afterwards `directory` holds the summary.

        Raises: RoundFailed when Flower could not start or the run ended without a summary, naming the log.
        """
        directory.mkdir(parents=True, exist_ok=True)
        log = directory / "flower.log"
        home = Path(tempfile.mkdtemp(prefix="stillroom-flower-"))
        link = self._start(home, log)
        try:
            run_id = self._submit(link, log)
            self._wait(link, run_id, directory, log)
        finally:
            _end(link.process)
            shutil.rmtree(home, ignore_errors=True)

    def _start(self, home: Path, log: Path) -> _Link:
        """Start a SuperLink of our own in an empty directory and wait until it listens."""
        port = _free_port()
        empty = home / "cwd"
        empty.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [_tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)],
                cwd=empty,
                env=self._environment(home),
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                _end(process)
                raise RoundFailed(f"Flower's SuperLink did not start; see {log}")
            time.sleep(0.2)
        return _Link(home=home, process=process)

    def _submit(self, link: _Link, log: Path) -> str:
        """Hand the bundle to the SuperLink and return the run's id."""
        config = link.home / "run.toml"
        lines = [f"{key} = {_quoted(value)}" for key, value in self._run_config.items()]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [_tool("flwr"), "run", str(ROOT), "own", "--federation-config", self._federation]
        command += ["--run-config", str(config)]
        done = subprocess.run(
            command,
            cwd=link.home / "cwd",
            env=self._environment(link.home),
            capture_output=True,
            text=True,
            check=False,
        )
        with log.open("a", encoding="utf-8") as sink:
            sink.write(done.stdout + done.stderr)
        found = re.search(r"run (?:ID:? )?(\d{6,})", done.stdout + done.stderr, re.IGNORECASE)
        if done.returncode or not found:
            raise RoundFailed(f"flwr run refused the bundle (exit {done.returncode}); see {log}")
        return found.group(1)

    def _wait(self, link: _Link, run_id: str, directory: Path, log: Path) -> None:
        """Wait for the summary; ask Flower now and then whether the run is still alive."""
        asked = time.monotonic()
        while not (directory / "summary.json").is_file():
            if link.process.poll() is not None:
                raise RoundFailed(f"Flower's SuperLink ended (exit {link.process.returncode}); see {log}")
            if time.monotonic() - asked > 15 * _POLL_S:
                asked = time.monotonic()
                if self._finished(link, run_id) and not (directory / "summary.json").is_file():
                    self._keep_log(link, run_id, log)
                    raise RoundFailed(f"the run ended without a summary; the reason is at the end of {log}")
            time.sleep(_POLL_S)
        self._keep_log(link, run_id, log)

    def _finished(self, link: _Link, run_id: str) -> bool:
        listed = self._flwr(link, "ls", "own", "--run-id", run_id, "--format", "json")
        return re.search(r'"status":\s*"finished', listed) is not None

    def _keep_log(self, link: _Link, run_id: str, log: Path) -> None:
        with log.open("a", encoding="utf-8") as sink:
            sink.write(self._flwr(link, "log", run_id, "own", "--show"))

    def _flwr(self, link: _Link, *words: str) -> str:
        done = subprocess.run(
            [_tool("flwr"), *words],
            cwd=link.home / "cwd",
            env=self._environment(link.home),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout + done.stderr

    def _environment(self, home: Path) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}


def _end(process: subprocess.Popen[bytes]) -> None:
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


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
