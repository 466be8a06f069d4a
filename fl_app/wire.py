"""Values <-> Flower records. What is not written here does not leave a site.

    server -> site   train     broadcast: manifest + arrays
    site -> server   train     upload: manifest + arrays, or a refusal
    server -> site   evaluate  broadcast
    site -> server   evaluate  probe score on public text, or a refusal
    server -> site   query     nothing
    site -> server   query     the site's logical id and the public part of its policy, or a refusal

Every reply is checked against the closed list of its keys, on both sides: when it is written and when it is read.
Arrays travel in float32. The server reads them against its own spec: it counts the bytes before it looks at any,
and then holds every array to the one header and length that its name may have (`wire_arrays`). Errors name the rule
that was broken and the array, in words of ours.

Source: ours; rules T1, T5 and T30 of `reliability-and-security.md` 2.2.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, cast, get_args

from flwr.app import ConfigRecord, RecordDict

from fl_app import lora, parts, releases, zeroth_order
from fl_app import wire_arrays as arrays
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
    HistogramRelease,
    Material,
    Precision,
    Probe,
    Refusal,
    ReleaseSpec,
    TextRelease,
    Upload,
    VectorRelease,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from fl_app.lora import LoraSpec
    from fl_app.types import DpReceipt, Factor, Floats, RefusalCode, Release, ScalarWalk

ADAPTER = ReleaseSpec()
"""What is asked when nothing is said: an adapter, and no survey."""

SITE_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
UNIT_NAME = r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}"
"""A column's name: one line that no page takes for a heading."""

"""A site's logical id; it names a directory on the server, so it is held to this before anything else."""

MAX_DELTA, MAX_EPSILON = 1e-2, 1e4
"""Beyond these a policy promises nothing: at a delta of 0.01 one unit in a hundred may be published as it is, and an
epsilon of 10,000 is far above a step with a noise multiplier of 0.1 (92). Such a site is not ready to take part."""

MAX_CAPACITY = 1 << 31
"""Megabytes, blocks or tokens: what claims more is taken for this."""

MAX_BITS_PER_BYTE = 1000.0
"""A model that knows nothing needs log2(vocabulary), under 20, per token; what claims more than this is no score."""

MAX_TEXT, MAX_RECEIPTS_TEXT, MAX_BLOCKS_TEXT = 200, 1 << 14, 1 << 17
"""Characters of one value. Eight receipts, the most that the server adds up, take under 2,000; a block under 100."""

BROADCAST_KEYS = frozenset(
    {"run", "round", "config_digest", "base", "alpha", "sha256", "head", "precision", "parts", "blocks"}
)
UPLOAD_KEYS = frozenset({"site", "run", "round", "kind", "base", "alpha", "sha256", "receipts", "spent", "head"})
OTHER_UPLOAD_KEYS = UPLOAD_KEYS - {"base", "alpha"}
"""Of a release that is no adapter."""

REFUSAL_KEYS = frozenset({"site", "round", "code", "incident"})
CAPACITY_KEYS = ("memory_mb", "first_layer", "micro_batch_tokens")
HELLO_KEYS = frozenset({"site", "epsilon", "delta", "unit", "spent", "head", "composition", *CAPACITY_KEYS})
PROBE_KEYS = frozenset({"site", "round", "items", "bits_per_byte"})

_RULES = {"site": "site", "run": "run", "round": "round", "base": "base", "receipts": "receipt", "spent": "spent"}
"""The rule that a value of the wrong type breaks, by its key; for all others, `keys`."""


def pack_broadcast(broadcast: Broadcast, precision: Precision = "float32") -> RecordDict:
    """Return the message of a round's start, whole. Its adapters must be what they are after `transport.rounded`."""
    blocks = [[parts.sha256(parts.arrays_of(block)), block.alpha] for block in broadcast.blocks]
    manifest: dict[str, Any] = {
        "run": broadcast.run,
        "round": broadcast.round,
        "config_digest": broadcast.config_digest,
        "base": broadcast.adapter.base,
        "alpha": broadcast.adapter.alpha,
        "sha256": lora.sha256(broadcast.adapter),
        "head": broadcast.head,
        "precision": precision,
        "parts": json.dumps(parts.of_adapter(broadcast.adapter), sort_keys=True),
        "blocks": json.dumps(blocks),
    }
    content = RecordDict(
        {"broadcast": ConfigRecord(manifest), "arrays": arrays.pack_factors(broadcast.adapter, precision=precision)}
    )
    for number, block in enumerate(broadcast.blocks):
        content[f"block-{number}"] = arrays.pack_factors(block, precision=precision)
    if broadcast.material.texts or broadcast.material.vectors:
        content["texts"] = arrays.pack_texts(broadcast.material.texts)
        content["vectors"] = arrays.pack(broadcast.material.vectors)
    return content


