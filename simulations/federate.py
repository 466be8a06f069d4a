"""Make a federation out of one corpus: one directory per site, as a real node would hold it, and the truth beside it.

    <out>/0/rows.jsonl, site.toml           what site 0 sees: its rows and its own policy (directory mode 0700)
    <out>-simulation/partition.json         who got how much, from which inputs
    <out>-simulation/partition.svg          the same as a picture
    <out>-simulation/planted.json           the synthetic identities and the controls (`simulations.identities`)

A site's ledger will live in its directory, so a finished federation is never written again: the same inputs leave
every byte as it is, other inputs are refused.

Out of scope: reading corpora (`simulations.corpora`); starting the federation (`simulations.launch`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fl_app.config import parse
from fl_app.errors import ConfigInvalid, RowsInvalid, StillroomError
from fl_app.seeds import stream
from simulations.corpora import CorpusRow, read_corpus
from simulations.identities import Planted, plant
from simulations.partition import ColumnPartition, DirichletPartition, Groups, IidPartition, Partition, column_of
from simulations.partition_plot import plot, short
from simulations.policy_template import PolicyTemplate, site_toml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STAMP = "SIMULATION - NOT PRIVATE"
ROW_KEYS = frozenset({"id", "instruction", "output", "code"})
LINE_ENDS = re.compile(r"[\x85\u2028\u2029]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One site as the simulator knows it; a real federation must not know `rows` and `labels`."""

    index: int
    name: str
    directory: Path
    rows: int
    labels: Mapping[str, int] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """A finished federation. `written` is False when an earlier run had written it from the same inputs."""

    root: Path
    simulation: Path
    sites: tuple[Site, ...]
    digest: str
    planted: int
    written: bool


def federate(
    rows: Sequence[CorpusRow],
    *,
    out: Path,
    partition: Partition,
    policy: PolicyTemplate,
    seed: int,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    plant_share: float | None = None,
    max_rows_per_site: int | None = None,
    label: str | None = None,
) -> Federation:
    """Write one directory per site under `out`, and what only the simulator may know beside it.

    `overrides` changes keys of the policy for the site of that name. `plant_share` None leaves the text as it is.
    `label` names the column shown in partition.svg; by default the label of the partition, else the control code.

    Raises: ConfigInvalid when nothing can be written from these inputs, or `out` holds something else;
        RowsInvalid when a row lacks a value that the partition or the privacy unit needs.
    """
    out = out.resolve()
    if not rows:
        raise RowsInvalid("no rows to federate: the corpus is empty")
    if not 0 <= seed < 2**63:
        raise ConfigInvalid(f"seed = {seed}; it lies between 0 and 2**63 - 1")
    if max_rows_per_site is not None and max_rows_per_site < 1:
        raise ConfigInvalid(f"max_rows_per_site = {max_rows_per_site}; a site needs at least one row")
    inputs = {
        "partition": partition.model_dump(),
        "policy": policy.model_dump(mode="json"),
        "overrides": {name: dict(keys) for name, keys in (overrides or {}).items()},
        "seed": seed,
        "plant_share": plant_share,
        "max_rows_per_site": max_rows_per_site,
        "label": label,
    }
    digest = _digest(rows, inputs)
    simulation = out.with_name(f"{out.name}-simulation")
    if _is_finished(out, simulation, digest):
        return _read(out, simulation, written=False)

    groups = partition.split(rows, stream(seed, "federate", "partition"))
    if max_rows_per_site is not None:
        rng = stream(seed, "federate", "cap")
        groups = {name: sorted(rng.permutation(part)[:max_rows_per_site].tolist()) for name, part in groups.items()}
    labels = _labels(rows, partition, label)
    policies = _policies(groups, policy, overrides or {})
    for name, part in groups.items():
        _check_unit([rows[index] for index in part], policies[name].unit, site=name)
    planted = Planted(rows_by_site={n: tuple(rows[i] for i in part) for n, part in groups.items()})
    if plant_share is not None:
        planted = plant(planted.rows_by_site, rng=stream(seed, "federate", "plant"), share=plant_share)
    report = {
        "stamp": STAMP,
        "digest": digest,
        **inputs,
        "planted": len(planted.identities),
        "sites": [
            {"name": name, "rows": len(part), "labels": dict(sorted(Counter(labels[i] for i in part).items()))}
            for name, part in groups.items()
        ],
    }
    _write(out, simulation, report=report, planted=planted, policies=policies)
    return _read(out, simulation, written=True)


# --- what is checked before anything is written


