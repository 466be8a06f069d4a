"""B9, configurations: thousands are made, good ones and all kinds of bad ones, and read as a user would have them read.

Each is a whole TOML file, or overrides on one, made by changing one thing in a configuration that we ship, a site's
policy among them. Whoever makes the change knows what the answer must name. No answer but `ConfigInvalid` is allowed,
on one line, within two seconds, and with none of the secrets that were planted.
"""

from __future__ import annotations

import copy
import random
import re
import time
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import pytest
import tomli_w

from clients.config import SitePolicy, read_client, read_policy
from fl_app.config import Section, digest, parse, read_tree, shared, shown
from fl_app.errors import ConfigInvalid
from fl_app.origin import ROOT
from simulations.config import read_simulation
from strategies.config import read_server
from tests.conftest import POLICY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Place = tuple[Any, ...]
READERS: dict[str, Callable[[Any], Any]] = {
    "run": shared,
    "client": read_client,
    "server": read_server,
    "simulation": read_simulation,
}
SECONDS = 2.0
ENDPOINT = {"kind": "endpoint", "base_url": "https://h.test/v1", "model": "m", "max_total_tokens": 9, "cache": "c"}
CENTRAL = {"kind": "central_dp", "clip_norm": 1.0, "noise_multiplier": 2.0, "epsilon": 8.0, "delta": 1e-5}
CENTRAL["inner"] = {"kind": "mean_factors"}


def _trees() -> list[dict[str, Any]]:
    every = {path: tomllib.loads(path.read_text("utf-8")) for path in sorted((ROOT / "configs").rglob("*.toml"))}
    runs = [path for path, tree in every.items() if "simulation" in tree or "extends" in tree]
    shipped = [read_tree(str(path)) for path in runs]  # a production run has no table [simulation]
    smoke = next(tree for tree in shipped if tree["run"]["rounds"] == 2)
    more = copy.deepcopy(smoke)
    more["server"]["distiller"] = dict(ENDPOINT)
    more["server"]["aggregator"] = dict(CENTRAL)
    more["client"]["learner"] = {"kind": "plain_lora", "steps": 3}
    return [*shipped, more]


TREES = _trees()


@dataclass(kw_only=True)
class Case:
    """A configuration and what must be said about it: nothing (`valid`), or all of `words`."""

    kind: str
    content: bytes
    overrides: str = ""
    policy: bool = False
    valid: bool = False
    words: tuple[str, ...] = ()
    secrets: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Leaf:
    """A key of a section that stands in a tree, with what its annotation says."""

    place: Place
    name: str
    section: type[Section]
    annotation: Any
    metadata: list[Any]
    required: bool

    @property
    def path(self) -> str:
        return ".".join(map(str, self.place))

    def bound(self, *names: str) -> Any:
        return next((getattr(one, name) for one in self.metadata for name in names if hasattr(one, name)), None)


