"""Values <-> Flower records. What is not written here does not leave a site.

    server -> site   train     broadcast: manifest + arrays
    site -> server   train     upload: manifest + arrays, or a refusal
    server -> site   evaluate  broadcast
    site -> server   evaluate  probe score on public text, or a refusal
    server -> site   query     nothing
    site -> server   query     the site's logical id and the public part of its policy, or a refusal

Every reply is checked against the closed list of its keys, on both sides: when it is written and when it is read.
Arrays travel in float32; their names are taken from the manifest's own layer list and matched, never trusted.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fl_app import lora
from fl_app.errors import LedgerRefusal, WireViolation
from fl_app.hash_chain import is_digest
from fl_app.privacy.events import receipt_from_dict, receipt_to_dict
from fl_app.types import (
    REFUSAL_CODES,
    Adapter,
    AdapterRelease,
    Broadcast,
    Composition,
    Hello,
    LoraFactors,
    Probe,
    Refusal,
    Upload,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_app.types import DpReceipt, RefusalCode

SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
UNIT_NAME = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}"
"""A column's name: one line that no page takes for a heading."""

"""A site's logical id; it names a directory on the server, so it is held to this before anything else."""

BROADCAST_KEYS = frozenset({"run", "round", "config_digest", "base", "alpha", "sha256", "head"})
UPLOAD_KEYS = frozenset({"site", "round", "kind", "base", "alpha", "sha256", "receipts", "spent", "head"})
REFUSAL_KEYS = frozenset({"site", "round", "code", "incident"})
HELLO_KEYS = frozenset({"site", "epsilon", "delta", "unit", "spent", "head", "composition"})
PROBE_KEYS = frozenset({"site", "round", "items", "bits_per_byte"})


def pack_broadcast(broadcast: Broadcast) -> RecordDict:
    """Return the message of a round's start."""
    manifest: dict[str, Any] = {
        "run": broadcast.run,
        "round": broadcast.round,
        "config_digest": broadcast.config_digest,
        "base": broadcast.adapter.base,
        "alpha": broadcast.adapter.alpha,
        "sha256": lora.sha256(broadcast.adapter),
        "head": broadcast.head,
    }
    return RecordDict({"broadcast": ConfigRecord(manifest), "arrays": _pack_arrays(broadcast.adapter)})


def addressed(content: RecordDict, head: str) -> RecordDict:
    """Return a packed broadcast for the site whose last known head is `head`; both share the arrays."""
    manifest = dict(_manifest(content, "broadcast", BROADCAST_KEYS, allowed={"broadcast", "arrays"}))
    return RecordDict({"broadcast": ConfigRecord({**manifest, "head": head}), "arrays": content["arrays"]})


def unpack_broadcast(content: RecordDict) -> Broadcast:
    """Return the broadcast. Raises: WireViolation."""
    manifest = _manifest(content, "broadcast", BROADCAST_KEYS, allowed={"broadcast", "arrays"})
    adapter = _unpack_adapter(content, manifest)
    return Broadcast(
        run=_text(manifest, "run"),
        round=_whole(manifest, "round"),
        adapter=adapter,
        config_digest=_text(manifest, "config_digest"),
        head=_head(manifest) if manifest["head"] != "" else "",
    )


def pack_reply(reply: Upload | Refusal | Hello | Probe) -> RecordDict:
    """Return a site's answer to any message: the keys of its kind and no other."""
    if isinstance(reply, Refusal):
        return _pack_refusal(reply)
    if isinstance(reply, Hello):
        return _pack_hello(reply)
    if isinstance(reply, Probe):
        return _pack_probe(reply)
    if not isinstance(reply.release, AdapterRelease):
        raise WireViolation(f"release kind {reply.release.kind!r} has no place on the wire yet; known: adapter")
    receipts = None if reply.receipts is None else [receipt_to_dict(receipt) for receipt in reply.receipts]
    adapter = reply.release.adapter
    manifest: dict[str, Any] = {
        "site": reply.site,
        "round": reply.round,
        "kind": reply.release.kind,
        "base": adapter.base,
        "alpha": adapter.alpha,
        "sha256": lora.sha256(adapter),
        "receipts": json.dumps(receipts),
        "spent": float(reply.spent),
        "head": reply.head,
    }
    assert manifest.keys() == UPLOAD_KEYS
    return RecordDict({"upload": ConfigRecord(manifest), "arrays": _pack_arrays(adapter)})


