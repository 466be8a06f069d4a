"""Are planted names found again in what a simulated run released? All models that left somewhere, and two that did not.

    make attack RUN=runs/<id>            needs simulation.plant_share, so that there are names whose home is known

    reference           the model before any private row: what a row gives away of its name by itself
    releases            each name in what its own site sent in the last round, where that was an adapter
    merged, target      the last aggregate, and what the run leaves
    without_privacy     the reference after plain fine-tuning on the very rows that hold the names: what the attack can
                        do; when it finds little here, it says nothing of the others

The figures go into `<run>/names.json`, with how many planted names, and how many names planted nowhere, stand in the
run's drafts and answers letter for letter. Only a simulation knows where a name stands: this reads all sites' rows.
Out of scope: the attacks themselves (`names`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from clients.config import read_client, read_policy
from clients.learners.plain_lora import PlainLora
from clients.private_rows import PrivateRow, PrivateRows, read_private_rows
from clients.stages import PublicConstants, Workbench
from clients.units import halves
from fl_app import journal, lora, lora_start, models, peft_files, releases
from fl_app.config import SharedConfig, shared
from fl_app.errors import RunInvalid, StillroomError
from fl_app.privacy.noise import SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import Adapter, AdapterRelease
from simulations.attacks import names
from simulations.attacks.names import Reader, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from clients.units import Learns

Hits: TypeAlias = dict[str, dict[int, bool]]
"""Attack -> place of a target -> whether its name was found."""

STAMP = "SIMULATION - NOT PRIVATE: reads planted names and the rows that hold them"
REFERENCE, RELEASES, MERGED, TARGET, TWIN = "reference", "releases", "merged", "target", "without_privacy"
TWIN_BATCHES = 4
"""The twin sees its rows in about this many batches an epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is attacked: names at most, candidates of each, and names that are also reconstructed, from `draws`.

    The twin learns `twin_epochs` times; with 0 there is none.
    """

    targets: int = 100
    candidates: int = 20
    reconstructed: int = 25
    draws: int = 32
    twin_epochs: int = 40
    twin_rate: float = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Held:
    """A target, the row that holds it, and the site that holds the row."""

    target: Target
    row: PrivateRow
    site: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Scene:
    """What the attack of a run knows. `beyond_cut` names stand where no learner read them, and are left out."""

    run: Path
    settings: SharedConfig
    learns: Learns
    max_tokens: int
    held: tuple[Held, ...]
    beyond_cut: int
    names: tuple[str, ...]
    controls: tuple[str, ...]
    bench: Workbench


def attack(run: Path, sizes: Sizes, *, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Attack the models of a run, write `names.json` into its directory, and return it.

    Raises: RunInvalid when the run is no complete simulation of this machine, or no name is planted in it;
    ConfigInvalid when more candidates are asked for than there are names.
    """
    scene = look(run, sizes.targets)
    seed = scene.settings.run.seed
    targets = [one.target for one in scene.held]
    among = names.lineups(targets, [*scene.names, *scene.controls], candidates=sizes.candidates, seed=seed)
    found: dict[str, Hits] = {}
    for name, views in _models(scene, sizes).items():
        say(f"attacking {name}")
        hits: Hits = {"inference": {}, "reconstruction": {}}
        for model, places in views:
            reader = Reader(model=model, tokenizer=scene.bench.model.tokenizer, max_tokens=scene.max_tokens)
            picked = names.infer(reader, [targets[n] for n in places], [among[n] for n in places], seed=seed)
            hits["inference"] |= dict(zip(places, picked, strict=True))
            few = [n for n in places if n < sizes.reconstructed]
            rebuilt = names.reconstruct(reader, [targets[n] for n in few], seed=seed, draws=sizes.draws)
            hits["reconstruction"] |= dict(zip(few, rebuilt, strict=True))
        found[name] = hits
    result: dict[str, Any] = {
        "stamp": STAMP,
        "seed": seed,
        "sizes": asdict(sizes),
        "targets": len(targets),
        "beyond_cut": scene.beyond_cut,
        "chance": 1 / sizes.candidates,
        "models": {name: _figures(hits, found[REFERENCE]) for name, hits in found.items()},
        "written": _written(scene),
    }
    journal.write_json(run / "names.json", result)
    return result


