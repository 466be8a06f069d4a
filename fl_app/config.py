"""One TOML file becomes a tree, the tree becomes frozen sections; each side reads only its own tables.

    [run] [model] [lora]      read by both sides, here
    [client.*]                read by clients.config
    [server.*]                read by strategies.config
    [simulation]              read by simulations.config, never by an app

Flower's run-config takes scalars only, so it carries two of them: `config` (a path, absolute or from the project's
root) and `overrides` (`run.rounds=3 server.tuner.epochs=2`, values in TOML syntax, separated by blanks or newlines).
The digest of the resolved tree travels in `Broadcast`, so both sides know that they read the same file.

A message names keys and values, on one line, because that is what helps; but what stands under a key that is called
like a secret, or looks like one, is shown as ***: messages go to logs and to tickets.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_app.errors import ConfigInvalid
from fl_app.origin import ROOT
from fl_app.types import Precision

Tree: TypeAlias = dict[str, Any]
SectionT = TypeVar("SectionT", bound="Section")

TABLES = ("run", "model", "lora", "client", "server", "simulation")
LOCAL_KEYS = frozenset({"directory"})
"""Keys of [run] that name places on one machine; they do not enter the digest."""


MAX_DEPTH = 16
"""Levels of tables and lists; ours have six. Deeper trees would end in errors of recursion, here or in a library."""

SHOWN = 80
"""Characters of a value that a message shows."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_SECRET_KEY = re.compile(
    r"(?:^|[_.])(?:apikey|key|secret|token|password|passwd|pwd|passphrase|credentials?|auth|authorization|bearer)(?:[_.]|$)"
)
_SECRET_VALUE = re.compile(
    r"(?<=://)[^/'\"]*@|(?<=[?&])[\w-]+=[^&'\"]+|\bbearer\s+[\w.~+-]+|"
    r"\b[spr]k-[\w-]{6,}|\bgh[a-z]_\w{10,}|\bhf_\w{10,}|\bAKIA\w{10,}|\beyJ[\w-]+\.[\w.-]+",
    re.IGNORECASE,
)


class Section(BaseModel):
    """A frozen table of the configuration: unknown keys, nan and inf are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


LoraInit: TypeAlias = Literal["uniform", "orthonormal", "weights"]
"""How a fresh adapter is drawn: see `fl_app.lora_start.initial`."""


class RunSection(Section):
    """[run]: how long, how random, where to."""

    rounds: Annotated[int, Field(ge=1, le=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    mode: Literal["simulation", "production"]
    directory: str = ""


class ModelSection(Section):
    """[model]: the shared local model W_loc.

    `name` is a folder, a hub id, a packaged model or `tiny-random`; `system` is the system message of every chat
    prompt (empty keeps a template from inserting its own).
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    system: str = ""


class LoraSection(Section):
    """[lora]: the shape of every adapter of this run. `first_layer` counts decoder blocks from 0.

    `start` is a PEFT adapter of exactly this shape, made from public text, that the run starts from; empty: a fresh
    one, which changes nothing in the model. `init` says how a fresh one's A is drawn: uniform as PEFT does, with
    orthonormal rows (FFA-LoRA, which never trains A), or along the base model's own first singular vectors.
    `upload_precision` and `broadcast_precision` say how adapters travel (`fl_app.transport`).
    """

    rank: Annotated[int, Field(ge=1, le=512)]
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[tuple[str, ...], Field(strict=False)]
    first_layer: Annotated[int, Field(ge=0)] = 0
    start: str = ""
    init: LoraInit = "uniform"
    upload_precision: Precision = "float32"
    broadcast_precision: Literal["float32", "float16"] = "float32"


class SharedConfig(Section):
    """The tables that both sides read."""

    run: RunSection
    model: ModelSection
    lora: LoraSection


