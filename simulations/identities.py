"""Plant synthetic identities in the slots of a corpus, and write down where each one stands.

An attack on a federation needs secrets whose home is known. Rows of a corpus carry slots where somebody's name, phone
number, place or date stood; a share of them is filled with identities made by Faker, the rest with public words.

| slot                                  | selected row          | any other row     |
| ------------------------------------- | --------------------- | ----------------- |
| `[NAME]`                              | an invented full name | a neighbour       |
| `[PHONE]` `[CONTACT]`                 | a 555-01xx number     | the usual number  |
| `[EMAIL]`                             | a name at example.org | the usual address |
| `[PLACE]` `[LOCATION]`                | an invented town      | a nearby town     |
| `[DATE]`                              | a day of 1940 to 2019 | last spring       |
| `XXXX XXXX` (finance)                 | an invented full name | XXXX              |
| a longer run, `XXXX XXXX XXXX`        | XXXX                  | XXXX              |
| `[AGE]` `[ID]` `[PROFESSION]` `[PHI]` | public words          | public words      |

A run that touches a slash or another X (a date, an account) is no name and shrinks too: `XX/XX/XXXX XXXX` becomes
`XX/XX/XXXX`. With `share` 0 every slot gets its public words.

Guarantee: inside a row one identity fills every slot of a kind; a name is planted in one row, hence at one site; no
planted name and no control stands in the corpus by itself; controls and planted names are disjoint.
Out of scope: how a name is found again (`simulations.attacks`). These texts are invented, but treat them as secrets.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

from fl_app.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy as np
    from faker import Faker

    from simulations.corpora import CorpusRow

Kind: TypeAlias = Literal["name", "phone", "email", "place", "date"]

KINDS: dict[str, Kind] = {
    "[NAME]": "name",
    "[PHONE]": "phone",
    "[CONTACT]": "phone",
    "[EMAIL]": "email",
    "[PLACE]": "place",
    "[LOCATION]": "place",
    "[DATE]": "date",
    "XXXX XXXX": "name",
}
PUBLIC: dict[str, str] = {
    "[NAME]": "a neighbour",
    "[PHONE]": "the usual number",
    "[CONTACT]": "the usual number",
    "[EMAIL]": "the usual address",
    "[PLACE]": "a nearby town",
    "[LOCATION]": "a nearby town",
    "[DATE]": "last spring",
    "[AGE]": "middle-aged",
    "[ID]": "on file",
    "[PROFESSION]": "worker",
    "[PHI]": "on file",
}
SLOT = re.compile("|".join(re.escape(slot) for slot in PUBLIC) + r"|(?<![X/])[X/]*XXXX(?: XXXX[X/]*)+")
RUN = re.compile(r"XXXX(?: XXXX)+")
FIRST_DAY = dt.date(1940, 1, 1)
DAYS = 29_220  # eighty years
MAX_DRAWS = 1_000  # Faker's en_US lists make over 500,000 full names; a thousand collisions in a row mean a full list


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One planted string: what it is, and the site and row that hold it."""

    kind: Kind
    text: str = field(repr=False)
    site: str
    row: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """Rows without slots, what was planted in them, and as many names that were planted nowhere."""

    rows_by_site: Mapping[str, tuple[CorpusRow, ...]] = field(repr=False, hash=False)
    identities: tuple[Identity, ...] = ()
    controls: tuple[str, ...] = field(default=(), repr=False)


