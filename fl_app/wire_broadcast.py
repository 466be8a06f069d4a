"""A broadcast <-> Flower's records: the adapter that sites train, what lies under it, and the material of a round.

    broadcast  manifest: run, round, digest, base, alpha, a hash of all that is answered (`releases.broadcast_sha256`),
               hashes of the parts (`fl_app.parts`), the site's own head
    arrays     the factors of the adapter, those that the site does not have yet
    block-<n>  an adapter under it, where the site does not have it yet
    texts, vectors  what a site needs for its answer beside the adapter (`Material`)

Out of scope: replies (`fl_app.wire`), what a site keeps (`clients.received`).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast, get_args

from flwr.app import ConfigRecord, RecordDict

from fl_app import parts, releases
from fl_app import wire_arrays as arrays
from fl_app import wire_fields as fields
from fl_app.errors import WireViolation
from fl_app.hash_chain import is_digest
from fl_app.types import Adapter, Broadcast, Material, Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from fl_app.types import Factor, Floats

KEYS = frozenset({"run", "round", "config_digest", "base", "alpha", "sha256", "head", "precision", "parts", "blocks"})

MAX_PARTS_TEXT, MAX_BLOCKS_TEXT = 1 << 10, 1 << 17
"""Characters of the hashes of factors, and of blocks: one takes under 100."""


def pack(broadcast: Broadcast, precision: Precision = "float32") -> RecordDict:
    """Return the message of a round's start, whole. Its adapter must be what it is after `transport.rounded`."""
    blocks = [[parts.sha256(parts.arrays_of(block)), block.alpha] for block in broadcast.blocks]
    manifest: dict[str, Any] = {
        "run": broadcast.run,
        "round": broadcast.round,
        "config_digest": broadcast.config_digest,
        "base": broadcast.adapter.base,
        "alpha": broadcast.adapter.alpha,
        "sha256": releases.broadcast_sha256(broadcast),
        "head": broadcast.head,
        "precision": precision,
        "parts": json.dumps(parts.of_adapter(broadcast.adapter), sort_keys=True),
        "blocks": json.dumps(blocks),
    }
    content = RecordDict(
        {"broadcast": ConfigRecord(manifest), "arrays": arrays.pack_factors(broadcast.adapter, precision=precision)}
    )
    for number, block in enumerate(broadcast.blocks):
        content[f"block-{number}"] = arrays.pack_factors(block)  # once in a run, and exact
    if broadcast.material.texts or broadcast.material.vectors:
        content["texts"] = arrays.pack_texts(broadcast.material.texts)
        content["vectors"] = arrays.pack(broadcast.material.vectors)
    return content


def addressed(content: RecordDict, head: str, known: Collection[str] = ()) -> RecordDict:
    """Return a packed broadcast for the site whose last known head is `head`, without the parts that it has.

    `known` are the hashes of those (`parts.hashes`). All sites' messages share the arrays.
    """
    manifest = dict(_manifest(content))
    beside = {name: content[name] for name in content if name != "broadcast"}
    told, blocks = _parts_of(manifest)
    travels = tuple(factor for factor, sha256 in told.items() if sha256 not in known)
    beside["arrays"] = arrays.some(content["arrays"], travels)
    for number, (sha256, _) in enumerate(blocks):
        if sha256 in known:
            del beside[f"block-{number}"]
    return RecordDict({"broadcast": ConfigRecord({**manifest, "head": head}), **beside})


def unpack(content: RecordDict, find: Callable[[str], Mapping[str, Floats] | None] = lambda _: None) -> Broadcast:
    """Return the broadcast; `find` gives the arrays of a part by its hash, None when the site has no such part.

    Raises: WireViolation, also for a part that neither travels nor is found: the next broadcast is then whole.
    """
    manifest = _manifest(content)
    told, blocks = _parts_of(manifest)
    precision = _precision(manifest)
    values: dict[str, Floats] = {}
    for factor, sha256 in told.items():
        values |= arrays.unpack_part(content["arrays"], factor, precision) or _found(find, sha256, factor)
    if odd := arrays.strangers(content["arrays"], told):
        raise WireViolation("is no LoRA factor of this broadcast", rule="layers", tensor=odd[0])
    adapter = Adapter(layers=arrays.layers_of(values), alpha=fields.alpha(manifest), base=fields.text(manifest, "base"))
    material = Material()
    if "texts" in content:
        material = Material(
            texts=arrays.unpack_texts(content["texts"]), vectors=arrays.unpack_vectors(content["vectors"])
        )
    broadcast = Broadcast(
        run=fields.text(manifest, "run"),
        round=fields.whole(manifest, "round"),
        adapter=adapter,
        config_digest=fields.text(manifest, "config_digest"),
        head=fields.head(manifest) if manifest["head"] != "" else "",
        material=material,
        blocks=tuple(
            _block(content, number, sha256, alpha, adapter.base, find) for number, (sha256, alpha) in enumerate(blocks)
        ),
    )
    fields.check_hash(releases.broadcast_sha256(broadcast), manifest)
    return broadcast


def _manifest(content: RecordDict) -> dict[str, Any]:
    """Return the manifest of a broadcast: with material or without, with any of its blocks."""
    named = {str(key) for key in content}
    blocks = {key for key in named if re.fullmatch(r"block-[0-9]{1,4}", key)}
    allowed = {"broadcast", "arrays"} | blocks | ({"texts", "vectors"} if "texts" in named else set())
    return fields.manifest(content, "broadcast", KEYS, allowed=allowed)


def _parts_of(manifest: Mapping[str, Any]) -> tuple[dict[Factor, str], list[tuple[str, float]]]:
    """Return the hash of each factor, and hash and alpha of each block. Raises: WireViolation."""
    try:
        told: Any = json.loads(fields.text(manifest, "parts", MAX_PARTS_TEXT))
        blocks: Any = json.loads(fields.text(manifest, "blocks", MAX_BLOCKS_TEXT))
        factors: dict[Factor, str] = {factor: told[factor] for factor in parts.FACTORS if factor in told}
        listed = [(str(sha256), float(alpha)) for sha256, alpha in blocks]
        sound = len(told) == len(factors) and {"a", "b"} <= factors.keys()
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
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
    find: Callable[[str], Mapping[str, Floats] | None],
) -> Adapter:
    name = f"block-{number}"
    came = name in content
    layers = arrays.unpack_layers(content[name]) if came else arrays.layers_of(_found(find, sha256, name))
    block = Adapter(layers=layers, alpha=fields.alpha({"alpha": alpha}), base=base)
    if parts.sha256(parts.arrays_of(block)) != sha256:
        raise WireViolation(f"{name} is not the block that the manifest names", rule="hash")
    return block


def _precision(manifest: Mapping[str, Any]) -> Precision:
    value = fields.text(manifest, "precision")
    if value not in get_args(Precision):
        raise WireViolation(f"precision {value[:40]!r}; known: {', '.join(get_args(Precision))}")
    return cast("Precision", value)
