"""The walls: what private rows cannot do, what a message may hold, what a bundle ships, what our code never calls."""

from __future__ import annotations

import ast
import copy
import dataclasses
import io
import json
import pickle
import shutil
import zipfile
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.private_rows import PrivateRow, PrivateRows
from fl_app import lora, wire, wire_arrays, wire_broadcast
from fl_app.errors import WireViolation
from fl_app.origin import ROOT
from fl_app.types import (
    Adapter,
    AdapterRelease,
    Broadcast,
    DpReceipt,
    Exponential,
    Gaussian,
    Hello,
    LoraFactors,
    PoissonGaussian,
    Probe,
    Refusal,
    Upload,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Message: TypeAlias = Broadcast | Upload | Refusal | Hello | Probe

SECRET = "Wilhelmina Quillfeather"  # a canary
ROW = PrivateRow(instruction=SECRET, output=SECRET, code="cough", unit=SECRET)


# --- private rows


def test_private_rows_do_not_print() -> None:
    rows = PrivateRows([ROW])
    shown = [repr(rows), str(rows), f"{rows}", f"{rows!r:>40}", repr([rows]), repr(ROW), str(ROW), repr({"r": ROW})]
    assert not any(word in text for text in shown for word in SECRET.split())
    assert rows.examples == (ROW,)  # the twin: what is hidden is there


@pytest.mark.parametrize(
    "private", [PrivateRows([ROW]), ROW, [ROW], {"rows": PrivateRows([])}], ids=lambda p: type(p).__name__
)
def test_private_rows_are_not_pickled_or_copied(private: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(private, protocol)
    with pytest.raises(TypeError, match="not pickled"):
        copy.deepcopy(private)
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(private)


def test_private_rows_are_not_compared_or_hashed_or_extended() -> None:
    rows = PrivateRows([ROW])
    with pytest.raises(TypeError, match="not compared"):
        _ = rows == PrivateRows([ROW])
    with pytest.raises(TypeError, match="not compared"):
        _ = rows != rows  # noqa: PLR0124
    with pytest.raises(TypeError, match="unhashable"):
        hash(rows)
    with pytest.raises(AttributeError):
        rows.note = SECRET  # type: ignore[attr-defined]
    assert PrivateRow(instruction=SECRET, output=SECRET, code="cough", unit=SECRET) != ROW


# --- messages


def small_adapter() -> Adapter:
    rng = np.random.default_rng(0)

    def factors(d_in: int, d_out: int) -> LoraFactors:
        return LoraFactors(
            a=rng.normal(size=(2, d_in)).astype(np.float32), b=rng.normal(size=(d_out, 2)).astype(np.float32)
        )

    return Adapter(layers={"m.0.q": factors(5, 3), "m.1.v": factors(1, 4)}, alpha=8.0, base="b" * 64)


RECEIPT = DpReceipt(event=PoissonGaussian(noise_multiplier=1.5, sample_rate=0.1, steps=3, clip_norm=1.0), unit="record")
OTHERS = (
    DpReceipt(event=Gaussian(noise_multiplier=2.0, clip_norm=0.5, count=3), unit="record"),
    DpReceipt(event=Exponential(epsilon=0.5), unit="record"),
)
HEAD = "0a" * 32
UPLOAD = Upload(
    site="inn",
    round=2,
    release=AdapterRelease(adapter=small_adapter()),
    receipts=(RECEIPT,),
    spent=1.25,
    head=HEAD,
)
MESSAGES: dict[str, Message] = {
    "broadcast": Broadcast(run="run-a", round=2, adapter=small_adapter(), config_digest="d" * 64, head=HEAD),
    "upload": UPLOAD,
    "refusal": Refusal(site="inn", round=2, code="budget_spent", incident="0123456789ab"),
    "hello": Hello(
        site="inn", epsilon=8.0, delta=1e-5, unit="record", spent=0.0, head=HEAD, composition="renyi_filter"
    ),
    "probe": Probe(site="inn", round=2, items=3, bits_per_byte=2.5),
}
KEYS = {
    "broadcast": ["alpha", "base", "blocks", "config_digest", "head", "parts", "precision", "round", "run", "sha256"],
    "upload": ["alpha", "base", "head", "kind", "receipts", "round", "run", "sha256", "site", "spent"],
    "refusal": ["code", "incident", "round", "site"],
    "hello": [
        "composition",
        "delta",
        "epsilon",
        "first_layer",
        "head",
        "memory_mb",
        "micro_batch_tokens",
        "site",
        "spent",
        "targets",
        "unit",
    ],
    "probe": ["bits_per_byte", "items", "round", "site"],
}
ARRAYS = ["m.0.q.a", "m.0.q.b", "m.1.v.a", "m.1.v.b"]
READ: dict[str, Callable[[RecordDict], Message]] = {
    "broadcast": wire_broadcast.unpack,
    "upload": wire.unpack_reply,
    "refusal": wire.unpack_reply,
    "hello": wire.unpack_hello,
    "probe": wire.unpack_probe,
}
every_message = pytest.mark.parametrize("name", list(MESSAGES))


def packed(name: str) -> RecordDict:
    message = MESSAGES[name]
    return wire_broadcast.pack(message) if isinstance(message, Broadcast) else wire.pack_reply(message)


def plain(message: Message) -> dict[str, Any]:
    """Return a message as comparable values, its arrays as their bytes."""
    fields = {name: getattr(message, name) for name in message.__slots__}
    if (material := fields.pop("material", None)) is not None:
        fields["material"] = (material.texts, {name: one.tolist() for name, one in material.vectors.items()})
    adapter = fields.pop("adapter", None) or getattr(fields.pop("release", None), "adapter", None)
    if adapter:
        fields["layers"] = {n: (f.a.tolist(), f.b.tolist(), f.a.dtype, f.b.dtype) for n, f in adapter.layers.items()}
        fields |= {"alpha": adapter.alpha, "base": adapter.base}
    return fields


@every_message
def test_a_message_has_exactly_these_keys(name: str) -> None:
    content = packed(name)
    with_arrays = name in {"broadcast", "upload"}
    assert sorted(content) == sorted([name, "arrays"] if with_arrays else [name])
    assert sorted(content[name]) == KEYS[name]
    assert isinstance(content[name], ConfigRecord)
    if with_arrays:
        assert isinstance(content["arrays"], ArrayRecord)
        assert sorted(content["arrays"]) == ARRAYS
        assert wire_arrays.num_bytes(content) == sum(len(array.data) for array in content["arrays"].values())


def test_an_upload_holds_nothing_but_the_release() -> None:
    """Its arrays are byte for byte the adapter's; its receipts are JSON with exactly these keys."""
    content = packed("upload")
    arrays: Any = content["arrays"]
    for key, array in arrays.items():
        name, _, factor = key.rpartition(".")
        assert array.data.endswith(getattr(small_adapter().layers[name], factor).tobytes())
        assert array.data == Array(getattr(small_adapter().layers[name], factor)).data
    (receipt,) = json.loads(str(content["upload"]["receipts"]))
    assert sorted(receipt) == ["event", "relation", "unit"]
    assert sorted(receipt["event"]) == ["clip_norm", "kind", "noise_multiplier", "sample_rate", "steps"]


@every_message
def test_what_is_packed_is_what_is_read(name: str) -> None:
    sent = recorddict_from_proto(recorddict_to_proto(packed(name)))  # as Flower puts it on the wire
    assert plain(READ[name](sent)) == plain(MESSAGES[name])


@pytest.mark.parametrize("receipts", [None, (), (RECEIPT,), (RECEIPT, *OTHERS)], ids=lambda r: str(r and len(r)))
def test_receipts_of_every_kind_travel(receipts: tuple[DpReceipt, ...] | None) -> None:
    upload = Upload(site="inn", round=1, release=UPLOAD.release, receipts=receipts, spent=0.0)
    found = wire.unpack_reply(wire.pack_reply(upload))
    assert isinstance(found, Upload)
    assert found.receipts == receipts


def test_a_release_without_receipts_travels_with_an_infinite_epsilon() -> None:
    """And so does the hello of a site that ever sent one; no other number of a message may be infinite."""
    upload = Upload(site="inn", round=1, release=UPLOAD.release, receipts=None, spent=float("inf"))
    hello = Hello(site="inn", epsilon=8.0, delta=1e-5, unit="record", spent=float("inf"))

    found = wire.unpack_reply(recorddict_from_proto(recorddict_to_proto(wire.pack_reply(upload))))
    greeting = wire.unpack_hello(recorddict_from_proto(recorddict_to_proto(wire.pack_reply(hello))))

    assert isinstance(found, Upload)
    assert (found.receipts, found.spent) == (None, float("inf"))
    assert greeting == hello


def refused(name: str, content: RecordDict, words: str = ".") -> None:
    READ[name](packed(name))  # the twin: untouched, it is read
    with pytest.raises(WireViolation, match=words):
        READ[name](content)


def test_a_broadcast_to_a_site_that_was_never_heard_of_has_no_head() -> None:
    first = dataclasses.replace(MESSAGES["broadcast"], head="")
    assert isinstance(first, Broadcast)
    assert wire_broadcast.unpack(recorddict_from_proto(recorddict_to_proto(wire_broadcast.pack(first)))).head == ""


def test_a_broadcast_is_addressed_without_another_copy_of_its_arrays() -> None:
    content = wire_broadcast.pack(dataclasses.replace(MESSAGES["broadcast"], head=""))  # type: ignore[arg-type]
    for head in ("", HEAD, "1" * 64):
        addressed = wire_broadcast.addressed(content, head)
        assert addressed["arrays"] is content["arrays"]
        assert plain(wire_broadcast.unpack(addressed)) == {**plain(MESSAGES["broadcast"]), "head": head}
    assert content["broadcast"]["head"] == ""


@every_message
def test_extra_and_missing_records_are_refused(name: str) -> None:
    for extra in (ConfigRecord({"note": SECRET}), MetricRecord({"loss": 0.5}), ArrayRecord([np.zeros((1, 1))])):
        content = packed(name)
        content["extra"] = extra
        refused(name, content, "records .*; expected")
    for record in list(packed(name)):
        content = packed(name)
        del content[record]
        refused(name, content)
        content[record] = MetricRecord({"loss": 0.5})
        refused(name, content)
    refused(name, RecordDict())


@every_message
def test_extra_and_missing_keys_are_refused(name: str) -> None:
    content = packed(name)
    content[name]["loss"] = 0.5
    refused(name, content, "holds .*; expected")
    for key in KEYS[name]:
        content = packed(name)
        del content[name][key]
        refused(name, content, "holds .*; expected")


WRONG: dict[str, list[Any]] = {
    "text": [3, 0.5, True, b"x", ["x"], [1]],
    "whole": ["3", 0.5, True, -1, b"x", [1], float("nan")],
    "number": ["3", True, -0.5, float("nan"), float("inf"), -float("inf"), b"x", [1.0]],
    "spending": ["3", True, -0.5, float("nan"), -float("inf"), b"x", [1.0], [float("inf")]],
    "names": ["q_proj", 3, [1], [0.5], [True], [b"x"], ["x" * 81], ["q"] * 65],
    "alpha": ["8", 8, True, 0.0, -1.0, float("nan"), float("inf"), 1e6, [8.0]],
}
KINDS = {
    **dict.fromkeys(
        [
            *("run", "config_digest", "base", "sha256", "site", "kind", "receipts", "code", "incident", "unit"),
            *("head", "composition", "precision", "parts", "blocks"),
        ],
        "text",
    ),
    **dict.fromkeys(["round", "items", "memory_mb", "first_layer", "micro_batch_tokens"], "whole"),
    **dict.fromkeys(["epsilon", "delta", "bits_per_byte"], "number"),
    "spent": "spending",
    "targets": "names",
    "alpha": "alpha",
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_values_of_another_type_are_refused(name: str, key: str) -> None:
    for value in WRONG[KINDS[key]]:
        content = packed(name)
        content[name][key] = value
        refused(name, content)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("upload", "kind", "vector"),
        ("upload", "sha256", "0" * 64),
        ("upload", "base", "c" * 64),
        ("upload", "alpha", 9.0),
        ("broadcast", "sha256", ""),
        ("broadcast", "alpha", 9.0),
        ("broadcast", "precision", "int4"),
        *(
            ("broadcast", "parts", value)
            for value in ("", "{}", "[]", "null", '{"a": "x", "b": "y"}', '{"a": 1, "b": 2}')
        ),
        *(
            ("broadcast", "blocks", value)
            for value in ("", "{", "3", "[[1, 2]]", '[["x", 1.0]]', '[["' + "0" * 64 + '"]]')
        ),
        ("refusal", "code", "no such code"),
        ("refusal", "code", ""),
        ("hello", "site", "../../tmp/x"),
        ("hello", "site", "/x"),
        ("hello", "site", ""),
        ("hello", "delta", 0.0),
        ("hello", "delta", 1.0),
        ("hello", "epsilon", 0.0),
        ("hello", "composition", "pld"),
        ("hello", "composition", ""),
        *((name, "head", value) for name in ("upload", "hello") for value in ("", "0" * 63, "A" * 64, "0" * 65)),
        *(("broadcast", "head", value) for value in ("0" * 63, "G" * 64, " ")),
    ],
)
def test_values_that_say_something_else_are_refused(name: str, key: str, value: Any) -> None:
    content = packed(name)
    content[name][key] = value
    refused(name, content)


GOOD = json.loads(str(packed("upload")["upload"]["receipts"]))[0]


@pytest.mark.parametrize(
    "receipts",
    [
        "",
        "{",
        "3",
        "{}",
        '""',
        '"null"',
        "[3]",
        "[null]",
        '["event"]',
        '[["event", "unit", "relation"]]',
        "[" * 9999,
        "[" + "1" * 9999 + "]",
        json.dumps([{**GOOD, "loss": 0.5}]),
        json.dumps([{**GOOD, "relation": "replace_one"}]),
        json.dumps([{**GOOD, "relation": {}}]),
        json.dumps([{**GOOD, "unit": ["record"]}]),
        json.dumps([{**GOOD, "unit": ""}]),
        json.dumps([{**GOOD, "event": None}]),
        *(
            json.dumps([{**GOOD, "event": {**GOOD["event"], key: value}}])
            for key, value in [
                ("kind", "none"),
                ("kind", ["x"]),
                ("loss", 1),
                ("noise_multiplier", float("nan")),
                ("noise_multiplier", -1.0),
                ("noise_multiplier", 10**400),
                ("sample_rate", 1.5),
                ("steps", 0),
                ("steps", 2.0),
                ("steps", True),
                ("steps", 10**400),
                ("clip_norm", float("inf")),
                ("clip_norm", "1"),
            ]
        ),
    ],
    ids=lambda text: text[:24],
)
def test_receipts_that_cannot_be_read_are_refused(receipts: str) -> None:
    content = packed("upload")
    content["upload"]["receipts"] = receipts
    refused("upload", content, "receipts")


def bytes_of(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def arrays_with(name: str, key: str, array: Array | None) -> RecordDict:
    content = packed(name)
    arrays: Any = content["arrays"]
    others = {other: value for other, value in arrays.items() if other != key}
    content["arrays"] = ArrayRecord({**others, **({key: array} if array else {})})
    return content


@pytest.mark.parametrize("name", ["broadcast", "upload"])
def test_arrays_that_are_no_factors_are_refused(name: str) -> None:
    good = small_adapter().layers["m.0.q"].a
    data = bytes_of(good)
    changed = bytearray(data)
    changed[-3] ^= 1
    archive = io.BytesIO()
    np.savez(archive, a=good)
    cases = [
        None,  # b without a
        Array(good.astype(np.float64)),
        Array(good.astype(np.float16)),
        Array(good.astype(np.int32)),
        Array(good.astype(">f4")),
        Array(good[None]),  # three axes
        Array(good.ravel()),
        Array(np.array(good[0, 0])),
        Array(good[:1]),  # a and b do not fit together
        Array(good[:0]),
        Array(np.full_like(good, np.nan)),  # not what was hashed
        Array(good[::-1].copy()),
        Array(np.asfortranarray(good)),
        Array("float32", (2, 5), "numpy.ndarray", bytes(changed)),
        Array("float32", (2, 5), "numpy.ndarray", data[:-1]),
        Array("float32", (2, 5), "numpy.ndarray", data + b"\0"),
        Array("float32", (2, 5), "numpy.ndarray", b""),
        Array("float32", (2, 5), "numpy.ndarray", b"no header" + data),
        Array("float32", (2, 5), "numpy.ndarray", data.replace(b"(2, 5)", b"(9, 9)")),
        Array("float32", (2, 5), "numpy.ndarray", data.replace(b"{", b"(")),
        Array("float32", (2, 5), "numpy.ndarray", archive.getvalue()),
        Array("float32", (2, 5), "numpy.ndarray", bytes_of(np.array([SECRET], object), allow_pickle=True)),
        Array("float32", (2, 5), "numpy.ndarray", pickle.dumps(SECRET)),
        Array("float32", (2, 5), "torch.Tensor", data),
        Array("float64", (2, 5), "numpy.ndarray", data),
        Array("float32", (5, 2), "numpy.ndarray", data),
        Array("float32", (10,), "numpy.ndarray", data),
        Array("float32", (-2, -5), "numpy.ndarray", data),
        Array("float32", (2**40, 2**40), "numpy.ndarray", data),
    ]
    for array in cases:
        refused(name, arrays_with(name, "m.0.q.a", array))


@pytest.mark.parametrize("key", ["m.0.q.c", "a", ".a", "m.0.q", "", "m.2.q.a", "m.0.q.a.b"])
def test_arrays_of_other_names_are_refused(key: str) -> None:
    extra = Array(np.zeros((2, 2), np.float32))
    for name in ("broadcast", "upload"):
        refused(name, arrays_with(name, key, extra))


def test_no_arrays_at_all_are_refused() -> None:
    content = packed("upload")
    content["arrays"] = ArrayRecord()
    refused("upload", content, "arrays is empty")


def test_not_a_number_in_an_honest_adapter_reaches_the_servers_own_check() -> None:
    """The wire vouches for bytes, `strategies.validate` for values: an adapter of NaN is read as it was sent."""
    adapter = small_adapter()
    bad = {**adapter.layers, "m.0.q": LoraFactors(a=np.full((2, 5), np.nan, np.float32), b=adapter.layers["m.0.q"].b)}
    broken = Adapter(layers=bad, alpha=8.0, base=adapter.base)
    upload = Upload(site="inn", round=2, release=AdapterRelease(adapter=broken), receipts=(RECEIPT,), spent=1.0)
    found = wire.unpack_reply(wire.pack_reply(upload))
    assert isinstance(found, Upload)
    assert isinstance(found.release, AdapterRelease)
    assert lora.sha256(found.release.adapter) == lora.sha256(broken)


SCALARS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(max_size=12), st.binary(max_size=12)
)
NAMES = st.sampled_from(
    [*KEYS, "arrays", "extra", "", *ARRAYS, "m.0.q.c", *sorted({k for ks in KEYS.values() for k in ks})]
)
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just(GOOD)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["event", "unit", "relation", "kind", "steps", "x"]), inner, max_size=4),
    ),
    max_leaves=6,
).map(json.dumps)
DATA = st.one_of(
    st.binary(max_size=300),
    st.just(bytes_of(np.ones((2, 5), np.float32))),
    st.tuples(st.integers(0, 167), st.integers(0, 255)).map(
        lambda change: (
            bytes_of(np.ones((2, 5), np.float32))[: change[0]]
            + bytes([change[1]])
            + bytes_of(np.ones((2, 5), np.float32))[change[0] + 1 :]
        )
    ),
)
ODD_ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "float64", "<f4", "object", ""]),
    st.lists(st.integers(-3, 6), max_size=3).map(tuple),
    st.sampled_from(["numpy.ndarray", "torch.Tensor", ""]),
    DATA,
)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, RecordDict]:
    """Return a good message with one to three things changed, as Flower's own types allow it."""
    name = draw(st.sampled_from(list(MESSAGES)))
    content = packed(name)
    for _ in range(draw(st.integers(1, 3))):
        action = draw(
            st.sampled_from(["record", "drop", "key", "drop key", "receipts", "array", "drop array", "bytes"])
        )
        manifest: Any = content.get(name)
        arrays: Any = content.get("arrays")
        if action == "record":
            odd = draw(
                st.sampled_from([ConfigRecord({"x": 1}), MetricRecord({"x": 1}), ArrayRecord(), content.get(name)])
            )
            content[draw(NAMES)] = odd if odd is not None else ConfigRecord()
        elif action == "drop" and content:
            del content[draw(st.sampled_from(sorted(content)))]
        elif action == "key" and isinstance(manifest, ConfigRecord):
            manifest[draw(NAMES)] = draw(st.one_of(SCALARS, st.lists(st.text(max_size=3), max_size=2)))
        elif action == "drop key" and isinstance(manifest, ConfigRecord) and manifest:
            del manifest[draw(st.sampled_from(sorted(manifest)))]
        elif action == "receipts" and isinstance(manifest, ConfigRecord):
            manifest["receipts"] = draw(JSONS)
        elif action in {"array", "drop array", "bytes"} and isinstance(arrays, ArrayRecord):
            key = draw(st.sampled_from(ARRAYS) if action != "array" else NAMES)
            kept = {other: value for other, value in arrays.items() if other != key}
            content["arrays"] = ArrayRecord(kept if action == "drop array" else {**kept, key: draw(ODD_ARRAYS)})
    return name, content


