"""Values <-> Flower records. What is not written here does not leave a site.

    server -> site   train     broadcast: manifest + arrays
    site -> server   train     upload: manifest + arrays, or a refusal
    server -> site   evaluate  broadcast
    site -> server   evaluate  probe score on public text, or a refusal
    server -> site   query     nothing
    site -> server   query     the site's logical id and the public part of its policy, or a refusal

Every reply is checked against the closed list of its keys, on both sides: when it is written and when it is read.
Arrays travel in float32. The server reads them against its own spec: it counts the bytes before it looks at any,
and then holds every array to the one header and length that its name may have. What a message says of an array's type
and shape is compared and never used, and no parser of numpy's ever runs on bytes from outside, so there is nothing in
a header to attack. Errors name the rule that was broken and the array, in words of ours.

Source: ours; rules T1, T5 and T30 of `reliability-and-security.md` 2.2.
"""

from __future__ import annotations

import io
import json
import math
import re
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

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

    from fl_app.lora import LoraSpec
    from fl_app.types import DpReceipt, Floats, RefusalCode

SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
UNIT_NAME = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}"
"""A column's name: one line that no page takes for a heading."""

"""A site's logical id; it names a directory on the server, so it is held to this before anything else."""

MAX_DELTA, MAX_EPSILON = 1e-2, 1e4
"""Beyond these a policy promises nothing: at a delta of 0.01 one unit in a hundred may be published as it is, and an
epsilon of 10,000 is far above a step with a noise multiplier of 0.1 (92). Such a site is not ready to take part."""

MAX_BITS_PER_BYTE = 1000.0
"""A model that knows nothing needs log2(vocabulary), under 20, per token; what claims more than this is no score."""

MAX_TEXT, MAX_RECEIPTS_TEXT = 200, 1 << 14
"""Characters of one value. Eight receipts, the most that the server adds up, take under 2,000."""

MANIFEST_BYTES = 1 << 16
"""The most that a message may hold beside its arrays. An honest manifest takes under 3,000 bytes."""

PER_ARRAY_BYTES = 512
"""What an array may take beside its numbers: its header (128), its name, and what the message says of it."""

BROADCAST_KEYS = frozenset({"run", "round", "config_digest", "base", "alpha", "sha256", "head"})
UPLOAD_KEYS = frozenset({"site", "run", "round", "kind", "base", "alpha", "sha256", "receipts", "spent", "head"})
REFUSAL_KEYS = frozenset({"site", "round", "code", "incident"})
HELLO_KEYS = frozenset({"site", "epsilon", "delta", "unit", "spent", "head", "composition"})
PROBE_KEYS = frozenset({"site", "round", "items", "bits_per_byte"})

_RULES = {"site": "site", "run": "run", "round": "round", "base": "base", "receipts": "receipt", "spent": "spent"}
"""The rule that a value of the wrong type breaks, by its key; for all others, `keys`."""


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
        "run": reply.run,
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


def unpack_reply(content: RecordDict, spec: LoraSpec | None = None) -> Upload | Refusal:
    """Return what a site answered; with `spec`, what any upload to this server must be, nothing else is decoded.

    Guarantee: arrays are views of the message's own bytes, so reading takes no memory of the size of the upload.
    Raises: WireViolation naming the rule, the array where there is one, the value and what is allowed.
    """
    _check_size(content, spec)
    if "refusal" in content:
        fields = _manifest(content, "refusal", REFUSAL_KEYS, allowed={"refusal"})
        code = _text(fields, "code")
        if code not in REFUSAL_CODES:
            raise WireViolation(f"refusal code {code[:40]!r}; known: {', '.join(REFUSAL_CODES)}", rule="kind")
        known: RefusalCode = REFUSAL_CODES[[str(item) for item in REFUSAL_CODES].index(code)]
        return Refusal(
            site=_text(fields, "site"), round=_whole(fields, "round"), code=known, incident=_text(fields, "incident")
        )
    manifest = _manifest(content, "upload", UPLOAD_KEYS, allowed={"upload", "arrays"})
    if manifest["kind"] != "adapter":
        raise WireViolation(f"release kind {str(manifest['kind'])[:40]!r}; known: adapter", rule="kind")
    adapter = _unpack_adapter(content, manifest, spec)
    return Upload(
        site=_text(manifest, "site"),
        round=_whole(manifest, "round"),
        release=AdapterRelease(adapter=adapter),
        receipts=_receipts(_text(manifest, "receipts", MAX_RECEIPTS_TEXT)),
        spent=_spending(manifest, "spent"),
        run=_text(manifest, "run"),
        head=_head(manifest),
    )


