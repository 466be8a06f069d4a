"""Configuration files, overrides, and that nothing odd in them ends in anything but `ConfigInvalid`."""

from __future__ import annotations

import copy
import datetime as dt
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.config import read_client, read_policy
from fl_app.config import SharedConfig, digest, parse, read_tree, shared
from fl_app.errors import ConfigInvalid
from fl_app.origin import ROOT
from simulations.config import read_simulation
from strategies.config import read_server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMOKE = "configs/smoke.toml"
READERS: tuple[Callable[[Any], object], ...] = (shared, read_client, read_server, read_simulation, digest)


def smoke() -> dict[str, Any]:
    return tomllib.loads((ROOT / SMOKE).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ("run.rounds=3", "rounds", 3),
        ('run.directory="/a b/c"', "directory", "/a b/c"),
        ("run.directory='x=y'", "directory", "x=y"),
        ("  run.seed = 7  ".replace(" = ", "="), "seed", 7),
        ("run.seed=1\nrun.rounds=9\t run.seed=2", "seed", 2),
        ("run.extra=[1, 2,\n 3]", "extra", [1, 2, 3]),
        ("run.extra={a = 1, b = [2]}", "extra", {"a": 1, "b": [2]}),
        ("run.extra='] ['", "extra", "] ["),
        ("run.extra=true", "extra", True),
        ("run.extra=1e-5", "extra", 1e-5),
    ],
)
def test_overrides_are_toml_values_split_at_blanks(overrides: str, key: str, value: object) -> None:
    assert read_tree(SMOKE, overrides)["run"][key] == value


def test_overrides_reach_deep_and_make_tables() -> None:
    tree = read_tree(SMOKE, "server.tuner.epochs=2 simulation.policy_overrides.inn.epsilon=1.5")
    assert tree["server"]["tuner"]["epochs"] == 2
    assert tree["server"]["tuner"]["kind"] == "sft"
    assert tree["simulation"]["policy_overrides"] == {"inn": {"epsilon": 1.5}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("run.rounds", "is not key=value"),
        ("=3", "is not key=value"),
        ("run.directory=/tmp/x", "quote strings"),
        ("run.rounds=", "quote strings"),
        ("run.seed=1 nonsense", "is not key=value"),
        ("run.rounds.more=3", "is a value, not a table"),
        ("sever.threads=2", "did you mean 'server'?"),
        ("client=3", "[client] is a value, not a table"),
        ("run=3", "[run] is a value, not a table"),
        ("run.extra=" + "[" * 9999, "quote strings"),
        ("run.seed=" + "1" * 9999, "quote strings"),
    ],
)
def test_bad_overrides_name_the_way_out(overrides: str, words: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        read_tree(SMOKE, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "reader", "words"),
    [
        ("run.round=3", shared, ["unknown key run.round ", "did you mean 'rounds'?"]),
        ("client.learner.clip_nrm=1.0", read_client, ["client.learner.clip_nrm", "did you mean 'clip_norm'?"]),
        ("client.prob={items = 1}", read_client, ["unknown key client.prob", "did you mean 'probe'?"]),
        ("server.network.poll=1.0", read_server, ["server.network.poll", "did you mean 'poll_s'?"]),
        ("server.aggregator.kind='mean'", read_server, ["server.aggregator", "mean_factors", "mean_product"]),
        ("server.filters=[{kind='length', min_word=2}]", read_server, ["did you mean 'min_words'?"]),
        ("simulation.policy.epsilo=1.0", read_simulation, ["did you mean 'epsilon'?"]),
        ("simulation.partition.colum='x'", read_simulation, ["did you mean 'column'?"]),
        ("run.rounds=true", shared, ["run.rounds = 'True'"]),
        ("run.rounds=1.0", shared, ["run.rounds = '1.0'"]),
        ("run.rounds=0", shared, ["run.rounds = '0'", "greater than or equal to 1"]),
        ("run.seed=-1", shared, ["run.seed = '-1'"]),
        ("run.mode='Production'", shared, ["'simulation' or 'production'"]),
        ("client.epsilon=nan", read_client, ["client.epsilon = 'nan'"]),
        ("client.epsilon=inf", read_client, ["client.epsilon = 'inf'"]),
        ("client.learner.clip_norm=inf", read_client, ["client.learner.clip_norm = 'inf'"]),
        ("client.learner.steps=true", read_client, ["client.learner.steps = 'True'"]),
        ("lora.alpha=nan", shared, ["lora.alpha = 'nan'"]),
        ("lora.rank=true", shared, ["lora.rank = 'True'"]),
        ("server.network.wait_s=inf", read_server, ["server.network.wait_s = 'inf'"]),
        ("simulation.policy.delta=nan", read_simulation, ["simulation.policy.delta = 'nan'"]),
    ],
)
def test_bad_keys_and_values_are_named(overrides: str, reader: Callable[[Any], object], words: list[str]) -> None:
    reader(read_tree(SMOKE))
    with pytest.raises(ConfigInvalid) as caught:
        reader(read_tree(SMOKE, overrides))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("table", "key", "reader"),
    [
        ("run", "rounds", shared),
        ("run", "mode", shared),
        ("model", "name", shared),
        ("lora", "targets", shared),
        ("client", "learner", read_client),
        ("server", "network", read_server),
        ("server", "exam", read_server),
        ("simulation", "policy", read_simulation),
    ],
)
def test_a_missing_key_is_named(table: str, key: str, reader: Callable[[Any], object]) -> None:
    tree = smoke()
    del tree[table][key]
    with pytest.raises(ConfigInvalid, match=rf"{table}\.{key} is required and absent"):
        reader(tree)


