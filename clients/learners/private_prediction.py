"""Private prediction: a site writes texts token by token, each drawn from the summed scores of a bucket of records.

Each record of a bucket of about `expected_units` units asks the model for the next token; a row of scores is clipped
to [-c, c] with its best at c, the sum divided by the *expected* number, and the token drawn from its softmax at
`temperature`. A bucket has `tokens_per_bucket` private tokens for good, and writes as many texts as they last for.

With a `threshold` above 0 a public drafter helps: the token is drawn from the public prompt's scores, free, while the
private rows agree with it (L1 distance of mean probabilities below a noisy threshold). Where they do not, the token
is private and a new threshold is drawn.

What it costs, for one unit of up to k = max_rows_per_unit rows, each of which counts 1 / k:

* A draw. A unit moves every score of a bucket of code j by at most k_j c / (k s), where k_j of its rows lie there.
  The log-ratios of that draw lie in an interval of width 2 k_j c / (k s temperature). The t-th draws of all buckets
  together are one draw of their product, given what was drawn before; ranges of independent draws add, the k_j add up
  to k at most, and so it is BoundedRange(2 c / (s temperature)), at most `tokens_per_bucket` times.
* A threshold. The distance moves by at most k_j / (k s), so one run (a threshold, and distances up to the first that
  passes it) is Exponential(2 k_j / (k s noise)); the i-th runs of all buckets together, Exponential(2 / (s noise)).
  A run costs from the moment its threshold is drawn, whether or not any distance ever passes. A threshold is drawn for
  the first token after a private one, and none after the last private token: as many at most as private tokens.

Out of scope: what is left of a run that the cap cut short. A text may end in the middle; a filter drops such.

Source: Amin et al. 2024 (2407.12108v2), algorithm 1, theorem 1. Ours differs in the cap, enforced within a text; in
public constants for the number of buckets and texts; in a vocabulary that may be cut by public scores; and in units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from clients.decoding import DecodingSection, Prompts, Task, check_announced, sorted_into_buckets, write_texts
from fl_app import lora, private_decoding
from fl_app.errors import PolicyRefusal
from fl_app.privacy import events
from fl_app.types import BoundedRange, DpReceipt, Exponential, TextRelease

if TYPE_CHECKING:
    import numpy.typing as npt

    from clients.private_rows import PrivateRows
    from clients.stages import Learner, PublicConstants, Workbench
    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import Adapter, ReleaseKind

    Singles = npt.NDArray[np.float32]


class PrivatePrediction(DecodingSection):
    """[client.learner] kind = "private_prediction".

    `public_top` cuts the vocabulary to the best public tokens (0: all of it), without which the tail of a large
    vocabulary drowns a clipped score. `threshold` 0: no drafter; distances lie in [0, 2].
    """

    kind: Literal["private_prediction"]
    tokens_per_bucket: Annotated[int, Field(ge=1, le=1_000_000)]
    texts_per_bucket: Annotated[int, Field(ge=1, le=10_000)] = 16
    clip_norm: Annotated[float, Field(ge=1e-3, le=1e3)] = 10.0
    temperature: Annotated[float, Field(ge=0.05, le=100)] = 2.0
    public_top: Annotated[int, Field(ge=0)] = 0
    threshold: Annotated[float, Field(ge=0, le=2)] = 0.0
    threshold_noise: Annotated[float, Field(ge=1e-4, le=100)] = 0.2
    public_temperature: Annotated[float, Field(ge=0.05, le=100)] = 1.5

    def build(self, round_number: int) -> Learner:
        """Return the stage for one round."""
        return PrivatePredictionLearner(section=self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivatePredictionLearner:
    """A `Learner` that writes."""

    section: PrivatePrediction
    release_kind: ReleaseKind = "text"
    private: bool = True

    @property
    def steps(self) -> int:
        """Private tokens of one bucket in one round."""
        return self.section.tokens_per_bucket

    @property
    def clip_norm(self) -> float:
        """Bound on one unit's contribution to the sum of scores."""
        return self.section.clip_norm

    @property
    def noise(self) -> float:
        """One over the span: clip, expected number and temperature fix it."""
        one = self.section
        span = private_decoding.token_span(one.clip_norm, one.expected_units, one.temperature)
        return 1 / events.span_of(1 / span)

    def announce(self, constants: PublicConstants, noise: float) -> tuple[DpReceipt, ...]:
        """Return the price of the private tokens and, with a drafter, of as many thresholds.

        Raises: PolicyRefusal for another noise than the configuration's, which no part of it could honour.
        """
        span, ours = events.span_of(noise), events.span_of(self.noise)
        if span != ours:
            raise PolicyRefusal(f"noise {noise:g} asked; clip_norm, expected_units and temperature make {1 / ours:g}")
        count = self.section.tokens_per_bucket
        paid = [DpReceipt(event=BoundedRange(span=span, count=count), unit=constants.unit)]
        if self.section.threshold > 0:
            epsilon = private_decoding.threshold_epsilon(self.section.expected_units, self.section.threshold_noise)
            paid.append(DpReceipt(event=Exponential(epsilon=epsilon, count=count), unit=constants.unit))
        return tuple(paid)

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
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
        pens = [
            Pen(section=one, span=span, vocabulary=vocabulary, row_weight=1 / constants.max_rows_per_unit)
            for _ in buckets
        ]
        task = Task(
            prompts=Prompts(tokenizer=bench.model.tokenizer, template=one.template, max_text=constants.max_tokens),
            max_new_tokens=one.max_new_tokens,
            examples=one.texts_per_bucket,
            batch_rows=one.batch_rows,
            max_bytes=one.max_bytes,
            asks_public=one.threshold > 0 or one.public_top > 0,
        )
        return TextRelease(texts=write_texts(model, buckets, pens, task, bench, one.placeholder))


