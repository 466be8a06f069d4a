"""Releases that are no adapter, over the wire: there and back, and every way in which one may be wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, RecordDict

from fl_app import releases, wire, wire_broadcast
from fl_app.errors import WireViolation
from fl_app.lora import LoraSpec
from fl_app.types import (
    Adapter,
    AdapterRelease,
    Broadcast,
    CodedText,
    DpReceipt,
    Gaussian,
    HistogramRelease,
    LoraFactors,
    Material,
    Release,
    ReleaseSpec,
    TextRelease,
    Upload,
    VectorRelease,
)

SPEC = LoraSpec(shapes={"m.q": (4, 4)}, rank=2, alpha=4.0, base="b" * 64)
RECEIPT = DpReceipt(event=Gaussian(noise_multiplier=2.0, clip_norm=1.0), unit="record")
ASKED = {
    "vector": ReleaseSpec(kind="vector", vectors={"x/3": 5, "x/count": 1}, survey={"codes": 2}),
    "histogram": ReleaseSpec(kind="histogram", vectors={"votes": 3}),
    "text": ReleaseSpec(kind="text", codes=frozenset({"x", "y"}), max_texts=3, max_bytes=20),
}
BINS = ("0", "1", "2")
SENT: dict[str, Release] = {
    "vector": VectorRelease(vectors={"x/3": np.arange(5, dtype=np.float32), "x/count": np.ones(1, np.float32)}),
    "histogram": HistogramRelease(bins=BINS, counts=np.array([1.5, -2.0, 0.0], np.float32)),
    "text": TextRelease(texts=(CodedText(code="x", text="über Öl"), CodedText(code="y", text=""))),
}
SURVEY = VectorRelease(vectors={"codes": np.array([3.5, -1.0], np.float32)})


def upload(kind: str, *, survey: VectorRelease | None = None, release: Release | None = None) -> Upload:
    return Upload(
        site="inn", round=1, release=release or SENT[kind], receipts=(RECEIPT,), spent=0.5, run="r", survey=survey
    )


def read(content: RecordDict, kind: str) -> Any:
    return wire.unpack_reply(content, SPEC, ASKED[kind], BINS)


def rule(content: RecordDict, kind: str) -> str:
    with pytest.raises(WireViolation) as caught:
        read(content, kind)
    return caught.value.rule


@pytest.mark.parametrize("kind", SENT)
def test_there_and_back(kind: str) -> None:
    survey = SURVEY if kind == "vector" else None
    found = read(wire.pack_reply(upload(kind, survey=survey)), kind)
    assert releases.sha256(found.release, found.survey) == releases.sha256(SENT[kind], survey)
    assert (found.receipts, found.spent, found.site) == ((RECEIPT,), 0.5, "inn")


@pytest.mark.parametrize("kind", SENT)
def test_the_manifest_holds_exactly_its_keys(kind: str) -> None:
    content = wire.pack_reply(upload(kind))
    assert {str(key) for key in content["upload"]} == {
        "site", "run", "round", "kind", "sha256", "receipts", "spent", "head",
    }  # fmt: skip
    assert {str(name) for name in content} == {"upload", "texts" if kind == "text" else "arrays"}


@pytest.mark.parametrize("sent", SENT)
@pytest.mark.parametrize("asked", ["adapter", *SENT])
def test_another_kind_than_was_asked_is_turned_away(sent: str, asked: str) -> None:
    if sent == asked:
        return
    content = wire.pack_reply(upload(sent))
    with pytest.raises(WireViolation, match=f"release kind '{sent}'; asked: {asked}"):
        wire.unpack_reply(content, SPEC, ASKED.get(asked, ReleaseSpec()), BINS)


def _array(content: RecordDict, record: str, name: str, value: Any) -> RecordDict:
    content[record][name] = Array(value)  # type: ignore[index]
    return content


@pytest.mark.parametrize(
    ("kind", "name", "value", "broken"),
    [
        ("vector", "x/3", np.zeros(6, np.float32), "shape"),
        ("vector", "x/3", np.zeros((5, 1), np.float32), "shape"),
        ("vector", "x/3", np.zeros(5, np.float64), "dtype"),
        ("vector", "more", np.zeros(5, np.float32), "layers"),
        ("histogram", "counts", np.zeros(4, np.float32), "shape"),
        ("vector", "x/3", np.zeros(100_000, np.float32), "size"),
    ],
)
def test_an_array_that_is_not_ours(kind: str, name: str, value: Any, broken: str) -> None:
    assert rule(_array(wire.pack_reply(upload(kind)), "arrays", name, value), kind) == broken


def test_numbers_that_were_changed_on_the_way() -> None:
    content = _array(wire.pack_reply(upload("vector")), "arrays", "x/3", np.ones(5, np.float32))
    assert rule(content, "vector") == "hash"


@pytest.mark.parametrize(
    ("texts", "broken"),
    [
        ([("x", "a")] * 4, "size"),
        ([("x", "ü" * 11)], "size"),
        ([("z", "a")], "keys"),
        ([("x", "a" * 10_000_000)], "size"),
    ],
)
def test_texts_that_are_too_many_too_long_or_of_no_code(texts: list[tuple[str, str]], broken: str) -> None:
    release = TextRelease(texts=tuple(CodedText(code=code, text=text) for code, text in texts))
    assert rule(wire.pack_reply(upload("text", release=release)), "text") == broken


@pytest.mark.parametrize(
    "record",
    [
        {"codes": ["x"], "texts": ["a", "b"]},
        {"codes": ["x"], "texts": [1]},
        {"codes": "x", "texts": ["a"]},
        {"codes": ["x"], "texts": ["a"], "loss": 0.5},
        {"texts": ["a"]},
    ],
)
def test_texts_that_are_no_two_lists(record: dict[str, Any]) -> None:
    content = wire.pack_reply(upload("text"))
    content["texts"] = ConfigRecord(record)
    assert rule(content, "text") in {"keys", "hash"}
    with pytest.raises(WireViolation, match="texts"):
        read(content, "text")


def test_a_survey_that_nobody_asked_for_or_of_another_length() -> None:
    assert rule(wire.pack_reply(upload("histogram", survey=SURVEY)), "histogram") == "layers"
    longer = VectorRelease(vectors={"codes": np.zeros(3, np.float32)})
    assert rule(wire.pack_reply(upload("vector", survey=longer)), "vector") == "shape"


def test_a_survey_that_was_changed_on_the_way() -> None:
    content = wire.pack_reply(upload("vector", survey=SURVEY))
    assert rule(_array(content, "survey", "codes", np.zeros(2, np.float32)), "vector") == "hash"


def test_material_travels_with_a_broadcast_and_an_empty_one_leaves_no_trace() -> None:
    factors = LoraFactors(a=np.zeros((2, 4), np.float32), b=np.zeros((4, 2), np.float32))
    adapter = Adapter(layers={"m.q": factors}, alpha=4.0, base="b" * 64)
    material = Material(
        texts=(CodedText(code="x", text="public"),), vectors={"x/3/centre": np.arange(3, dtype=np.float32)}
    )
    sent = Broadcast(run="r", round=2, adapter=adapter, config_digest="d", material=material)
    content = wire_broadcast.addressed(wire_broadcast.pack(sent), "ab" * 32)
    found = wire_broadcast.unpack(content)
    assert found.material.texts == material.texts
    assert found.head == "ab" * 32
    np.testing.assert_array_equal(found.material.vectors["x/3/centre"], material.vectors["x/3/centre"])
    other = wire_broadcast.pack(
        dataclasses.replace(sent, material=Material(texts=(CodedText(code="x", text="pubiic"),)))
    )
    for record in ("texts", "vectors"):
        changed = wire_broadcast.addressed(wire_broadcast.pack(sent), "ab" * 32)
        changed[record] = other[record]
        with pytest.raises(WireViolation, match="sha256 of what came"):
            wire_broadcast.unpack(changed)
    empty = wire_broadcast.pack(Broadcast(run="r", round=2, adapter=adapter, config_digest="d"))
    assert {str(name) for name in empty} == {"broadcast", "arrays"}
    assert not wire_broadcast.unpack(empty).material.texts


@pytest.mark.parametrize("kind", SENT)
def test_files_give_back_what_was_released(kind: str, tmp_path: Any) -> None:
    releases.save(SENT[kind], SURVEY, tmp_path / "box", base_name="tiny")
    release, survey = releases.load(tmp_path / "box")
    assert releases.sha256(release, survey) == releases.sha256(SENT[kind], SURVEY)
    assert releases.sha256(release, survey) != releases.sha256(SENT[kind])


def test_scalars_stay_beside_the_adapter_that_they_made(tmp_path: Any) -> None:
    """A resend comes from these files, and it is the scalars that travel."""
    factors = LoraFactors(a=np.ones((2, 4), np.float32), b=np.ones((4, 2), np.float32))
    sent = AdapterRelease(adapter=Adapter(layers={"m.q": factors}, alpha=4.0, base="b" * 64))
    scalars = np.array([0.5, -0.25, 0.0], np.float32)
    releases.save(dataclasses.replace(sent, scalars=scalars), None, tmp_path / "box", base_name="tiny")
    found, _ = releases.load(tmp_path / "box")
    assert isinstance(found, AdapterRelease)
    assert found.scalars is not None
    np.testing.assert_array_equal(found.scalars, scalars)
    releases.save(sent, None, tmp_path / "plain", base_name="tiny")
    plain, _ = releases.load(tmp_path / "plain")
    assert isinstance(plain, AdapterRelease)
    assert plain.scalars is None
