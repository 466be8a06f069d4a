"""Keeps the drafts that lie where the sites' private texts lie, by one noisy sum of kernel features.

Every site sums the kernel features of its private texts once and adds noise (`fl_app.kernel_features`); that survey is
a release, and the density of private text around any draft is read off it as often as one likes: post-processing.
The densest `keep` drafts of each code stay, or of all with by = "all". A number, not a share: the top half of a top
half is another quarter, the top 200 of the top 200 are the same, so a second pass drops nothing.

Density alone seeks the mode. By code, what is kept stays as broad as the codes are; copies are for `near_duplicate`.

How sure it is: see `noise_std` and `pair_std` there. Over n sites the noise of a density is noise_multiplier * sqrt(n)
texts, so a draft is told from another only when their densities differ by more.

Source: Backurs et al. 2024 (2403.08917) for private similarity to synthetic text; choosing drafts by it is ours.
Out of scope: who asks the sites for the survey, and what it costs (`clients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from fl_app.errors import RoundFailed
from fl_app.kernel_features import densities
from fl_app.kernel_sum import KernelSumSection
from fl_app.types import Screened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.embeddings import Embedder
    from fl_app.types import Draft, Floats
    from strategies.lab import ServerModels
    from strategies.stages import Filter

SURVEYED = "kernel"
"""Name of the noisy sum in a survey."""


class KernelDensity(KernelSumSection):
    """[[server.filters]] kind = "kernel_density": the keys of the sites' sum, and how many drafts stay."""

    kind: Literal["kernel_density"]
    keep: Annotated[int, Field(ge=1, le=1_000_000)]
    by: Literal["code", "all"] = "code"

    def build(self, lab: ServerModels) -> Filter:
        """Return the stage. Raises: ModelMissing when the embedder is not on this machine."""
        return KernelDensityFilter(section=self, lab=lab, embed=self.embedder.build(lab.local))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelDensityFilter:
    """A `Filter` that compares drafts of one call; what it knows of private text is the lab's survey."""

    section: KernelDensity
    lab: ServerModels
    embed: Embedder

    def __call__(self, drafts: Sequence[Draft], earlier: Sequence[Draft]) -> Screened:
        """Return the densest drafts, in the order in which they came.

        Raises: RoundFailed when no site has sent a survey, or one is of another length.
        """
        del earlier
        if not drafts:
            return Screened(kept=(), dropped={})
        section = self.section
        features = section.features([draft.instruction for draft in drafts], self.embed)
        density = densities(features, self._surveyed())
        groups: dict[str, list[int]] = {}
        for number, draft in enumerate(drafts):
            groups.setdefault(draft.origin.code if section.by == "code" else "", []).append(number)
        dropped: dict[str, str] = {}
        for members in groups.values():
            order = sorted(members, key=lambda number: (-density[number], number))
            for number in order[section.keep :]:
                least = density[order[section.keep - 1]]
                dropped[drafts[number].id] = f"kernel_density: {density[number]:.2f} texts near, {least:.2f} needed"
        return Screened(kept=tuple(draft for draft in drafts if draft.id not in dropped), dropped=dropped)

    def _surveyed(self) -> Floats:
        """Return the sum over the sites that were heard, in the order of their names. Shapes: (dim,) float32."""
        told = [
            survey.vectors[SURVEYED] for _, survey in sorted(self.lab.surveys.items()) if SURVEYED in survey.vectors
        ]
        if not told:
            raise RoundFailed(
                "filter kernel_density: no site has sent a survey of kernel features. Way out: let the sites survey, "
                "or leave the filter out"
            )
        if any(one.shape != (self.section.dim,) for one in told):
            lengths = ", ".join(sorted({str(len(one)) for one in told}))
            raise RoundFailed(
                f"filter kernel_density: dim = {self.section.dim}, and the surveys are of length {lengths}"
            )
        return np.stack(told).sum(axis=0, dtype=np.float64).astype(np.float32)
