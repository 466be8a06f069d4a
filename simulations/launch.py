"""One command, one simulated run: corpus -> sites -> rounds -> report.

    python -m simulations.launch --config configs/demo.toml
    python -m simulations.launch --resume runs/<id>            a run that was stopped, from where it stood

Brings the sites into being (or finds those of an earlier run), starts the apps in process or through `flwr run` on
Ray, shows what happens from the run's journal, writes the report, and exits non-zero when the run failed. The last
line of its output is the path of the run directory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from clients.config import read_client
from fl_app import journal, models
from fl_app.config import Tree, read_tree, shared
from fl_app.errors import ConfigInvalid, RoundFailed, RunInvalid, StillroomError
from fl_app.origin import ROOT
from simulations.config import EMBEDDED, SimulationSection, read_simulation
from simulations.corpora import read_corpus
from simulations.corpus.write import write_corpus
from simulations.federate import federate
from simulations.flower import FlowerRun
from simulations.progress import final_table, follow
from simulations.report.page import build_report
from strategies.config import read_server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from simulations.corpora import CorpusRow
    from simulations.federate import Federation
    from simulations.local_grid import Fault

BUILD = ROOT / "build"
RUNS = ROOT / "runs"
LAUNCH = "launch.json"
"""In the run directory: how the run was started, for whoever resumes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that is ready to start: its name, its directory, its sites, and what Flower's run-config says."""

    run: str
    directory: Path
    federation: Federation
    simulation: SimulationSection
    run_config: Mapping[str, str]


def prepare(
    config: str, overrides: str = "", *, run: str = "", sites: Path | None = None, again: bool = False
) -> Prepared:
    """Write corpus and sites, fix every path, and return what a grid needs.

    `run` names the run (default: the configuration's name and the time); `sites` is where the site directories are,
    or shall be (default: beside the run). `again`: the run directory may hold a run, which then goes on.

    Raises: ConfigInvalid, RowsInvalid, ModelMissing, each before anything is trained.
    """
    config_path = Path(config) if Path(config).is_absolute() else ROOT / config
    tree = read_tree(str(config_path), overrides)
    simulation = read_simulation(tree)
    _check_apps(tree)
    seed = shared(tree).run.seed
    if shared(tree).run.mode != "simulation":
        raise ConfigInvalid("run.mode is not 'simulation': real sites are started by their SuperNodes, not from here")
    name = run or f"{config_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(tree["run"].get("directory") or RUNS / name).resolve()
    if (directory / "journal.jsonl").exists() and not again:
        raise ConfigInvalid(
            f"{directory} holds a run already; choose another name with --run, or go on with --resume {directory}"
        )
    places = _corpus(simulation)
    home = (sites or BUILD / "sites" / name).resolve()
    rows = read_corpus(
        places["private"],
        join_input=simulation.join_input,
        code_column="code" if simulation.corpus == EMBEDDED else simulation.code_column or None,
    )
    codes = _codes(simulation, rows, places, home)
    federation = federate(
        rows,
        out=home,
        partition=simulation.partition,
        policy=simulation.policy,
        seed=seed,
        overrides=simulation.policy_overrides,
        plant_share=simulation.plant_share,
        max_rows_per_site=simulation.max_rows_per_site or None,
    )
    for site in federation.sites:
        shutil.copyfile(codes, site.directory / "codes.jsonl")
    fixed = _paths(tree, places, codes, directory, len(federation.sites))
    everything = "\n".join([overrides, *(f"{key}={_toml(value)}" for key, value in fixed.items())])
    run_config = {"config": str(config_path), "overrides": everything, "sites": str(home), "run": name}
    journal.write_json(
        directory / LAUNCH, {"config": str(config_path), "overrides": overrides, "run": name, "sites": str(home)}
    )
    return Prepared(run=name, directory=directory, federation=federation, simulation=simulation, run_config=run_config)


def resume(directory: Path) -> Prepared:
    """Return a run that was stopped, ready to go on from where it stood: same sites, same configuration, same name.

    Raises: RunInvalid when the directory holds no run of this launcher, or one that is complete.
    """
    try:
        told: dict[str, str] = json.loads((directory / LAUNCH).read_text(encoding="utf-8"))
        config, overrides, run, sites = told["config"], told["overrides"], told["run"], Path(told["sites"])
    except FileNotFoundError:
        raise RunInvalid(
            f"{directory} holds no {LAUNCH}, so no run was started there from here; give runs/<id>"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunInvalid(f"{directory / LAUNCH} cannot be read ({type(error).__name__}: {error})") from None
    summary = directory / "summary.json"
    if summary.is_file() and json.loads(summary.read_text(encoding="utf-8"))["status"] == "completed":
        raise RunInvalid(f"the run in {directory} is complete; nothing is left to do")
    if not sites.is_dir():
        raise RunInvalid(f"the sites of this run are gone: {sites}; restore them, since their ledgers hold its budget")
    prepared = prepare(config, overrides, run=run, sites=sites, again=True)
    summary.unlink(missing_ok=True)  # of the attempt that failed: whoever waits for the run waits for this file
    return prepared


def play(prepared: Prepared, *, faults: Mapping[int, Fault] | None = None) -> dict[str, Any]:
    """Run a prepared simulation to its end and return its summary.

    Raises: RoundFailed, or any StillroomError of the server, when the run failed.
    """
    if prepared.simulation.grid == "ray":
        flower = FlowerRun(
            prepared.run_config, sites=len(prepared.federation.sites), workers=prepared.simulation.workers
        )
        flower.play(prepared.directory)
    else:
        from flwr.app import Context, RecordDict

        from fl_app import client_app, server_app
        from simulations.local_grid import LocalGrid

        sites = len(prepared.federation.sites)
        grid = LocalGrid(client_app.app, nodes=sites, run_config=prepared.run_config, faults=faults)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(prepared.run_config))
        server_app.app(grid, context)
    return read_summary(prepared.directory)


