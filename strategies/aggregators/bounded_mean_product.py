"""The mean of the products with every site's update cut to one length: no site moves the model further than another.

    update_k = delta_W(upload_k) - delta_W(broadcast), all layers as one vector; N_k its Frobenius norm
    merged   = delta_W(broadcast) + (1/n) sum_k min(1, bound / N_k) * update_k

What is cut and averaged are products, so a site cannot hide length by rescaling A against B, and the bound speaks of
what the model feels. The sum is exact, without a dense matrix: it is a weighted sum of the n uploads and the broadcast
with weights c_k / n and 1 - mean(c_k), stacked into one adapter (rank n r, or (n + 1) r once an update was cut).

| bound        | one upload of n moves the merged delta_W by | hostile uploads it takes | claimed from |
|--------------|---------------------------------------------|--------------------------|--------------|
| a number     | at most 2 bound / n, whatever it holds      | any; f move 2 f bound/n  | n = 1        |
| "median"     | at most (2 M + (n - 1) (M - m)) / n         | fewer than n / 2         | n = 3        |

"median" is the median of the N_k, the lower one of an even number. m and M are the least and the greatest honest N_k:
with fewer than n / 2 hostile uploads the median is one of them or between them. A number is a constant of the
configuration and needs no vote; it has to be known, for instance from the clip norm and the noise of the learner.

Not claimed: direction. A sign-flipped update of an honest length counts as much as an honest one, and a trigger
trained within the bound stays in, at a weight of 1 / n. For those use `median_factors` or `krum_product`, and the
per-site share of `site_share` where drafts are written by each site.

Source: Sun et al. 2019 (Can You Really Backdoor Federated Learning?, 1911.07963), norm thresholding; ours bounds the
product instead of the weights, offers the median as the threshold, and adds no noise: for that see `central_dp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import PlainValidator

from fl_app import lora
from fl_app.config import Section
from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.types import Merged
from strategies import products

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


class BoundedMeanProduct(Section):
    """[server.aggregator] kind = "bounded_mean_product": `bound` is a length of delta_W, or "median"."""

    kind: Literal["bounded_mean_product"]
    bound: Bound = "median"

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage. Raises: ConfigInvalid when there are too few sites for a median of norms."""
        if self.bound == "median" and setting.sites < FEWEST:
            raise ConfigInvalid(
                f'server.aggregator: bound = "median" outvotes nobody with server.network.sites = {setting.sites}: it '
                f"takes {FEWEST} sites; write a number, bound = 1.0, which is a promise for any number of sites"
            )
        return BoundedMean(bound=self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedMean:
    """An `Aggregator`."""

    bound: Bound

    def __call__(self, uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
        """Return the mean of the cut updates on top of the broadcast; uploads within the bound give `mean_product`.

        Raises: RoundFailed for fewer than three uploads where the bound is their median; AdapterMismatch; ValueError.
        """
        adapters, start = products.by_site(uploads), broadcast.adapter
        products.check_maps(adapters, start)
        if self.bound == "median" and len(adapters) < FEWEST:
            raise RoundFailed(
                f"round {broadcast.round}: {len(adapters)} sound uploads ({', '.join(adapters)}), and the median of "
                f"their norms outvotes nobody: it takes {FEWEST}. The target of the last round is kept; raise "
                "server.network.quorum, or give server.aggregator.bound a number"
            )
        norms = [products.distance(adapter, start) for adapter in adapters.values()]
        bound = sorted(norms)[(len(norms) - 1) // 2] if self.bound == "median" else self.bound
        scales = [1.0 if norm <= bound else bound / norm for norm in norms]
        voices, weights = list(adapters.values()), [scale / len(scales) for scale in scales]
        rest = sum(1 - scale for scale in scales) / len(scales)
        if rest > 0:
            voices, weights = [*voices, start], [*weights, rest]
        return Merged(adapter=lora.stacked(voices, weights), used=tuple(adapters))
