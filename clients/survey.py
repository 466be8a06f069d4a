"""What a site counts once, beside its release: how many rows lie under each control code, with noise.

One Gaussian mechanism over one vector. Each row adds a vector of L2 norm 1 over all parts, a unit of up to k rows adds
each row's vector divided by k; the noise covers the whole, so the parts together cost one receipt:

    row -> [ share_codes * one_hot(code),  share_kernel * features(text) ],   share_codes^2 + share_kernel^2 = 1

What leaves is the noisy sum with every part divided by its share (and multiplied by k), in units of rows, so that the
server may read it as a count. A row whose code is not public (in no line of `codes.jsonl`) adds nothing to the counts.

It is asked in the first round that a site plays in a run. Under a fixed schedule the plan of the ledger holds it as a
side: one survey for the life of the ledger (`fl_app.privacy.plan`); under a Renyi filter every run may have its own.

Source: the Gaussian mechanism on a histogram; quotas of synthetic text from noisy counts as in DistilDP (2403.00932),
whose code uses the exact ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from fl_app.config import Section
from fl_app.privacy import gaussian
from fl_app.types import DpReceipt, Gaussian, VectorRelease

if TYPE_CHECKING:
    from clients.private_rows import PrivateRows
    from clients.stages import PublicConstants, Workbench
    from fl_app.types import ReleaseKind

CLIP = 1.0
"""The L2 norm of one unit's contribution, all parts together."""


class SurveySection(Section):
    """[client.survey]: `noise_multiplier` is the standard deviation of a count when nothing but codes is asked."""

    noise_multiplier: Annotated[float, Field(ge=0.5, le=1e4)]
    codes: bool = True

    def build(self) -> Survey:
        """Return the survey."""
        return Survey(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One noisy sum over all rows."""

    section: SurveySection

    @property
    def release_kinds(self) -> tuple[ReleaseKind, ...]:
        """The kinds of release, which the site's policy must allow."""
        return ("histogram",)

    def announce(self, constants: PublicConstants) -> DpReceipt:
        """Return the receipt."""
        event = Gaussian(noise_multiplier=self.section.noise_multiplier, clip_norm=CLIP)
        return DpReceipt(event=event, unit=constants.unit)

    def __call__(self, rows: PrivateRows, constants: PublicConstants, bench: Workbench) -> VectorRelease:
        """Return the noisy sums by name, codes in the order of their ids. Shapes: codes (number of codes,)."""
        place = {code: index for index, code in enumerate(sorted(bench.codes))}
        counts = np.zeros(len(place))
        for row in rows.examples:
            if row.code in place:
                counts[place[row.code]] += 1
        per_row = constants.max_rows_per_unit
        share = gaussian.usable_clip(CLIP) / per_row
        (noisy,) = gaussian.release(
            [counts * share], clip_norm=CLIP, noise_multiplier=self.section.noise_multiplier, noise=bench.noise
        )
        del counts
        return VectorRelease(vectors={"codes": (noisy / share).astype(np.float32)})
