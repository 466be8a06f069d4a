"""B1, the other side: what is honest passes, and of two thousand other things none is more than a rejection."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from fl_app import lora, lora_start, wire, wire_arrays
from fl_app.lora import LoraSpec
from fl_app.types import Adapter, AdapterRelease, Broadcast, Hello, LoraFactors, Refusal, ReleaseSpec, Upload
from simulations import launch
from strategies.knowledge import Knowledge
from strategies.reach import norm, read_cap
from strategies.validate import Rejection, broken_rule
from tests.faults.hostile import BUDGET, COST, DELTA, RECEIPT, STEPS, Hostile, Played, Stage, moved, read, stage, upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["stage"]


# --- what is honest


def again(change: Callable[[RecordDict, Broadcast], RecordDict]) -> Callable[[Message, Message], list[Message]]:
    def twist(asked: Message, reply: Message) -> list[Message]:
        reply.content = change(reply.content, read(asked.content))
        return [reply]

    return twist


def backwards(good: RecordDict, _: Broadcast) -> RecordDict:
    """The same arrays, the last first, in records of the other order."""
    arrays = dict(reversed(list(good.array_records["arrays"].items())))
    return RecordDict({"arrays": ArrayRecord(arrays), "upload": good["upload"]})


def travelled(good: RecordDict, _: Broadcast) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(good))


def widened(_: RecordDict, asked: Broadcast) -> RecordDict:
    """Numbers that were float64 on their way, and are what they were in float32."""
    honest = moved(asked.adapter, seed=1)
    layers = {
        name: LoraFactors(a=one.a.astype(np.float64).astype(np.float32), b=np.asfortranarray(one.b))
        for name, one in honest.layers.items()
    }
    return wire.pack_reply(upload(asked, "inn", dataclasses.replace(honest, layers=layers)))


@pytest.fixture(scope="module")
def clean(stage: Stage) -> Played:
    return stage.play(Hostile())


@pytest.mark.parametrize("change", [backwards, travelled, widened])
def test_another_form_of_the_same_upload_gives_the_same_run(stage: Stage, clean: Played, change: Any) -> None:
    played = stage.play(Hostile(again(change)))

    assert played.record["rejections"] == []
    assert played.record["used"] == ["farm", "inn", "mill"]
    assert played.outcome == clean.outcome


def test_an_update_just_below_the_cap_is_used(stage: Stage) -> None:
    """The twin of `one hundredth beyond the cap`."""

    def far(_: RecordDict, asked: Broadcast) -> RecordDict:
        cap = read_cap({"kind": "dp_lora", "steps": STEPS}).of_round(1)
        layers = {
            name: LoraFactors(
                a=one.a + np.float32(cap.of("a", one.a) * 0.999 / math.sqrt(one.a.size)),
                b=one.b - np.float32(cap.of("b", one.b) * 0.999 / math.sqrt(one.b.size)),
            )
            for name, one in asked.adapter.layers.items()
        }
        return wire.pack_reply(upload(asked, "inn", dataclasses.replace(asked.adapter, layers=layers)))

    assert stage.play(Hostile(again(far))).record["used"] == ["farm", "inn", "mill"]


# --- what is not, over more than one round, and in a run whose sites really train


def test_a_release_of_an_earlier_round_is_no_release_of_this(stage: Stage) -> None:
    """Sent again with a manifest that is right in every field, and an epsilon that counts the round again."""
    kept: list[Adapter] = []

    def replay(asked: Message, reply: Message) -> list[Message]:
        broadcast = read(asked.content)
        kept.append(moved(broadcast.adapter, seed=1))
        return [Message(wire.pack_reply(upload(broadcast, "inn", kept[0])), reply_to=asked)]

    # A target that hardly moves, so that the old release is not too far from it.
    played = stage.play(Hostile(replay), "run.rounds=2", "server.tuner.learning_rate=1e-5")

    used = [one["used"] for one in played.summary["rounds"]]
    assert used == [["farm", "inn", "mill"], ["farm", "mill"]]
    told = "replay: is the release of inn in round 1 once more; noise never comes twice"
    assert [one["rejected"] for one in played.summary["rounds"]] == [{}, {"inn": told}]


def test_two_rounds_of_honest_sites_pass(stage: Stage) -> None:
    """The twin of the test above."""
    played = stage.play(Hostile(), "run.rounds=2", "server.tuner.learning_rate=1e-5")

    assert [one["used"] for one in played.summary["rounds"]] == [["farm", "inn", "mill"]] * 2


def test_nobody_sends_what_another_sent(stage: Stage) -> None:
    """Two sites with one release: the second by name is turned away."""

    def copied(asked: Message, _: Message) -> list[Message]:
        broadcast = read(asked.content)
        farms = moved(broadcast.adapter, seed=0)
        return [Message(wire.pack_reply(upload(broadcast, "inn", farms)), reply_to=asked)]

    played = stage.play(Hostile(copied))

    assert played.record["rejected"] == {"inn": "replay: is the release of farm once more; noise never comes twice"}


def test_a_site_speaks_for_itself_only(stage: Stage) -> None:
    """A fourth node with a name of its own, and an upload in the inn's name: the inn is heard, the fourth is named."""
    played = stage.play(Hostile(hellos={3: {"site": "mint"}}))

    assert played.record["used"] == ["farm", "inn", "mill"]
    assert played.record["rejected"] == {"mint": "site: the reply names another site"}