def read_tree(config: str, overrides: str = "") -> Tree:
    """Return the tree of a TOML file, on top of the file that it `extends`, with overrides applied.

    Raises: ConfigInvalid when a file is missing, is not TOML, or it or an override names no table of ours.
    """
    tree = _read_file(config)
    if (base := tree.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise ConfigInvalid(f"extends = {shown(base)} is no path of a configuration")
        below = _read_file(base)
        if "extends" in below:
            raise ConfigInvalid(f"{base} extends another file itself; one level is enough to read")
        _check_values(tree, "")
        _check_values(below, "")
        tree = _on_top(below, tree)
    for key, value in _read_overrides(overrides).items():
        _set(tree, key, value)
    for table, content in tree.items():
        if table in TABLES and not isinstance(content, dict):
            raise ConfigInvalid(f"[{table}] is a value, not a table: {shown(content, table)}")
        if table not in TABLES:
            raise ConfigInvalid(f"unknown table [{_key(table)}]{_nearest(table, TABLES)}; known: {', '.join(TABLES)}")
    _check_values(tree, "")
    return tree


def _on_top(below: Tree, above: Tree) -> Tree:
    """Return two trees as one: tables key by key, a table of another `kind` as a whole, anything else from above."""
    merged = dict(below)
    for key, value in above.items():
        former = below.get(key)
        if isinstance(former, dict) and isinstance(value, dict) and _same_kind(former, value):
            merged[key] = _on_top(former, value)
        else:
            merged[key] = value
    return merged


def _same_kind(below: Tree, above: Tree) -> bool:
    """Whether a table says more of the same thing: no kind at all, the same one, or none said anew."""
    return "kind" not in above or above["kind"] == below.get("kind", above["kind"])


def _read_file(config: str) -> Tree:
    path = Path(config) if Path(config).is_absolute() else ROOT / config
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.toml")))
        raise ConfigInvalid(f"no configuration at {path}; configs/ holds: {known}") from None
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, endless digits, endless brackets
        raise ConfigInvalid(f"{path} is not TOML: {error}") from None


def parse(section: type[SectionT], tree: object, *, where: str = "") -> SectionT:
    """Return `tree` as a section.

    Raises: ConfigInvalid naming every bad key, its value, what is allowed and, for a typo, the nearest key.
    """
    _check_values(tree, where)
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(section, detail, where) for detail in error.errors()]
        raise ConfigInvalid("; ".join(lines)) from None


