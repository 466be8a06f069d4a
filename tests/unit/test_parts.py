"""What a site has does not travel again; what it lost is named; what came is what was meant, to the bit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from clients.received import Received
from fl_app import lora, parts, transport, wire, wire_arrays, wire_broadcast
from fl_app.errors import WireViolation
from fl_app.types import Adapter, AdapterRelease, Broadcast, LoraFactors, ReleaseSpec, Upload

if TYPE_CHECKING:
    from pathlib import Path

HEADER = 128
"""What numpy writes before an array's numbers."""


def draw(seed: int, *, core: bool = False, rank: int = 2) -> Adapter:
    rng = np.random.default_rng(seed)

    def one(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    layers = {
        name: LoraFactors(a=one(rank, d_in), b=one(d_out, rank), core=one(rank, rank) if core else None)
        for name, d_in, d_out in (("q", 5, 3), ("v", 4, 6))
    }
    return Adapter(layers=layers, alpha=4.0, base="b" * 64)


def sent(adapter: Adapter, *blocks: Adapter, number: int = 1) -> Broadcast:
    return Broadcast(run="r", round=number, adapter=adapter, config_digest="d" * 64, blocks=blocks)


def same(one: Broadcast, other: Broadcast) -> bool:
    hashes = [[lora.sha256(adapter) for adapter in (b.adapter, *b.blocks)] for b in (one, other)]
    return hashes[0] == hashes[1] and [b.alpha for b in one.blocks] == [b.alpha for b in other.blocks]


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_whole_broadcast_needs_nothing_that_is_kept(core: bool, precision: Any) -> None:
    adapter, block = (transport.rounded(draw(n, core=core and n == 1), parts.FACTORS, precision) for n in (1, 2))

    found = wire_broadcast.unpack(wire_broadcast.pack(sent(adapter, block), precision))

    assert same(found, sent(adapter, block))


def test_what_did_not_change_does_not_travel(tmp_path: Path) -> None:
    received = Received(directory=tmp_path / "received")
    first, block = draw(1), draw(2, rank=3)
    received.keep(sent(first, block))
    moved = {name: dataclasses.replace(one, b=one.b + 1) for name, one in first.layers.items()}
    second, new = dataclasses.replace(first, layers=moved), draw(3)
    broadcast = sent(second, block, new, number=2)

    content = wire_broadcast.addressed(wire_broadcast.pack(broadcast), "", parts.hashes(first, [block]))

    assert sorted(content["arrays"]) == ["q.b", "v.b"]
    assert sorted(map(str, content)) == ["arrays", "block-1", "broadcast"]
    numbers = sum(one.b.size for one in second.layers.values()) + 2 * (5 + 3 + 4 + 6)
    assert wire_arrays.num_bytes(content) == 4 * numbers + 6 * HEADER
    assert same(wire_broadcast.unpack(content, received.find), broadcast)


def test_what_is_not_kept_is_named_and_nothing_is_made_up(tmp_path: Path) -> None:
    received = Received(directory=tmp_path / "received")
    broadcast = sent(draw(1), draw(2))
    content = wire_broadcast.addressed(wire_broadcast.pack(broadcast), "", parts.hashes(draw(1), [draw(2)]))
    with pytest.raises(WireViolation, match=r"a did not come, and [0-9a-f]{12} is not kept here; the next round"):
        wire_broadcast.unpack(content, received.find)

    received.keep(broadcast)
    path = min((tmp_path / "received").glob("*/*"))
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x01")  # one number of one part
    with pytest.raises(WireViolation, match="did not come"):
        wire_broadcast.unpack(content, received.find)
    path.write_bytes(b"no file of arrays")
    with pytest.raises(WireViolation, match="did not come"):
        wire_broadcast.unpack(content, received.find)


def test_another_array_than_the_manifest_names_is_refused() -> None:
    content = wire_broadcast.pack(sent(draw(1), draw(2)))
    other = wire_broadcast.pack(sent(draw(1), draw(3)))
    content["block-0"] = other["block-0"]

    with pytest.raises(WireViolation, match="block-0 is not the block that the manifest names"):
        wire_broadcast.unpack(content)


def test_only_the_last_broadcast_is_kept(tmp_path: Path) -> None:
    received = Received(directory=tmp_path / "received")
    received.keep(sent(draw(1), draw(2)))
    before = {path.name for path in (tmp_path / "received").glob("*/*")}
    received.keep(sent(draw(1), draw(3)))
    after = {path.name for path in (tmp_path / "received").glob("*/*")}

    assert len(before) == len(after) == 3
    assert len(before & after) == 2
    assert received.find("../" + "a" * 61) is None


def test_runs_do_not_touch_each_others_parts_and_old_ones_go(tmp_path: Path) -> None:
    received = Received(directory=tmp_path / "received")
    for number in range(6):
        received.keep(dataclasses.replace(sent(draw(number)), run=f"run-{number}"))

    found = [received.find(parts.sha256(parts.part(draw(number), "a"))) is not None for number in range(6)]
    assert found == [False, False, True, True, True, True]


@pytest.mark.parametrize("factors", [("a", "b"), ("b",), ("a",), ("core",)])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_an_upload_brings_what_moved_and_the_rest_is_the_broadcasts(factors: Any, precision: Any) -> None:
    core = factors == ("core",)
    start, trained = draw(1, core=core), draw(2, core=core)
    layers = {
        name: dataclasses.replace(one, **{factor: getattr(trained.layers[name], factor) for factor in factors})
        for name, one in start.layers.items()
    }
    adapter = transport.rounded(dataclasses.replace(start, layers=layers), factors, precision, start)
    asked = ReleaseSpec(factors=factors, precision=precision)
    upload = Upload(site="inn", round=1, release=AdapterRelease(adapter=adapter), receipts=None, spent=0.0)
    spec = lora.spec_like(start)

    content = wire.pack_reply(upload, asked, start)
    found = wire.unpack_reply(content, spec, asked, (), start)

    assert isinstance(found, Upload)
    assert isinstance(found.release, AdapterRelease)
    assert lora.sha256(found.release.adapter) == lora.sha256(adapter)
    shapes = {key: shape for key, shape in lora.factor_shapes(spec).items() if key.rpartition(".")[2] in factors}
    size = sum(transport.num_bytes(shape, key.rpartition(".")[2], precision) for key, shape in shapes.items())  # type: ignore[arg-type]
    pieces = len(shapes) * (2 if precision == "int8" else 1)
    assert wire_arrays.num_bytes(content) == size + pieces * HEADER


def test_a_site_that_moved_what_does_not_travel_is_found_out() -> None:
    """Its hash is of what it trained; what the server puts together is another adapter."""
    start = draw(1)
    moved = {name: dataclasses.replace(one, a=one.a + 1, b=one.b + 1) for name, one in start.layers.items()}
    release = AdapterRelease(adapter=dataclasses.replace(start, layers=moved))
    upload = Upload(site="inn", round=1, release=release, receipts=None, spent=0.0)
    asked = ReleaseSpec(factors=("b",))

    with pytest.raises(WireViolation, match="sha256 of what came"):
        wire.unpack_reply(wire.pack_reply(upload, asked), lora.spec_like(start), asked, (), start)