def _check_unit(rows: Sequence[CorpusRow], unit: str, *, site: str) -> None:
    if unit in ROW_KEYS:
        raise ConfigInvalid(f"{site}: unit = {unit!r} is a key of every row; name a column, or 'record'")
    if unit != "record":
        column_of(rows, unit)


def _labels(rows: Sequence[CorpusRow], partition: Partition, label: str | None) -> list[str]:
    """Return what each row is counted as in partition.json and partition.svg."""
    shown = label or (partition.label if isinstance(partition, DirichletPartition) else None)
    return column_of(rows, shown) if shown else [row.code or "rows" for row in rows]


def _policies(
    groups: Groups, policy: PolicyTemplate, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, PolicyTemplate]:
    unknown = sorted(set(overrides) - set(groups))
    if unknown:
        raise ConfigInvalid(f"overrides for {', '.join(unknown)}, but the sites are {', '.join(groups)}")
    template = policy.model_dump()
    return {
        name: parse(PolicyTemplate, {**template, **overrides.get(name, {})}, where=f"overrides.{name}")
        for name in groups
    }


def _digest(rows: Sequence[CorpusRow], inputs: Mapping[str, Any]) -> str:
    hashed = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode())
    for row in rows:
        hashed.update(json.dumps([row.id, row.instruction, row.output, row.code, dict(row.columns)]).encode())
    return hashed.hexdigest()


def _is_finished(out: Path, simulation: Path, digest: str) -> bool:
    """Return whether `out` was written from these very inputs; False when there is nothing yet, or only its claim.

    Raises: ConfigInvalid when `out` or `simulation` holds anything else. Nothing is removed: a ledger may be there.
    """
    way_out = "choose another directory; nothing here is overwritten, since a site's ledger outlives a run"
    for place in (out, simulation):
        if place.exists() and not place.is_dir():
            raise ConfigInvalid(f"{place} is a file; {way_out}")
    record = simulation / "partition.json"
    try:
        found = str(json.loads(record.read_text(encoding="utf-8"))["digest"]) if record.is_file() else ""
    except (ValueError, KeyError, TypeError):
        raise ConfigInvalid(f"{record} is damaged; {way_out}") from None
    holding = [place for place in (out, simulation) if place.is_dir() and any(place.iterdir())]
    if holding and found != digest:
        written_by = f"other inputs ({found[:12]}, now {digest[:12]})" if found else "something else"
        raise ConfigInvalid(f"{holding[0]} was written by {written_by}; {way_out}")
    return out in holding


# --- what is written


def _write(
    out: Path, simulation: Path, *, report: Mapping[str, Any], planted: Planted, policies: Mapping[str, PolicyTemplate]
) -> None:
    """Write everything beside its place, then move the sites in one step: `out` is complete or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        staged = Path(scratch) / "sites"
        staged.mkdir(mode=0o700)
        for index, (name, rows) in enumerate(planted.rows_by_site.items()):
            directory = staged / str(index)
            directory.mkdir(mode=0o700)
            unit = policies[name].unit
            lines = "".join(_line(_row_tree(row, unit)) for row in rows)
            (directory / "rows.jsonl").write_text(lines, encoding="utf-8", newline="\n")
            (directory / "site.toml").write_text(
                site_toml(name, policies[name], stamp=STAMP), encoding="utf-8", newline="\n"
            )
        simulation.mkdir(mode=0o700, exist_ok=True)
        identities = [{"kind": i.kind, "text": i.text, "site": i.site, "row": i.row} for i in planted.identities]
        secrets = {"stamp": STAMP, "identities": identities, "controls": list(planted.controls)}
        files = {
            "partition.json": _json(report),
            "planted.json": _json(secrets),
            "partition.svg": plot(report["sites"], stamp=STAMP),
        }
        for name, text in files.items():  # partition.json first: it claims `out` for these inputs
            (Path(scratch) / name).write_text(text, encoding="utf-8", newline="\n")
            (Path(scratch) / name).replace(simulation / name)
        staged.rename(out)  # onto nothing or an empty directory; the system refuses anything else


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=1, default=str) + "\n"


def _line(tree: Mapping[str, str]) -> str:
    """Return one line of JSON that no reader splits: Unicode's own line ends are escaped like the others."""
    return LINE_ENDS.sub(lambda end: f"\\u{ord(end.group()):04x}", json.dumps(tree, ensure_ascii=False)) + "\n"


def _row_tree(row: CorpusRow, unit: str) -> dict[str, str]:
    tree = {"id": row.id, "instruction": row.instruction, "output": row.output, "code": row.code}
    return tree if unit == "record" else {**tree, unit: row.columns[unit]}


