"""The protocol of a site's round: a learner announces what it will cost before it reads a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clients.private_rows import PrivateRows
    from fl_app.models import FrozenModel
    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import Adapter, AdapterRelease, DpReceipt


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """What a learner works with besides the rows: the frozen model, the public codes, the source of noise."""

    model: FrozenModel
    codes: Mapping[str, str]
    noise: NoiseSource
    system: str


class Learner(Protocol):
    """Rows and a start adapter -> one release, at exactly the announced cost."""

    @property
    def release_kind(self) -> str:
        """The kind of release, which the site's policy must allow."""
        ...

    @property
    def private(self) -> bool:
        """Whether a release has a receipt; without one its epsilon is infinite."""
        ...

    @property
    def steps(self) -> int:
        """Steps of one round, a public constant."""
        ...

    @property
    def clip_norm(self) -> float:
        """L2 bound on one unit's contribution to one step."""
        ...

    def announce(self, constants: PublicConstants, noise_multiplier: float) -> DpReceipt | None:
        """Return the receipt of one round at this noise multiplier; None when `private` is false."""
        ...

    def __call__(
        self, rows: PrivateRows, start: Adapter, receipt: DpReceipt | None, constants: PublicConstants, bench: Workbench
    ) -> AdapterRelease:
        """Return the release that `receipt` pays for. The number of steps never depends on the rows."""
        ...
