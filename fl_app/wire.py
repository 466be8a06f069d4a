"""Values <-> Flower records. What is not written here does not leave a site.

    server -> site   train     broadcast: manifest + arrays
    site -> server   train     upload: manifest + arrays, or a refusal
    server -> site   evaluate  broadcast
    site -> server   evaluate  probe score on public text, or a refusal
    server -> site   query     nothing
    site -> server   query     the site's logical id and the public part of its policy, or a refusal

Broadcasts are in `fl_app.wire_broadcast`. Every reply is checked against the closed list of its keys, on both sides:
when it is written and when it is read. Arrays travel in float32, or as `fl_app.transport` says. The server reads them
against its own spec: it counts the bytes before it looks at any, and then holds every array to the one header and
length that its name may have (`wire_arrays`). Errors name the rule that was broken and the array, in words of ours.

Source: ours; rules T1, T5 and T30 of `reliability-and-security.md` 2.2.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast, get_args

from flwr.app import ConfigRecord, RecordDict

from fl_app import parts, releases, wire_fields, zeroth_order
from fl_app import wire_arrays as arrays
from fl_app.errors import LedgerRefusal, WireViolation
from fl_app.privacy.events import receipt_from_dict, receipt_to_dict
from fl_app.types import (
    REFUSAL_CODES,
    Adapter,
    AdapterRelease,
    Composition,
    Hello,
    HistogramRelease,
    Probe,
    Refusal,
    ReleaseSpec,
    TextRelease,
    Upload,
    VectorRelease,
)

if TYPE_CHECKING:
    from fl_app.lora import LoraSpec
    from fl_app.types import DpReceipt, RefusalCode, Release, ScalarWalk

ADAPTER = ReleaseSpec()
"""What is asked when nothing is said: an adapter, and no survey."""

SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
UNIT_NAME = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}"
"""A column's name: one line that no page takes for a heading."""

"""A site's logical id; it names a directory on the server, so it is held to this before anything else."""

MAX_DELTA, MAX_EPSILON = 1e-2, 1e4
"""Beyond these a policy promises nothing: at a delta of 0.01 one unit in a hundred may be published as it is, and an
epsilon of 10,000 is far above a step with a noise multiplier of 0.1 (92). Such a site is not ready to take part."""

MAX_TARGET, MAX_TARGETS = 80, 64
"""Characters of the name of a kind of map, such as q_proj, and how many a site may name."""

MAX_CAPACITY = 1 << 31
"""Megabytes, blocks or tokens: what claims more is taken for this."""

MAX_BITS_PER_BYTE = 1000.0
"""A model that knows nothing needs log2(vocabulary), under 20, per token; what claims more than this is no score."""

MAX_RECEIPTS_TEXT = 1 << 14
"""Characters of the receipts. Eight, the most that the server adds up, take under 2,000."""

UPLOAD_KEYS = frozenset({"site", "run", "round", "kind", "base", "alpha", "sha256", "receipts", "spent", "head"})
OTHER_UPLOAD_KEYS = UPLOAD_KEYS - {"base", "alpha"}
"""Of a release that is no adapter."""

REFUSAL_KEYS = frozenset({"site", "round", "code", "incident"})
CAPACITY_KEYS = ("memory_mb", "first_layer", "micro_batch_tokens")
HELLO_KEYS = frozenset({"site", "epsilon", "delta", "unit", "spent", "head", "composition", "targets", *CAPACITY_KEYS})
PROBE_KEYS = frozenset({"site", "round", "items", "bits_per_byte"})


def pack_reply(
    reply: Upload | Refusal | Hello | Probe, asked: ReleaseSpec | None = None, start: Adapter | None = None
) -> RecordDict:
    """Return a site's answer to any message: the keys of its kind and no other.

    Of an adapter the factors that are `asked` travel, at their precision and below float32 as what was added to
    `start`; all of them where nothing is said.
    """
    if isinstance(reply, Refusal):
        return _pack_refusal(reply)
    if isinstance(reply, Hello):
        return _pack_hello(reply)
    if isinstance(reply, Probe):
        return _pack_probe(reply)
    return _pack_upload(reply, asked, start)


