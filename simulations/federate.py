"""Make a federation out of one corpus: one directory per site, as a real node would hold it, and the truth beside it.

    <out>/0/rows.jsonl, site.toml           what site 0 sees: its rows and its own policy (directory mode 0700)
    <out>-simulation/partition.json         who got how much, from which inputs
    <out>-simulation/partition.svg          the same as a picture
    <out>-simulation/planted.json           the synthetic identities and the controls (`simulations.identities`)

A site's ledger will live in its directory, so a finished federation is never written again: the same inputs leave
every byte as it is, other inputs are refused. The three partitioners are a dozen lines of numpy each; flwr-datasets
has the same ones, but is not in our lock, and would bring its own way of reading files.

Out of scope: reading corpora (`simulations.corpora`); starting the federation (`simulations.launch`).
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import sys
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias

import numpy as np
from pydantic import Field

from fl_app.config import Section, parse
from fl_app.errors import ConfigInvalid, RowsInvalid, StillroomError
from fl_app.seeds import stream
from fl_app.types import ReleaseKind
from simulations.corpora import CorpusRow, read_corpus
from simulations.identities import Planted, plant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STAMP = "SIMULATION - NOT PRIVATE"
MAX_DRAWS = 100  # of a Dirichlet partition that leaves a site too small; not studied, assumption
ROW_KEYS = frozenset({"id", "instruction", "output", "code"})
LINE_ENDS = re.compile(r"[\x85\u2028\u2029]")

Groups: TypeAlias = dict[str, list[int]]
"""The rows of each site, as positions in the corpus, by site name."""


class ColumnPartition(Section):
    """One site per value of a column. Values with fewer than `min_rows` rows become one site `other`.

    When `other` is itself too small, its rows go to the first of the remaining sites.
    """

    kind: Literal["column"] = "column"
    column: str
    min_rows: Annotated[int, Field(ge=1)] = 1

    def split(self, rows: Sequence[CorpusRow], _rng: np.random.Generator) -> Groups:
        """Return the sites in the alphabetical order of the values."""
        by_value: dict[str, list[int]] = {}
        for index, value in enumerate(_column(rows, self.column)):
            by_value.setdefault(value, []).append(index)
        groups: Groups = {}
        small: list[int] = []
        for value in sorted(by_value):
            if len(by_value[value]) < self.min_rows:
                small += by_value[value]
            else:
                groups[_slug(value, groups)] = by_value[value]
        if len(small) >= self.min_rows:
            groups[_slug("other", groups)] = sorted(small)
        elif small and not groups:
            raise ConfigInvalid(f"min_rows = {self.min_rows}, but {self.column!r} has {len(small)} rows in all")
        elif small:
            first = next(iter(groups))
            groups[first] = sorted(groups[first] + small)
        return groups


class DirichletPartition(Section):
    """Each label's rows are dealt to `sites` in proportions drawn from Dirichlet(concentration): small is skewed.

    Source: Hsu, Qi and Brown, Measuring the effects of non-identical data distribution (2019), section 3; ours draws
    the sites' shares of each label, not the labels' shares of each site, so that every row is used.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    label: str
    concentration: Annotated[float, Field(gt=0)]
    sites: Annotated[int, Field(ge=1)]
    min_rows: Annotated[int, Field(ge=1)] = 1

    def split(self, rows: Sequence[CorpusRow], rng: np.random.Generator) -> Groups:
        """Return the first draw that gives every site `min_rows` rows."""
        labels = np.array(_column(rows, self.label))
        _check_enough(rows, self.sites, self.min_rows)
        smallest = ""
        for _ in range(MAX_DRAWS):
            groups: Groups = {f"site-{site}": [] for site in range(self.sites)}
            for label in np.unique(labels):
                indices = rng.permutation(np.flatnonzero(labels == label))
                shares = rng.dirichlet(np.full(self.sites, self.concentration))
                cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(int)
                for name, part in zip(groups, np.split(indices, cuts), strict=True):
                    groups[name] += part.tolist()
            smallest = min(groups, key=lambda name: len(groups[name]))
            if len(groups[smallest]) >= self.min_rows:
                return {name: sorted(indices) for name, indices in groups.items()}
        raise ConfigInvalid(
            f"{MAX_DRAWS} draws left a site (last: {smallest}) with fewer than {self.min_rows} rows; "
            f"raise concentration = {self.concentration}, or lower sites = {self.sites} or min_rows"
        )


