"""A simulated run through Flower's own door: a private SuperLink, `flwr run`, Ray actors; everything ended by its id.

`flwr run` by itself leaves a SuperLink running for ever, whose working directory shadows the bundle of every later
run, and it exits 0 when the run failed (specs `flower.md` 2). So a run gets a SuperLink of its own, started in an
empty directory on a free port, and the run's own journal and summary say how it ended.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.errors import RoundFailed
from fl_app.origin import ROOT
from simulations import processes

if TYPE_CHECKING:
    from collections.abc import Mapping

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
            processes.end(link.process)
            shutil.rmtree(home, ignore_errors=True)

    def _start(self, home: Path, log: Path) -> _Link:
        """Start a SuperLink of our own in an empty directory and wait until it listens."""
        port = processes.free_port()
        empty = home / "cwd"
        empty.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
        process = processes.start(command, log=log, cwd=empty, env=processes.environment(home))
        deadline = time.monotonic() + _START_S
        while not processes.listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                processes.end(process)
                raise RoundFailed(f"Flower's SuperLink did not start; see {log}")
            time.sleep(0.2)
        return _Link(home=home, process=process)

    def _submit(self, link: _Link, log: Path) -> str:
        """Hand the bundle to the SuperLink and return the run's id."""
        config = link.home / "run.toml"
        lines = [f"{key} = {_quoted(value)}" for key, value in self._run_config.items()]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [processes.tool("flwr"), "run", str(ROOT), "own", "--federation-config", self._federation]
        command += ["--run-config", str(config)]
        done = subprocess.run(
            command,
            cwd=link.home / "cwd",
            env=processes.environment(link.home),
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
            [processes.tool("flwr"), *words],
            cwd=link.home / "cwd",
            env=processes.environment(link.home),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout + done.stderr


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