def _pack_upload(upload: Upload, asked: ReleaseSpec | None, start: Adapter | None) -> RecordDict:
    receipts = None if upload.receipts is None else [receipt_to_dict(receipt) for receipt in upload.receipts]
    manifest: dict[str, Any] = {
        "site": upload.site,
        "run": upload.run,
        "round": upload.round,
        "kind": upload.release.kind,
        "sha256": releases.sha256(upload.release, upload.survey),
        "receipts": json.dumps(receipts),
        "spent": float(upload.spent),
        "head": upload.head,
    }
    content = RecordDict()
    match upload.release:
        case AdapterRelease(adapter=adapter, scalars=scalars):
            manifest |= {"base": adapter.base, "alpha": adapter.alpha}
            told = asked or ReleaseSpec(factors=parts.FACTORS)
            if told.walk is not None and scalars is not None:
                content["arrays"] = arrays.pack_bytes({"scalars": zeroth_order.encode(scalars)})
            else:
                content["arrays"] = arrays.pack_factors(adapter, told.factors, told.precision, start)
        case VectorRelease(vectors=vectors):
            content["arrays"] = arrays.pack(vectors)
        case HistogramRelease(counts=counts):
            content["arrays"] = arrays.pack({"counts": counts})
        case TextRelease(texts=texts):
            content["texts"] = arrays.pack_texts(texts)
    if upload.survey is not None:
        content["survey"] = arrays.pack(upload.survey.vectors)
    assert manifest.keys() == (UPLOAD_KEYS if upload.release.kind == "adapter" else OTHER_UPLOAD_KEYS)
    content["upload"] = ConfigRecord(manifest)
    return content


def _pack_refusal(refusal: Refusal) -> RecordDict:
    fields: dict[str, Any] = {
        "site": refusal.site,
        "round": refusal.round,
        "code": refusal.code,
        "incident": refusal.incident,
    }
    assert fields.keys() == REFUSAL_KEYS
    return RecordDict({"refusal": ConfigRecord(fields)})


def unpack_reply(
    content: RecordDict,
    spec: LoraSpec | None = None,
    asked: ReleaseSpec = ADAPTER,
    bins: tuple[str, ...] = (),
    start: Adapter | None = None,
) -> Upload | Refusal:
    """Return what a site answered; nothing is decoded but what it was asked for.

    `spec` is what any adapter sent to this server must be; `asked` the kind of release and the shape of all others;
    `bins` are the names of a histogram's counts, which never travel; `start` is the adapter that the site was sent,
    of which it sends back only the factors that are asked for.

    Guarantee: arrays are views of the message's own bytes, so reading takes no memory of the size of the upload.
    Raises: WireViolation naming the rule, the array where there is one, the value and what is allowed.
    """
    arrays.check_size(content, spec, asked)
    if "refusal" in content:
        fields = wire_fields.manifest(content, "refusal", REFUSAL_KEYS, allowed={"refusal"})
        code = wire_fields.text(fields, "code")
        if code not in REFUSAL_CODES:
            raise WireViolation(f"refusal code {code[:40]!r}; known: {', '.join(REFUSAL_CODES)}", rule="kind")
        known: RefusalCode = REFUSAL_CODES[[str(item) for item in REFUSAL_CODES].index(code)]
        return Refusal(
            site=wire_fields.text(fields, "site"),
            round=wire_fields.whole(fields, "round"),
            code=known,
            incident=wire_fields.text(fields, "incident"),
        )
    keys = UPLOAD_KEYS if asked.kind == "adapter" else OTHER_UPLOAD_KEYS
    sent = content["upload"]["kind"] if "upload" in content and "kind" in content["upload"] else asked.kind
    if sent != asked.kind:
        raise WireViolation(f"release kind {str(sent)[:40]!r}; asked: {asked.kind}", rule="kind")
    body = "texts" if asked.kind == "text" else "arrays"
    manifest = wire_fields.manifest(
        content, "upload", keys, allowed={"upload", body} | ({"survey"} & {*map(str, content)})
    )
    survey = None
    if "survey" in content:
        shapes = {name: (length,) for name, length in asked.survey.items()}
        survey = VectorRelease(vectors=arrays.unpack(content["survey"], shapes))
    release = _release(content, manifest, spec, asked, bins, start)
    wire_fields.check_hash(releases.sha256(release, survey), manifest)
    return Upload(
        site=wire_fields.text(manifest, "site"),
        round=wire_fields.whole(manifest, "round"),
        release=release,
        receipts=_receipts(wire_fields.text(manifest, "receipts", MAX_RECEIPTS_TEXT)),
        spent=wire_fields.spending(manifest, "spent"),
        run=wire_fields.text(manifest, "run"),
        head=wire_fields.head(manifest),
        survey=survey,
    )


def _release(
    content: RecordDict,
    manifest: dict[str, Any],
    spec: LoraSpec | None,
    asked: ReleaseSpec,
    bins: tuple[str, ...],
    start: Adapter | None,
) -> Release:
    """Return the release of the kind that was asked for. Raises: WireViolation."""
    shapes = {name: (length,) for name, length in asked.vectors.items()}
    match asked.kind:
        case "vector":
            return VectorRelease(vectors=arrays.unpack(content["arrays"], shapes))
        case "histogram":
            return HistogramRelease(
                bins=bins, counts=arrays.unpack(content["arrays"], {"counts": (len(bins),)})["counts"]
            )
        case "text":
            return TextRelease(texts=arrays.unpack_texts(content["texts"], asked))
        case _ if asked.walk is not None and start is not None:
            return _walked(content, manifest, asked.walk, start)
        case _:
            return AdapterRelease(adapter=_adapter(content, manifest, spec, asked, start))


