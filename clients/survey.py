"""What a site counts and sums once, beside its release: rows under each control code, and where their texts lie.

One Gaussian mechanism over one vector. Each row adds a vector of L2 norm 1 over all parts, a unit of up to k rows adds
each row's vector divided by k; the noise covers the whole, so the parts together cost one receipt:

    row -> [ sqrt(1 - kernel_share) * one_hot(code),  sqrt(kernel_share) * kernel features of its text ]

What leaves is the noisy sum with every part divided by its weight (and multiplied by k), in units of rows, so that the
server may read it as a count, or as a density of texts. A row whose code is not public (in no line of `codes.jsonl`)
adds nothing to the counts. Texts are embedded alone, so that no row's features hang on a neighbour's rounding.

It is asked in the first round that a site plays in a run. Under a fixed schedule the plan of the ledger holds it as a
side: one survey for the life of the ledger (`fl_app.privacy.plan`); under a Renyi filter every run may have its own.

Source: the Gaussian mechanism on a histogram; quotas of synthetic text from noisy counts as in DistilDP (2403.00932),
whose code uses the exact ones; RAFT's profile (2603.07027, from a note). Kernel sums: `fl_app.kernel_features`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from fl_app.config import Section
from fl_app.kernel_sum import KernelSumSection
from fl_app.privacy import gaussian
from fl_app.types import DpReceipt, Gaussian, VectorRelease

if TYPE_CHECKING:
    import numpy.typing as npt

    from clients.private_rows import PrivateRows
    from clients.stages import PublicConstants, Workbench
    from fl_app.types import ReleaseKind

    Doubles = npt.NDArray[np.float64]

CLIP = 1.0
"""The L2 norm of one unit's contribution, all parts together."""

CODES, KERNEL = "codes", "kernel"
"""Names of the two sums."""


class SurveySection(Section):
    """[client.survey]. `noise_multiplier` is the noise in rows, of a count when nothing but codes is asked.

    `kernel` holds the keys of the filter `kernel_density`, which reads the sum. `kernel_share` is the part of a row's
    squared norm that its kernel features take where both are asked.
    """

    noise_multiplier: Annotated[float, Field(ge=0.5, le=1e4)]
    codes: bool = True
    kernel: KernelSumSection | None = None
    kernel_share: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _something(self) -> SurveySection:
        if not self.codes and self.kernel is None:
            raise ValueError("codes is false and there is no kernel: nothing is asked; leave the table out")
        return self

    def build(self) -> Survey:
        """Return the survey; an embedding model is loaded when it is first asked."""
        return Survey(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One noisy sum over all rows."""

    section: SurveySection

    @property
    def release_kinds(self) -> tuple[ReleaseKind, ...]:
        """The kinds of release, which the site's policy must allow: counts a histogram, kernel sums a vector."""
        kinds: list[ReleaseKind] = []
        if self.section.codes:
            kinds.append("histogram")
        if self.section.kernel is not None:
            kinds.append("vector")
        return tuple(kinds)

    def announce(self, constants: PublicConstants) -> DpReceipt:
        """Return the receipt: all parts are one sum."""
        event = Gaussian(noise_multiplier=self.section.noise_multiplier, clip_norm=CLIP)
        return DpReceipt(event=event, unit=constants.unit)

    def __call__(self, rows: PrivateRows, constants: PublicConstants, bench: Workbench) -> VectorRelease:
        """Return the noisy sums by name. Shapes: codes (number of codes,), in the order of their ids; kernel (dim,).

        Raises: ModelMissing when the embedder is not on this machine.
        """
        sums = self._sums(rows, bench)
        usable = gaussian.usable_clip(CLIP) / constants.max_rows_per_unit
        scales = {name: usable * math.sqrt(weight) for name, weight in self._weights().items()}
        noisy = gaussian.release(
            [sums[name] * scales[name] for name in scales],
            clip_norm=CLIP,
            noise_multiplier=self.section.noise_multiplier,
            noise=bench.noise,
        )
        del sums
        return VectorRelease(
            vectors={name: (one / scales[name]).astype(np.float32) for name, one in zip(scales, noisy, strict=True)}
        )

    def _weights(self) -> dict[str, float]:
        """Return the part of a row's squared norm that each sum takes; they add up to 1."""
        if self.section.kernel is None:
            return {CODES: 1.0}
        if not self.section.codes:
            return {KERNEL: 1.0}
        return {CODES: 1 - self.section.kernel_share, KERNEL: self.section.kernel_share}

    def _sums(self, rows: PrivateRows, bench: Workbench) -> dict[str, Doubles]:
        """Return the exact sums, to which every row adds a vector of norm 1 (0 to the counts of an unknown code)."""
        place = {code: index for index, code in enumerate(sorted(bench.codes))}
        counts = np.zeros(len(place))
        for row in rows.examples:
            if row.code in place:
                counts[place[row.code]] += 1
        asked = self.section.kernel
        if asked is None:
            return {CODES: counts}
        embed = asked.embedder.build(bench.model)
        features = asked.features([row.instruction for row in rows.examples], embed, alone=True).astype(np.float64)
        features[~np.isfinite(features).all(axis=1)] = 0.0  # no row may make the round fail, and so be told from others
        features /= np.maximum(1.0, np.linalg.norm(features, axis=1, keepdims=True))  # 1 but for float32
        return {CODES: counts, KERNEL: features.sum(0)}
