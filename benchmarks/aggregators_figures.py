"""What a finished run of a federated-LoRA method comes to: exam, error of its sums, and bytes against closed forms.

The error of a round is that of what the next round begins with, `start` and new blocks, or the aggregate itself:

    |delta_W(carried) - sum_k p_k delta_W(upload_k)|  /  |sum_k p_k delta_W(upload_k)|        over all layers, p_k = 1/K

Norms are taken from factors in float64 (`strategies.products`). About 1e-7 is what float32 factors can hold, so
anything near it is exact.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_app import lora, peft_files, releases
from fl_app.types import Adapter, AdapterRelease
from strategies import products

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FLOAT_BYTES = 4


def of_run(run: Path, method: str) -> dict[str, Any]:
    """Return the figures of a run directory, every one of them releasable."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rounds = sorted((one for one in (run / "rounds").iterdir() if (one / "merged").is_dir()), key=lambda p: int(p.name))
    exam = {name: {metric: _triple(score) for metric, score in told.items()} for name, told in summary["exam"].items()}
    targets = [exam[f"target_round_{place.name}"] for place in rounds]
    line: dict[str, Any] = {
        "exam": targets[-1],
        "exam_by_round": [{metric: score[0] for metric, score in told.items()} for told in targets],
        "error": [product_error(place) for place in rounds],
        "bytes": {way: sum(summary["bytes"][way].values()) for way in ("up", "down")},
        "seconds": summary["seconds"],
        "epsilon": sorted(one["spent"] for one in summary["epsilon"].values()),
    }
    closed = closed_form(method, [uploads_of(place) for place in rounds])
    return line | {"closed_form": closed} | ({"exam_base": exam["base"]} if "base" in exam else {})


def _triple(score: Mapping[str, Any]) -> list[float]:
    return [score["value"], score["low"], score["high"]]


def uploads_of(folder: Path) -> list[Adapter]:
    """Return the adapters that the sites sent in a round, by the sites' names."""
    found = [releases.load(place)[0] for place in sorted((folder / "releases").iterdir())]
    return [one.adapter for one in found if isinstance(one, AdapterRelease)]


def carried_of(folder: Path) -> list[Adapter]:
    """Return what a round adds to the model before the next one: the start and the new blocks, or the aggregate."""
    start = folder / "start"
    blocks = folder / "blocks"
    found = sorted(blocks.iterdir(), key=lambda place: int(place.name)) if blocks.is_dir() else []
    return [peft_files.load(start if start.is_dir() else folder / "merged"), *map(peft_files.load, found)]


def product_error(folder: Path) -> float | None:
    """Return the relative error of a round's sum; None where the exact sum is zero."""
    uploads = uploads_of(folder)
    exact = lora.stacked(uploads, [1 / len(uploads)] * len(uploads))
    size = norm(exact)
    return products.distance(lora.stacked(carried_of(folder)), exact) / size if size else None


def norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of delta_W over all layers."""
    layers = {
        name: dataclasses.replace(one, b=np.zeros_like(one.b)) for name, one in lora.plain(adapter).layers.items()
    }
    return products.distance(lora.plain(adapter), dataclasses.replace(adapter, layers=layers))


def closed_form(method: str, uploads: Sequence[Sequence[Adapter]]) -> dict[str, float] | None:
    """Return the bytes up and down of a whole run that the method's paper implies; None where ranks are mixed.

    With S = sum over layers of d_in + d_out, I and O its two parts, L layers, K sites, N rounds, rank r, four bytes a
    number. All sites send up, and are sent down, the same; what did not change since the last round is not sent again:
    the first round brings both factors, later ones what the round before made.
    """
    first = lora.plain(uploads[0][0])
    sites, rounds, layers = len(uploads[0]), len(uploads), len(first.layers)
    r = lora.rank_of(first)
    wide = {factor: sum(getattr(one, factor).size for one in first.layers.values()) // r for factor in ("a", "b")}
    a, b = r * wide["a"], r * wide["b"]
    later = rounds - 1
    halves = [b if number % 2 else a for number in range(1, rounds + 1)]
    match method:
        case "fedit" | "la_lora" | "lora_fair" | "flex_lora":
            up, down = rounds * (a + b), rounds * (a + b)
        case "ffa_lora":
            up, down = rounds * b, a + b + later * b
        case "fedask":
            up, down = rounds * b, rounds * (a + b)
        case "rolora":
            up, down = sum(halves), a + b + sum(halves[:-1])
        case "flora":
            up, down = rounds * (a + b), a + b + later * (a + sites * (a + b))
        case "fedex_lora":
            up, down = rounds * (a + b), a + b + later * (a + b + (sites - 1) * (a + b))
        case "fed_sb" | "fed_sb_32":
            up, down = rounds * layers * r**2, a + b + rounds * layers * r**2
        case _:
            return None
    return {"up": float(FLOAT_BYTES * sites * up), "down": float(FLOAT_BYTES * sites * down)}


def rate_scores(tuned: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, bool], dict[float, float]]:
    """Return bits per byte by learning rate, for each (corpus, method, DP), of the last line of tuned rates."""
    found: dict[tuple[str, str, bool], dict[float, float]] = {}
    for one in tuned[-1]["cells"] if tuned else []:
        if "failed" not in one:
            scores = found.setdefault((one["corpus"], one["method"], one["private"]), {})
            scores[one["rate"]] = one["exam"]["bits_per_byte"][0]
    return found