def _receipts(text: str) -> tuple[DpReceipt, ...] | None:
    try:
        listed = json.loads(text)
        if not isinstance(listed, list | None):
            raise WireViolation(f"receipts are {type(listed).__name__}; expected a list or null", rule="receipt")
        return None if listed is None else tuple(receipt_from_dict(receipt) for receipt in listed)
    except (ValueError, TypeError, OverflowError, RecursionError, LedgerRefusal) as error:
        raise WireViolation(f"receipts cannot be read: {str(error)[:200]}", rule="receipt") from None


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
    _check_size(content, None)
    fields = _manifest(content, "hello", HELLO_KEYS, allowed={"hello"})
    if not re.fullmatch(SITE_NAME, _text(fields, "site")):
        raise WireViolation("site is no logical id: lower-case letters, digits and hyphens, at most 63")
    if not re.fullmatch(UNIT_NAME, _text(fields, "unit")):
        raise WireViolation("unit is no column name: letters, digits, blanks and _.-, at most 63")
    delta, epsilon = _number(fields, "delta"), _number(fields, "epsilon")
    if not 0 < delta <= MAX_DELTA or not 0 < epsilon <= MAX_EPSILON:
        raise WireViolation(
            f"delta = {delta:g} and epsilon = {epsilon:g}: above 0, and at most {MAX_DELTA:g} and {MAX_EPSILON:g}",
            rule="spent",
        )
    composition = _text(fields, "composition")
    if composition not in get_args(Composition):
        raise WireViolation(f"composition {composition[:40]!r}; known: {', '.join(get_args(Composition))}")
    return Hello(
        site=_text(fields, "site"),
        epsilon=epsilon,
        delta=delta,
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
    _check_size(content, None)
    fields = _manifest(content, "probe", PROBE_KEYS, allowed={"probe"})
    score = _number(fields, "bits_per_byte")
    if score > MAX_BITS_PER_BYTE:
        raise WireViolation(f"bits_per_byte = {score:g}, at most {MAX_BITS_PER_BYTE:g}", rule="size")
    return Probe(
        site=_text(fields, "site"), round=_whole(fields, "round"), items=_whole(fields, "items"), bits_per_byte=score
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


def _check_size(content: RecordDict, spec: LoraSpec | None) -> None:
    """Raise `WireViolation` when a message is larger than any good one. Bytes are counted, none is looked at.

    With a spec its arrays may take twice what they need: little enough to hold, and enough to say of a longer array
    which rule it breaks. Without one (a site that reads its server) arrays may be of any size.
    """
    arrays = sum(len(record) for record in content.array_records.values())
    if spec is not None:
        arrays = 2 * len(spec.shapes)
        most = 2 * sum(4 * spec.rank * (d_in + d_out) for d_in, d_out in spec.shapes.values()) + MANIFEST_BYTES
        if (found := num_bytes(content)) > most:
            sizes = {key: len(one.data) for record in content.array_records.values() for key, one in record.items()}
            longest = max(sizes, key=lambda key: sizes[key])
            raise WireViolation(f"is the longest of {found} bytes, at most {most}", rule="size", tensor=longest)
    most = MANIFEST_BYTES + PER_ARRAY_BYTES * arrays
    found = sum(len(str(name)) + _beside(record) for name, record in content.items())
    if found > most:
        raise WireViolation(f"all but the arrays takes {found} bytes, at most {most}", rule="size")


def _beside(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    """Return the bytes of a record beside the bytes of its arrays, near enough."""
    if isinstance(record, ArrayRecord):
        told = ((key, array.dtype, array.stype, array.shape) for key, array in record.items())
        return sum(len(key) + len(dtype) + len(stype) + 8 * len(shape) for key, dtype, stype, shape in told)
    return sum(len(key) + _width(value) for key, value in record.items())


def _width(value: object) -> int:
    if isinstance(value, list):
        return sum(_width(one) for one in value)
    return len(value) if isinstance(value, (str, bytes)) else 8


def _unpack_adapter(content: RecordDict, manifest: Mapping[str, Any], spec: LoraSpec | None = None) -> Adapter:
    record = content["arrays"]
    if not isinstance(record, ArrayRecord):
        raise WireViolation("arrays is no ArrayRecord")
    shapes = _shapes(record) if spec is None else lora.factor_shapes(spec)
    if odd := sorted(set(record) ^ shapes.keys()):
        raise WireViolation("is missing" if odd[0] in shapes else "is none of ours", rule="layers", tensor=odd[0])
    alpha = manifest["alpha"]
    if not isinstance(alpha, float) or not 0 < alpha < 1e6:  # noqa: PLR2004
        raise WireViolation(f"alpha = {_shown(alpha)} is no scaling", rule="alpha")
    values = {key: _matrix(key, record[key], shape) for key, shape in shapes.items()}
    names = sorted({key.rpartition(".")[0] for key in values})
    layers = {name: LoraFactors(a=values[f"{name}.a"], b=values[f"{name}.b"]) for name in names}
    adapter = Adapter(layers=layers, alpha=alpha, base=_text(manifest, "base"))
    if lora.sha256(adapter) != manifest["sha256"]:
        raise WireViolation("sha256 of the arrays is not the one in the manifest", rule="hash")
    return adapter


def _shapes(record: ArrayRecord) -> dict[str, tuple[int, int]]:
    """Return the shapes that a message without a spec claims for its own arrays, when they fit together."""
    shapes: dict[str, tuple[int, int]] = {}
    for key, array in record.items():
        name, _, factor = key.rpartition(".")
        if factor not in {"a", "b"} or not name:
            raise WireViolation("is no LoRA factor; expected <layer>.a and <layer>.b", rule="layers", tensor=key)
        if len(array.shape) != 2 or min(array.shape) < 1:  # noqa: PLR2004
            raise WireViolation(f"is of shape {str(array.shape)[:80]}; expected two axes", rule="shape", tensor=key)
        shapes[key] = (array.shape[0], array.shape[1])
    for name in sorted({key.rpartition(".")[0] for key in shapes}):
        rank, other = shapes.get(f"{name}.a", (0, 0))[0], shapes.get(f"{name}.b", (0, -1))[1]
        if rank != other:
            raise WireViolation("factors a and b do not fit together", rule="shape", tensor=name)
    if not shapes:
        raise WireViolation("arrays is empty; expected one pair of factors per adapted layer", rule="layers")
    return shapes


def _matrix(key: str, array: Array, shape: tuple[int, int]) -> Floats:
    """Return a float32 matrix over the message's own bytes, which must be exactly what we would send for `shape`."""
    if array.dtype != "float32":
        raise WireViolation(f"is {array.dtype[:20]!r}, not float32", rule="dtype", tensor=key)
    if array.shape != shape:
        told = str(array.shape[:4]) if len(array.shape) <= 4 else f"{len(array.shape)} axes"  # noqa: PLR2004
        raise WireViolation(f"is {told[:80]}, ours is {shape}", rule="shape", tensor=key)
    if array.stype != "numpy.ndarray":
        raise WireViolation(f"is written as {array.stype[:20]!r}, not numpy.ndarray", rule="bytes", tensor=key)
    header = _header(shape)
    if len(array.data) != len(header) + 4 * math.prod(shape) or not array.data.startswith(header):
        raise WireViolation(
            f"is not what numpy.save writes for float32 {shape}: {len(array.data)} bytes", rule="bytes", tensor=key
        )
    return np.frombuffer(array.data, "<f4", offset=len(header)).reshape(shape).astype(np.float32, copy=False)


def _header(shape: tuple[int, int]) -> bytes:
    """Return what `numpy.save` writes before the numbers of a float32 matrix of this shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _text(fields: Mapping[str, Any], key: str, limit: int = MAX_TEXT) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise WireViolation(f"{key} = {_shown(value)} is no text", rule=_RULES.get(key, "keys"))
    if len(value) > limit:
        raise WireViolation(f"{key} is {len(value)} characters, at most {limit}", rule="size")
    return value


def _head(fields: Mapping[str, Any]) -> str:
    """Return the head of a ledger; 64 zeros when there is none to show."""
    if not is_digest(fields["head"]):
        raise WireViolation(f"head = {str(fields['head'])[:80]!r} is no SHA-256 in lower-case hex")
    return fields["head"]


def _number(fields: Mapping[str, Any], key: str) -> float:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e308:  # noqa: PLR2004
        raise WireViolation(f"{key} = {_shown(value)} is no finite number from 0", rule=_RULES.get(key, "keys"))
    return float(value)


def _spending(fields: Mapping[str, Any], key: str) -> float:
    """Return an epsilon; infinite is what a site has spent that ever released without noise, and it may say so."""
    return math.inf if fields[key] == math.inf else _number(fields, key)


def _whole(fields: Mapping[str, Any], key: str) -> int:
    value = fields[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise WireViolation(f"{key} = {_shown(value)} is no whole number", rule=_RULES.get(key, "keys"))
    return value


def _shown(value: object) -> str:
    """Return a value from outside in short: Python refuses to write out a whole number of thousands of digits."""
    return "a huge number" if isinstance(value, int) and value.bit_length() > 64 else repr(str(value)[:80])  # noqa: PLR2004
