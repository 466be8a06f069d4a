"""Runs on a real SuperLink: what a production run may say, how it is started, and how it really ended.

`flwr run` exits 0 when the run failed (specs `flower.md` 2), so the end is read from `flwr ls`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.config import read_client
from fl_app.config import read_tree, shared
from fl_app.errors import DeploymentUnsafe, RoundFailed
from fl_app.journal import STAMP
from simulations import processes
from strategies.config import read_server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMPLETED = "finished:completed"
ASK_S, _POLL_S = 15.0, 0.5


def check_run(config: Path, overrides: str = "") -> None:
    """Raise unless a run's configuration is one for production: whole, and without seeded noise.

    Raises: ConfigInvalid for what cannot be read; DeploymentUnsafe for what must not run on real rows.
    """
    tree = read_tree(str(config.resolve()), overrides)
    if shared(tree).run.mode != "production":
        raise DeploymentUnsafe(
            f"{config}: run.mode is {shared(tree).run.mode!r}: its noise can be computed by whoever reads the seed; "
            "say 'production'"
        )
    server = read_server(tree)
    places = {"lora.start": shared(tree).lora.start, "server.professional.adapter": server.professional.adapter}
    for setting, place in places.items():
        card = Path(place) / "README.md"
        if place and card.is_file() and STAMP in card.read_text(encoding="utf-8"):
            raise DeploymentUnsafe(f"{config}: {setting}: {place} was made by a simulation; its noise protects nobody")
    if not read_client(tree).learner.build(1).private:
        raise DeploymentUnsafe(f"{config}: client.learner trains without noise; choose a private learner")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Whoever starts runs: a connection of `home`/config.toml, and Flower's command line in an empty directory."""

    connection: str
    home: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def flwr(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run Flower's command line to its end."""
        env = {**processes.environment(self.home.expanduser()), **self.environment}
        env.pop("PYTHONPATH", None)  # else our checkout would shadow the bundle
        with tempfile.TemporaryDirectory(prefix="stillroom-flwr-") as empty:
            return subprocess.run(
                [processes.tool("flwr"), *words],
                cwd=empty,
                env=env,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
            )

    def register(self, public_key: Path) -> int:
        """Register a node's public key and return the node's id. Raises: RoundFailed."""
        done = self.flwr("supernode", "register", str(public_key), self.connection)
        found = re.search(r"(\d{6,})", done.stdout)
        if done.returncode or not found:
            raise RoundFailed(f"{public_key} was not registered: {_tail(done)}")
        return int(found.group(1))

    def unregister(self, node: int) -> None:
        """Withdraw a node's registration; its next call is refused. Raises: RoundFailed."""
        done = self.flwr("supernode", "unregister", str(node), self.connection)
        if done.returncode:
            raise RoundFailed(f"node {node} was not unregistered: {_tail(done)}")

    def nodes(self) -> dict[int, str]:
        """Return the registered nodes and their states (`registered`, `online`, `offline`)."""
        done = self.flwr("supernode", "ls", self.connection, "--format", "json")
        found: Any = _read_json(done)
        return {int(node["node-id"]): str(node["status"]) for node in found.get("nodes", [])}

    def submit(self, root: Path, run_config: Mapping[str, str]) -> int:
        """Send the bundle of `root` and return the run's id. Raises: RoundFailed."""
        with tempfile.TemporaryDirectory(prefix="stillroom-run-") as folder:
            file = Path(folder) / "run.toml"
            lines = (f"{key} = {json.dumps(value)}\n" for key, value in run_config.items())
            file.write_text("".join(lines), encoding="utf-8")
            given = ["--run-config", str(file)] if run_config else []
            done = self.flwr("run", str(root), self.connection, *given, "--format", "json")
        found: Any = _read_json(done)
        if done.returncode or not found.get("success"):
            raise RoundFailed(f"flwr run refused the bundle: {_tail(done)}")
        return int(found["run-id"])

    def status(self, run_id: int) -> str:
        """Return Flower's word for where a run stands (`running`, `finished:failed`, ...), or "" when it says none."""
        done = self.flwr("ls", self.connection, "--run-id", str(run_id), "--format", "json")
        found: Any = _read_json(done)
        runs = found.get("runs", [])
        return str(runs[0]["status"]) if runs else ""

    def wait(self, run_id: int, *, timeout_s: float, hint: Callable[[], bool] = lambda: False) -> None:
        """Wait for the end of a run; `hint` is a cheap sign that it is near.

        Flower's command line costs seconds of a core, so it is asked every `ASK_S`, and at once when the hint is true.

        Raises: RoundFailed unless the run completed, with the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not (status := self.status(run_id)).startswith("finished"):
            if time.monotonic() > deadline:
                raise RoundFailed(f"run {run_id} is {status!r} after {timeout_s:g} s; `flwr stop` ends it")
            asked = time.monotonic()
            while time.monotonic() - asked < ASK_S and not hint():
                time.sleep(_POLL_S)
            time.sleep(_POLL_S)
        if status != COMPLETED:
            raise RoundFailed(f"run {run_id} ended as {status}:\n{self.log(run_id)[-2000:]}")

    def log(self, run_id: int) -> str:
        """Return what the server's app has said in a run."""
        return self.flwr("log", str(run_id), self.connection, "--show").stdout


def _read_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the JSON object in a command's output, or nothing: the command may have failed before it."""
    start = done.stdout.find("{")
    try:
        found: Any = json.JSONDecoder().raw_decode(done.stdout[start:])[0] if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()[-600:]
