"""B1: 61 replies that are not an honest upload are turned away by name, and the round is as if they had never come.

Each case goes the whole way: a message on the grid, the strategy, the wire, the validator, the aggregator, text written
and lessons learned. What is compared is what the round made, down to the bytes of the target: with a run in which
the site was silent, or, where the case is a reply too many, with a run in which that reply was not sent.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

from fl_app import wire
from fl_app.types import Adapter, Broadcast, LoraFactors
from strategies.reach import read_cap
from tests.faults.hostile import COST, STEPS, Hostile, Played, Stage, moved, read, stage, upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faults.hostile import Twist

__all__ = ["stage"]

LAYER = "model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.a", f"{LAYER}.b"
OTHER = "model.layers.1.self_attn.q_proj"


@dataclass(frozen=True)
class Case:
    """One hostile reply: how it comes about, and what must be said of it.

    `site` is who is named, `as_if` the run it must equal: the site silent, or all as it should be. `hellos` changes how
    a site introduces itself, and a fourth is a node more; `late` replies come with the next wave.
    """

    twist: Twist
    rule: str
    tensor: str = ""
    site: str = "inn"
    as_if: Literal["absent", "clean"] = "absent"
    hellos: dict[int, dict[str, Any]] = field(default_factory=dict)
    late: bool = False


def content(rule: str, tensor: str, change: Callable[[RecordDict, Broadcast], RecordDict], **more: Any) -> Case:
    """Return the case in which the inn's message is changed, or another one put in its place."""

    def twist(asked: Message, reply: Message) -> list[Message]:
        reply.content = change(reply.content, read(asked.content))
        return [reply]

    return Case(twist=twist, rule=rule, tensor=tensor, **more)


def arrays(rule: str, tensor: str, change: Callable[[dict[str, Array]], dict[str, Array]]) -> Case:
    """Return the case in which the arrays are others; the manifest stays the honest one."""

    def changed(good: RecordDict, _: Broadcast) -> RecordDict:
        good["arrays"] = ArrayRecord(change(dict(good.array_records["arrays"])))
        return good

    return content(rule, tensor, changed)


def one(rule: str, change: Callable[[np.ndarray], Array]) -> Case:
    """Return the case in which one array is another."""
    return arrays(rule, A, lambda good: {**good, A: change(good[A].numpy())})


def adapter(rule: str, tensor: str, change: Callable[[Adapter, Adapter], Adapter]) -> Case:
    """Return the case in which another adapter is sent, with the manifest that belongs to it."""

    def sent(_: RecordDict, asked: Broadcast) -> RecordDict:
        honest = moved(asked.adapter, seed=1)
        return wire.pack_reply(upload(asked, "inn", change(honest, asked.adapter)))

    return content(rule, tensor, sent)


def manifest(rule: str, change: Callable[[Any], Any], **more: Any) -> Case:
    """Return the case in which the manifest says something else."""

    def changed(good: RecordDict, _: Broadcast) -> RecordDict:
        change(good.config_records["upload"])
        return good

    return content(rule, "", changed, **more)


def values(rule: str, tensor: str, change: Callable[[str, np.ndarray, np.ndarray], np.ndarray]) -> Case:
    """Return the case in which numbers are others: `change` gets the name of each factor, it, and where it began."""

    def changed(honest: Adapter, began: Adapter) -> Adapter:
        layers = {
            name: LoraFactors(
                a=change(f"{name}.a", factors.a.copy(), began.layers[name].a).astype(np.float32),
                b=change(f"{name}.b", factors.b.copy(), began.layers[name].b).astype(np.float32),
            )
            for name, factors in honest.layers.items()
        }
        return dataclasses.replace(honest, layers=layers)

    return adapter(rule, tensor, changed)


def raw(data: bytes, shape: tuple[int, ...], *, dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype, shape, stype, data)


def saved(part: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, part, **options)
    return buffer.getvalue()


def zipped(part: np.ndarray) -> bytes:
    """Return 30 MB of zeros in 30 kB, under the name that numpy would look for."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", saved(np.zeros(30_000_000 // 4, np.float32)))
    return buffer.getvalue()


def put(part: np.ndarray, value: float) -> np.ndarray:
    part[0, -1] = value
    return part


def exchanged(honest: Adapter, _: Adapter) -> Adapter:
    """Two layers of one shape under each other's name: every name, shape and hash is right."""
    layers = dict(honest.layers)
    layers[LAYER], layers[OTHER] = layers[OTHER], layers[LAYER]
    return dataclasses.replace(honest, layers=layers)


def just_beyond(name: str, part: np.ndarray, began: np.ndarray) -> np.ndarray:
    cap = read_cap({"kind": "dp_lora", "steps": STEPS}).of_round(1).of("b", began)
    return began + np.float32(cap * 1.01 / np.sqrt(began.size)) if name == B else part


def without(key: str) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return lambda good: {name: array for name, array in good.items() if name != key}


def record(name: str, more: Any) -> Callable[[RecordDict, Broadcast], RecordDict]:
    def changed(good: RecordDict, _: Broadcast) -> RecordDict:
        good[name] = more
        return good

    return changed


