"""The five protocols of a server round. A method package implements one of them, one file per method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from fl_app.types import AdapterRelease

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from fl_app.config import LoraInit
    from fl_app.types import (
        Adapter,
        Broadcast,
        Draft,
        Lesson,
        Material,
        Merged,
        Release,
        ReleaseSpec,
        Screened,
        Upload,
        VectorRelease,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an aggregator may know of its run before it begins: constants of the configuration, and its directory.

    `sites` is the size of the cohort as configured, never how many came; `directory` is the run directory; `init` is
    how a fresh adapter is drawn (`lora_start.initial`).
    """

    run: str
    mode: Literal["simulation", "production"]
    seed: int
    rounds: int
    sites: int
    directory: Path
    init: LoraInit = "uniform"


class Aggregator(Protocol):
    """Uploads of one round -> one adapter. Free of order; inputs are not changed."""

    def __call__(self, uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
        """`broadcast` is what the uploads answer: the round, and the adapter that every site started from.

        Raises: AdapterMismatch when base, layers or, where the method needs them alike, rank and scaling differ;
        ValueError when there is no upload; RoundFailed when the method has a budget and it is spent, too few uploads
        to keep its promise, or one from a site without a weight.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Voices:
    """What a synthesizer may write from: the merged adapter, by site every release that was used, names in order.

    `by_site` holds the adapters among the releases; `releases` all of them, of whatever kind; `surveys` by site what
    was counted and summed in the first round, of every site that was ever sound; `material` what the sites were sent.
    """

    merged: Adapter
    by_site: Mapping[str, Adapter]
    releases: Mapping[str, Release] = field(default_factory=dict[str, "Release"])
    surveys: Mapping[str, VectorRelease] = field(default_factory=dict[str, "VectorRelease"])
    material: Material | None = None

    @classmethod
    def of(
        cls,
        merged: Merged,
        uploads: Sequence[Upload],
        *,
        surveys: Mapping[str, VectorRelease] | None = None,
        material: Material | None = None,
    ) -> Voices:
        """Return the voices of a round; a site that the aggregator did not use has none.

        Guarantee: none but `merged` where the aggregator itself made it private: its noise does not cover what a site
        sent, and text of that would tell who took part.
        """
        if merged.cost is not None:
            return cls(merged=merged.adapter, by_site={}, material=material)
        found = {upload.site: upload.release for upload in uploads if upload.site in merged.used}
        adapters = {site: one.adapter for site, one in found.items() if isinstance(one, AdapterRelease)}
        return cls(
            merged=merged.adapter,
            by_site=dict(sorted(adapters.items())),
            releases=dict(sorted(found.items())),
            surveys=dict(sorted((surveys or {}).items())),
            material=material,
        )


class Synthesizer(Protocol):
    """Releases of the sites -> synthetic instructions, under public control codes."""

    @property
    def asks(self) -> ReleaseSpec:
        """What every site is asked for in a round."""
        ...

    def prepare(
        self, target: Adapter, earlier: Sequence[Draft], rng: np.random.Generator, round_number: int
    ) -> Material:
        """Return what the sites need to answer round `round_number`, from public text and earlier releases alone.

        `target` is what they start from, `earlier` every draft that was kept in former rounds. Most need nothing.
        """
        ...

    def __call__(self, voices: Voices, rng: np.random.Generator, round_number: int) -> Sequence[Draft]:
        """Same voices and same generator state give the same drafts, each with complete provenance."""
        ...


class Filter(Protocol):
    """Drafts -> those kept, and a reason for every other one. Reads synthetic and public text only; idempotent."""

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """`earlier` are the drafts kept in former rounds; they are never judged again."""
        ...


class Distiller(Protocol):
    """Drafts -> lessons: the professional writes the answers."""

    def __call__(self, drafts: Sequence[Draft], rng: np.random.Generator) -> Sequence[Lesson]:
        """At most one lesson per draft, in the order of the drafts.

        Raises: TeacherFailed when the professional cannot be reached for good.
        """
        ...


class Tuner(Protocol):
    """An adapter and all lessons so far -> the target adapter. No lessons, no change; base and rank are kept."""

    def __call__(self, adapter: Adapter, lessons: Sequence[Lesson], rng: np.random.Generator) -> Adapter:
        """Touches released data only."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The five methods of a run; filters by name, in order."""

    aggregator: Aggregator
    synthesizer: Synthesizer
    filters: tuple[tuple[str, Filter], ...]
    distiller: Distiller
    tuner: Tuner
