"""InvisibleInk: texts drawn from public scores, moved a little, token by token, by the records of a bucket.

A public prompt gives every token a score; each of a bucket's records moves it by its own score minus the public one,
recentred and cut to [-C, C]. The public score plus the sum of these over the *expected* number B is drawn from, at
`temperature`, among the tokens that are best in public and those that the records could lift among them (top-k+).
The less the budget allows, the smaller is C; at 0 the text is public.

The site calibrates the noise; one over it is the span of a draw, and C = span B temperature / 2.

Why the span holds although a bucket has as many units as the hash gives it. Fix what was drawn so far. The public
scores and the mask are functions of it and of public constants. A record not there contributes exactly what it would
"replaced by the public prompt": a difference of 0. Of a unit with up to k = max_rows_per_unit rows, each counting
1 / k, k_j rows lie in one bucket of code j and move each of its scores by at most k_j C / (k B) in either direction,
whatever else is in the sum: B is a constant, not a count. So the log-ratios of one draw lie in an interval of width
2 k_j C / (k B temperature). The t-th draws of all buckets are one draw of their product; ranges of independent draws
add, and the k_j add up to k at most: BoundedRange(2 C / (B temperature)), once for each of the tokens of a bucket.
Nothing follows from a bucket's size but how loudly it speaks.

The number of draws charged is that of texts that all run to their last token; ending earlier is a function of tokens
drawn, and what is saved is not given back.

Source: InvisibleInk 2025 (2507.02974), DClip and top-k+, read in its code. Ours differs in recentring at the median
over the public mask, in hashed buckets (theirs cut a shuffled list), in units, and in a clip that the ledger chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from clients.decoding import DecodingSection, Prompts, Task, check_announced, sorted_into_buckets, write_texts
from fl_app import lora, private_decoding
from fl_app.privacy import events
from fl_app.types import BoundedRange, DpReceipt, TextRelease

if TYPE_CHECKING:
    import numpy.typing as npt

    from clients.private_rows import PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import Adapter, ReleaseKind

    Singles = npt.NDArray[np.float32]


class InvisibleInk(DecodingSection):
    """[client.learner] kind = "invisible_ink".

    `expected_units` is B. `max_clip` bounds C where the budget would allow more: a difference of 20 is as good as any.
    """

    kind: Literal["invisible_ink"]
    texts_per_bucket: Annotated[int, Field(ge=1, le=10_000)] = 1
    temperature: Annotated[float, Field(ge=0.05, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = 100
    max_clip: Annotated[float, Field(ge=1e-3, le=100)] = 20.0

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return InvisibleInkLearner(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class InvisibleInkLearner:
    """A `Learner` that writes."""

    section: InvisibleInk
    release_kind: ReleaseKind = "text"
    private: bool = True

    @property
    def steps(self) -> int:
        """Tokens of one bucket in one round."""
        return self.section.texts_per_bucket * self.section.max_new_tokens

    @property
    def clip_norm(self) -> float:
        """Largest bound on one unit's contribution to the sum of differences."""
        return self.section.max_clip

    @property
    def noise(self) -> None:
        """None: the site chooses, and the clip follows."""
        return

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the price of all tokens of a bucket at this noise.

        Raises: PolicyRefusal when it leaves no clip.
        """
        section = self.section
        private_decoding.check_bound(
            private_decoding.bound_of_span(events.span_of(noise), section.expected_units, section.temperature)
        )
        event = BoundedRange(span=events.span_of(noise), count=self.steps)
        return (DpReceipt(event=event, unit=constants.unit),)

    def __call__(
        self,
        rows: PrivateRows,
        start: Adapter,
        receipts: tuple[DpReceipt, ...],
        constants: PublicConstants,
        bench: Workbench,
    ) -> TextRelease:
        """Return the texts of all buckets.

        Guarantee: `receipts`, for units of `constants.unit`, under add-or-remove of one unit.
        Raises: PolicyRefusal when the receipts are not what was announced, or the site has no control code.
        """
        span = check_announced(self, receipts, constants).span
        one = self.section
        model = lora.attach(bench.model, start, bench.blocks)
        buckets = sorted_into_buckets(rows, bench, per_code=one.buckets_per_code, unit=constants.unit)
        pens = [Pen(section=one, span=span, row_weight=1 / constants.max_rows_per_unit) for _ in buckets]
        task = Task(
            prompts=Prompts(tokenizer=bench.model.tokenizer, template=one.template, max_text=constants.max_tokens),
            max_new_tokens=one.max_new_tokens,
            examples=one.texts_per_bucket,
            batch_rows=one.batch_rows,
            max_bytes=one.max_bytes,
            asks_public=True,
        )
        return TextRelease(texts=write_texts(model, buckets, pens, task, bench, one.placeholder))


class Pen:
    """Writes for one bucket. `drawn` counts its tokens."""

    def __init__(self, *, section: InvisibleInk, span: float, row_weight: float) -> None:
        bound = private_decoding.bound_of_span(span, section.expected_units, section.temperature)
        private_decoding.check_bound(bound)
        self._announced = min(bound, section.max_clip)
        self._bound = private_decoding.usable(self._announced)
        self._section, self._row_weight = section, row_weight
        self.drawn = 0

    @property
    def spent(self) -> bool:
        """Whether all tokens that were charged are drawn."""
        return self.drawn >= self._section.texts_per_bucket * self._section.max_new_tokens

    def begin(self, public_V: Singles | None) -> None:
        """See `clients.decoding.Pen`."""
        assert public_V is not None
        margin = 2 * self._announced / self._section.expected_units
        self._mask = private_decoding.public_mask(public_V, self._section.top_k, margin)
        self._public_K = public_V[self._mask]
        self._moves_K = np.zeros(len(self._mask))

    def add(self, scores_RV: Singles) -> None:
        """See `clients.decoding.Pen`."""
        inside_RK = scores_RV[:, self._mask]
        clipped_RK = private_decoding.clip_differences(inside_RK, self._public_K, self._bound)
        self._moves_K += private_decoding.summed(clipped_RK)

    def draw(self, noise: NoiseSource) -> int:
        """Return a draw from the moved public scores."""
        assert not self.spent
        self.drawn += 1
        moved_K = self._public_K.astype(np.float64) + self._moves_K * (self._row_weight / self._section.expected_units)
        return int(self._mask[private_decoding.draw(moved_K / self._section.temperature, noise)])
