"""How much a message may hold: counted before anything is decoded, far above all that is honest."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_app import lora_start, wire, wire_arrays
from fl_app.errors import WireViolation
from fl_app.lora import LoraSpec
from fl_app.types import AdapterRelease, DpReceipt, Hello, PoissonGaussian, Probe, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable

SPEC = LoraSpec(shapes={"q": (3, 2), "v": (4, 5)}, rank=2, alpha=8.0, base="a" * 64)
RECEIPT = DpReceipt(
    event=PoissonGaussian(noise_multiplier=1.0123456789012345, sample_rate=1 / 3, steps=123_456, clip_norm=1 / 7),
    unit="u" * 63,
)


def _upload(spec: LoraSpec = SPEC, **changes: Any) -> Upload:
    release = AdapterRelease(adapter=lora_start.initial(spec, np.random.default_rng(0)))
    honest = Upload(site="inn", run="r.d", round=1, release=release, receipts=(RECEIPT,), spent=1.0)
    return dataclasses.replace(honest, **changes)


def _packed() -> RecordDict:
    return wire.pack_reply(_upload())


def _with(record: str, key: str, value: Any) -> RecordDict:
    content = _packed()
    made: Any = content[record]
    made[key] = value
    return content


def _rule(content: RecordDict, read: Callable[[RecordDict], Any] = lambda one: wire.unpack_reply(one, SPEC)) -> str:
    with pytest.raises(WireViolation) as caught:
        read(content)
    assert len(str(caught.value)) < 400
    return caught.value.rule


def test_the_largest_honest_upload_is_far_below_the_limits() -> None:
    """Eight receipts, and all seven maps of 80 blocks under long names: a model of 70 billion numbers."""
    long = "base_model.language_model.model.layers.{}.self_attention.projection_{}"
    shapes = {long.format(block, name): (64, 64) for block in range(80) for name in range(7)}
    spec = LoraSpec(shapes=shapes, rank=1, alpha=8.0, base="a" * 64)
    upload = _upload(spec, site="s" * 63, run="r" * 60 + "." + "d" * 16, receipts=(RECEIPT,) * 8)
    content = wire.pack_reply(upload)

    found = wire.unpack_reply(content, spec)

    assert isinstance(found, Upload)
    assert found.receipts == upload.receipts
    beside = sum(len(name) + wire_arrays._beside(record) for name, record in content.items())
    assert beside < (wire_arrays.MANIFEST_BYTES + wire_arrays.PER_ARRAY_BYTES * 2 * len(shapes)) / 3
    assert len(str(content["upload"]["receipts"])) < wire.MAX_RECEIPTS_TEXT / 4


@pytest.mark.parametrize(
    "content",
    [
        _with("upload", "site", "x" * 10_000_000),
        _with("upload", "site", "x" * 201),
        _with("upload", "receipts", "[" + " " * 20_000 + "]"),
        _with("upload", "note", b"x" * 100_000),
        _with("upload", "note", ["x" * 100] * 1000),
        _with("upload", "note", [1.0] * 10_000),
        _with("upload", "n" * 100_000, 1),
        RecordDict({"x" * 100_000: ConfigRecord()}),
        RecordDict({"metrics": MetricRecord({f"{n}": 1.0 for n in range(9000)})}),
        _with("arrays", "q.a", Array("float32" * 20_000, (2, 3), "numpy.ndarray", b"")),
        _with("arrays", "q.a", Array("float32", (2, 3), "numpy" * 20_000, b"")),
        _with("arrays", "q.a", Array("float32", (1,) * 10_000, "numpy.ndarray", b"")),
        _with("arrays", "a" * 100_000, Array(np.zeros((2, 3), np.float32))),
        RecordDict({f"{n}": ArrayRecord() for n in range(20_000)}),
    ],
    ids=lambda content: ", ".join(str(name)[:9] for name in list(content)[:3]),
)
def test_what_takes_more_than_any_manifest_is_not_read(content: RecordDict) -> None:
    assert _rule(content) == "size"


@pytest.mark.parametrize(("count", "rule"), [(16_000, "shape"), (17_000, "size")])
def test_arrays_are_counted_before_they_are_looked_at(count: int, rule: str) -> None:
    """Twice 112 bytes and the manifest's 65,536 may be there; what is within is told by its own rule."""
    assert _rule(_with("arrays", "q.a", Array(np.zeros((1, count), np.float32)))) == rule


def test_the_longest_array_is_named() -> None:
    with pytest.raises(WireViolation) as caught:
        wire.unpack_reply(_with("arrays", "v.b", Array(np.zeros((1, 100_000), np.float32))), SPEC)

    assert (caught.value.rule, caught.value.tensor) == ("size", "v.b")


def test_a_site_may_read_a_broadcast_of_any_size() -> None:
    content = wire.pack_reply(_upload(LoraSpec(shapes={"q": (99, 999)}, rank=99, alpha=8.0, base="b")))

    assert isinstance(wire.unpack_reply(content), Upload)
    assert _rule(content) == "size"


@pytest.mark.parametrize(
    ("message", "read"),
    [
        (Refusal(site="inn", round=1, code="rows", incident="abc"), wire.unpack_reply),
        (Hello(site="inn", epsilon=8.0, delta=1e-5, unit="record", spent=0.0), wire.unpack_hello),
        (Probe(site="inn", round=1, items=1, bits_per_byte=2.0), wire.unpack_probe),
    ],
    ids=["refusal", "hello", "probe"],
)
def test_short_messages_stay_short(message: Any, read: Any) -> None:
    content = wire.pack_reply(message)
    read(content)  # the twin
    (record,) = content.values()
    record["site"] = "x" * 201
    assert _rule(content, read) in {"size", "keys"}  # a hello's name has a shape of its own
    record["site"] = "x" * 100_000
    assert _rule(content, read) == "size"


@pytest.mark.parametrize(("bits", "good"), [(999.0, True), (1001.0, False), (1e300, False)])
def test_a_score_beyond_any_model_is_refused(bits: float, good: bool) -> None:
    content = wire.pack_reply(Probe(site="inn", round=1, items=1, bits_per_byte=bits))

    if good:
        assert wire.unpack_probe(content).bits_per_byte == bits
    else:
        assert _rule(content, wire.unpack_probe) == "size"


@pytest.mark.parametrize("value", [10**5000, -(10**5000), 2**63, -1], ids=["long", "longer", "64 bits", "-1"])
def test_numbers_of_any_length_are_told_in_short(value: int) -> None:
    assert _rule(_with("upload", "round", value)) == "round"
    assert _rule(_with("upload", "alpha", value)) == "alpha"
    if not 0 < value < 2**64:
        assert _rule(_with("upload", "spent", value)) == "spent"


def test_arrays_are_views_of_the_message() -> None:
    content = _packed()

    found = wire.unpack_reply(content, SPEC)

    assert isinstance(found, Upload)
    assert isinstance(found.release, AdapterRelease)
    part = found.release.adapter.layers["q"].a
    data = content.array_records["arrays"]["q.a"].data
    assert np.shares_memory(part, np.frombuffer(data, np.uint8))
    assert not part.flags.writeable
    assert math.prod(part.shape) * 4 == part.nbytes