def test_flowers_own_loop_takes_one_reply_of_a_site_as_well(stage: Stage, clean: Played) -> None:
    """No `exchange` stands before it there: two of the inn, one late, one of nobody, and all in another order."""
    knowledge, grid = stage.knowledge(), Hostile()
    knowledge.open(grid)
    wave = list(knowledge.configure_train(1, ArrayRecord(), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(wave))
    broadcast = read(wave[1].content)
    twice, late, nobodys = (
        Message(wire.pack_reply(upload(broadcast, "inn", moved(broadcast.adapter, seed=9 + n))), reply_to=wave[1])
        for n in range(3)
    )
    late.metadata.__dict__["_group_id"], nobodys.metadata.__dict__["_src_node_id"] = "0", 77

    knowledge.aggregate_train(1, [nobodys, late, *reversed(replies), twice])
    knowledge.pipeline.close()

    played = Played(pipeline=knowledge.pipeline, directory=knowledge.pipeline.journal.directory)
    assert played.outcome == clean.outcome
    told = [(one["site"], one["rule"]) for one in played.record["rejections"]]
    assert told == [("node 77", "member"), ("inn", "deadline"), ("inn", "duplicate")]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC0DEAD, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000], ids=hex)
def test_no_bits_of_a_number_that_is_none_get_through(bits: int) -> None:
    factors = GOOD.layers["v"]
    part = factors.a.copy()
    part[-1, -1] = np.array([bits], np.uint32).view(np.float32)[0]
    spoiled = dataclasses.replace(GOOD, layers={**GOOD.layers, "v": dataclasses.replace(factors, a=part)})

    broken = judged(wire.pack_reply(upload(ASKED, "inn", spoiled)))

    assert isinstance(broken, Rejection)
    assert (broken.site, broken.rule, broken.tensor) == ("inn", "finite", "v.a")


def test_a_real_run_goes_on_without_a_site_whose_upload_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real apps, real training: one site's release is changed on its way, and its hash with it."""
    from simulations.local_grid import FIRST_NODE, LocalGrid

    answer = LocalGrid._answer

    def changed(grid: LocalGrid, message: Message) -> Message | None:
        reply = answer(grid, message)
        if reply is None or (message.metadata.message_type, message.metadata.dst_node_id) != ("train", FIRST_NODE + 1):
            return reply
        sent = wire.unpack_reply(reply.content)
        assert isinstance(sent, Upload)
        assert isinstance(sent.release, AdapterRelease)
        adapter = sent.release.adapter
        name, factors = next(iter(adapter.layers.items()))
        layers = {**adapter.layers, name: dataclasses.replace(factors, b=factors.b * 100)}
        release = AdapterRelease(adapter=dataclasses.replace(adapter, layers=layers))
        reply.content = wire.pack_reply(dataclasses.replace(sent, release=release))
        return reply

    monkeypatch.setattr(launch, "BUILD", tmp_path / "build")
    monkeypatch.setattr(launch, "RUNS", tmp_path / "runs")
    tampered = launch.prepare("configs/smoke.toml", _real(), run="tampered")
    monkeypatch.setattr(LocalGrid, "_answer", changed)
    summary = launch.play(tampered)
    monkeypatch.setattr(LocalGrid, "_answer", answer)
    absent = launch.play(launch.prepare("configs/smoke.toml", _real(), run="absent"), faults={1: "raises"})

    (one,) = summary["rounds"]
    assert one["used"] == ["site-0"]
    assert one["rejected"]["site-1"].startswith("norm: ")
    assert absent["rounds"][0]["rejected"] == {"site-1": "error: code 2"}
    for name in ("merged", "target", "drafts.jsonl", "lessons.jsonl"):
        assert summary["hashes"][f"round_1/{name}"] == absent["hashes"][f"round_1/{name}"]


