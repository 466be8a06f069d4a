"""`make deploy-smoke`: the same run in process and through a real deployment on loopback, compared hash by hash.

Three sites, two rounds, the tiny random model, seeded noise. What is proved: the two apps travel as a signed bundle,
train behind TLS and node keys, end as completed, leave a ledger with one committed entry per round at each site, and
give bit for bit the artefacts of the run in process. The last line of the output is one JSON object with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_app.errors import RoundFailed, StillroomError
from fl_app.journal import read_lines
from fl_app.origin import ROOT
from simulations import launch
from simulations.deployment.loopback import Loopback

if TYPE_CHECKING:
    from types import FrameType

    from simulations.launch import Prepared

CONFIG = "configs/smoke.toml"
SITES, ROUNDS = 3, 2
OVERRIDES = (
    "server.network.reply_timeout_s=120.0",  # how long a round waits for a node that was lost to come back
    f'simulation.partition={{kind="iid", sites={SITES}}}',
    f"run.rounds={ROUNDS}",
    "simulation.max_rows_per_site=30",
    "simulation.policy.epsilon=2.0",
    "simulation.policy.min_noise_multiplier=0.8",
    "simulation.policy.max_noise_multiplier=5.0",
    "client.learner.steps=1",
    "server.synthesizer.drafts=6",
    "server.synthesizer.max_new_tokens=12",
    "server.filters=[]",
    "server.distiller.max_new_tokens=8",
    "server.exam.choice_items=3",
    "server.exam.free_items=2",
    "server.exam.max_new_tokens=2",
)
"""Small enough for two busy cores; a wave through SuperNodes costs more than what is computed in it."""

RUN_S = 420.0
WAVES = ("train", "broadcast")


class Stopwatch:
    """Seconds by phase, each from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap and say so on stderr."""
        now = time.monotonic()
        self.seconds[phase] = round(now - self._last, 2)
        self._last = now
        sys.stderr.write(f"{phase}: {self.seconds[phase]:.1f} s\n")


def smoke(folder: Path, *, record: bool = False) -> dict[str, Any]:
    """Play both runs below `folder` and return the figures.

    Raises: RoundFailed when the deployed run fails, or differs from the run in process.
    """
    watch = Stopwatch()
    reference, deployed = prepare(folder, "in-process"), prepare(folder, "deployed")
    watch.lap("prepare")
    expected = launch.play(reference)
    watch.lap("in_process")
    with Loopback(folder / "deployment") as deployment:
        deployment.start()
        watch.lap("superlink")
        for site in deployed.federation.sites:
            deployment.add_node(site.directory.name, site.directory)
        deployment.await_nodes()
        watch.lap("nodes")
        fab_hash = deployment.sign(ROOT)
        run_id = deployment.operator.submit(ROOT, run_config(deployed))
        watch.lap("submit")
        done = deployed.directory / "summary.json"
        deployment.operator.wait(run_id, timeout_s=RUN_S, hint=done.is_file)
        watch.lap("run")
        found = launch.read_summary(deployed.directory)
        ledgers = check_ledgers(deployed)
        check_same(expected, found)
    watch.lap("end")
    figures = _figures(deployed, found, watch.seconds, ledgers, fab_hash)
    return _record(figures) if record else figures


def prepare(folder: Path, name: str) -> Prepared:
    """Write the sites and paths of one of the two runs below `folder`."""
    overrides = (*OVERRIDES, f'run.directory="{folder / "runs" / name}"')
    return launch.prepare(CONFIG, "\n".join(overrides), run=name, sites=folder / "sites" / name)


def run_config(prepared: Prepared) -> dict[str, str]:
    """Return what `flwr run` is given: the configuration is the bundle's own, not this checkout's."""
    return {**prepared.run_config, "config": CONFIG, "sites": ""}


def check_ledgers(prepared: Prepared) -> dict[str, int]:
    """Return the committed entries of each site's ledger. Raises: RoundFailed unless there is one for each round."""
    found: dict[str, int] = {}
    for site in prepared.federation.sites:
        lines = read_lines(site.directory / "ledger" / "ledger.jsonl")
        kinds = Counter(str(line.get("kind")) for line in lines)
        found[site.directory.name] = kinds["commit"]
        if kinds["commit"] != ROUNDS or kinds["reserve"] != ROUNDS:
            raise RoundFailed(f"ledger of {site.directory}: {dict(kinds)}; one reservation and commit a round expected")
    return found


def check_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise `RoundFailed` unless two runs agree in every artefact's hash, exam score and epsilon."""
    for part in ("hashes", "exam", "epsilon", "lessons", "config_digest"):
        if expected[part] != found[part]:
            keys = [k for k in expected[part] if expected[part][k] != found[part].get(k)] if part == "hashes" else []
            raise RoundFailed(f"the deployed run differs from the run in process in {part} {keys}")


def _figures(
    deployed: Prepared, found: dict[str, Any], seconds: dict[str, float], ledgers: dict[str, int], fab_hash: str
) -> dict[str, Any]:
    events = read_lines(deployed.directory / "journal.jsonl")
    waves = [event for event in events if event["event"] == "phase_finished" and event["phase"] in WAVES]
    return {
        "kind": "deploy_smoke",
        "sites": len(ledgers),
        "rounds": len(found["rounds"]),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "waves": [{"phase": event["phase"], "seconds": event["seconds"]} for event in waves],
        "bytes": found["bytes"],
        "ledger_committed": ledgers,
        "hashes": found["hashes"],
        "same_as_in_process": True,
        "fab_sha256": fab_hash,
        "status": "completed",
        "load_average": round(os.getloadavg()[0], 1),
    }


def _record(figures: dict[str, Any]) -> dict[str, Any]:
    """Append the figures to the benchmarks' results, with the commit."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import record  # pyright: ignore[reportMissingImports] - benchmarks are scripts, not a package

    return record.append(figures)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0 when the deployed run completed and equals the run in process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.jsonl")
    parser.add_argument("--keep", type=Path, help="work in this new directory and leave it")
    asked = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    folder = (asked.keep or Path(tempfile.mkdtemp(prefix="stillroom-deploy-"))).resolve()
    try:
        figures = smoke(folder, record=asked.record)
    except StillroomError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps(figures, sort_keys=True) + "\n")
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
