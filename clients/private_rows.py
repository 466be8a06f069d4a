"""The type that never leaves: a site's rows in memory. It hides its repr, refuses pickling and has no equality."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fl_app.errors import RowsInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_NOT_PICKLED = "private rows are not pickled: they stay in the process that read them"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class PrivateRow:
    """One record: an instruction, its answer, the id of its public control code, and its privacy unit."""

    instruction: str
    output: str
    code: str
    unit: str

    def __reduce__(self) -> NoReturn:
        raise TypeError(_NOT_PICKLED)


class PrivateRows:
    """The rows of one site, bounded to `max_rows_per_unit` contributions per privacy unit."""

    __slots__ = ("_rows",)

    def __init__(self, rows: Sequence[PrivateRow]) -> None:
        self._rows = tuple(rows)

    @property
    def examples(self) -> tuple[PrivateRow, ...]:
        """The rows, for a learner's eyes only."""
        return self._rows

    def __repr__(self) -> str:
        return "PrivateRows(hidden)"

    def __eq__(self, other: object) -> bool:
        raise TypeError("private rows are not compared")

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError(_NOT_PICKLED)

    def __getstate__(self) -> NoReturn:
        raise TypeError(_NOT_PICKLED)


def read_private_rows(path: Path, *, unit: str, max_rows_per_unit: int) -> PrivateRows:
    """Return the rows of `rows.jsonl`.

    `unit` is "record" (every row is its own unit) or a column; then at most `max_rows_per_unit` rows of a unit are
    kept, the first in the file's order, so that keeping depends on nobody else's rows.

    Raises: RowsInvalid naming the line and the keys, never the text; also when the file is missing or holds no row.
    """
    if not path.is_file():
        raise RowsInvalid(f"no rows at {path}: a site directory holds rows.jsonl and site.toml")
    rows: list[PrivateRow] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        row = _read(line, f"{path}:{number}", unit, number)
        seen[row.unit] = seen.get(row.unit, 0) + 1
        if unit == "record" or seen[row.unit] <= max_rows_per_unit:
            rows.append(row)
    if not rows:
        raise RowsInvalid(f"{path} holds no row; a site needs at least one")
    return PrivateRows(rows)


def _read(line: bytes, where: str, unit: str, number: int) -> PrivateRow:
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise RowsInvalid(f"{where}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError:
        raise RowsInvalid(f"{where}: not a JSON object; one row a line") from None
    if not isinstance(row, dict):
        raise RowsInvalid(f"{where}: not a JSON object; one row a line")
    for key in ("instruction", "output", "code"):
        if not isinstance(row.get(key, "" if key != "instruction" else None), str):
            raise RowsInvalid(f"{where}: {key!r} is absent or no text; keys there: {', '.join(sorted(map(str, row)))}")
    if unit != "record" and not isinstance(row.get(unit), (str, int)):
        raise RowsInvalid(f"{where}: privacy unit column {unit!r} is absent; see privacy.unit in site.toml")
    return PrivateRow(
        instruction=_encodable(row["instruction"]),
        output=_encodable(row.get("output", "")),
        code=row.get("code", ""),
        unit=str(number) if unit == "record" else str(row[unit]),
    )


def _encodable(text: str) -> str:
    """Return the text with lone surrogates replaced: no tokenizer takes them, and a row must not make a round fail."""
    return text.encode("utf-8", "replace").decode("utf-8")