def look(run: Path, most: int) -> Scene:
    """Return at most so many targets of a run, drawn at random, and what an attack needs. Raises: RunInvalid."""
    home, planted = _home(run)
    tree = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    settings = shared(tree)
    learns: Learns = getattr(read_client(tree).learner, "learns", "instruction")
    homes = {one["text"]: one["site"] for one in planted["identities"] if one["kind"] == "name"}
    folders = sorted(place.parent for place in home.glob("*/site.toml"))
    bench = Workbench(
        model=models.load(settings.model.name, settings.model.dtype),
        codes={code: text for folder in folders for code, text in _codes(folder).items()},
        noise=SimulatedNoise(stream(settings.run.seed, "names", "noise")),
        system=settings.model.system,
    )
    cuts = {policy.site.name: policy.constants.max_tokens for policy in map(read_policy, folders)}
    readers = {site: Reader(model=None, tokenizer=bench.model.tokenizer, max_tokens=own) for site, own in cuts.items()}
    everyone = [one for folder in folders for one in _held(folder, homes, learns, bench)]
    seen = [one for one in everyone if readers[one.site].reads(one.target)]
    if not seen:
        raise RunInvalid(
            f"no planted name stands in what a site reads of a row, {max(cuts.values(), default=0)} tokens at most "
            f"({len(everyone)} stand behind them); raise simulation.policy.max_tokens or simulation.plant_share"
        )
    order = stream(settings.run.seed, "names", "targets").permutation(len(seen))[:most]
    return Scene(
        run=run,
        settings=settings,
        learns=learns,
        max_tokens=max(cuts.values()),
        held=tuple(seen[int(place)] for place in order),
        beyond_cut=len(everyone) - len(seen),
        names=tuple(homes),
        controls=tuple(planted["controls"]),
        bench=bench,
    )


def _codes(folder: Path) -> dict[str, str]:
    """Return a site's public control codes."""
    path = folder / "codes.jsonl"
    return {str(row["id"]): str(row["text"]) for row in journal.read_lines(path)} if path.is_file() else {}


def _held(folder: Path, homes: Mapping[str, str], learns: Learns, bench: Workbench) -> Iterator[Held]:
    """Yield the names that stand in the rows that a site's learner is given."""
    policy = read_policy(folder)
    site, privacy = policy.site.name, policy.privacy
    mine = [name for name, home in homes.items() if home == site]
    rows = read_private_rows(folder / "rows.jsonl", unit=privacy.unit, max_rows_per_unit=privacy.max_rows_per_unit)
    for row in rows.examples:
        prefix, text = halves(row, learns, bench)
        for name in mine:
            if name in prefix + text:
                yield Held(target=Target(prefix=prefix, text=text, name=name), row=row, site=site)