class IidPartition(Section):
    """Equal random parts."""

    kind: Literal["iid"] = "iid"
    sites: Annotated[int, Field(ge=1)]

    def split(self, rows: Sequence[CorpusRow], rng: np.random.Generator) -> Groups:
        """Return `sites` parts whose sizes differ by at most one."""
        _check_enough(rows, self.sites, 1)
        parts = np.array_split(rng.permutation(len(rows)), self.sites)
        return {f"site-{site}": sorted(part.tolist()) for site, part in enumerate(parts)}


Partition: TypeAlias = Annotated[ColumnPartition | DirichletPartition | IidPartition, Field(discriminator="kind")]


class PolicyTemplate(Section):
    """What every site's `site.toml` says unless an override says otherwise. All public, none computed from rows."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Annotated[str, Field(min_length=1)] = "record"
    max_rows_per_unit: Annotated[int, Field(ge=1)] = 1
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch: Annotated[int, Field(ge=1)]
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 96
    min_noise_multiplier: Annotated[float, Field(gt=0)] = 0.3
    max_noise_multiplier: Annotated[float, Field(gt=0)] = 5.0
    max_steps_per_round: Annotated[int, Field(ge=1)] = 200
    max_rounds: Annotated[int, Field(ge=1)] = 100
    release_kinds: Annotated[tuple[ReleaseKind, ...], Field(strict=False)] = ("adapter",)
    base_models: Annotated[tuple[str, ...], Field(strict=False)] = ()
    simulation: bool = True
    composition: Literal["fixed_schedule", "renyi_filter"] = "fixed_schedule"
    non_private: bool = False
    memory_mb: Annotated[int, Field(ge=0)] = 0
    first_layer: Annotated[int, Field(ge=0)] = 0
    micro_batch_tokens: Annotated[int, Field(ge=0)] = 0
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()


TABLES: dict[str, tuple[str, ...]] = {
    "privacy": ("epsilon", "delta", "unit", "max_rows_per_unit", "composition"),
    "constants": ("sample_rate", "expected_batch", "max_tokens"),
    "limits": (
        "min_noise_multiplier",
        "max_noise_multiplier",
        "max_steps_per_round",
        "max_rounds",
        "release_kinds",
        "base_models",
        "simulation",
        "non_private",
    ),
    "capacity": ("memory_mb", "first_layer", "micro_batch_tokens", "targets"),
}
"""The tables of site.toml and the keys of the template that stand in them, in order."""


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


def _column(rows: Sequence[CorpusRow], column: str) -> list[str]:
    """Return every row's value of `column`."""
    known = sorted({name for row in rows for name in row.columns})
    if column not in known:
        raise ConfigInvalid(
            f"no column {column!r}; the corpus has: {', '.join(known) or 'no columns besides the text'}"
        )
    without = [row.id for row in rows if column not in row.columns]
    if without:
        raise RowsInvalid(f"{len(without)} rows have no {column!r} (the first is {without[0]}); fill or remove them")
    return [row.columns[column] for row in rows]


def _check_enough(rows: Sequence[CorpusRow], sites: int, min_rows: int) -> None:
    if len(rows) < sites * min_rows:
        last = f"site-{len(rows) // min_rows}"
        raise ConfigInvalid(f"{len(rows)} rows do not give {sites} sites {min_rows} each: {last} would go short")


def _check_unit(rows: Sequence[CorpusRow], unit: str, *, site: str) -> None:
    if unit in ROW_KEYS:
        raise ConfigInvalid(f"{site}: unit = {unit!r} is a key of every row; name a column, or 'record'")
    if unit != "record":
        _column(rows, unit)


def _labels(rows: Sequence[CorpusRow], partition: Partition, label: str | None) -> list[str]:
    """Return what each row is counted as in partition.json and partition.svg."""
    shown = label or (partition.label if isinstance(partition, DirichletPartition) else None)
    return _column(rows, shown) if shown else [row.code or "rows" for row in rows]


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