def test_a_missing_table_is_named_by_its_keys() -> None:
    with pytest.raises(ConfigInvalid, match=r"run\.rounds is required and absent"):
        shared({name: table for name, table in smoke().items() if name != "run"})


def test_every_bad_key_is_named_at_once() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        shared(read_tree(SMOKE, "run.rounds=0 model.nme='x' lora.rank=0"))
    assert all(word in str(caught.value) for word in ("run.rounds", "model.nme", "lora.rank"))


def test_a_missing_file_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"no configuration at .*absent\.toml; configs/ holds: .*smoke\.toml"):
        read_tree("configs/absent.toml")
    with pytest.raises(ConfigInvalid, match="no configuration at"):
        read_tree(str(tmp_path / "absent.toml"))


@pytest.mark.parametrize("content", [b"[run\n", b"x = 1\nx = 2\n", b"\xff\xfe", b"run = [1,", b"x = " + b"[" * 9999])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(ConfigInvalid, match=r"bad\.toml is not TOML"):
        read_tree(str(tmp_path / "bad.toml"))


def test_an_absolute_path_and_one_from_the_root_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_tree(SMOKE) == read_tree(str(ROOT / SMOKE))


def test_the_digest_covers_everything_but_the_simulator_and_local_places() -> None:
    same = ["", "run.directory='/elsewhere'", "simulation.grid='ray'", "simulation.policy.epsilon=1.0"]
    other = ["run.seed=1", "run.rounds=3", "client.learner.steps=3", "server.network.poll_s=0.06", "lora.rank=5"]
    reference = digest(read_tree(SMOKE))
    assert {digest(read_tree(SMOKE, overrides)) for overrides in same} == {reference}
    digests = [reference, *(digest(read_tree(SMOKE, overrides)) for overrides in other)]
    assert len(set(digests)) == len(digests)


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    tree = smoke()
    turned = {name: dict(reversed(table.items())) for name, table in reversed(tree.items())}
    assert digest(turned) == digest(tree)


def test_sections_are_frozen() -> None:
    section = shared(smoke())
    with pytest.raises(ValueError, match="frozen"):
        section.run.rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_we_ship_can_be_read(path: Path) -> None:
    tree = read_tree(str(path))
    for reader in READERS:
        if reader is not read_simulation or tree["run"]["mode"] == "simulation":  # real sites are nobody's simulation
            reader(tree)