def _home(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return where a run's sites are, and what was planted there. Raises: RunInvalid."""
    try:
        launched = json.loads((run / "launch.json").read_text(encoding="utf-8"))
        status = json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"]
        home = Path(launched["sites"])
        planted = json.loads((home.parent / f"{home.name}-simulation" / "planted.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunInvalid(
            f"{error.filename} is not there; an attack needs a complete simulation of this machine, and its sites"
        ) from None
    if status != "completed":
        raise RunInvalid(f"the run in {run} is {status}; finish it with: make resume RUN={run}")
    if not any(one["kind"] == "name" for one in planted["identities"]):
        raise RunInvalid("no name is planted in this run; start one with simulation.plant_share above 0")
    return home, planted


def _models(scene: Scene, sizes: Sizes) -> dict[str, Iterator[tuple[Any, Sequence[int]]]]:
    """Return what is attacked: models one by one, each with the places of the targets that it is asked for."""
    everyone = range(len(scene.held))
    frozen = scene.bench.model
    last = max((int(one.name) for one in (scene.run / "rounds").iterdir()), default=0)
    folder = scene.run / "rounds" / str(last)
    blocks = [
        peft_files.load(place)
        for number in range(1, last)
        for place in sorted((scene.run / "rounds" / str(number) / "blocks").glob("*"))
    ]

    def one(adapter: Adapter, under: Sequence[Adapter] = ()) -> Iterator[tuple[Any, Sequence[int]]]:
        yield lora.attach(frozen, adapter, under), everyone

    def of_sites(sent: Mapping[str, Adapter]) -> Iterator[tuple[Any, Sequence[int]]]:
        for site, adapter in sent.items():
            yield lora.attach(frozen, adapter, blocks), [n for n in everyone if scene.held[n].site == site]

    start = _start(scene)
    found = {REFERENCE: one(start)}
    sent = {place.name: releases.load(place)[0] for place in sorted((folder / "releases").glob("*"))}
    adapters = {site: release.adapter for site, release in sent.items() if isinstance(release, AdapterRelease)}
    if adapters:
        found |= {RELEASES: of_sites(adapters), MERGED: one(peft_files.load(folder / "merged"), blocks)}
    found[TARGET] = one(peft_files.load(scene.run / "target"))
    if sizes.twin_epochs:
        found[TWIN] = _twin(scene, start, sizes, everyone)
    return found


def _start(scene: Scene) -> Adapter:
    """Return the adapter that the run began with, without cores; a fresh one changes nothing."""
    section, frozen = scene.settings.lora, scene.bench.model
    if section.start:
        return lora.plain(peft_files.load(Path(section.start), base=frozen.resolved.sha256))
    return lora_start.initial(lora.spec_of(frozen, section), stream(scene.settings.run.seed, "initial adapter"))


def _twin(scene: Scene, start: Adapter, sizes: Sizes, everyone: Sequence[int]) -> Iterator[tuple[Any, Sequence[int]]]:
    """Learn the targets' rows by heart, with the learner of sites that protect nobody, and yield that model."""
    count = len(scene.held)
    rows = PrivateRows(
        [PrivateRow(instruction=held.row.instruction, output=held.row.output, code=held.row.code, unit=str(number))
         for number, held in enumerate(scene.held)]
    )  # fmt: skip
    constants = PublicConstants(
        sample_rate=1 / TWIN_BATCHES,
        expected_batch=max(1, count // TWIN_BATCHES),
        max_tokens=scene.max_tokens,
        max_rows_per_unit=1,
        unit="record",
    )
    steps = TWIN_BATCHES * sizes.twin_epochs
    section = PlainLora(kind="plain_lora", steps=steps, learning_rate=sizes.twin_rate, learns=scene.learns)
    learner = section.build(1)
    release = learner(rows, start, learner.announce(constants, math.inf), constants, scene.bench)
    assert isinstance(release, AdapterRelease)
    yield lora.attach(scene.bench.model, release.adapter), everyone


def _figures(hits: Hits, reference: Hits) -> dict[str, Any]:
    """Return the shares of every attack: of all targets, and of those that the reference misses."""
    out: dict[str, Any] = {}
    for kind, found in hits.items():
        missed = {place: hit for place, hit in found.items() if not reference[kind][place]}
        for name, told in ((kind, found), (f"{kind}_reference_misses", missed)):
            share = names.share(list(told.values()))
            interval = share.interval
            if interval is not None:
                out[name] = {
                    "right": share.right,
                    "count": share.count,
                    "value": share.value,
                    "low": interval.low,
                    "high": interval.high,
                }
    return out


def _written(scene: Scene) -> dict[str, int]:
    """Return how many names of either kind stand in any draft or answer of the run."""
    files = sorted((scene.run / "rounds").glob("*/*.jsonl"))
    everything = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return {
        kind: sum(name in everything for name in told)
        for kind, told in (("planted", scene.names), ("planted_nowhere", scene.controls))
    }


def _recorded(run: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Append the figures to the benchmarks' results, with the commit, and what the run's sites spent."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import record  # pyright: ignore[reportMissingImports] - benchmarks are scripts, not a package

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    spent = {site: one["spent"] for site, one in summary["epsilon"].items()}
    return record.append({"kind": "names", "run": run.name, "spent": spent, **result})


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--record", action="store_true", help="append the figures to benchmarks/results.jsonl")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    told = vars(parser.parse_args(argv))
    run, record = told.pop("run"), told.pop("record")
    console = Console(stderr=True)
    try:
        result = attack(run, Sizes(**told), say=lambda line: console.print(line, markup=False))
        result = _recorded(run, result) if record else result
    except StillroomError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 2
    Console().print(json.dumps(result, sort_keys=True), soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