def plant(rows_by_site: Mapping[str, Sequence[CorpusRow]], *, rng: np.random.Generator, share: float) -> Planted:
    """Return the rows with every slot filled; at each site, `share` of the rows with slots get an identity.

    Raises: ConfigInvalid when `share` is not in [0, 1], or there is something to plant and no slot to plant it in.
    """
    if not 0 <= share <= 1:
        raise ConfigInvalid(f"the planted share is {share}; it lies between 0 and 1")
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(int(rng.integers(2**63)))
    taken = _standing_names(row for rows in rows_by_site.values() for row in rows)
    filled: dict[str, tuple[CorpusRow, ...]] = {}
    identities: list[Identity] = []
    fillable = 0
    for site, rows in rows_by_site.items():
        candidates = [index for index, row in enumerate(rows) if _kinds(row)]
        fillable += len(candidates)
        picks = rng.choice(len(candidates), size=round(share * len(candidates)), replace=False) if candidates else ()
        selected = {candidates[int(pick)] for pick in picks}
        site_rows: list[CorpusRow] = []
        for index, row in enumerate(rows):
            values = _identity(_kinds(row), fake=fake, rng=rng, taken=taken) if index in selected else {}
            identities += [Identity(kind=kind, text=text, site=site, row=row.id) for kind, text in values.items()]
            site_rows.append(_fill_row(row, values))
        filled[site] = tuple(site_rows)
    if share > 0 and not fillable:
        raise ConfigInvalid(f"nothing can be planted: no row holds a slot; slots are {', '.join(KINDS)}")
    planted_names = sum(identity.kind == "name" for identity in identities)
    controls = tuple(_fresh(lambda: _full_name(fake), taken) for _ in range(planted_names))
    return Planted(rows_by_site=filled, identities=tuple(identities), controls=controls)


def _kinds(row: CorpusRow) -> tuple[Kind, ...]:
    """Return the kinds of identity that `row` has slots for, in order of appearance."""
    slots = SLOT.findall(f"{row.instruction}\n{row.output}")
    return tuple(dict.fromkeys(KINDS[slot] for slot in slots if slot in KINDS))


def _identity(kinds: Iterable[Kind], *, fake: Faker, rng: np.random.Generator, taken: set[str]) -> dict[Kind, str]:
    draws: dict[Kind, Callable[[], str]] = {
        "name": lambda: _full_name(fake),
        "phone": lambda: fake.numerify("%##-555-01##"),  # reserved for fiction in every area code
        "email": lambda: f"{_full_name(fake).replace(' ', '.').lower()}@example.org",
        "place": fake.city,
        "date": lambda: _long_date(FIRST_DAY + dt.timedelta(days=int(rng.integers(DAYS)))),
    }
    unique: frozenset[Kind] = frozenset({"name", "phone", "email"})
    return {kind: _fresh(draws[kind], taken) if kind in unique else draws[kind]() for kind in kinds}


def _full_name(fake: Faker) -> str:
    return f"{fake.first_name()} {fake.last_name()}"


def _long_date(day: dt.date) -> str:
    return f"{day:%B} {day.day}, {day.year}"


def _fresh(draw: Callable[[], str], taken: set[str]) -> str:
    """Return a draw that is not taken yet, and take it."""
    for _ in range(MAX_DRAWS):
        text = draw()
        if text.casefold() not in taken:
            taken.add(text.casefold())
            return text
    raise ConfigInvalid(f"{MAX_DRAWS} draws gave no new identity after {len(taken)}; plant a smaller share")


def _standing_names(rows: Iterable[CorpusRow]) -> set[str]:
    """Return every pair of neighbouring words of the corpus, in lower case: a name among them would be no secret."""
    pairs: set[str] = set()
    for row in rows:
        words = re.findall(r"[^\W\d_]+", f"{row.instruction}\n{row.output}".casefold())
        pairs.update(f"{first} {second}" for first, second in pairwise(words))
    return pairs


def _fill_row(row: CorpusRow, values: Mapping[Kind, str]) -> CorpusRow:
    def fill(match: re.Match[str]) -> str:
        slot = match.group()
        kind = KINDS.get(slot)
        if kind is not None and kind in values:
            return values[kind]
        return PUBLIC.get(slot) or RUN.sub("XXXX", slot)

    return replace(row, instruction=SLOT.sub(fill, row.instruction), output=SLOT.sub(fill, row.output))