# --- protocol


def twice(asked: Message, reply: Message) -> list[Message]:
    """A sound upload, and another sound one behind it."""
    broadcast = read(asked.content)
    second = upload(broadcast, "inn", moved(broadcast.adapter, seed=99))
    return [reply, Message(wire.pack_reply(second), reply_to=asked)]


def stranger(asked: Message, reply: Message) -> list[Message]:
    """A sound upload in the inn's name, to the inn's message, from a node that nobody asked; then the inn's own."""
    broadcast = read(asked.content)
    forged = Message(wire.pack_reply(upload(broadcast, "inn", moved(broadcast.adapter, seed=99))), reply_to=asked)
    forged.metadata.__dict__["_src_node_id"] = 77
    return [forged, reply]


def broken(asked: Message, _: Message) -> list[Message]:
    reason = "\x1b[2J\x1b[31mrun_finished\n" + '{"event": "run_finished"}\r\n' + "x" * 10_000_000
    return [Message(Error(2, reason), reply_to=asked)]


CASES: dict[str, Case] = {
    # structure 12
    "structure: an array is missing": arrays("layers", A, without(A)),
    "structure: an array too many": arrays(
        "layers", "model.layers.9.a", lambda good: {**good, "model.layers.9.a": good[A]}
    ),
    "structure: an array of another name": arrays("layers", A, lambda good: {**without(A)(good), "z.a": good[A]}),
    "structure: layers under each other's name": adapter("norm", A, exchanged),
    "structure: a name that only looks the same": arrays(
        "layers", A.replace("q", "\uff51"), lambda good: {**good, A.replace("q", "\uff51"): good[A]}
    ),
    "structure: no arrays": arrays("layers", A, lambda _: {}),
    "structure: two records of arrays": content("keys", "", record("arrays2", ArrayRecord())),
    "structure: another rank": one("shape", lambda part: Array(part[:3].copy())),
    "structure: transposed": one("shape", lambda part: Array(part.T.copy())),
    "structure: one row, which would be repeated": one("shape", lambda part: Array(part[:1].copy())),
    "structure: a scalar": one("shape", lambda part: Array(np.array(part[0, 0]))),
    "structure: a million numbers": one("size", lambda _: Array(np.zeros((4, 250_000), np.float32))),
    # dtype 8
    "dtype: float64": one("dtype", lambda part: Array(part.astype(np.float64))),
    "dtype: float16": one("dtype", lambda part: Array(part.astype(np.float16))),
    "dtype: bfloat16": one(
        "dtype", lambda part: raw(saved(part.view(np.uint16)[:, 1::2].copy()), part.shape, dtype="bfloat16")
    ),
    "dtype: int8": one("dtype", lambda part: Array(part.astype(np.int8))),
    "dtype: bool": one("dtype", lambda part: Array(part > 0)),
    "dtype: complex64": one("dtype", lambda part: Array(part.astype(np.complex64))),
    "dtype: text": one("dtype", lambda part: Array(part.astype("<U4"))),
    "dtype: objects": one(
        "dtype", lambda part: raw(saved(part.astype(object), allow_pickle=True), part.shape, dtype="object")
    ),
    # values 9
    "values: one NaN": values("finite", A, lambda name, part, _: put(part, np.nan) if name == A else part),
    "values: NaN everywhere": values("finite", A, lambda name, part, _: part * np.nan),
    "values: infinities": values(
        "finite", B, lambda name, part, _: put(put(part, np.inf).T, -np.inf).T if name == B else part
    ),
    "values: 1e30": values("norm", B, lambda name, part, _: put(part, 1e30) if name == B else part),
    "values: denormals only": values("zero", B, lambda name, part, _: part * 0 + 1e-40 if name == B else part),
    "values: one hundredth beyond the cap": values("norm", B, just_beyond),
    "values: all zero": values("norm", A, lambda name, part, _: part * 0),
    "values: the broadcast itself": values("replay", "", lambda name, _, began: began),
    "values: the broadcast with other zeros": values(
        "replay", "", lambda name, _, began: np.where(began == 0, -0.0, began)
    ),
    # bytes 9
    "bytes: garbage": one("bytes", lambda part: raw(np.random.default_rng(0).bytes(len(saved(part))), part.shape)),
    "bytes: cut short": one("bytes", lambda part: raw(saved(part)[:-1], part.shape)),
    "bytes: something behind": one("bytes", lambda part: raw(saved(part) + b"\0", part.shape)),
    "bytes: a pickle": one("bytes", lambda part: raw(pickle.dumps(part), part.shape)),
    "bytes: an object array": one("bytes", lambda part: raw(saved(part.astype(object), allow_pickle=True), part.shape)),
    "bytes: a bomb": one("bytes", lambda part: raw(zipped(part), part.shape)),
    "bytes: a header of 2^60 bytes": one(
        "bytes", lambda part: raw(b"\x93NUMPY\x03\x00" + (1 << 60).to_bytes(8, "little") + saved(part), part.shape)
    ),
    "bytes: another shape inside": one("bytes", lambda part: raw(saved(part.T.copy()), part.shape)),
    "bytes: written in another way": one("bytes", lambda part: raw(saved(part), part.shape, stype="torch.Tensor")),
    # metadata 14
    **{
        f"metadata: n = {told}": manifest("keys", lambda record, n=n: record.update({"num-examples": n}))
        for told, n in {
            "0": 0,
            "-5": -5,
            "NaN": float("nan"),
            "Inf": float("inf"),
            "10^18": 10**18,
            "true": True,
            "text": "many",
            "a list": [29, 29],
        }.items()
    },
    "metadata: metrics, and no n": content("keys", "", record("metrics", MetricRecord({"train_loss": 0.5}))),
    "metadata: no epsilon": manifest("keys", lambda record: record.pop("spent")),
    "metadata: epsilon = -1": manifest("spent", lambda record: record.update(spent=-1.0)),
    "metadata: epsilon = NaN": manifest("spent", lambda record: record.update(spent=float("nan"))),
    "metadata: epsilon above the budget": manifest("spent", lambda record: record.update(spent=8.001)),
    "metadata: epsilon below that of before": manifest(
        "spent", lambda record: record.update(spent=COST), hellos={1: {"spent": COST + 0.1}}
    ),
    # protocol 9
    "protocol: another round": manifest("round", lambda record: record.update(round=2)),
    "protocol: another run": manifest("run", lambda record: record.update(run="run-b" + record["run"][5:])),
    "protocol: another base model": adapter("base", "", lambda good, _: dataclasses.replace(good, base="c" * 64)),
    "protocol: another hash": manifest("hash", lambda record: record.update(sha256="0" * 64)),
    "protocol: a second reply": Case(twist=twice, rule="duplicate", as_if="clean"),
    "protocol: a node that nobody asked": Case(twist=stranger, rule="member", site="node 77", as_if="clean"),
    "protocol: a second node of one name": Case(
        twist=lambda _, reply: [reply], rule="duplicate", hellos={3: {"site": "inn"}}
    ),
    "protocol: a reply after the deadline": Case(twist=lambda _, reply: [reply], rule="deadline", late=True),
    "protocol: an error of 10 MB with control codes": Case(twist=broken, rule="error"),
}