def addressed(content: RecordDict, head: str, known: Collection[str] = ()) -> RecordDict:
    """Return a packed broadcast for the site whose last known head is `head`, without the parts that it has.

    `known` are the hashes of those (`parts.hashes`). All sites' messages share the arrays.
    """
    manifest = dict(_broadcast_manifest(content))
    beside = {name: content[name] for name in content if name != "broadcast"}
    told, blocks = _parts_of(manifest)
    travels = tuple(factor for factor, sha256 in told.items() if sha256 not in known)
    beside["arrays"] = arrays.some(content["arrays"], travels)
    for number, (sha256, _) in enumerate(blocks):
        if sha256 in known:
            del beside[f"block-{number}"]
    return RecordDict({"broadcast": ConfigRecord({**manifest, "head": head}), **beside})


def unpack_broadcast(
    content: RecordDict, find: Callable[[str], Mapping[str, Floats] | None] = lambda _: None
) -> Broadcast:
    """Return the broadcast; `find` gives the arrays of a part by its hash, None when the site has no such part.

    Raises: WireViolation, also for a part that neither travels nor is found: the next broadcast is then whole.
    """
    manifest = _broadcast_manifest(content)
    told, blocks = _parts_of(manifest)
    precision = _precision(manifest)
    values: dict[str, Floats] = {}
    for factor, sha256 in told.items():
        values |= arrays.unpack_part(content["arrays"], factor, precision) or _found(find, sha256, factor)
    if odd := arrays.strangers(content["arrays"], told):
        raise WireViolation("is no LoRA factor of this broadcast", rule="layers", tensor=odd[0])
    adapter = Adapter(layers=arrays.layers_of(values), alpha=_alpha(manifest), base=_text(manifest, "base"))
    _check_hash(lora.sha256(adapter), manifest)
    material = Material()
    if "texts" in content:
        material = Material(
            texts=arrays.unpack_texts(content["texts"]), vectors=arrays.unpack_vectors(content["vectors"])
        )
    return Broadcast(
        run=_text(manifest, "run"),
        round=_whole(manifest, "round"),
        adapter=adapter,
        config_digest=_text(manifest, "config_digest"),
        head=_head(manifest) if manifest["head"] != "" else "",
        material=material,
        blocks=tuple(
            _block(content, number, sha256, alpha, adapter.base, precision, find)
            for number, (sha256, alpha) in enumerate(blocks)
        ),
    )


def _broadcast_manifest(content: RecordDict) -> dict[str, Any]:
    """Return the manifest of a broadcast: with material or without, with any of its blocks."""
    named = {str(key) for key in content}
    blocks = {key for key in named if re.fullmatch(r"block-[0-9]{1,4}", key)}
    allowed = {"broadcast", "arrays"} | blocks | ({"texts", "vectors"} if "texts" in named else set())
    return _manifest(content, "broadcast", BROADCAST_KEYS, allowed=allowed)


def _parts_of(manifest: Mapping[str, Any]) -> tuple[dict[Factor, str], list[tuple[str, float]]]:
    """Return the hash of each factor, and hash and alpha of each block. Raises: WireViolation."""
    try:
        told: Any = json.loads(_text(manifest, "parts", MAX_RECEIPTS_TEXT))
        blocks: Any = json.loads(_text(manifest, "blocks", MAX_BLOCKS_TEXT))
        factors: dict[Factor, str] = {factor: told[factor] for factor in parts.FACTORS if factor in told}
        listed = [(str(sha256), float(alpha)) for sha256, alpha in blocks]
        sound = len(told) == len(factors) and {"a", "b"} <= factors.keys()
    except (ValueError, TypeError, RecursionError) as error:
        raise WireViolation(f"parts or blocks cannot be read: {str(error)[:80]}") from None
    if not sound or not all(map(is_digest, [*factors.values(), *(sha256 for sha256, _ in listed)])):
        raise WireViolation("parts and blocks name hashes of factors; these do not")
    return factors, listed


def _found(find: Callable[[str], Mapping[str, Floats] | None], sha256: str, what: str) -> Mapping[str, Floats]:
    found = find(sha256)
    if found is None:
        raise WireViolation(f"{what} did not come, and {sha256[:12]} is not kept here; the next round brings it")
    return found


def _block(
    content: RecordDict,
    number: int,
    sha256: str,
    alpha: float,
    base: str,
    precision: Precision,
    find: Callable[[str], Mapping[str, Floats] | None],
) -> Adapter:
    name = f"block-{number}"
    if name in content:
        layers = arrays.unpack_layers(content[name], precision)
    else:
        layers = arrays.layers_of(_found(find, sha256, name))
    block = Adapter(layers=layers, alpha=_alpha({"alpha": alpha}), base=base)
    if parts.sha256(parts.arrays_of(block)) != sha256:
        raise WireViolation(f"{name} is not the block that the manifest names", rule="hash")
    return block