def _real() -> str:
    small = (
        'simulation.partition={kind="iid", sites=2}',
        "simulation.max_rows_per_site=30",
        "run.rounds=1",
        "client.learner.steps=1",
        "server.synthesizer.drafts=4",
        "server.synthesizer.max_new_tokens=12",
        "server.filters=[]",
        "server.distiller.max_new_tokens=8",
        "server.exam.choice_items=1",
        "server.exam.free_items=0",
    )
    return "\n".join(small)


# --- two thousand ways

SPEC = LoraSpec(shapes={"q": (3, 2), "v": (4, 5)}, rank=2, alpha=8.0, base="a" * 64)
CAP = read_cap({"kind": "dp_lora", "steps": STEPS, "learning_rate": 0.1}).of_round(1)
BEGAN = lora_start.initial(SPEC, np.random.default_rng(0))
ASKED = Broadcast(run="run-a", round=1, adapter=BEGAN, config_digest="d" * 64)
GOOD = moved(BEGAN, seed=7)
SITE = Hello(site="inn", epsilon=BUDGET, delta=DELTA, unit="record", spent=0.0)
FACTORS = [*lora.factor_shapes(SPEC)]


def judged(content: RecordDict) -> Upload | Refusal | Rejection:
    """Return what the server makes of a reply of the inn, by the functions that a round calls."""
    asked: dict[str, Any] = {"spec_of": lambda *_: SPEC, "asked_in": lambda _: ReleaseSpec(), "bins": lambda _: ()}
    server: Any = SimpleNamespace(pipeline=SimpleNamespace(**asked, broadcast_to=lambda *_: ASKED))
    message: Any = SimpleNamespace(content=content, has_error=lambda: False)
    found = Knowledge._read(server, "inn", 1, message)
    if not isinstance(found, Upload):
        return found
    return broken_rule(found, broadcast=ASKED, spec=SPEC, site=SITE, cap=CAP) or found


SCALARS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(max_size=12), st.binary(max_size=12)
)
NUMBERS = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1e-40, 1e30, math.nan, math.inf]))
KEYS = st.sampled_from([*sorted(wire.UPLOAD_KEYS), "num-examples", "", "arrays"])
NAMES = st.sampled_from([*FACTORS, "q", "q.c", ".a", "", "\uff51.a", "../../etc/x", "upload", "arrays", "refusal"])
RECEIPTS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["event", "unit", "relation", "kind", "steps", "x"]), inner, max_size=4),
    ),
    max_leaves=6,
).map(json.dumps)
PARTS = ["noise_multiplier", "sample_rate", "steps", "clip_norm", "kind", "x"]


def _good() -> RecordDict:
    return wire.pack_reply(upload(ASKED, "inn", GOOD))


def _one_record(draw: st.DrawFn, content: RecordDict) -> None:
    content[draw(NAMES)] = draw(st.sampled_from([ConfigRecord({"x": 1}), MetricRecord({"x": 1}), ArrayRecord()]))


def _one_key(draw: st.DrawFn, content: RecordDict) -> None:
    manifest = content.config_records["upload"]
    if draw(st.booleans()):
        manifest[draw(KEYS)] = draw(st.one_of(SCALARS, st.lists(st.text(max_size=3), max_size=2)))
    elif manifest:
        del manifest[draw(st.sampled_from(sorted(manifest)))]


def _receipts(draw: st.DrawFn, content: RecordDict) -> None:
    event = {"kind": "poisson_gaussian", **dataclasses.asdict(RECEIPT.event)}
    event[draw(st.sampled_from(PARTS))] = draw(st.one_of(st.integers(), st.floats(), st.text(max_size=3)))
    one = json.dumps([{"event": event, "unit": "record", "relation": RECEIPT.relation}])
    content.config_records["upload"]["receipts"] = draw(st.one_of(RECEIPTS, st.just(one)))