def _options(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    inner = [option for argument in arguments for option in _options(argument)]
    return inner if arguments and get_origin(annotation) is not Literal else [annotation]


def _member(annotation: Any, value: Any) -> type[Section] | None:
    """Return the section of a table: the field's own, or the member of its union that `kind` names."""
    sections = [one for one in _options(annotation) if isinstance(one, type) and issubclass(one, Section)]
    if len(sections) == 1 and "kind" not in sections[0].model_fields:
        return sections[0]
    kind = value.get("kind") if isinstance(value, dict) else None
    return next((one for one in sections if kind in get_args(one.model_fields["kind"].annotation)), None)


def leaves(section: type[Section], tree: dict[str, Any], place: Place) -> list[Leaf]:
    """Return every key of our own schema that stands in the tree, tables included."""
    found: list[Leaf] = []
    for name, info in section.model_fields.items():
        if name not in tree:
            continue
        here = (*place, name)
        found.append(
            Leaf(
                place=here,
                name=name,
                section=section,
                annotation=info.annotation,
                metadata=list(info.metadata),
                required=info.is_required(),
            )
        )
        values = enumerate(tree[name]) if isinstance(tree[name], list) else [(None, tree[name])]
        for index, value in values:
            member = _member(info.annotation, value)
            if member is not None and isinstance(value, dict):
                found += leaves(member, value, here if index is None else (*here, index))
    return found


def all_leaves(tree: dict[str, Any], *, policy: bool) -> list[Leaf]:
    from clients.config import ClientSection
    from fl_app.config import LoraSection, ModelSection, RunSection
    from simulations.config import SimulationSection
    from strategies.config import ServerSection

    if policy:
        return leaves(SitePolicy, tree, ("site.toml",))
    sections = {"run": RunSection, "model": ModelSection, "lora": LoraSection, "client": ClientSection}
    sections |= {"server": ServerSection, "simulation": SimulationSection}
    return [leaf for table, one in sections.items() for leaf in leaves(one, tree[table], (table,))]


def parent_of(tree: dict[str, Any], place: Place) -> Any:
    found: Any = tree
    for key in place[:-1]:
        found = found if key == "site.toml" else found[key]
    return found


class Maker:
    """Makes cases from one stream of random numbers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kinds = [name for name in dir(self) if name.startswith("make_")]

    def case(self) -> Case:
        while True:
            made = getattr(self, self.random.choice(self.kinds))()
            if made is not None:
                made.kind = made.kind or "?"
                return made

    def start(self) -> tuple[dict[str, Any], bool, list[Leaf]]:
        policy = self.random.random() < 0.2
        tree = copy.deepcopy(POLICY if policy else self.random.choice(TREES))
        return tree, policy, all_leaves(tree, policy=policy)

    def put(self, kind: str, tree: Any, *, policy: bool, words: tuple[str, ...] = (), **more: Any) -> Case:
        return Case(kind=kind, content=tomli_w.dumps(tree).encode(), policy=policy, words=words, **more)

    def scalar(self, found: list[Leaf], *types: type) -> Leaf | None:
        fitting = [leaf for leaf in found if any(option in types for option in _options(leaf.annotation))]
        return self.random.choice(fitting) if fitting else None

    # --- one maker per way to be right or wrong

    def make_valid(self) -> Case:
        tree, policy, found = self.start()
        for leaf in self.random.sample(found, min(4, len(found))):
            value = self.fitting(leaf)
            if value is not None:
                parent_of(tree, leaf.place)[leaf.name] = value
        return self.put("valid", tree, policy=policy, valid=True)

    def fitting(self, leaf: Leaf) -> Any:
        """Return another value that the key may have; None where sections have rules of their own about it."""
        if leaf.name in {
            "kind",
            "base_url",
            "min_words",
            "max_words",
            "inner",
            "name",
            "learns",
            "api_key_env",
            "question",
            "unit",
        }:
            return None
        low, high = leaf.bound("ge", "gt"), leaf.bound("le", "lt")
        options = _options(leaf.annotation)
        if get_origin(leaf.annotation) is Literal or leaf.annotation is bool:
            return self.random.choice(get_args(leaf.annotation) or (True, False))
        if options == [int]:
            least = int(low or 0) + int(leaf.bound("gt") is not None)
            return self.random.randint(least, min(int(high or 2**40) - int(leaf.bound("lt") is not None), 2**62))
        if options == [float]:
            least, most = float(low or 0.0), float(high if high is not None else least_over(low))
            return least + (most - least) * self.random.uniform(0.01, 0.99)
        if options == [str] and leaf.annotation is str and leaf.bound("pattern", "min_length") is None:
            return self.random.choice(["x", "über alles", "a/b", "\u2603 " * 9, "", "'\"\\"])
        return None

    def make_typo(self) -> Case | None:
        tree, policy, found = self.start()
        leaf = self.random.choice([leaf for leaf in found if len(leaf.name) > 4])
        at = self.random.randrange(1, len(leaf.name) - 1)
        letter = self.random.choice("abcdefghijklmnopqrstuvwxyz")
        name = self.random.choice(
            [
                leaf.name[:at] + leaf.name[at + 1 :],
                leaf.name[:at] + letter + leaf.name[at:],
                leaf.name[:at] + leaf.name[at + 1] + leaf.name[at] + leaf.name[at + 2 :],
                leaf.name[:at] + letter + leaf.name[at + 1 :],
                leaf.name[:at] + leaf.name[at:].upper(),
            ]
        )
        if name in leaf.section.model_fields:
            return None
        parent = parent_of(tree, leaf.place)
        parent[name] = parent.pop(leaf.name)
        path = ".".join(map(str, (*leaf.place[:-1], name)))
        near = () if name.lower() == leaf.name and name != leaf.name else ("did you mean",)
        return self.put("typo", tree, policy=policy, words=(f"unknown key {path}", leaf.name, *near))

    def make_wrong_type(self) -> Case | None:
        tree, policy, found = self.start()
        leaf = self.scalar(found, int, float, bool, str)
        if leaf is None:
            return None
        options = _options(leaf.annotation)
        wrong: list[Any] = [[1, 2], {"x": 1}]
        wrong += ["1e-5", "5", "nan", True] if bool not in options and str not in options else []
        wrong += [7, 2.5, True] if options == [str] else []
        wrong += [3.0, 1.5] if options == [int] else []
        wrong += [1, "true"] if options == [bool] else []
        value = self.random.choice(wrong)
        if get_origin(leaf.annotation) in {list, tuple} or (isinstance(value, list | dict) and len(options) > 1):
            return None  # a list complains about each of its items
        parent_of(tree, leaf.place)[leaf.name] = value
        return self.put("type", tree, policy=policy, words=(f"{leaf.path} = {shown(value, leaf.name)}", "should be"))

    def make_not_finite(self) -> Case | None:
        tree, policy, found = self.start()
        leaf = self.scalar(found, float, int)
        if leaf is None:
            return None
        value = self.random.choice([float("nan"), float("inf"), -float("inf")])
        parent_of(tree, leaf.place)[leaf.name] = value
        return self.put("nan", tree, policy=policy, words=(f"{leaf.path} = '{value}'",))

    def make_out_of_range(self) -> Case | None:
        tree, policy, found = self.start()
        ranged = [leaf for leaf in found if leaf.bound("ge", "gt", "le", "lt") is not None]
        leaf = self.random.choice(ranged)
        whole = _options(leaf.annotation)[0] is int
        low, high = leaf.bound("ge", "gt"), leaf.bound("le", "lt")
        below = high is None or (low is not None and self.random.random() < 0.5)
        limit = low if below else high
        far = self.random.choice([1, 7, 1000])
        value = limit - far if below else limit + far
        value = int(value) if whole else float(value)
        if abs(value) >= 2**63:
            return None  # TOML itself holds no such number
        parent_of(tree, leaf.place)[leaf.name] = value
        return self.put("range", tree, policy=policy, words=(leaf.path, str(value), "than "))

    def make_missing(self) -> Case | None:
        tree, policy, found = self.start()
        leaf = self.random.choice([leaf for leaf in found if leaf.required and leaf.name != "kind"])
        del parent_of(tree, leaf.place)[leaf.name]
        return self.put("missing", tree, policy=policy, words=(f"{leaf.path} is required and absent",))

    def make_other_kind(self) -> Case | None:
        tree, policy, found = self.start()
        kinds = [leaf for leaf in found if leaf.name == "kind"]
        if not kinds:
            return None
        leaf = self.random.choice(kinds)
        value = self.random.choice(["", "mean", "sfft", "\u2603", "a\nb", "x" * 500])
        parent_of(tree, leaf.place)["kind"] = value
        allowed = get_args(leaf.section.model_fields["kind"].annotation)[0]
        return self.put("kind", tree, policy=policy, words=(".".join(map(str, leaf.place[:-1])), allowed))

    def make_literal(self) -> Case | None:
        tree, policy, found = self.start()
        choices = [leaf for leaf in found if get_origin(leaf.annotation) is Literal and leaf.name != "kind"]
        if not choices:
            return None
        leaf = self.random.choice(choices)
        value = self.random.choice(["Production", "", "\u00fc", "x" * 200])
        parent_of(tree, leaf.place)[leaf.name] = value
        allowed = [str(one) for one in get_args(leaf.annotation)]
        return self.put("literal", tree, policy=policy, words=(f"{leaf.path} = {value[:80]!r}", *allowed))

    def make_odd_table(self) -> Case:
        tree = copy.deepcopy(self.random.choice(TREES))
        if self.random.random() < 0.5:
            table = self.random.choice(
                ["sever", "clients", "RUN", "simulations", "models", "a b", "\u2603", "x\ny", ""]
            )
            tree[table] = {"x": 1}
            return self.put("table", tree, policy=False, words=("unknown table", "known: run, model"))
        table = self.random.choice(["run", "client", "server"])
        tree[table] = self.random.choice([3, "text", [1], True])
        return self.put("table", tree, policy=False, words=(f"[{table}] is a value, not a table",))

    def make_deep(self) -> Case:
        depth = self.random.choice([20, 300, 900, 3000])
        where = self.random.choice(["run.extra", "server.tuner", "simulation.policy_overrides", "lora.targets"])
        how = self.random.randrange(3)
        tree = copy.deepcopy(self.random.choice(TREES))
        if how == 0:
            overrides = f"{where}{'.x' * depth}=1"
        elif how == 1:
            overrides = f"{where}={'[' * depth}{']' * depth}"
        else:
            overrides = f"{where}={'{x=' * depth}1{'}' * depth}"
        return self.put("deep", tree, policy=False, overrides=overrides, words=(where.split(".")[0],))

    def make_huge(self) -> Case | None:
        tree, policy, found = self.start()
        leaf = self.scalar(found, int, float)
        if leaf is None or leaf.place == ():
            return None
        text = self.random.choice(["0x" + "f" * 20_000, "9" * 30, "9" * 5000, "-" + "1" * 400, "1e999", "1_0" * 900])
        parent_of(tree, leaf.place)[leaf.name] = "PLACE"
        content = tomli_w.dumps(tree).replace('"PLACE"', text).encode()
        return Case(kind="huge", content=content, policy=policy, words=("toml",) if "1e999" not in text else ("inf",))

    def make_long(self) -> Case | None:
        tree, policy, found = self.start()
        leaf = self.scalar(found, int, float, bool)
        if leaf is None:
            return None
        if self.random.random() < 0.5:
            value = "x" * self.random.choice([1000, 100_000])
            parent_of(tree, leaf.place)[leaf.name] = value
            return self.put("long", tree, policy=policy, words=(f"{leaf.path} = '{'x' * 80}'",))
        key = self.random.choice("abc") * self.random.choice([1000, 50_000])
        parent_of(tree, leaf.place)[key] = 1
        return self.put("long", tree, policy=policy, words=("unknown key", leaf.name))

    def make_odd_key(self) -> Case:
        tree, policy, found = self.start()
        leaf = self.random.choice(found)
        key = self.random.choice(
            ["\u2603", "a b", "", "x\nRoundFailed: no", "\x1b[31mred", "\u202etxt", "'", "a.b", "é"]
        )
        parent_of(tree, leaf.place)[key] = self.random.choice([1, "x", [], {}])
        return self.put("odd key", tree, policy=policy, words=("unknown key", "known:"))

    def make_secret(self) -> Case:
        tree, policy, found = self.start()
        secret = f"hunter{self.random.getrandbits(48):x}"
        spelled = self.random.choice(["", "sk-", "ghp_", "hf_", "Bearer ", "eyJhbGci.eyJzdWIi."]) + secret
        leaf = self.random.choice(found)
        how = self.random.randrange(5)
        name = self.random.choice(
            [
                "api_key",
                "apiKey",
                "API-KEY",
                "token",
                "auth_token",
                "password",
                "secret",
                "client_secret",
                "credentials",
            ]
        )
        parent = parent_of(tree, leaf.place)
        if how == 0:
            parent[name] = spelled
        elif how == 1:
            parent[leaf.name] = {name: spelled, "x": [{name: spelled}]}
        elif how == 2:
            parent[leaf.name] = [[spelled]] if spelled != secret else [{name: spelled}]
        elif how == 3:
            key = "base_url" if "base_url" in parent else leaf.name
            parent[key] = [f"https://me:{spelled}@h.test/v1?key={spelled}"]
        else:
            tree = copy.deepcopy(TREES[-1])
            tree["server"]["distiller"]["api_key_env"] = spelled
            policy = False
        overrides = ""
        if self.random.random() < 0.3 and not policy:
            overrides = self.random.choice(
                [f"server.distiller.{name}={spelled}", f"server.{name} = '{spelled}'", f"run.{name}='{spelled}", name]
            )
        return self.put("secret", tree, policy=policy, overrides=overrides, secrets=[secret])

    def make_garbage(self) -> Case:
        tree, policy, _ = self.start()
        content = bytearray(tomli_w.dumps(tree).encode())
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(content))
            how = self.random.randrange(3)
            if how == 0:
                content[at] = self.random.randrange(256)
            elif how == 1:
                del content[at : at + self.random.randint(1, 40)]
            else:
                content[at:at] = self.random.choice([b"[", b"]", b'"', b"'''", b"=", b"\n", b"\xff", b"\0", b"{", b"#"])
            if not content:
                content = bytearray(b"x")
        return Case(kind="garbage", content=bytes(content), policy=policy)

    def make_override(self) -> Case:
        tree = self.random.choice(TREES)
        broken = self.random.choice(
            [
                "run.rounds",
                "=3",
                "run.rounds=",
                "run.rounds=x y",
                "run.rounds.more=3",
                "run.directory=/tmp/x",
                "a=[",
                "x",
            ]
        )
        bad = self.random.choice([f"run.seed=1 {broken}", f"{broken}\nrun.seed=2", broken])
        return self.put("override", tree, policy=False, overrides=bad, words=("override" if broken != "a=[" else "a",))


def least_over(low: float | None) -> float:
    return float(low or 0.0) + 5.0


def read(case: Case, folder: Path) -> None:
    """Read a case as the apps do, all sections, and hold what is read to its own text. Raises: ConfigInvalid."""
    if case.policy:
        (folder / "site.toml").write_bytes(case.content)
        again(SitePolicy, read_policy(folder))
        return
    path = folder / "run.toml"
    path.write_bytes(case.content)
    tree = read_tree(str(path), case.overrides)
    for reader in READERS.values():
        section = reader(tree)
        again(type(section), section)
    assert len(digest(tree)) == 64


def again(kind: type[Section], section: Section) -> None:
    """Write a section as TOML and read it again: it must be equal."""
    text = tomli_w.dumps(section.model_dump(exclude_none=True))
    assert parse(kind, tomllib.loads(text)) == section, text


def complaint(case: Case, folder: Path) -> str:  # noqa: PLR0911 - one way per complaint
    """Return what is wrong with how a case was answered; empty when nothing is."""
    began, message = time.monotonic(), ""
    try:
        read(case, folder)
    except ConfigInvalid as error:
        message = str(error) or "an empty message"
        if error.__cause__ is not None:
            return f"quotes {type(error.__cause__).__name__}, whose text nobody has looked at"
    except Exception as error:  # noqa: BLE001 - this is what must not happen, and it is counted
        return f"{type(error).__name__}: {str(error)[:200]}"
    took = time.monotonic() - began
    if took > SECONDS:
        return f"took {took:.1f} s"
    if case.valid and message:
        return f"refused: {message[:300]}"
    if case.words and not message:
        return "accepted"
    lowered = message.lower()
    missing = [word for word in case.words if word.lower() not in lowered]
    if missing:
        return f"does not say {missing}: {message[:300]}"
    if not message.isprintable():
        return f"holds what a terminal would obey: {message[:300]!r}"
    if any(secret in message for secret in case.secrets):
        return f"shows a secret: {message[:300]}"
    return ""


def hunt(count: int, seed: int, folder: Path) -> tuple[int, list[str]]:
    """Return how many of `count` cases were answered as they must be, and what was wrong with the others."""
    maker, wrong = Maker(seed), []
    for _ in range(count):
        case = maker.case()
        said = complaint(case, folder)
        if said:
            wrong.append(f"{case.kind}: {said}")
    return count - len(wrong), wrong


def test_a_thousand_configurations(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    right, wrong = hunt(1000, 1, tmp_path)
    record_property("bar", {"name": "B9", "passed": right, "of": 1000})
    assert wrong[:10] == []


@pytest.mark.slow
def test_nine_thousand_more(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    right, wrong = hunt(9000, 2, tmp_path)
    record_property("bar", {"name": "B9", "passed": right, "of": 9000})
    assert wrong[:10] == []


def test_all_ways_to_be_wrong_are_taken() -> None:
    maker = Maker(3)
    kinds = {maker.case().kind for _ in range(600)}
    assert kinds == {
        *("valid", "typo", "type", "nan", "range", "missing", "kind", "literal", "table", "deep", "huge", "long"),
        *("odd key", "secret", "garbage", "override"),
    }


def test_the_hunt_sees_an_error_of_another_kind_a_hang_and_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: readers that are broken in the three ways that count."""
    case = Case(kind="x", content=b"x = 1\n", secrets=["hunter2"], words=("unknown table",))
    assert complaint(case, tmp_path) == ""

    def broken(error: BaseException, seconds: float = 0.0) -> Callable[..., Any]:
        def reader(*_: Any) -> Any:
            time.sleep(seconds)
            raise error

        return reader

    for error, seconds, said in (
        (KeyError("x"), 0.0, "KeyError"),
        (ConfigInvalid("unknown table hunter2"), 0.0, "shows a secret"),
        (ConfigInvalid("unknown table"), SECONDS + 0.1, "took"),
        (ConfigInvalid("unknown table\nx"), 0.0, "terminal"),
        (ConfigInvalid("something"), 0.0, "does not say"),
    ):
        monkeypatch.setitem(globals(), "read_tree", broken(error, seconds))
        assert said in complaint(case, tmp_path)


@pytest.mark.parametrize(
    ("value", "key", "seen"),
    [
        ("hunter2", "api_key", "'***'"),
        ("hunter2", "apiKey", "'***'"),
        ("hunter2", "server.x.key", "'***'"),
        (512, "max_tokens", "'512'"),
        ("sk-live-0123456789", "name", "'***'"),
        ("https://me:pw@h/v1", "base_url", "'https://***h/v1'"),
        ({"password": "hunter2", "x": 1}, "policy", "\"{'password': '***', 'x': '1'}\""),
        ("monkey", "monkey", "'monkey'"),
        ("x" * 99, "name", "'" + "x" * 80 + "'"),
    ],
)
def test_what_is_shown_of_a_value(value: object, key: str, seen: str) -> None:
    assert shown(value, key) == seen


def test_no_reader_names_a_key_that_we_do_not_have() -> None:
    """The schema walk above must see our keys: a walk that finds none would make an empty hunt."""
    found = {leaf.path for tree in TREES for leaf in all_leaves(tree, policy=False)}
    policy = {leaf.path for leaf in all_leaves(POLICY, policy=True)}
    assert len(found) > 60
    assert len(policy) > 12
    assert {"run.rounds", "server.distiller.base_url", "client.learner.clip_norm"} <= found
    assert re.search("site.toml.privacy.epsilon", " ".join(policy))
