"""Read a corpus into rows: JSONL, CSV, Parquet, or a data set of the Hugging Face hub.

Three row shapes are recognised, row by row; whatever else a row holds is kept as a column to partition by.

    instruction, output [, input]       Alpaca; `join_input` says what happens to the input
    prompt, completion
    messages                            a list of {role, content}, or the same list as JSON text (the only way in CSV)

From `messages`: the user messages before the first assistant message, one a line, become the instruction; the last
assistant message becomes the output; system messages are ignored. Turns in between are not kept.

| value of a text key       | what happens                                            |
| ------------------------- | ------------------------------------------------------- |
| null `input`              | as if it were absent                                    |
| empty output              | kept: a prompt without an answer is still a prompt      |
| empty instruction, number | refused                                                 |
| `id` absent or empty      | `row-<n>`, n counts rows from 1                         |
| other column              | text; null, empty, list and table values are left out   |

Errors name file, line and keys, never the text of a row. Out of scope: filtering, splitting, and what a site does
with its rows (`clients.private_rows`).
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from fl_app.errors import ConfigInvalid, RowsInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator

JoinInput: TypeAlias = Literal["append", "input_only"]

SHAPES: tuple[tuple[str, ...], ...] = (("instruction", "output"), ("prompt", "completion"), ("messages",))
TEXT_KEYS = frozenset({"id", "instruction", "input", "output", "prompt", "completion", "messages"})
ACCEPTED = "accepted: {instruction, output[, input]}, {prompt, completion} or {messages: [{role, content}, ...]}"
ROLES = ("assistant", "system", "user")
KEY = re.compile(r"[\w.-]{1,40}")
"""A key that may stand in an error. Anything else may be text, e.g. the first row of a CSV without a header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRow:
    """One instruction with its answer; `columns` holds every other value that can name a group. Texts do not print."""

    id: str
    instruction: str = field(repr=False)
    output: str = field(repr=False)
    code: str = ""
    columns: Mapping[str, str] = field(default_factory=dict[str, str], repr=False, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """One row as a file holds it, and where that is."""

    where: str
    values: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    instruction: str = field(repr=False)
    output: str = field(repr=False)


def read_corpus(source: str, *, join_input: JoinInput = "append", code_column: str | None = None) -> list[CorpusRow]:
    """Return the rows of a file, or of the `train` split of a hub data set when `source` is no existing path.

    `join_input`: "append" puts the input of an Alpaca row under its instruction, "input_only" in its place (for corpora
    whose private text is the input). `code_column` names the column with the row's public control code; without it the
    column `code` is used where a row has one.

    Raises: RowsInvalid for a file or row that cannot be read, ConfigInvalid for a source that cannot be found.
    """
    rows: list[CorpusRow] = []
    places: dict[str, str] = {}
    for number, record in enumerate(_records(source), start=1):
        row = _row(record, number=number, join_input=join_input, code_column=code_column)
        if row.id in places:
            raise RowsInvalid(f"{record.where}: its id was already used at {places[row.id]}; ids must be unique")
        places[row.id] = record.where
        rows.append(row)
    if not rows:
        raise RowsInvalid(f"{source} holds no rows; {ACCEPTED}")
    return rows


def _records(source: str) -> Iterator[_Record]:
    path = Path(source)
    if not path.exists():
        return _from_hub(source)
    readers = {".jsonl": _from_jsonl, ".ndjson": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise ConfigInvalid(f"{source} is not a file of a known kind; known endings: {', '.join(readers)}")
    return reader(path)


def _from_jsonl(path: Path) -> Iterator[_Record]:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        where = f"{path}, line {number}"
        text = _decode(line, where=where)
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise RowsInvalid(f"{where}: not JSON; each line holds one JSON object") from None
        if not isinstance(values, dict):
            raise RowsInvalid(f"{where}: JSON, but not an object; {ACCEPTED}")
        yield _Record(where=where, values=cast("dict[str, Any]", values))


def _from_csv(path: Path) -> Iterator[_Record]:
    """Yield the rows of a CSV with a header. The standard library reads it, as it knows on which line a row starts."""
    lines = [_decode(line, where=f"{path}, line {n}") for n, line in enumerate(_bytes(path).split(b"\n"), start=1)]
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, where=where)
                continue
            if len(cells) != len(header):
                raise RowsInvalid(
                    f"{where}: {len(cells)} cells, but the header has {len(header)}; quote cells with commas"
                )
            yield _Record(where=where, values=dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise RowsInvalid(f"{path}, line {start}: not CSV: {error}") from None


def _header(cells: Sequence[str], *, where: str) -> list[str]:
    if len(set(cells)) != len(cells):
        raise RowsInvalid(f"{where}: the header names a column twice; found {_keys(cells)}")
    return list(cells)


def _from_parquet(path: Path) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = cast("list[dict[str, Any]]", pq.ParquetFile(path).read().to_pylist())
    except (pa.ArrowException, OSError):
        raise RowsInvalid(f"{path} is not a readable Parquet file; write it again, or as JSONL") from None
    except UnicodeDecodeError:
        raise RowsInvalid(f"{path}: a text column is not UTF-8; write it again as UTF-8") from None
    for number, row in enumerate(values, start=1):
        yield _Record(where=f"{path}, row {number}", values=row)


def _from_hub(source: str) -> Iterator[_Record]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) or Path(source).suffix in {
        ".jsonl",
        ".csv",
        ".parquet",
    }:
        raise ConfigInvalid(f"no file at {source}, and it is no hub id (owner/name)")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        splits: Any = datasets.load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigInvalid(
            f"no file at {source}, and the hub gave no data set of that name ({type(error).__name__}); "
            "give a path to JSONL, CSV or Parquet, or load the set once with network"
        ) from None
    split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise ConfigInvalid(f"{source} has no split 'train' but {', '.join(splits)}; save the one you want as Parquet")
    for number, row in enumerate(splits[split], start=1):
        yield _Record(where=f"{source}, split {split}, row {number}", values=row)


def _row(record: _Record, *, number: int, join_input: JoinInput, code_column: str | None) -> CorpusRow:
    values, where = record.values, record.where
    pair = _pair(record, join_input=join_input)
    if not pair.instruction.strip():
        raise RowsInvalid(f"{where}: the instruction is empty; {ACCEPTED}")
    columns = {key: _column(value) for key, value in values.items() if key not in TEXT_KEYS}
    columns = {key: value for key, value in columns.items() if value}
    if code_column is not None and code_column not in columns:
        raise RowsInvalid(f"{where}: no control code in column {code_column!r}; found {_keys(columns)}")
    row = CorpusRow(
        id=_id(values.get("id"), where=where) or f"row-{number}",
        instruction=pair.instruction,
        output=pair.output,
        code=columns.get(code_column or "code", ""),
        columns=columns,
    )
    try:
        "".join((row.id, row.instruction, row.output, *columns, *columns.values())).encode()
    except UnicodeEncodeError:
        raise RowsInvalid(f"{where}: holds half a surrogate pair, which is no character; repair its escapes") from None
    return row


def _pair(record: _Record, *, join_input: JoinInput) -> _Pair:
    values, where = record.values, record.where
    shapes = [s for s in SHAPES if values.get(s[0]) != "" and all(values.get(key) is not None for key in s)]
    if not shapes:
        raise RowsInvalid(
            f"{where}: no shape we know (null and an empty instruction count as absent); "
            f"found {_keys(values)}; {ACCEPTED}"
        )
    if len(shapes) > 1:
        raise RowsInvalid(f"{where}: more than one shape at once; found {_keys(values)}; keep one; {ACCEPTED}")
    if shapes[0] == ("messages",):
        return _conversation(values["messages"], where=where)
    first, second = (_text(values, key, where=where) for key in shapes[0])
    if shapes[0][0] != "instruction" or values.get("input") is None:
        return _Pair(instruction=first, output=second)
    extra = _text(values, "input", where=where)
    if extra.strip():
        first = extra if join_input == "input_only" else f"{first}\n{extra}"
    return _Pair(instruction=first, output=second)


def _text(values: Mapping[str, Any], key: str, *, where: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise RowsInvalid(f"{where}: {key} is {type(value).__name__}, not text; found {_keys(values)}; {ACCEPTED}")
    return value


def _conversation(value: Any, *, where: str) -> _Pair:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowsInvalid(f"{where}: messages is text, but not JSON; {ACCEPTED}") from None
    if not isinstance(value, Sequence):
        raise RowsInvalid(f"{where}: messages is {type(value).__name__}, not a list; {ACCEPTED}")
    roles: list[str] = []
    contents: list[str] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            known = ", ".join(ROLES)
            raise RowsInvalid(f"{where}: message {number} has no role we know; known: {known}; {ACCEPTED}")
        if not isinstance(message.get("content"), str):
            raise RowsInvalid(f"{where}: the content of message {number} is not text; {ACCEPTED}")
        roles.append(message["role"])
        contents.append(message["content"])
    if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
        raise RowsInvalid(f"{where}: messages hold no user message with an assistant message after it; {ACCEPTED}")
    asked = [text for role, text in zip(roles, contents, strict=True) if role == "user"]
    asked = asked[: roles[: roles.index("assistant")].count("user")]
    answered = [text for role, text in zip(roles, contents, strict=True) if role == "assistant"]
    return _Pair(instruction="\n".join(asked), output=answered[-1])


def _id(value: Any, *, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowsInvalid(f"{where}: id is {type(value).__name__}; an id is text or a whole number")
    return str(value)


def _column(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        whole = math.isfinite(value) and value.is_integer()
        return str(int(value)) if whole else repr(value) if math.isfinite(value) else ""
    return str(value) if isinstance(value, str | int) else ""


def _keys(keys: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the keys that look like column names, and the number of those that do not."""
    named = sorted(key for key in keys if KEY.fullmatch(key))
    hidden = len(keys) - len(named)
    return ", ".join(named + ([f"and {hidden} that are no column names"] if hidden else [])) or "nothing"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise RowsInvalid(f"{path} cannot be read: {error.strerror}; check its permissions") from None


def _decode(line: bytes, *, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise RowsInvalid(f"{where}: not UTF-8; save the file as UTF-8") from None