@given(mutated=mutations(), reader=st.sampled_from(sorted(READ)))
@settings(max_examples=300, deadline=None)
def test_whatever_arrives_only_wire_violation_is_raised(mutated: tuple[str, RecordDict], reader: str) -> None:
    name, content = mutated
    for read in (READ[name], READ[reader]):
        try:
            found = read(content)
        except WireViolation:
            continue
        assert isinstance(found, tuple(type(message) for message in MESSAGES.values()))
        again = wire_broadcast.pack(found) if isinstance(found, Broadcast) else wire.pack_reply(found)
        assert sorted(again) == sorted(content)


# --- the bundle

DECOYS = [
    *["rows.jsonl", "fl_app/rows.jsonl", "clients/rows.json", "strategies/notes.md", "configs/site.json"],
    *["configs/site.md", "runs/x/journal.jsonl", "data/rows.toml", "private/README.md", "clients/secret.toml"],
    *["docs/guide.md", "notes.py", "simulations/rows.py", "tests/test_x.py", "clients/LICENSE.md"],
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, zipfile.ZipFile]:
    """Return a copy of the project with decoys of all kinds inside, and the bundle Flower builds of it."""
    app = tmp_path_factory.mktemp("project") / "stillroom"
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for folder in ("fl_app", "strategies", "clients", "configs", "simulations", "tests"):
        shutil.copytree(ROOT / folder, app / folder, ignore=skip)
    for file in ("pyproject.toml", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / file, app / file)
    (app / "README.md").write_text("read me\n", encoding="utf-8")
    for decoy in DECOYS:
        (app / decoy).parent.mkdir(parents=True, exist_ok=True)
        (app / decoy).write_text(SECRET, encoding="utf-8")
    return app, zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app)))


