"""What one wave of training brought, and what the server made of it; the second as a file keeps it.

`Collected` comes from the wire. `Judged` is what stands after validation: sound uploads with their releases on disk,
and for everybody else a reason. It is written into the run directory and read back, so a round that was stopped goes
on without asking any site again.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from fl_app import journal, releases
from fl_app.privacy.events import receipt_from_dict, receipt_to_dict
from fl_app.types import Refusal, Upload
from strategies.validate import Rejection, broken_rule, cost_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from fl_app.lora import LoraSpec
    from fl_app.types import Broadcast, ReleaseSpec
    from strategies.reach import UpdateCap
    from strategies.spending import Spending


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Collected:
    """What one wave of training brought, by site: uploads, refusals, broken messages, silence, bytes, seconds.

    `strays` are replies that nobody was asked for: they are named, and change nothing for the site that sent them.
    """

    uploads: tuple[Upload, ...]
    refusals: tuple[Refusal, ...]
    broken: Mapping[str, Rejection]
    silent: tuple[str, ...]
    asked: int
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    seconds: float
    strays: tuple[Rejection, ...] = ()


NOBODY = Collected(uploads=(), refusals=(), broken={}, silent=(), asked=0, bytes_up={}, bytes_down={}, seconds=0.0)
"""The wave of a round in which no site is asked for anything."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judged:
    """A wave after validation. `booked` is what a rejected site has spent at the least; `seconds` as in `Collected`.

    `heard` are the sites that sent an upload, sound or not.
    """

    sound: tuple[Upload, ...]
    rejected: Mapping[str, Rejection]
    strays: tuple[Rejection, ...]
    booked: Mapping[str, float]
    refusals: tuple[Refusal, ...]
    broken: tuple[str, ...]
    silent: tuple[str, ...]
    heard: tuple[str, ...]
    asked: int
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    seconds: float


def needed(asked: int, quorum: float) -> int:
    """Return how many of `asked` a quorum is; 0.07 of 100 is 7, whatever floats say. Nobody asked, nobody needed."""
    return max(1, math.ceil(asked * quorum - 1e-9)) if asked else 0


def judge(
    collected: Collected,
    *,
    broadcast: Callable[[str], Broadcast],
    spec: Callable[[str], LoraSpec],
    asked: ReleaseSpec,
    spending: Spending,
    seen: Mapping[str, str],
    cap: UpdateCap | None,
    accept_non_private: bool,
) -> Judged:
    """Return what stands of a wave: each upload held against what its site was sent, and the site's history.

    `broadcast` and `spec` give what a site was sent, and what it was to train, by its name.

    `seen` says by content hash what every adapter known from before is: no release can be one of them.
    """
    sound: list[Upload] = []
    rejected, booked, known = dict(collected.broken), dict[str, float](), dict(seen)
    for upload in sorted(collected.uploads, key=lambda item: item.site):
        hello = spending.sites.get(upload.site)
        broken = broken_rule(
            upload,
            broadcast=broadcast(upload.site),
            spec=spec(upload.site),
            asked=asked,
            site=hello,
            cap=cap,
            earlier=spending.receipts.get(upload.site, ()),
            seen=known,
            accept_non_private=accept_non_private,
        )
        if broken is None:
            sound.append(upload)
            known[releases.sha256(upload.release, upload.survey)] = f"the release of {upload.site}"
            continue
        rejected[upload.site] = broken
        if hello is not None:  # released all the same, and nobody will use it
            booked[upload.site] = cost_of(upload, hello.delta)
    return Judged(
        sound=tuple(sound),
        rejected=rejected,
        strays=collected.strays,
        booked=booked,
        refusals=collected.refusals,
        broken=tuple(collected.broken),
        silent=collected.silent,
        heard=tuple(upload.site for upload in collected.uploads),
        asked=collected.asked,
        bytes_up=collected.bytes_up,
        bytes_down=collected.bytes_down,
        seconds=collected.seconds,
    )


def too_few(number: int, judged: Judged, need: int, unready: Iterable[str]) -> str:
    """Return why a round has no result, site by site, and what may be done."""
    refused = ", ".join(f"{one.site}: {one.code}" for one in judged.refusals)
    turned_away = ", ".join(f"{site}: {broken.rule}" for site, broken in judged.rejected.items())
    return (
        f"round {number}: {len(judged.sound)} of {judged.asked} sites sent a sound upload, {need} needed "
        f"(refused: {refused or 'none'}; rejected: {turned_away or 'none'}; silent: "
        f"{', '.join(judged.silent) or 'none'}; never ready: {', '.join(unready) or 'none'}). The target of the last "
        "round is kept; resume the run when the sites are back: those that have trained answer again without spending "
        "anything."
    )


def release_folder(folder: Path, site: str) -> Path:
    """Return where a site's release lies in a round's directory."""
    return folder / "releases" / site


def write_release(folder: Path, upload: Upload, *, base_name: str) -> Path:
    """Write a sound release and its receipts into a round's directory and return where."""
    place = release_folder(folder, upload.site)
    releases.save(upload.release, upload.survey, place, base_name=base_name)
    receipts = upload.receipts
    told = None if receipts is None else [receipt_to_dict(receipt) for receipt in receipts]
    journal.write_json(place / "receipts.json", told)
    return place


def to_json(judged: Judged) -> dict[str, Any]:
    """Return everything but the releases themselves and the time it took."""
    plain = ("booked", "broken", "silent", "heard", "asked", "bytes_up", "bytes_down")
    value: dict[str, Any] = {key: getattr(judged, key) for key in plain}
    value["rejected"] = {site: asdict(one) for site, one in judged.rejected.items()}
    value["strays"] = [asdict(one) for one in judged.strays]
    value["refusals"] = [asdict(refusal) for refusal in judged.refusals]
    value["sound"] = [
        {"site": one.site, "spent": one.spent, "round": one.round, "run": one.run, "head": one.head}
        for one in judged.sound
    ]
    return value


def from_json(value: Mapping[str, Any], folder: Path, *, seconds: float) -> Judged:
    """Return what `to_json` told, with the releases and receipts of a round's directory."""
    return Judged(
        sound=tuple(_upload(one, release_folder(folder, one["site"])) for one in value["sound"]),
        rejected={site: Rejection(**one) for site, one in value["rejected"].items()},
        strays=tuple(Rejection(**one) for one in value["strays"]),
        booked={site: float(spent) for site, spent in value["booked"].items()},
        refusals=tuple(Refusal(**refusal) for refusal in value["refusals"]),
        broken=tuple(value["broken"]),
        silent=tuple(value["silent"]),
        heard=tuple(value["heard"]),
        asked=int(value["asked"]),
        bytes_up=dict(value["bytes_up"]),
        bytes_down=dict(value["bytes_down"]),
        seconds=seconds,
    )


def _upload(told: Mapping[str, Any], place: Path) -> Upload:
    receipts = cast("list[dict[str, Any]] | None", json.loads((place / "receipts.json").read_text(encoding="utf-8")))
    release, survey = releases.load(place)
    return Upload(
        site=told["site"],
        round=told["round"],
        release=release,
        receipts=None if receipts is None else tuple(receipt_from_dict(receipt) for receipt in receipts),
        spent=float(told["spent"]),
        run=told["run"],
        head=told["head"],
        survey=survey,
    )