def _one_array(draw: st.DrawFn, content: RecordDict) -> None:
    """Rename, drop, describe otherwise or cut into one array."""
    kept = dict(content.array_records["arrays"])
    if not kept:
        return
    name = draw(st.sampled_from(sorted(kept)))
    array = kept.pop(name)
    action = draw(st.sampled_from(["drop", "rename", "describe", "cut", "cut"]))
    if action == "rename":
        kept[draw(NAMES)] = array
    elif action == "describe":
        shape = draw(st.one_of(st.just(array.shape), st.lists(st.integers(-3, 2**62), max_size=3).map(tuple)))
        dtype = draw(st.sampled_from(["float32", "float64", "<f4", "object", "", "x" * 99]))
        kept[name] = Array(dtype, shape, draw(st.sampled_from(["numpy.ndarray", "", "x" * 99])), array.data)
    elif action == "cut":
        place = draw(st.integers(0, len(array.data)))
        data = array.data[:place] + draw(st.binary(max_size=3)) + array.data[place + draw(st.integers(0, 3)) :]
        kept[name] = Array(array.dtype, array.shape, array.stype, data)
    content["arrays"] = ArrayRecord(kept)


def _other_adapter(draw: st.DrawFn, content: RecordDict) -> None:
    """Another adapter, or one number of it, with the hash that belongs to it."""
    adapter = moved(
        BEGAN, seed=draw(st.integers(0, 9)), scale=draw(st.sampled_from([0.0, 1e-45, 1e-9, 0.1, 1.0, 1e10]))
    )
    if draw(st.booleans()):
        layer, _, factor = draw(st.sampled_from(FACTORS)).rpartition(".")
        part = getattr(GOOD.layers[layer], factor).copy()
        part.flat[draw(st.integers(0, part.size - 1))] = draw(NUMBERS)
        layers = {**GOOD.layers, layer: dataclasses.replace(GOOD.layers[layer], **{factor: part})}
        adapter = dataclasses.replace(GOOD, layers=layers)
    sent = wire.pack_reply(upload(ASKED, "inn", adapter))
    content["arrays"], content["upload"] = sent["arrays"], sent["upload"]


MUTATIONS = [_one_record, _one_key, _receipts, _one_array, _other_adapter]


@st.composite
def replies(draw: st.DrawFn) -> RecordDict:
    """Return a good upload with up to three things changed, as far as Flower's own types allow it."""
    content = _good()
    for mutate in draw(st.lists(st.sampled_from(MUTATIONS), max_size=3)):
        if "upload" in content.config_records and "arrays" in content.array_records:
            mutate(draw, content)
    return content


@given(content=replies())
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_is_sent_is_sound_or_is_named(content: RecordDict) -> None:
    found = judged(content)

    if isinstance(found, Rejection):
        assert str(found).isprintable()
        assert found.site == "inn"
    elif isinstance(found, Upload):
        assert isinstance(found.release, AdapterRelease)
        adapter = found.release.adapter
        assert lora.sha256(adapter) == content.config_records["upload"]["sha256"]
        assert lora.difference(adapter, SPEC) is None
        for name, began in BEGAN.layers.items():
            assert norm(adapter.layers[name].a - began.a) <= CAP.of("a", began.a)
            assert norm(adapter.layers[name].b - began.b) <= CAP.of("b", began.b)
        assert COST * (1 - 1e-5) <= found.spent <= BUDGET * (1 + 1e-5) or found.receipts != (RECEIPT,)


def test_reading_and_judging_takes_little_memory_beside_the_message() -> None:
    """Arrays are views of the message's own bytes: at most as much again, at the very highest, is the bar."""
    spec = LoraSpec(shapes={f"m.{n}": (256, 256) for n in range(32)}, rank=16, alpha=8.0, base="a" * 64)
    asked = dataclasses.replace(ASKED, adapter=lora_start.initial(spec, np.random.default_rng(0)))
    content = wire.pack_reply(upload(asked, "inn", moved(asked.adapter, seed=1)))
    assert wire_arrays.num_bytes(content) > 1_000_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        found = wire.unpack_reply(content, spec)
        assert isinstance(found, Upload)
        broken = broken_rule(found, broadcast=asked, spec=spec, site=SITE, cap=CAP)
        highest = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()

    assert broken is None
    assert highest < 0.25 * wire_arrays.num_bytes(content)


def test_the_search_finds_both_sound_and_unsound_replies() -> None:
    """The twin: it would prove nothing if all were of one kind."""
    find(replies(), lambda content: isinstance(judged(content), Rejection))
    find(replies(), lambda content: isinstance(judged(content), Upload) and content != _good())
    assert isinstance(judged(_good()), Upload)