@pytest.mark.parametrize("content", ["privacy = 3\n", "[site]\nname = 'Not a Name'\n", "x = ", "\udcff"])
def test_a_bad_policy_is_config_invalid(tmp_path: Path, content: str) -> None:
    (tmp_path / "site.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigInvalid, match=r"site\.toml"):
        read_policy(tmp_path)
    with pytest.raises(ConfigInvalid, match=r"no site\.toml"):
        read_policy(tmp_path / "nowhere")


LEAVES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=8).filter(lambda s: s.isprintable()),
    st.just(dt.date(2026, 1, 2)),
    st.just(dt.datetime(2026, 1, 2, tzinfo=dt.UTC)),
    st.sampled_from(["length", "pii", "sft", "iid", "dirichlet", "mean_product", "kind", "record"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["kind", "items", "name", "x", "0", ""]), inner, max_size=3),
    ),
    max_leaves=5,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


PLACES = places(smoke())[1:]


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Any]:
    """Return the smoke tree with one to three places removed, replaced, or given a new neighbour."""
    tree = copy.deepcopy(smoke())
    for place in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        parent: Any = tree
        for key in place[:-1]:
            known = parent if isinstance(parent, dict) else dict(enumerate(parent)) if isinstance(parent, list) else {}
            parent = known.get(key)
        last = place[-1]
        action = draw(st.sampled_from(["remove", "replace", "neighbour"]))
        if isinstance(parent, dict) and action == "remove":
            parent.pop(last, None)
        elif isinstance(parent, dict):
            parent[last if action == "replace" else draw(st.sampled_from(["kind", "x", "item", last]))] = draw(VALUES)
        elif isinstance(parent, list):
            parent[:] = [draw(VALUES)] if action == "replace" else [*parent, draw(VALUES)]
    return tree


@given(tree=mutations())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_says_only_config_invalid_is_raised(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "mutated.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    for reader in READERS:
        try:
            reader(read_tree(str(path)))
        except ConfigInvalid as error:
            assert str(error)  # noqa: PT017 - the one error that is allowed, and it says something


def test_parse_names_what_is_no_table() -> None:
    with pytest.raises(ConfigInvalid, match=r"here = '3'"):
        parse(SharedConfig, 3, where="here")  # type: ignore[arg-type]


# --- a file on top of another


def on_top(
    tmp_path: Path, above: str, below: str = '[run]\nrounds = 2\n[client.learner]\nkind = "x"\nsteps = 1\n'
) -> Any:
    (tmp_path / "below.toml").write_text(below, encoding="utf-8")
    (tmp_path / "above.toml").write_text(f'extends = "{tmp_path}/below.toml"\n{above}', encoding="utf-8")
    return read_tree(str(tmp_path / "above.toml"))


def test_a_file_says_only_what_is_different(tmp_path: Path) -> None:
    tree = on_top(tmp_path, "[run]\nseed = 3\n[client.learner]\nsteps = 9\n")

    assert tree == {"run": {"rounds": 2, "seed": 3}, "client": {"learner": {"kind": "x", "steps": 9}}}


def test_a_table_of_another_kind_is_another_table(tmp_path: Path) -> None:
    """Keys of the former kind would be unknown to the new one."""
    assert on_top(tmp_path, '[client.learner]\nkind = "y"\n')["client"]["learner"] == {"kind": "y"}
    assert on_top(tmp_path, '[client.learner]\nkind = "x"\n')["client"]["learner"] == {"kind": "x", "steps": 1}


@pytest.mark.parametrize(
    ("above", "below", "message"),
    [
        ("", 'extends = "x.toml"\n', "extends another file itself"),
        ("[nowhere]\nx = 1\n", "", r"unknown table \[nowhere\]"),
        ("", "run = 3\n", r"\[run\] is a value, not a table"),
        ("", "run =", "is not TOML"),
    ],
)
def test_what_cannot_be_put_on_top_is_named(tmp_path: Path, above: str, below: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        on_top(tmp_path, above, below)


def test_what_it_extends_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "above.toml").write_text('extends = "nowhere.toml"\n', encoding="utf-8")
    with pytest.raises(ConfigInvalid, match=r"no configuration at .*nowhere\.toml"):
        read_tree(str(tmp_path / "above.toml"))
    (tmp_path / "above.toml").write_text("extends = 3\n", encoding="utf-8")
    with pytest.raises(ConfigInvalid, match=r"extends = '3' is no path"):
        read_tree(str(tmp_path / "above.toml"))
