"""Renyi differential privacy: the cross-check beside the certificate, looser but of another kind.

RDP knows no grid and no FFT, so a slip there does not repeat here. It overstates by 4 to 95 % (performance.md 4);
it is printed beside the PLD epsilon and binds nothing. Its value at one order is what a Renyi filter adds up.

Source: dp_accounting.rdp (Mironov 2017, arXiv 1702.07476; conversion of Canonne, Kamath & Steinke 2020).
"""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fl_app.privacy.events import check_delta, merged, to_dp_event
from fl_app.types import Exponential, Gaussian, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import DpReceipt

MIN_NOISE = 1e-3
"""Below it (epsilon above 10^5) the answer is infinity: sound, and the library's 1 / noise^2 cannot overflow."""


def epsilon(receipts: Sequence[DpReceipt] | None, delta: float) -> float:
    """Return the RDP epsilon of everything the receipts released, at `delta`; `[]` is 0, None or no noise is inf.

    Guarantee: an upper bound, at the best of dp-accounting's default orders.
    Raises: LedgerRefusal for a delta outside (0, 1), an unknown event, or receipts of different units or relations.
    """
    check_delta(delta)
    if receipts is None:
        return math.inf
    if not receipts:
        return 0.0
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    found = curve(receipts)
    return float(rdp.compute_epsilon(found.orders, found.spent, delta)[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class RenyiCurve:
    """Renyi divergence spent, order by order; infinite where it could not be bounded."""

    orders: tuple[float, ...]
    spent: tuple[float, ...]


def curve(receipts: Sequence[DpReceipt], orders: Sequence[float] | None = None) -> RenyiCurve:
    """Return the summed Renyi divergence of the receipts at `orders`, dp-accounting's own when there are none given.

    Guarantee: an upper bound at every order, for any order in which the receipts were made, adaptively or not.
    Raises: LedgerRefusal for an unknown event, or receipts of different units or relations.
    """
    import dp_accounting as dp
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    together = merged(receipts)
    gaussians = rdp.RdpAccountant(orders, dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    # A randomised response is the bounding pair of an epsilon-DP draw, composed under the only relation in which
    # dp-accounting knows that pair; see fl_app.privacy.events.
    bounding_pairs = rdp.RdpAccountant(orders, dp.NeighboringRelation.REPLACE_ONE)
    known = tuple(float(order) for order in gaussians.orders)
    gaussian = (PoissonGaussian, Gaussian)
    if any(isinstance(r.event, gaussian) and r.event.noise_multiplier < MIN_NOISE for r in together):
        return RenyiCurve(orders=known, spent=(math.inf,) * len(known))
    for receipt in together:
        (bounding_pairs if isinstance(receipt.event, Exponential) else gaussians).compose(to_dp_event(receipt))
    spent = (gaussians.rdp + bounding_pairs.rdp).tolist()
    return RenyiCurve(orders=known, spent=tuple(float(value) for value in spent))


def label() -> str:
    """Return the name that stands beside this epsilon, e.g. 'RDP (dp-accounting 0.6.0)'."""
    return f"RDP (dp-accounting {importlib.metadata.version('dp-accounting')})"