def _slug(value: str, taken: Mapping[str, object]) -> str:
    """Return `value` as a public logical id that no other site has: letters, digits and hyphens."""
    ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_only)[:40].strip("-") or f"site-{len(taken)}"
    names = (slug if attempt == 1 else f"{slug}-{attempt}" for attempt in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


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
            (directory / "site.toml").write_text(_site_toml(name, policies[name]), encoding="utf-8", newline="\n")
        simulation.mkdir(mode=0o700, exist_ok=True)
        identities = [{"kind": i.kind, "text": i.text, "site": i.site, "row": i.row} for i in planted.identities]
        secrets = {"stamp": STAMP, "identities": identities, "controls": list(planted.controls)}
        files = {
            "partition.json": _json(report),
            "planted.json": _json(secrets),
            "partition.svg": _svg(report["sites"]),
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


def _site_toml(name: str, policy: PolicyTemplate) -> str:
    values = policy.model_dump()
    lines = [f"# {STAMP}: written by simulations/federate.py", "[site]", f"name = {_toml(name)}"]
    for table, keys in TABLES.items():
        lines += ["", f"[{table}]", *(f"{key} = {_toml(values[key])}" for key in keys)]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


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


# --- the picture

COLOURS = ("#3b6ea5", "#e08e45", "#4f9d79", "#c25b6e", "#8a6fb3", "#c9a63c", "#5fa8b8", "#9c6b4e")
REST = "#b8bec6"
WIDTH, LEFT, RIGHT, TOP, BAR, STEP, LEGEND = 760, 150, 56, 64, 20, 32, 18  # pixels


def _svg(sites: Sequence[Mapping[str, Any]]) -> str:
    """Return one bar per site, as long as its rows, in the colours of its labels; rare labels share the last one."""
    totals: Counter[str] = sum((Counter(site["labels"]) for site in sites), Counter[str]())
    ranked = sorted(totals, key=lambda name: (-totals[name], name))
    names = ranked if len(ranked) <= len(COLOURS) else [*ranked[: len(COLOURS) - 1], "(others)"]
    colour = dict(
        zip(names, (*COLOURS[: len(COLOURS) - 1], REST if "(others)" in names else COLOURS[-1]), strict=False)
    )
    scale = (WIDTH - LEFT - RIGHT) / max(int(site["rows"]) for site in sites)
    parts = [
        f'<text x="16" y="28" class="title">{sum(totals.values()):,} rows at {len(sites)} sites</text>',
        f'<text x="16" y="46" class="quiet">{STAMP} · a real federation cannot draw this picture</text>',
    ]
    for index, site in enumerate(sites):
        y = TOP + STEP * index
        name = html.escape(_short(site["name"], 20))
        parts.append(f'<text x="{LEFT - 10}" y="{y + 14}" text-anchor="end">{name}</text>')
        counts: Counter[str] = Counter()
        for label, count in site["labels"].items():
            counts[label if label in colour else "(others)"] += count
        x = float(LEFT)
        for label in names:
            width = counts[label] * scale
            if width:
                tip = html.escape(f"{site['name']}: {label}, {counts[label]:,} rows")
                box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}"'
                parts.append(f'<rect {box} fill="{colour[label]}"><title>{tip}</title></rect>')
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}" class="quiet">{site["rows"]:,}</text>')
    bottom = TOP + STEP * len(sites) + 10
    for index, label in enumerate(names):
        x, y = LEFT + 185 * (index % 3), bottom + LEGEND * (index // 3)
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" rx="2" fill="{colour[label]}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 9}" class="quiet">{html.escape(_short(label, 24))}</text>')
    height = bottom + LEGEND * ((len(names) + 2) // 3) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, -apple-system, \'Segoe UI\', sans-serif" font-size="13" fill="#1f2933">\n'
        "<style>.title{font-size:16px;font-weight:600}.quiet{font-size:12px;fill:#66717d}</style>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


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
        table.add_row(site.name, str(site.rows), ", ".join(f"{_short(name, 24)} {count}" for name, count in largest))
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
