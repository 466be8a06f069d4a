"""Privacy random variables as Opacus composes them: a third opinion, for tests and the report only.

Another library, another grid (chosen from the error allowed), another truncation. It adds its own error bound of
0.01 to epsilon. It binds nothing.

Out of scope: exponential draws, which Opacus does not know; they are refused.
Source: opacus.accountants.PRVAccountant (Gopi, Lee & Wutschitz 2021, arXiv 2106.02848).
"""

from __future__ import annotations

import importlib.metadata
import math
from typing import TYPE_CHECKING

from fl_app.errors import LedgerRefusal
from fl_app.privacy.events import check_delta, merged
from fl_app.types import BoundedRange, Exponential, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.types import DpReceipt


def epsilon(receipts: Sequence[DpReceipt] | None, delta: float) -> float:
    """Return Opacus' PRV upper bound on epsilon at `delta`; `[]` is 0, None or no noise is inf.

    Raises: LedgerRefusal for a delta outside (0, 1), an exponential draw, an unknown event, or receipts of different
    units or relations.
    """
    check_delta(delta)
    if receipts is None:
        return math.inf
    together = merged(receipts)
    if not together:
        return 0.0
    history: list[tuple[float, float, int]] = []
    for receipt in together:
        event = receipt.event
        if isinstance(event, Exponential | BoundedRange):
            name = type(event).__name__
            raise LedgerRefusal(f"Opacus' PRV does not know {name}; ask the PLD or the RDP accountant")
        if event.noise_multiplier == 0:
            return math.inf
        if isinstance(event, PoissonGaussian):
            history.append((event.noise_multiplier, event.sample_rate, event.steps))
        else:
            history.append((event.noise_multiplier, 1.0, event.count))

    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = history
    with np.errstate(divide="ignore"):  # Opacus takes log(1 - q), and a Gaussian has q = 1: -inf is what it means
        return float(accountant.get_epsilon(delta))


def label() -> str:
    """Return the name that stands beside this epsilon, e.g. 'PRV (opacus 1.6.0)'."""
    return f"PRV (opacus {importlib.metadata.version('opacus')})"