def _walked(content: RecordDict, manifest: dict[str, Any], walk: ScalarWalk, start: Adapter) -> AdapterRelease:
    """Return the adapter that a site's bytes lead to from where it began."""
    scalars = zeroth_order.decode(arrays.unpack_bytes(content["arrays"], "scalars", walk.steps))
    if (wire_fields.text(manifest, "base"), wire_fields.alpha(manifest)) != (start.base, start.alpha):
        raise WireViolation("base or alpha is not that of the broadcast", rule="base")
    adapter = zeroth_order.replay(
        start,
        scalars,
        run=wire_fields.text(manifest, "run"),
        site=wire_fields.text(manifest, "site"),
        round_number=wire_fields.whole(manifest, "round"),
        learning_rate=walk.learning_rate,
        schedule=walk.schedule,
    )
    return AdapterRelease(adapter=adapter, scalars=scalars)


def _adapter(
    content: RecordDict, manifest: dict[str, Any], spec: LoraSpec | None, asked: ReleaseSpec, start: Adapter | None
) -> Adapter:
    """Return the adapter that a site sent; what did not travel is that of the broadcast."""
    if spec is None:
        layers = arrays.unpack_layers(content["arrays"], asked.precision)
    else:
        began = {} if start is None else parts.arrays_of(start)
        layers = arrays.layers_of({**began, **arrays.unpack_factors(content["arrays"], spec, asked, began)})
    return Adapter(layers=layers, alpha=wire_fields.alpha(manifest), base=wire_fields.text(manifest, "base"))


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
        "targets": list(hello.targets),
        **{key: getattr(hello, key) for key in CAPACITY_KEYS},
    }
    assert fields.keys() == HELLO_KEYS
    return RecordDict({"hello": ConfigRecord(fields)})


def unpack_hello(content: RecordDict) -> Hello:
    """Return how a site introduced itself. Raises: WireViolation."""
    arrays.check_size(content, None)
    fields = wire_fields.manifest(content, "hello", HELLO_KEYS, allowed={"hello"})
    if not re.fullmatch(SITE_NAME, wire_fields.text(fields, "site")):
        raise WireViolation("site is no logical id: lower-case letters, digits and hyphens, at most 63")
    if not re.fullmatch(UNIT_NAME, wire_fields.text(fields, "unit")):
        raise WireViolation("unit is no column name: letters, digits, blanks and _.-, at most 63")
    delta, epsilon = wire_fields.number(fields, "delta"), wire_fields.number(fields, "epsilon")
    if not 0 < delta <= MAX_DELTA or not 0 < epsilon <= MAX_EPSILON:
        raise WireViolation(
            f"delta = {delta:g} and epsilon = {epsilon:g}: above 0, and at most {MAX_DELTA:g} and {MAX_EPSILON:g}",
            rule="spent",
        )
    composition = wire_fields.text(fields, "composition")
    if composition not in get_args(Composition):
        raise WireViolation(f"composition {composition[:40]!r}; known: {', '.join(get_args(Composition))}")
    return Hello(
        site=wire_fields.text(fields, "site"),
        epsilon=epsilon,
        delta=delta,
        unit=wire_fields.text(fields, "unit"),
        spent=wire_fields.spending(fields, "spent"),
        head=wire_fields.head(fields),
        composition=cast("Composition", composition),
        targets=_targets(fields["targets"]),
        **{key: min(wire_fields.whole(fields, key), MAX_CAPACITY) for key in CAPACITY_KEYS},
    )


def _targets(value: object) -> tuple[str, ...]:
    """Return names of maps. Raises: WireViolation."""
    listed = cast("list[object]", value) if isinstance(value, list) else [None]
    named = tuple(one for one in listed if isinstance(one, str) and len(one) <= MAX_TARGET)
    if len(named) != len(listed) or len(named) > MAX_TARGETS:
        raise WireViolation(f"targets = {str(value)[:80]!r} is no list of at most {MAX_TARGETS} names of maps")
    return named


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
    arrays.check_size(content, None)
    fields = wire_fields.manifest(content, "probe", PROBE_KEYS, allowed={"probe"})
    score = wire_fields.number(fields, "bits_per_byte")
    if score > MAX_BITS_PER_BYTE:
        raise WireViolation(f"bits_per_byte = {score:g}, at most {MAX_BITS_PER_BYTE:g}", rule="size")
    return Probe(
        site=wire_fields.text(fields, "site"),
        round=wire_fields.whole(fields, "round"),
        items=wire_fields.whole(fields, "items"),
        bits_per_byte=score,
    )