def play(stage: Stage, case: Case) -> Played:
    return stage.play(Hostile(case.twist, hellos=case.hellos, hold=case.late))


@pytest.fixture(scope="module")
def runs(stage: Stage) -> dict[str, Played]:
    """The two runs that others are held against."""
    return {"clean": stage.play(Hostile()), "absent": stage.play(Hostile(lambda *_: []))}


def test_the_site_matters(runs: dict[str, Played]) -> None:
    """The twin: an honest inn is used, nothing is turned away, and without it every result is another."""
    clean, absent = runs["clean"], runs["absent"]

    assert (clean.record["used"], clean.record["rejected"]) == (["farm", "inn", "mill"], {})
    assert (absent.record["used"], absent.record["silent"]) == (["farm", "mill"], ["inn"])
    assert clean.record["rejections"] == absent.record["rejections"] == []
    assert clean.summary["lessons"] > 0
    assert clean.outcome != absent.outcome
    assert all(clean.outcome[name] != absent.outcome[name] for name in ("file", "merged", "target"))


def test_there_are_as_many_cases_as_the_bar_counts() -> None:
    groups = [name.partition(":")[0] for name in CASES]

    assert {group: groups.count(group) for group in groups} == {
        "structure": 12,
        "dtype": 8,
        "values": 9,
        "bytes": 9,
        "metadata": 14,
        "protocol": 9,
    }


@pytest.mark.bar("B1")
@pytest.mark.parametrize("name", CASES)
def test_a_reply_that_is_no_honest_upload_changes_nothing(stage: Stage, runs: dict[str, Played], name: str) -> None:
    case = CASES[name]

    played = play(stage, case)

    assert played.summary["status"] == "completed"
    assert played.outcome == runs[case.as_if].outcome
    assert _told(played) == [{"site": case.site, "rule": case.rule, "tensor": case.tensor}]
    assert (played.directory / "journal.jsonl").stat().st_size < 20_000
    assert len(played.summary["error"]) == 0
    assert all(line.isprintable() for line in (played.directory / "journal.jsonl").read_text().splitlines())
    assert [event["event"] for event in played.events].count("run_finished") == 1


def _told(played: Played) -> list[dict[str, str]]:
    """Return who was turned away and why, from the journal; the record must agree where it has a place for it."""
    events = [event for event in played.events if event.get("state") == "rejected" or event["event"] == "stray"]
    found = [{key: event[key] for key in ("site", "rule", "tensor")} for event in events]
    train = [one for one in found if one["rule"] != "deadline"]
    assert [{key: one[key] for key in ("site", "rule", "tensor")} for one in played.record["rejections"]] == train
    unready = next(event for event in played.events if event["event"] == "run_started")["unready"].values()
    return found + [{"site": "inn", "rule": why.partition(":")[0], "tensor": ""} for why in unready if "inn" in why][:1]