def shown(value: object, key: str = "") -> str:
    """Return a value as a message may show it: one line, not long, and no secret."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", key).lower()
    text = "***" if _SECRET_KEY.search(words) else _SECRET_VALUE.sub("***", str(_masked(value)))
    return repr(text[:SHOWN])


def shared(tree: Tree) -> SharedConfig:
    """Return the tables both sides read."""
    return parse(SharedConfig, {name: tree.get(name, {}) for name in ("run", "model", "lora")})


def digest(tree: Tree) -> str:
    """Return the SHA-256 of the resolved tree without what is local to one machine or to the simulator."""
    run = {key: value for key, value in tree.get("run", {}).items() if key not in LOCAL_KEYS}
    public = {key: value for key, value in tree.items() if key != "simulation"} | {"run": run}
    text = json.dumps(public, sort_keys=True, separators=(",", ":"), default=str)  # str: dates, which no key takes
    return hashlib.sha256(text.encode()).hexdigest()


def _read_overrides(overrides: str) -> Tree:
    values: Tree = {}
    for item in _split(overrides):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigInvalid(f"override {shown(item)} is not key=value, e.g. run.rounds=3")
        try:
            values[key.strip()] = tomllib.loads(f"x = {value.strip()}")["x"]
        except (ValueError, RecursionError):
            name = key.strip()
            raise ConfigInvalid(
                f"override {_path(name)}: {shown(value.strip(), name)} is no TOML value; quote strings"
            ) from None
    return values


def _split(overrides: str) -> list[str]:
    """Split at blanks outside quotes and brackets."""
    items, current, quote, depth = [""], "", "", 0
    for character in overrides:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[]{}":
            depth += 1 if character in "[{" else -1
        if character.isspace() and not quote and depth == 0:
            items.append(current)
            current = ""
        else:
            current += character
    items.append(current)
    return [item for item in items if item]


def _set(tree: Tree, key: str, value: object) -> None:
    *parents, last = key.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigInvalid(f"override {_path(key)}: {_key(name)!r} is a value, not a table")
        tree = child
    tree[last] = value


def _nearest(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(section: type[BaseModel], detail: Any, where: str) -> str:
    keys = [str(key) for key in _keys(section, detail["loc"])]
    path = ".".join([*([where] if where else []), *map(_key, keys)])
    if detail["type"] == "extra_forbidden":
        known = _fields_at(section, detail["loc"][:-1])
        return f"unknown key {path}{_nearest(str(detail['loc'][-1]), known)}; known: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{path} is required and absent"
    if detail["type"] == "union_tag_invalid":
        given, known = dict(detail["input"]).get("kind"), detail["ctx"]["expected_tags"]
        near = _nearest(str(given)[:SHOWN], known.replace("'", "").split(", "))
        return f"{path}.kind = {shown(given)}{near}; allowed: {known}"
    named = next((key for key in reversed(keys) if not key.isdigit()), where)
    return f"{path} = {shown(detail.get('input'), named)}: {_one_line(detail['msg'])}"


def _key(key: str) -> str:
    """Return a key as TOML writes it: bare, or in quotes and on one line."""
    return key if _BARE_KEY.fullmatch(key) else repr(key[:SHOWN])


def _path(dotted: str) -> str:
    return ".".join(_key(part) for part in dotted[:SHOWN].split("."))


def _one_line(text: str) -> str:
    masked = _SECRET_VALUE.sub("***", text)
    return "".join(c if c.isprintable() else " " for c in masked)[: 4 * SHOWN]


def _masked(value: Any) -> Any:
    """Return a value with the secrets in its tables hidden; its depth has been checked."""
    if isinstance(value, dict):
        return {key: shown(item, str(key))[1:-1] for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value


def _check_values(tree: Any, where: str) -> None:
    """Raise ConfigInvalid for what TOML allows nobody to write, or nobody means: endless depth, huge whole numbers."""
    level = [(where, tree)]
    for depth in range(MAX_DEPTH + 1):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigInvalid(f"{path} is a whole number of {value.bit_length()} bits; TOML holds 64")
            inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            below += [(f"{path}.{_key(str(key))}".lstrip("."), item) for key, item in inner]
        if depth == MAX_DEPTH and below:
            raise ConfigInvalid(f"{below[0][0][:SHOWN]}... is nested deeper than {MAX_DEPTH} levels; ours have six")
        level = below


def _fields_at(section: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    fields: Any = section
    for part in loc:
        fields = _step(fields, part)
    names = getattr(fields, "model_fields", None)
    return sorted(names) if names else []


def _keys(section: type[BaseModel], loc: tuple[Any, ...]) -> list[Any]:
    """Return the keys of a location as they stand in the file: pydantic also names the kind of a union it chose."""
    fields: Any = section
    keys: list[Any] = []
    for part in loc:
        chosen = part not in getattr(fields, "model_fields", {}) and any(str(part) == _tag(o) for o in _options(fields))
        keys += [] if chosen else [part]
        fields = _step(fields, part)
    return keys


def _step(fields: Any, part: Any) -> Any:
    """Return what lies under one part of a location: a field's annotation, or the member of a union."""
    info = getattr(fields, "model_fields", {}).get(part)
    if info is not None:
        return info.annotation
    options = [option for option in _options(fields) if str(part) == _tag(option)]
    return options[0] if options else fields


def _options(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, also of one inside `list[...]` or `Annotated[...]`."""
    arguments = getattr(annotation, "__args__", None)
    return tuple(option for a in arguments for option in _options(a)) if arguments else (annotation,)


def _tag(option: Any) -> str:
    kind = getattr(option, "model_fields", {}).get("kind")
    return str(getattr(kind.annotation, "__args__", ("",))[0]) if kind else ""
