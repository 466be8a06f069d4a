"""The mean of the products with every site's update cut to one length: no site moves the model further than another.

    update_k = delta_W(upload_k) - delta_W(broadcast), all layers as one vector; N_k its Frobenius norm
    merged   = delta_W(broadcast) + sum_k p_k c_k update_k,   c_k = min(1, bound / N_k),   p_k = 1/n without weights

What is cut and averaged are products, so a site cannot hide length by rescaling A against B, and the bound speaks of
what the model feels. It is a sum of the n uploads and the broadcast in the shares p_k c_k and 1 - sum p_k c_k, which
`inner` adds up: by default stacked into one adapter, exactly (rank n r, or (n + 1) r once an update was cut). Since the
broadcast joins as one more adapter, an inner that adds factors instead of products would cut nothing; those are
refused.

| bound        | one upload of n moves the merged delta_W by | hostile uploads it takes | claimed from |
|--------------|---------------------------------------------|--------------------------|--------------|
| a number     | at most 2 bound / n, whatever it holds      | any; f move 2 f bound/n  | n = 1        |
| "median"     | at most (2 M + (n - 1) (M - m)) / n         | fewer than n / 2         | n = 3        |

"median" is the median of the N_k, the lower one of an even number. m and M are the least and the greatest honest N_k:
with fewer than n / 2 hostile uploads the median is one of them or between them. With weights, p_k stands for 1 / n. A
number is a constant of the configuration and needs no vote; it has to be known, for instance from the clip norm and the
noise of the learner. The bounds are on the sum. An inner that cuts the sum to a rank is as far from it as what it cuts
off, and a cut can turn about where two singular values are near each other.

Not claimed: direction. A sign-flipped update of an honest length counts as much as an honest one, and a trigger
trained within the bound stays in, at a weight of 1 / n. For those use `median_factors` or `krum_product`, and the
per-site share of `site_share` where drafts are written by each site.

Source: Sun et al. 2019 (Can You Really Backdoor Federated Learning?, 1911.07963), norm thresholding; ours bounds the
product instead of the weights, offers the median as the threshold, and adds no noise: for that see `central_dp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, PlainValidator, field_validator

from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.types import Merged
from strategies import products
from strategies.aggregators.mean_product import MeanProduct
from strategies.aggregators.sketched_svd import SketchedSvd
from strategies.aggregators.stacked import Stacked
from strategies.aggregators.thresholded_svd import ThresholdedSvd
from strategies.aggregators.truncated_svd import TruncatedSvd
from strategies.weighing import Wrapping, refuse_inner, shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast, Upload
    from strategies.stages import Aggregator, Setting

FEWEST = 3
"""Norms it takes for their median to outvote one."""


def _bound(value: object) -> float | Literal["median"]:
    """Return a bound; one message for both forms, where a union would complain once for each."""
    if value == "median":
        return "median"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError('write a finite number above 0, or "median"')


Bound: TypeAlias = Annotated[float | Literal["median"], PlainValidator(_bound)]


REFUSED = {
    "mean_factors": "a cut product is no product of cut factors, so it has no factors to average",
    "residual": "it starts from the mean of the factors, and a cut product has none",
    "ridge": "it corrects the mean of the factors, and a cut product has none",
    "zero_padded": "it averages factors, and a cut product has none",
    "median_factors": "a median of factors needs no bound, and a cut product has no factors",
    "central_dp": "its bound is on factors and is part of its promise; write clip_norm there",
    "bounded_mean_product": "it would cut what is cut; lower bound",
    "krum_product": "choose first and cut then: write krum_product with this as its inner",
}
"""Why an aggregator cannot add up cut products, by its kind."""

AnySum: TypeAlias = Annotated[
    MeanProduct | Stacked | TruncatedSvd | ThresholdedSvd | SketchedSvd, Field(discriminator="kind")
]


class BoundedMeanProduct(Wrapping):
    """[server.aggregator] kind = "bounded_mean_product": `bound` is a length of delta_W, or "median"."""

    kind: Literal["bounded_mean_product"]
    bound: Bound = "median"
    inner: AnySum = MeanProduct(kind="mean_product")

    @field_validator("inner", mode="before")
    @classmethod
    def _sums_products(cls, value: Any) -> Any:
        return refuse_inner(value, REFUSED, way_out='write inner = {kind = "mean_product"}, or another sum of products')

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage. Raises: ConfigInvalid when there are too few sites for a median of norms."""
        if self.bound == "median" and setting.sites < FEWEST:
            raise ConfigInvalid(
                f'server.aggregator: bound = "median" outvotes nobody with server.network.sites = {setting.sites}: it '
                f"takes {FEWEST} sites; write a number, bound = 1.0, which is a promise for any number of sites"
            )
        self.inner.build(setting)  # for its refusals
        return BoundedMean(section=self, setting=setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedMean:
    """An `Aggregator`."""

    section: BoundedMeanProduct
    setting: Setting

    def __call__(self, uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
        """Return the sum of the cut updates on top of the broadcast; uploads within the bound give what `inner` gives.

        Raises: RoundFailed for fewer than three uploads where the bound is their median; AdapterMismatch; ValueError.
        """
        adapters, start, inner = products.by_site(uploads), broadcast.adapter, self.section.inner
        inner.check(adapters, start)
        if self.section.bound == "median" and len(adapters) < FEWEST:
            raise RoundFailed(
                f"round {broadcast.round}: {len(adapters)} sound uploads ({', '.join(adapters)}), and the median of "
                f"their norms outvotes nobody: it takes {FEWEST}. The target of the last round is kept; raise "
                "server.network.quorum, or give server.aggregator.bound a number"
            )
        norms = [products.distance(adapter, start) for adapter in adapters.values()]
        bound = sorted(norms)[(len(norms) - 1) // 2] if self.section.bound == "median" else self.section.bound
        weighed = shares(inner.weights, adapters, round_number=broadcast.round)
        cuts = [1.0 if norm <= bound else bound / norm for norm in norms]
        voices = list(adapters.values())
        counted = [share * scale for share, scale in zip(weighed, cuts, strict=True)]
        if (rest := math.fsum(share * (1 - scale) for share, scale in zip(weighed, cuts, strict=True))) > 0:
            voices, counted = [*voices, start], [*counted, rest]
        whole = inner.merge(voices, counted, broadcast, self.setting)
        return Merged(adapter=whole.adapter, used=tuple(adapters), start=whole.start, blocks=whole.blocks)
