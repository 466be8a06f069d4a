"""Every private text votes for the synthetic text that is most like it: the site's half of Private Evolution.

    population from the server -> votes, one per row -> joint vote per unit, L2 norm <= 1 -> histogram + noise

Nothing is trained and no gradient is taken: a site needs an embedding model and one pass over its rows. The server
writes the texts, keeps what was voted for, and varies it (`strategies.synthesizers.private_evolution`).

Sensitivity. A row's vote has L2 norm at most 1 however many texts share it (`fl_app.votes`), and a unit of several
rows is shrunk to 1 as a whole. The histogram over all bins is therefore one Gaussian mechanism of L2 sensitivity 1,
and T rounds compose to mu = sqrt(T) / noise_multiplier. Texts are embedded alone, so that no vote hangs on a
neighbour's rounding.

DPSDA's client level, one vote vector of norm 1 per client, is the case of a unit column that has one value per client.

Source: Aug-PE (Xie et al. 2024, 2403.01749) and DPSDA (Lin et al. 2023, 2305.15560). Ours differs in three places: a
unit may have several rows; noise lies on a lattice; nothing else about the rows is released, where the papers take the
number of rows per class without noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from fl_app import votes
from fl_app.config import Section
from fl_app.embeddings import AnyEmbedder
from fl_app.errors import PolicyRefusal
from fl_app.privacy import gaussian
from fl_app.types import DpReceipt, Gaussian, HistogramRelease, ReleaseKind

if TYPE_CHECKING:
    from clients.private_rows import PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.types import Adapter

    Doubles = votes.Doubles

CLIP_NORM = 1.0
"""L2 norm of a unit's joint vote; a constant of the method, not a choice."""


class PeVotes(Section):
    """[client.learner] kind = "pe_votes".

    `nearest` texts share a row's vote. `within` says among which: those of the row's own code, or of all codes, which
    is for codes so fine that most have no text in the population. `noise_multiplier` fixes the noise; without it the
    site takes the least that its budget allows.
    """

    kind: Literal["pe_votes"]
    embedder: AnyEmbedder
    within: Literal["code", "all"] = "code"
    nearest: Annotated[int, Field(ge=1, le=1000)] = 1
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)] | None = None

    def build(self, round_number: int) -> Learner:
        """Return the learner; the embedding model is loaded when it is first asked."""
        return VoteCounter(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteCounter:
    """A `Learner` that counts."""

    section: PeVotes
    release_kind: ReleaseKind = "histogram"
    private: bool = True
    steps: int = 1
    clip_norm: float = CLIP_NORM

    @property
    def noise(self) -> float | None:
        """The configuration's noise multiplier, if it has one."""
        return self.section.noise_multiplier

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the one receipt of a round: a histogram, whatever the number of bins."""
        event = Gaussian(noise_multiplier=noise, clip_norm=CLIP_NORM, count=1)
        return (DpReceipt(event=event, unit=constants.unit),)

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> HistogramRelease:
        """Return the noisy histogram over the texts that the server sent, in their order.

        Guarantee: `receipts`, for units of `constants.unit`, under add-or-remove of one unit.
        Raises: PolicyRefusal when the receipts are not those that this learner announced, or there is nothing to vote
        on; ModelMissing when the embedder is not on this machine.
        """
        event = receipts[0].event if receipts else None
        if not isinstance(event, Gaussian) or receipts != self.announce(constants, event.noise_multiplier):
            raise PolicyRefusal(f"receipts {receipts} were not announced by this learner")
        population = bench.material.texts
        if not population:
            raise PolicyRefusal(
                "the server sent no texts to vote on; pe_votes answers a synthesizer that sends a population, such as "
                "private_evolution"
            )
        total = self._count(rows, bench)
        (noisy,) = gaussian.release(
            [total], clip_norm=event.clip_norm, noise_multiplier=event.noise_multiplier, noise=bench.noise
        )
        del total
        return HistogramRelease(bins=votes.bin_names(population), counts=noisy.astype(np.float32))

    def _count(self, rows: PrivateRows, bench: Workbench) -> Doubles:
        """Return the sum of the units' joint votes; private. Shapes: (texts,) float64."""
        embed = self.section.embedder.build(bench.model)
        population = bench.material.texts
        ballot = votes.Ballot.of(
            [one.code if self.section.within == "code" else "" for one in population],
            embed([one.text for one in population]),
        )
        own = embed([row.instruction for row in rows.examples], alone=True)
        of_unit: dict[str, list[int]] = {}
        for number, row in enumerate(rows.examples):
            of_unit.setdefault(row.unit, []).append(number)
        total = np.zeros(ballot.size)
        for numbers in of_unit.values():
            joint = np.zeros(ballot.size)
            for number in numbers:
                code = rows.examples[number].code if self.section.within == "code" else ""
                joint += ballot.vote(own[number], code, nearest=self.section.nearest)
            total += votes.bounded(joint, gaussian.usable_clip(CLIP_NORM))
        del own, of_unit
        return total