class Pen:
    """Writes for one bucket, and counts what it spends: `private_tokens` and `thresholds`."""

    def __init__(self, *, section: PrivatePrediction, span: float, vocabulary: int, row_weight: float) -> None:
        bound = private_decoding.bound_of_span(span, section.expected_units, section.temperature)
        self._bound = private_decoding.usable(min(bound, section.clip_norm))
        self._section, self._vocabulary, self._row_weight = section, vocabulary, row_weight
        self._threshold: float | None = None
        self.private_tokens = self.thresholds = 0

    @property
    def spent(self) -> bool:
        """Whether all private tokens are used up."""
        return self.private_tokens >= self._section.tokens_per_bucket

    def begin(self, public_V: Singles | None) -> None:
        """See `clients.decoding.Pen`."""
        self._public_V = public_V
        self._mask: npt.NDArray[np.int64] = (
            np.arange(self._vocabulary)
            if public_V is None
            else private_decoding.public_mask(public_V, self._section.public_top)
        )
        self._scores = np.zeros(len(self._mask))
        self._probabilities = np.zeros(self._vocabulary)

    def add(self, scores_RV: Singles) -> None:
        """See `clients.decoding.Pen`."""
        inside_RK = scores_RV if len(self._mask) == scores_RV.shape[1] else scores_RV[:, self._mask]
        self._scores += private_decoding.summed(private_decoding.clip_scores(inside_RK, self._bound))
        if self._section.threshold > 0:
            self._probabilities += private_decoding.probability_sum(scores_RV)

    def draw(self, noise: NoiseSource) -> int:
        """Return a public token while the rows agree with the public prompt, else a private one."""
        assert not self.spent
        one = self._section
        if one.threshold > 0 and self._public_V is not None and not self._disagrees(self._public_V, noise):
            public_K = self._public_V[self._mask].astype(np.float64)
            return int(self._mask[private_decoding.draw(public_K / one.public_temperature, noise)])
        self.private_tokens += 1
        mean = self._scores * (self._row_weight / one.expected_units)
        return int(self._mask[private_decoding.draw(mean / one.temperature, noise)])

    def _disagrees(self, public_V: Singles, noise: NoiseSource) -> bool:
        """Ask the sparse vector; its noise is a share `SLACK` above what was announced, which pays for rounding."""
        scale = self._section.threshold_noise * (1 + private_decoding.SLACK)
        if self._threshold is None:
            self.thresholds += 1
            self._threshold = self._section.threshold + scale * float(noise.laplace(()))
        apart = private_decoding.distance(
            self._probabilities * self._row_weight, public_V, self._section.expected_units
        )
        if apart + 2 * scale * float(noise.laplace(())) < self._threshold:
            return False
        self._threshold = None
        return True
