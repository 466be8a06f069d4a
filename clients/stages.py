"""The protocol of a site's round: a learner announces what it will cost before it reads a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fl_app.types import Material

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clients.private_rows import PrivateRows
    from fl_app.models import FrozenModel
    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import Adapter, DpReceipt, Floats, Release, ReleaseKind


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicConstants:
    """What a site declares in its policy and never computes from its rows.

    `sample_rate` is the Poisson rate of a privacy unit per step, `expected_batch` the public normaliser in rows.
    """

    sample_rate: float
    expected_batch: int
    max_tokens: int
    max_rows_per_unit: int
    unit: str


class Drawer(Protocol):
    """What a site keeps of a run for itself, from one round to a later one: arrays by name, which never leave it."""

    def latest(self, before: int) -> Mapping[str, Floats] | None:
        """Return what the last round before this one put here; None when none did."""
        ...

    def put(self, round_number: int, arrays: Mapping[str, Floats]) -> None:
        """Keep the arrays of a round, whole or not at all; a round that is made again replaces its own."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """What a learner works with besides the rows: the frozen model, the public codes, the source of noise.

    `codes` maps a control code's id to its text. `material` is what the server sent along: public text, or text and
    vectors made of earlier releases. `secret` salts what must not be guessed from outside, such as a record's bucket.
    `blocks` are the frozen adapters under the one that is trained. `run` and `site` are the names under which the
    release will be known (`Upload`). `drawer` is where a learner keeps what is the site's own; None: nowhere.
    """

    model: FrozenModel
    codes: Mapping[str, str]
    noise: NoiseSource
    system: str
    material: Material = field(default_factory=Material)
    secret: bytes = b""
    blocks: tuple[Adapter, ...] = ()
    run: str = ""
    site: str = ""
    drawer: Drawer | None = None


class Learner(Protocol):
    """Rows and a start adapter -> one release, at exactly the announced cost."""

    @property
    def release_kind(self) -> ReleaseKind:
        """The kind of release, which the site's policy must allow."""
        ...

    @property
    def private(self) -> bool:
        """Whether a release has receipts; without any its epsilon is infinite."""
        ...

    @property
    def steps(self) -> int:
        """Steps, releases or draws that one round charges to a unit; a public constant."""
        ...

    @property
    def clip_norm(self) -> float:
        """Bound on one unit's contribution: to one step in L2 norm, or to one score."""
        ...

    @property
    def noise(self) -> float | None:
        """The noise that the configuration fixes; None when the site chooses the least that its budget needs."""
        ...

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the receipts of one round at this noise, the main mechanism first; none when `private` is false.

        `noise` is a noise multiplier, and for a `BoundedRange` one over its span (`events.span_of`): more is always
        more private.
        """
        ...

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> Release:
        """Return the release that `receipts` pay for. What they say of it never depends on the rows."""
        ...
