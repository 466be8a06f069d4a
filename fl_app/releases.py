"""What a site releases, as files and as a hash: the same for every kind, on both sides of the wire.

    adapter      PEFT format (`peft_files.save`), hash of `lora.sha256`; scalars.safetensors where scalars made it
    vector       arrays.safetensors, one array a name
    histogram    arrays.safetensors with `counts`, bins.json
    text         texts.jsonl, one {"code", "text"} a line
    + survey     survey.safetensors beside any of them

Out of scope: whether a release is any good (`strategies.validate`), how it travels (`fl_app.wire`).
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import disk, journal, lora, peft_files
from fl_app.errors import RunInvalid
from fl_app.types import AdapterRelease, CodedText, HistogramRelease, TextRelease, VectorRelease

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fl_app.types import Broadcast, Floats, Release

ARRAYS, BINS, TEXTS, SURVEY = "arrays.safetensors", "bins.json", "texts.jsonl", "survey.safetensors"
SCALARS = "scalars.safetensors"


def sha256(release: Release, survey: VectorRelease | None = None) -> str:
    """Return the content hash of a release and what came beside it. An adapter alone has its own, `lora.sha256`."""
    if isinstance(release, AdapterRelease) and survey is None:
        return lora.sha256(release.adapter)
    digest = hashlib.sha256(release.kind.encode())
    match release:
        case AdapterRelease():
            digest.update(lora.sha256(release.adapter).encode())
        case VectorRelease():
            _feed(digest, release.vectors)
        case HistogramRelease():
            digest.update(json.dumps(release.bins).encode())
            _feed(digest, {"counts": release.counts})
        case TextRelease():
            digest.update(json.dumps([[one.code, one.text] for one in release.texts]).encode())
    if survey is not None:
        digest.update(b"survey")
        _feed(digest, survey.vectors)
    return digest.hexdigest()


def broadcast_sha256(broadcast: Broadcast) -> str:
    """Return the content hash of what a site answers: the adapter it trains, what lies under it, and the material."""
    digest = hashlib.sha256(lora.sha256(broadcast.adapter).encode())
    for block in broadcast.blocks:
        digest.update(lora.sha256(block).encode())
    digest.update(json.dumps([[one.code, one.text] for one in broadcast.material.texts]).encode())
    _feed(digest, broadcast.material.vectors)
    return digest.hexdigest()


def save(release: Release, survey: VectorRelease | None, folder: Path, *, base_name: str) -> None:
    """Write a release into a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    match release:
        case AdapterRelease():
            peft_files.save(release.adapter, folder, base_name=base_name)
            if release.scalars is not None:
                save_vectors({"scalars": release.scalars}, folder / SCALARS)
        case VectorRelease():
            save_vectors(release.vectors, folder / ARRAYS)
        case HistogramRelease():
            save_vectors({"counts": release.counts}, folder / ARRAYS)
            journal.write_json(folder / BINS, list(release.bins))
        case TextRelease():
            journal.write_lines(folder / TEXTS, release.texts)
    if survey is not None:
        save_vectors(survey.vectors, folder / SURVEY)


def load(folder: Path) -> tuple[Release, VectorRelease | None]:
    """Return the release in a folder and what came beside it. Raises: RunInvalid when there is none."""
    survey = VectorRelease(vectors=load_vectors(folder / SURVEY)) if (folder / SURVEY).is_file() else None
    if (folder / "adapter_config.json").is_file():
        scalars = load_vectors(folder / SCALARS)["scalars"] if (folder / SCALARS).is_file() else None
        return AdapterRelease(adapter=peft_files.load(folder), scalars=scalars), survey
    if (folder / TEXTS).is_file():
        rows = journal.read_lines(folder / TEXTS)
        return TextRelease(texts=tuple(CodedText(code=row["code"], text=row["text"]) for row in rows)), survey
    if (folder / BINS).is_file():
        bins = tuple(json.loads((folder / BINS).read_text(encoding="utf-8")))
        return HistogramRelease(bins=bins, counts=load_vectors(folder / ARRAYS)["counts"]), survey
    if (folder / ARRAYS).is_file():
        return VectorRelease(vectors=load_vectors(folder / ARRAYS)), survey
    raise RunInvalid(f"{folder} holds no release; restore it from a backup")


def _feed(digest: Any, vectors: Mapping[str, Floats]) -> None:
    for name in sorted(vectors):
        array = np.ascontiguousarray(vectors[name], "<f4")
        digest.update(f"{name}{array.shape}".encode())
        digest.update(array.tobytes())


def save_vectors(vectors: Mapping[str, Floats], path: Path) -> None:
    """Write float32 arrays by name, as a whole."""
    from safetensors.numpy import save

    disk.replace(path, save({name: np.ascontiguousarray(v, np.float32) for name, v in vectors.items()}))


def load_vectors(path: Path) -> dict[str, Floats]:
    """Return what `save_vectors` wrote."""
    from safetensors.numpy import load

    return dict(load(path.read_bytes()))