def test_the_bundle_holds_exactly_what_is_listed(bundle: tuple[Path, zipfile.ZipFile]) -> None:
    app, built = bundle
    code = [path for folder in ("fl_app", "strategies", "clients") for path in (app / folder).rglob("*.py")]
    expected = {path.relative_to(app).as_posix() for path in [*code, *(app / "configs").rglob("*.toml")]}
    assert {"fl_app/client_app.py", "fl_app/server_app.py", "configs/smoke.toml"} < expected
    assert set(built.namelist()) == expected | {"README.md", "LICENSE", "pyproject.toml", ".info/CONTENT"}


def test_no_decoy_is_in_the_bundle(bundle: tuple[Path, zipfile.ZipFile]) -> None:
    _, built = bundle
    assert not set(built.namelist()) & set(DECOYS)
    assert not [name for name in built.namelist() if SECRET.encode() in built.read(name)]
    assert not [name for name in built.namelist() if name.startswith(("simulations", "tests", "runs", "docs", "data"))]


# --- the code

FORBIDDEN_NAMES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
FORBIDDEN_KEYWORDS = {
    "trust_remote_code": True,
    "verify": False,
    "weights_only": False,
    "allow_pickle": True,
    "shell": True,
}


def offences(source: str) -> list[str]:
    """Return what a source must not do, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {
                (getattr(node, "module", "") or "").split(".")[0]
            }
            found += [f"{where}: imports {name}" for name in names & FORBIDDEN_NAMES]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_CALLS | FORBIDDEN_NAMES:
            found.append(f"{where}: {node.id}")
        elif isinstance(node, ast.Attribute) and node.attr in {"load", "save"} and ast.unparse(node.value) == "torch":
            found.append(f"{where}: torch.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
            fixed = isinstance(node.value, ast.Constant) and node.value.value is not FORBIDDEN_KEYWORDS[node.arg]
            found += [] if fixed else [f"{where}: {node.arg}={ast.unparse(node.value)}"]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, dill.session",
        "eval('1')",
        "f = exec",
        "import torch\ntorch.load('x')",
        "f = torch.load",
        "load('x', trust_remote_code=True)",
        "load('x', trust_remote_code=flag)",
        "get(url, verify=False)",
        "get(url, verify=check)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_search_for_offences_finds_them(source: str) -> None:
    assert offences(source)


def test_the_search_for_offences_finds_nothing_else() -> None:
    assert not offences("model.eval()\nnp.load(x, allow_pickle=False)\nsave_file(x)\n'pickle'\nre.compile('x')")


@pytest.mark.parametrize("folder", ["fl_app", "strategies", "clients"])
def test_what_ships_never_unpickles_evaluates_or_trusts(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 3
    found = [
        f"{path.relative_to(ROOT)} {what}" for path in files for what in offences(path.read_text(encoding="utf-8"))
    ]
    assert not found
