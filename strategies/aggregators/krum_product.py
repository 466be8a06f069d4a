"""Krum: the upload whose product lies nearest to its neighbours; with `keep` above 1, a sum of the nearest ones.

    score_k = sum of the squared distances from delta_W_k to the n - f - 2 uploads nearest to it; lowest scores win

n uploads, f = `hostile` of them bad at the most, n >= 2 f + 3. Distances are between products over all layers at once:
scores per layer, or of A and B apart, would pick factors of different sites, whose product nobody sent, and a site
could look near or far by rescaling A against B. What is chosen are whole uploads, and those `inner` adds up as it would
add any: fewer uploads are uploads again. By default that is the exact mean of their products (rank keep * r), where no
factor of one site ever meets a factor of another.

Guarantee, for that inner and every other exact one: with D the greatest distance between two honest uploads, every
upload that is picked lies within D * sqrt((n - f - 2) / (n - 2 f - 1)) of some honest one, so what is merged lies
within D * (1 + that root) of every honest one. For a hostile upload to be picked some honest one must have scored no
lower (keep <= n - f leaves one behind it); that score is at most (n - f - 2) D^2, and n - 2 f - 1 or more of the
neighbours it counts are honest.

Not claimed: that the pick is honest, or good. Noise keeps honest uploads far apart, so D is large where privacy is
strong, and a site that sends the broadcast back, bent a little, looks central. Krum with keep = 1 throws the other
sites' work away, and honest sites with unlike text are never picked.

An availability price: fewer than 2 f + 3 sound uploads fail the round, so silence of a few sites is enough for that.
Plan sites >= 3 f + 3 to bear f silent ones.

Source: Blanchard et al. 2017 (1703.02757), Krum and Multi-Krum, on adapters after a local round instead of on
gradients. The guarantee above is ours, of distances in one round; theirs is of the angle to a true gradient.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator

from fl_app.errors import ConfigInvalid, RoundFailed
from strategies import products
from strategies.aggregators.bounded_mean_product import BoundedMeanProduct
from strategies.aggregators.mean_factors import MeanFactors
from strategies.aggregators.mean_product import MeanProduct
from strategies.aggregators.median_factors import MedianFactors
from strategies.aggregators.residual import Residual
from strategies.aggregators.ridge import Ridge
from strategies.aggregators.sketched_svd import SketchedSvd
from strategies.aggregators.stacked import Stacked
from strategies.aggregators.thresholded_svd import ThresholdedSvd
from strategies.aggregators.truncated_svd import TruncatedSvd
from strategies.aggregators.zero_padded import ZeroPadded
from strategies.weighing import Wrapping, refuse_inner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fl_app.types import Adapter, Broadcast, Merged, Upload
    from strategies.stages import Aggregator, Setting

REFUSED = {
    "central_dp": "who is chosen depends on every update, so the noise of a sum does not cover it",
    "krum_product": "it would choose among the chosen; lower keep",
}
"""Why an aggregator cannot add up what was chosen, by its kind."""

AnyInner: TypeAlias = Annotated[
    MeanProduct
    | MeanFactors
    | Stacked
    | Residual
    | TruncatedSvd
    | ThresholdedSvd
    | SketchedSvd
    | Ridge
    | ZeroPadded
    | MedianFactors
    | BoundedMeanProduct,
    Field(discriminator="kind"),
]


class KrumProduct(Wrapping):
    """[server.aggregator] kind = "krum_product": tolerates `hostile` sites, adds up `keep` uploads as `inner` does."""

    kind: Literal["krum_product"]
    hostile: Annotated[int, Field(ge=1)] = 1
    keep: Annotated[int, Field(ge=1)] = 1
    inner: AnyInner = MeanProduct(kind="mean_product")

    @field_validator("inner", mode="before")
    @classmethod
    def _sums_uploads(cls, value: Any) -> Any:
        return refuse_inner(value, REFUSED, way_out="choose an aggregator of uploads")

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage. Raises: ConfigInvalid when there are too few sites for `hostile` and `keep`."""
        if fault := too_few(setting.sites, self):
            raise ConfigInvalid(f"server.aggregator: with server.network.sites = {setting.sites}, {fault}")
        return Krum(section=self, inner=self.inner.build(dataclasses.replace(setting, sites=self.keep)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Krum:
    """An `Aggregator`."""

    section: KrumProduct
    inner: Aggregator

    def __call__(self, uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
        """Return the sum of the `keep` lowest scores; ties go to the site whose name comes first.

        Raises: RoundFailed for too few uploads; AdapterMismatch; ValueError.
        """
        adapters, keep = products.by_site(uploads), self.section.keep
        products.check_maps(adapters, broadcast.adapter)
        if fault := too_few(len(adapters), self.section):
            raise RoundFailed(
                f"round {broadcast.round}: with {len(adapters)} sound uploads ({', '.join(adapters)}), {fault}. The "
                "target of the last round is kept"
            )
        scored = scores(adapters, hostile=self.section.hostile)
        chosen = frozenset(sorted(scored, key=lambda site: (scored[site], site))[:keep])
        merged = self.inner([upload for upload in uploads if upload.site in chosen], broadcast)
        told = f"krum: not among the {keep} nearest to the others"
        return dataclasses.replace(merged, rejected={site: told for site in adapters if site not in chosen})


def too_few(count: int, section: KrumProduct) -> str:
    """Return why `count` uploads are too few, and the way out; empty when they are enough."""
    if count < 2 * section.hostile + 3:
        return (
            f"krum_product with hostile = {section.hostile} needs 2 * hostile + 3 = {2 * section.hostile + 3}: with "
            "fewer, hostile uploads can be each other's neighbours and win; ask more sites or lower hostile"
        )
    if section.keep > count - section.hostile:
        return (
            f"krum_product can keep sites - hostile = {count - section.hostile} at the most, not keep = "
            f"{section.keep}: beyond that a hostile upload is kept for certain; ask more sites or lower keep"
        )
    return ""


def scores(adapters: Mapping[str, Adapter], *, hostile: int) -> dict[str, float]:
    """Return the sum of squared distances to the nearest neighbours, by site."""
    sites = sorted(adapters)
    apart = {(one, two): products.distance(adapters[one], adapters[two]) for one in sites for two in sites if one < two}
    near = len(sites) - hostile - 2
    return {
        site: math.fsum(
            sorted(apart[min(site, other), max(site, other)] ** 2 for other in sites if other != site)[:near]
        )
        for site in sites
    }
