"""Which rows go to which site: one site per value of a column, skewed by label, or at random.

flwr-datasets has the same partitioners, but is not in our lock, and would bring its own way of reading files.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import numpy as np
from pydantic import Field

from fl_app.config import Section
from fl_app.errors import ConfigInvalid, RowsInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from simulations.corpora import CorpusRow

MAX_DRAWS = 100  # of a Dirichlet partition that leaves a site too small; not studied, assumption

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
        for index, value in enumerate(column_of(rows, self.column)):
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
        labels = np.array(column_of(rows, self.label))
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


def column_of(rows: Sequence[CorpusRow], column: str) -> list[str]:
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


def _slug(value: str, taken: Mapping[str, object]) -> str:
    """Return `value` as a public logical id that no other site has: letters, digits and hyphens."""
    ascii_only = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_only)[:40].strip("-") or f"site-{len(taken)}"
    names = (slug if attempt == 1 else f"{slug}-{attempt}" for attempt in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