def _pack_refusal(refusal: Refusal) -> RecordDict:
    fields: dict[str, Any] = {
        "site": refusal.site,
        "round": refusal.round,
        "code": refusal.code,
        "incident": refusal.incident,
    }
    assert fields.keys() == REFUSAL_KEYS
    return RecordDict({"refusal": ConfigRecord(fields)})


def unpack_reply(content: RecordDict) -> Upload | Refusal:
    """Return what a site answered. Raises: WireViolation naming the key, the value and what is allowed."""
    if "refusal" in content:
        fields = _manifest(content, "refusal", REFUSAL_KEYS, allowed={"refusal"})
        code = _text(fields, "code")
        if code not in REFUSAL_CODES:
            raise WireViolation(f"refusal code {code[:40]!r}; known: {', '.join(REFUSAL_CODES)}")
        known: RefusalCode = REFUSAL_CODES[[str(item) for item in REFUSAL_CODES].index(code)]
        return Refusal(
            site=_text(fields, "site"), round=_whole(fields, "round"), code=known, incident=_text(fields, "incident")
        )
    manifest = _manifest(content, "upload", UPLOAD_KEYS, allowed={"upload", "arrays"})
    if manifest["kind"] != "adapter":
        raise WireViolation(f"release kind {str(manifest['kind'])[:40]!r}; known: adapter")
    adapter = _unpack_adapter(content, manifest)
    return Upload(
        site=_text(manifest, "site"),
        round=_whole(manifest, "round"),
        release=AdapterRelease(adapter=adapter),
        receipts=_receipts(_text(manifest, "receipts")),
        spent=_spending(manifest, "spent"),
        head=_head(manifest),
    )


def _receipts(text: str) -> tuple[DpReceipt, ...] | None:
    try:
        listed = json.loads(text)
        if not isinstance(listed, list | None):
            raise WireViolation(f"receipts are {type(listed).__name__}; expected a list or null")
        return None if listed is None else tuple(receipt_from_dict(receipt) for receipt in listed)
    except (ValueError, TypeError, OverflowError, RecursionError, LedgerRefusal) as error:
        raise WireViolation(f"receipts cannot be read: {str(error)[:200]}") from None


def _pack_hello(hello: Hello) -> RecordDict:
    fields: dict[str, Any] = {
        "site": hello.site,
        "epsilon": float(hello.epsilon),
        "delta": float(hello.delta),
        "unit": hello.unit,
        "spent": float(hello.spent),
        "head": hello.head,
        "composition": hello.composition,
    }
    assert fields.keys() == HELLO_KEYS
    return RecordDict({"hello": ConfigRecord(fields)})


def unpack_hello(content: RecordDict) -> Hello:
    """Return how a site introduced itself. Raises: WireViolation."""
    fields = _manifest(content, "hello", HELLO_KEYS, allowed={"hello"})
    if not re.fullmatch(SITE_NAME, _text(fields, "site")):
        raise WireViolation("site is no logical id: lower-case letters, digits and hyphens, at most 63")
    if not re.fullmatch(UNIT_NAME, _text(fields, "unit")):
        raise WireViolation("unit is no column name: letters, digits, blanks and _.-, at most 63")
    if not 0 < _number(fields, "delta") < 1 or not _number(fields, "epsilon") > 0:
        raise WireViolation("delta must lie between 0 and 1, epsilon above 0")
    composition = _text(fields, "composition")
    if composition not in get_args(Composition):
        raise WireViolation(f"composition {composition[:40]!r}; known: {', '.join(get_args(Composition))}")
    return Hello(
        site=_text(fields, "site"),
        epsilon=_number(fields, "epsilon"),
        delta=_number(fields, "delta"),
        unit=_text(fields, "unit"),
        spent=_spending(fields, "spent"),
        head=_head(fields),
        composition=cast("Composition", composition),
    )


def _pack_probe(probe: Probe) -> RecordDict:
    fields: dict[str, Any] = {
        "site": probe.site,
        "round": probe.round,
        "items": probe.items,
        "bits_per_byte": float(probe.bits_per_byte),
    }
    assert fields.keys() == PROBE_KEYS
    return RecordDict({"probe": ConfigRecord(fields)})


def unpack_probe(content: RecordDict) -> Probe:
    """Return a site's score on public text. Raises: WireViolation."""
    fields = _manifest(content, "probe", PROBE_KEYS, allowed={"probe"})
    return Probe(
        site=_text(fields, "site"),
        round=_whole(fields, "round"),
        items=_whole(fields, "items"),
        bits_per_byte=_number(fields, "bits_per_byte"),
    )


