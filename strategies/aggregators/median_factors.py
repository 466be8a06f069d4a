"""The coordinate-wise median of A and of B, each for itself: one vote per site and coordinate.

| uploads | hostile ones it outvotes | what is claimed                                                              |
|---------|--------------------------|------------------------------------------------------------------------------|
| 1, 2    | 0                        | nothing, a median of two is their mean; refused                              |
| n >= 3  | fewer than n / 2         | every coordinate of both factors lies between the least and the greatest of  |
|         |                          | the honest uploads, whatever the others hold                                 |

The median is taken of the factors, not of the products. Sites of a round start from one broadcast, so their factors
speak of the same directions and coordinates compare; a frozen A (`dp_ffa_lora`) makes it the median of B exactly, and
the product moves with B alone. Where both factors train, median(B) @ median(A) is not the median of the products, as
`mean_factors` is not their mean: the error grows with the sites' drift apart, and after many local steps a coordinate
of A means another thing at every site. The honest range still holds, factor by factor.

Not taken: the median of the products' entries, cut back to rank r by a singular value decomposition. It needs n dense
d_out x d_in matrices a layer (1.8 GB for one 4096 x 11008 map of five sites in float64) and a decomposition of each,
its entries leave the honest range in the cut, and a median of rank r matrices has no reason to be of rank r. Measured
on drawn factors (576 x 192, r 8, five sites, drift between the sites as large as the common update, one upload at 100
times its size): distance to the common update, in its own lengths, 0.69 for this method, 0.69 for the dense median,
0.54 for the median cut to rank r, 163 for `mean_factors`. The cut would be worth its price on small maps only.

It takes no `inner`: a median is of single numbers at one place in every upload, so no part of the uploads is chosen
that another aggregator could add up, and a median of products would need the dense matrices above. Of adapters with
cores it is the median of the cores, exact in the products, since A and B are common.

Out of scope: a colluding half, and what differs honestly: where sites hold different text a median keeps the common
part and drops the rest, more than a mean does.

Source: Yin et al. 2018 (1803.01498), option I, on adapters after a local round instead of on gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from fl_app.config import Section
from fl_app.errors import ConfigInvalid, RoundFailed
from fl_app.types import Merged
from strategies import products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import Broadcast, Floats, Upload
    from strategies.stages import Aggregator, Setting

FEWEST = 3
"""Uploads it takes to outvote one."""


class MedianFactors(Section):
    """[server.aggregator] kind = "median_factors"."""

    carries: ClassVar[bool] = True
    one_rank: ClassVar[str] = "adds or orders coordinate by coordinate, and factors of different ranks share none"

    kind: Literal["median_factors"]

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage. Raises: ConfigInvalid when there are too few sites to outvote one."""
        if setting.sites < FEWEST:
            raise ConfigInvalid(
                f"server.aggregator: median_factors outvotes nobody with server.network.sites = {setting.sites}: it "
                f"takes {FEWEST} sites; a median of two is their mean, so write mean_factors"
            )
        return median_factors


def median_factors(uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
    """Return the median of the factors; of an even number, the mean of the two in the middle.

    Raises: RoundFailed for fewer than three uploads; AdapterMismatch; ValueError.
    """
    adapters = products.by_site(uploads)
    products.check_maps(adapters, broadcast.adapter, same_rank=True)
    if len(adapters) < FEWEST:
        raise RoundFailed(
            f"round {broadcast.round}: {len(adapters)} sound uploads ({', '.join(adapters)}), and a median of them "
            f"outvotes nobody: it takes {FEWEST}. The target of the last round is kept; raise server.network.quorum, "
            "or use mean_factors"
        )
    return Merged(adapter=products.by_factor(list(adapters.values()), _median), used=tuple(adapters))


def _median(parts: Sequence[Floats]) -> Floats:
    """Return the median of equal shapes, halves computed in float64."""
    return np.asarray(np.median(np.stack(parts).astype(np.float64), axis=0), np.float32)