def _precision(manifest: Mapping[str, Any]) -> Precision:
    value = _text(manifest, "precision")
    if value not in get_args(Precision):
        raise WireViolation(f"precision {value[:40]!r}; known: {', '.join(get_args(Precision))}")
    return cast("Precision", value)


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
        fields = _manifest(content, "refusal", REFUSAL_KEYS, allowed={"refusal"})
        code = _text(fields, "code")
        if code not in REFUSAL_CODES:
            raise WireViolation(f"refusal code {code[:40]!r}; known: {', '.join(REFUSAL_CODES)}", rule="kind")
        known: RefusalCode = REFUSAL_CODES[[str(item) for item in REFUSAL_CODES].index(code)]
        return Refusal(
            site=_text(fields, "site"), round=_whole(fields, "round"), code=known, incident=_text(fields, "incident")
        )
    keys = UPLOAD_KEYS if asked.kind == "adapter" else OTHER_UPLOAD_KEYS
    sent = content["upload"]["kind"] if "upload" in content and "kind" in content["upload"] else asked.kind
    if sent != asked.kind:
        raise WireViolation(f"release kind {str(sent)[:40]!r}; asked: {asked.kind}", rule="kind")
    body = "texts" if asked.kind == "text" else "arrays"
    manifest = _manifest(content, "upload", keys, allowed={"upload", body} | ({"survey"} & {*map(str, content)}))
    survey = None
    if "survey" in content:
        shapes = {name: (length,) for name, length in asked.survey.items()}
        survey = VectorRelease(vectors=arrays.unpack(content["survey"], shapes))
    release = _release(content, manifest, spec, asked, bins, start)
    _check_hash(releases.sha256(release, survey), manifest)
    return Upload(
        site=_text(manifest, "site"),
        round=_whole(manifest, "round"),
        release=release,
        receipts=_receipts(_text(manifest, "receipts", MAX_RECEIPTS_TEXT)),
        spent=_spending(manifest, "spent"),
        run=_text(manifest, "run"),
        head=_head(manifest),
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
    if (_text(manifest, "base"), _alpha(manifest)) != (start.base, start.alpha):
        raise WireViolation("base or alpha is not that of the broadcast", rule="base")
    adapter = zeroth_order.replay(
        start,
        scalars,
        run=_text(manifest, "run"),
        site=_text(manifest, "site"),
        round_number=_whole(manifest, "round"),
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
    return Adapter(layers=layers, alpha=_alpha(manifest), base=_text(manifest, "base"))


def _alpha(manifest: Mapping[str, Any]) -> float:
    alpha = manifest["alpha"]
    if not isinstance(alpha, float) or not 0 < alpha < 1e6:  # noqa: PLR2004
        raise WireViolation(f"alpha = {_shown(alpha)} is no scaling", rule="alpha")
    return alpha


def _check_hash(found: str, manifest: dict[str, Any]) -> None:
    if found != manifest["sha256"]:
        raise WireViolation("sha256 of what came is not the one in the manifest", rule="hash")


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
        **{key: getattr(hello, key) for key in CAPACITY_KEYS},
    }
    assert fields.keys() == HELLO_KEYS
    return RecordDict({"hello": ConfigRecord(fields)})


def unpack_hello(content: RecordDict) -> Hello:
    """Return how a site introduced itself. Raises: WireViolation."""
    arrays.check_size(content, None)
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
        **{key: min(_whole(fields, key), MAX_CAPACITY) for key in CAPACITY_KEYS},
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
    arrays.check_size(content, None)
    fields = _manifest(content, "probe", PROBE_KEYS, allowed={"probe"})
    score = _number(fields, "bits_per_byte")
    if score > MAX_BITS_PER_BYTE:
        raise WireViolation(f"bits_per_byte = {score:g}, at most {MAX_BITS_PER_BYTE:g}", rule="size")
    return Probe(
        site=_text(fields, "site"), round=_whole(fields, "round"), items=_whole(fields, "items"), bits_per_byte=score
    )


def _manifest(content: RecordDict, name: str, keys: frozenset[str], *, allowed: set[str]) -> dict[str, Any]:
    if {str(key) for key in content} != allowed:
        raise WireViolation(f"records {sorted(map(str, content))[:6]}; expected {sorted(allowed)}")
    record = content[name]
    if not isinstance(record, ConfigRecord) or {str(key) for key in record} != set(keys):
        found = sorted(map(str, record))[:12] if isinstance(record, ConfigRecord) else type(record).__name__
        raise WireViolation(f"{name} holds {found}; expected {sorted(keys)}")
    return dict(record)


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