def read_summary(directory: Path) -> dict[str, Any]:
    """Return `summary.json` of a finished run. Raises: RoundFailed when there is none or it says failed."""
    path = directory / "summary.json"
    if not path.is_file():
        raise RoundFailed(f"the run left no summary in {directory}; see journal.jsonl there")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if summary["status"] != "completed":
        raise RoundFailed(summary["error"] or f"the run in {directory} did not complete")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--config", help="TOML file, from the project's root")
    how.add_argument("--resume", type=Path, metavar="RUN", help="directory of a run that was stopped")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run", default="", help="name of the run")
    parser.add_argument("--sites", type=Path, help="directory of the sites; an existing one keeps its ledgers")
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        if arguments.resume:
            prepared = resume(arguments.resume.resolve())
        else:
            overrides = "\n".join(arguments.override)
            prepared = prepare(arguments.config, overrides, run=arguments.run, sites=arguments.sites)
    except StillroomError as error:
        _say(console, error)
        return 2
    failure = _watched(prepared, console)
    if (prepared.directory / "summary.json").is_file():
        build_report(prepared.directory)
    if failure is not None:
        _say(console, failure)
    else:
        console.print(final_table(read_summary(prepared.directory)))
        console.print(f"report: {prepared.directory / 'report.html'}")
    Console().print(str(prepared.directory), soft_wrap=True, highlight=False)
    return 0 if failure is None else 1


def _say(console: Console, error: StillroomError) -> None:
    """Print one line; a message may name [tables], which are no markup."""
    console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def _watched(prepared: Prepared, console: Console) -> StillroomError | None:
    """Play the run on a thread while this one shows its journal; return what failed, if anything."""
    failures: list[StillroomError] = []

    def work() -> None:
        try:
            play(prepared)
        except StillroomError as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="run")
    thread.start()
    follow(prepared.directory, done=lambda: not thread.is_alive(), console=console)
    thread.join()
    return failures[0] if failures else None


def _check_apps(tree: Tree) -> None:
    """Read both apps' tables and find their models, as the apps will: a typo costs no corpus, site or SuperLink."""
    read_client(tree)
    server = read_server(tree)
    for name in {shared(tree).model.name, server.professional.model or shared(tree).model.name}:
        models.resolve(name)


def _corpus(simulation: SimulationSection) -> dict[str, str]:
    """Return the files of the corpus: the embedded one, written now, or the one that was named."""
    if simulation.corpus != EMBEDDED:
        path = Path(simulation.corpus)
        return {"private": str(path if path.is_absolute() or not (ROOT / path).exists() else ROOT / path)}
    folder = BUILD / "corpus"
    write_corpus(folder)
    return {name: str(folder / f"{name}.jsonl") for name in ("private", "public", "exam", "codes")}


def _codes(simulation: SimulationSection, rows: Sequence[CorpusRow], places: Mapping[str, str], home: Path) -> Path:
    """Return the file of public control codes: the corpus' own, or one per value of `code_column`."""
    if "codes" in places:
        return Path(places["codes"])
    if not simulation.code_column:
        raise ConfigInvalid("simulation.code_column is empty, and this corpus brings no control codes")
    values = sorted({row.code for row in rows})
    path = home.with_name(f"{home.name}-codes.jsonl")
    journal.write_lines(
        path, [{"id": value, "text": simulation.code_text.replace("{value}", value)} for value in values]
    )
    return path


def _paths(tree: Tree, places: Mapping[str, str], codes: Path, directory: Path, sites: int) -> dict[str, Any]:
    """Return the settings that only this machine knows, as overrides with absolute paths."""
    server = tree.get("server", {})
    fixed: dict[str, Any] = {
        "run.directory": str(directory),
        "server.network.sites": sites,
    }
    if server.get("synthesizer", {}).get("kind") != "no_drafts":
        fixed["server.synthesizer.codes"] = str(codes)
    start = tree.get("lora", {}).get("start", "")
    if start and not Path(start).is_absolute():
        fixed["lora.start"] = str((ROOT / start).resolve())
    for table, key in (("exam", "path"), ("professional", "adapter"), ("professional", "public_text")):
        value = server.get(table, {}).get(key, "")
        if not value and table == "exam" and "exam" in places:
            fixed["server.exam.path"] = places["exam"]
        elif not value and key == "public_text" and "public" in places:
            fixed["server.professional.public_text"] = places["public"]
        elif value and not Path(value).is_absolute():
            fixed[f"server.{table}.{key}"] = str((ROOT / value).resolve())
    return fixed


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main())