def _read(out: Path, simulation: Path, *, written: bool) -> Federation:
    """Return the federation that partition.json describes."""
    report = json.loads((simulation / "partition.json").read_text(encoding="utf-8"))
    sites = tuple(
        Site(index=index, name=site["name"], directory=out / str(index), rows=site["rows"], labels=site["labels"])
        for index, site in enumerate(report["sites"])
    )
    missing = [str(site.directory) for site in sites if not (site.directory / "rows.jsonl").is_file()]
    if missing:
        raise ConfigInvalid(
            f"{', '.join(missing)} lost its rows after it was written; restore it or choose another out"
        )
    return Federation(
        root=out,
        simulation=simulation,
        sites=sites,
        digest=report["digest"],
        planted=report["planted"],
        written=written,
    )


# --- the command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigInvalid(f"{message}; see --help")


def _arguments() -> _Parser:
    parser = _Parser(prog="python -m simulations.federate", description="Make a simulated federation of one corpus.")
    parser.add_argument("--corpus", required=True, help="JSONL, CSV or Parquet file, or a hub id")
    parser.add_argument("--out", required=True, type=Path, help="the directory of the sites")
    parser.add_argument("--partition", required=True, help="column:NAME, dirichlet or iid")
    parser.add_argument("--epsilon", required=True, type=float, help="budget of every site")
    parser.add_argument("--delta", required=True, type=float)
    parser.add_argument("--sample-rate", required=True, type=float)
    parser.add_argument("--expected-batch", required=True, type=int, help="declared, never computed from the rows")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--unit", default="record", help="privacy unit: record, or a column")
    parser.add_argument("--max-rows-per-unit", type=int, default=1)
    parser.add_argument("--sites", type=int, default=3, help="dirichlet and iid: number of sites")
    parser.add_argument("--alpha", type=float, default=0.5, help="dirichlet: concentration, small is skewed")
    parser.add_argument("--label", help="dirichlet: the skewed column; else the column to draw")
    parser.add_argument("--min-rows", type=int, default=1, help="column and dirichlet: smallest site")
    parser.add_argument("--max-rows-per-site", type=int)
    parser.add_argument("--plant", type=float, help="share of the rows with slots that get a synthetic identity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--join-input", choices=("append", "input_only"), default="append")
    parser.add_argument("--code-column", help="column with the public control code (default: code, if there)")
    return parser


def _partition(options: argparse.Namespace) -> Partition:
    kind, _, column = str(options.partition).partition(":")
    if kind == "column" and column:
        return parse(ColumnPartition, {"column": column, "min_rows": options.min_rows}, where="partition")
    if kind == "dirichlet" and not column:
        if options.label is None:
            raise ConfigInvalid("--partition dirichlet needs --label COLUMN")
        keys = {"label": options.label, "concentration": options.alpha, "sites": options.sites}
        return parse(DirichletPartition, {**keys, "min_rows": options.min_rows}, where="partition")
    if kind == "iid" and not column:
        return parse(IidPartition, {"sites": options.sites}, where="partition")
    raise ConfigInvalid(f"--partition {options.partition!r}; known: column:NAME, dirichlet, iid")


def _show(federation: Federation) -> None:
    from rich.console import Console
    from rich.table import Table

    state = "written" if federation.written else "already there, left as it is"
    table = Table("site", "rows", "labels", title=f"{federation.root} ({state})", caption=STAMP)
    for site in federation.sites:
        largest = sorted(site.labels.items(), key=lambda item: -item[1])[:3]
        table.add_row(site.name, str(site.rows), ", ".join(f"{short(name, 24)} {count}" for name, count in largest))
    console = Console()
    console.print(table)
    console.print(f"{federation.planted} strings planted; truth and picture in {federation.simulation}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a federation as the command line says; return 0, or 2 with one line on stderr."""
    try:
        options = _arguments().parse_args(arguments)
        policy = {
            key: getattr(options, key) for key in ("epsilon", "delta", "sample_rate", "expected_batch", "max_tokens")
        }
        unit = {"unit": options.unit, "max_rows_per_unit": options.max_rows_per_unit}
        federation = federate(
            read_corpus(options.corpus, join_input=options.join_input, code_column=options.code_column),
            out=options.out,
            partition=_partition(options),
            policy=parse(PolicyTemplate, {**policy, **unit}, where="policy"),
            seed=options.seed,
            plant_share=options.plant,
            max_rows_per_site=options.max_rows_per_site,
            label=options.label,
        )
    except (StillroomError, OSError) as error:
        sys.stderr.write(f"federate: {' '.join(str(error).split())}\n")
        return 2
    _show(federation)
    return 0


if __name__ == "__main__":
    sys.exit(main())