def num_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's arrays as Flower serialises them."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def _pack_arrays(adapter: Adapter) -> ArrayRecord:
    arrays: dict[str, Array] = {}
    for name in sorted(adapter.layers):
        arrays[f"{name}.a"] = Array(np.ascontiguousarray(adapter.layers[name].a, np.float32))
        arrays[f"{name}.b"] = Array(np.ascontiguousarray(adapter.layers[name].b, np.float32))
    return ArrayRecord(arrays)


def _manifest(content: RecordDict, name: str, keys: frozenset[str], *, allowed: set[str]) -> dict[str, Any]:
    if {str(key) for key in content} != allowed:
        raise WireViolation(f"records {sorted(map(str, content))[:6]}; expected {sorted(allowed)}")
    record = content[name]
    if not isinstance(record, ConfigRecord) or {str(key) for key in record} != set(keys):
        found = sorted(map(str, record))[:12] if isinstance(record, ConfigRecord) else type(record).__name__
        raise WireViolation(f"{name} holds {found}; expected {sorted(keys)}")
    return dict(record)


def _unpack_adapter(content: RecordDict, manifest: Mapping[str, Any]) -> Adapter:
    record = content["arrays"]
    if not isinstance(record, ArrayRecord):
        raise WireViolation("arrays is no ArrayRecord")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in record.items():
        name, _, factor = key.rpartition(".")
        if factor not in {"a", "b"} or not name:
            raise WireViolation(f"array {key[:80]!r} is no LoRA factor; expected <layer>.a and <layer>.b")
        parts.setdefault(name, {})[factor] = _matrix(key, array)
    for name, found in parts.items():
        if found.keys() != {"a", "b"} or found["a"].shape[0] != found["b"].shape[1]:
            raise WireViolation(f"layer {name[:80]!r}: factors a and b do not fit together")
    if not parts:
        raise WireViolation("arrays is empty; expected one pair of factors per adapted layer")
    alpha = manifest["alpha"]
    if not isinstance(alpha, float) or not 0 < alpha < 1e6:  # noqa: PLR2004
        raise WireViolation(f"alpha = {alpha!r} is no scaling")
    layers = {name: LoraFactors(a=found["a"], b=found["b"]) for name, found in sorted(parts.items())}
    adapter = Adapter(layers=layers, alpha=alpha, base=_text(manifest, "base"))
    if lora.sha256(adapter) != manifest["sha256"]:
        raise WireViolation("sha256 of the arrays is not the one in the manifest; the message was changed on its way")
    return adapter


def _matrix(key: str, array: Array) -> np.ndarray:
    """Return a float32 matrix from bytes that must be exactly what we would send; numpy's file parser never runs."""
    if array.stype != "numpy.ndarray" or array.dtype != "float32" or len(array.shape) != 2:  # noqa: PLR2004
        raise WireViolation(
            f"array {key[:80]!r} is {array.dtype[:20]} of {len(array.shape)} axes in {array.stype[:20]}; expected "
            "float32 of 2 in numpy.ndarray"
        )
    size = math.prod(array.shape) * np.dtype(np.float32).itemsize
    if min(array.shape) < 1 or size > len(array.data):
        raise WireViolation(f"array {key[:80]!r} says shape {array.shape} over {len(array.data)} bytes")
    values = np.frombuffer(array.data[-size:], "<f4").reshape(array.shape).astype(np.float32)
    if Array(values).data != array.data:
        raise WireViolation(f"array {key[:80]!r} is not what numpy.save writes for shape {array.shape}")
    return values


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise WireViolation(f"{key} = {str(value)[:80]!r} is no text")
    return value


def _head(fields: Mapping[str, Any]) -> str:
    """Return the head of a ledger; 64 zeros when there is none to show."""
    if not is_digest(fields["head"]):
        raise WireViolation(f"head = {str(fields['head'])[:80]!r} is no SHA-256 in lower-case hex")
    return fields["head"]


def _number(fields: Mapping[str, Any], key: str) -> float:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise WireViolation(f"{key} = {str(value)[:80]!r} is no finite number from 0")
    return float(value)


def _spending(fields: Mapping[str, Any], key: str) -> float:
    """Return an epsilon; infinite is what a site has spent that ever released without noise, and it may say so."""
    return math.inf if fields[key] == math.inf else _number(fields, key)


def _whole(fields: Mapping[str, Any], key: str) -> int:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WireViolation(f"{key} = {str(value)[:80]!r} is no whole number")
    return value
