"""What a site sent is held against the server's own spec; the first broken rule is named, nothing is repaired."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fl_app import lora
from fl_app.errors import AdapterMismatch, LedgerRefusal
from fl_app.privacy.accountants import pld
from fl_app.types import AdapterRelease, PoissonGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.lora import LoraSpec
    from fl_app.types import DpReceipt, Hello, Upload

TOLERANCE = 1e-6
"""Relative slack between two computations of one epsilon on different machines."""

MAX_RECEIPTS, MAX_STEPS = 8, 1_000_000
"""What one upload, and one site in one run, may ask this server to account for: seconds of work, far above any use."""


def broken_rule(
    upload: Upload,
    *,
    spec: LoraSpec,
    site: Hello | None,
    round_number: int,
    earlier: Sequence[DpReceipt] = (),
    accept_non_private: bool = False,
) -> str:
    """Return the rule an upload breaks, with the layer where there is one; empty when it is sound.

    `earlier` are the receipts of this site's sound uploads in former rounds of this run. `accept_non_private` takes a
    release without receipts, which must then say that its epsilon is infinite.
    """
    if site is None:
        return "site: not a member of this run"
    if upload.round != round_number:
        return f"round: is for round {upload.round}, this is {round_number}"
    if not isinstance(upload.release, AdapterRelease):
        return f"kind: {upload.release.kind} where an adapter is asked"
    try:
        lora.check_spec(upload.release.adapter, spec)
    except AdapterMismatch as error:
        return str(error)
    if upload.receipts is None and accept_non_private:
        return "" if upload.spent == math.inf else f"receipt: none, but spent {upload.spent:.4g} where only inf is true"
    return _broken_receipts(upload, site, earlier)


def _broken_receipts(upload: Upload, site: Hello, earlier: Sequence[DpReceipt]) -> str:
    if not upload.receipts:
        return "receipt: none, so the release is not private"
    if any(receipt.unit != site.unit for receipt in upload.receipts):
        return f"receipt: unit is not {site.unit}"
    together = [*earlier, *upload.receipts]
    if too_much := _too_much(upload.receipts, together):
        return too_much
    try:
        recomputed = pld.epsilon(together, site.delta)
    except LedgerRefusal as error:
        return f"receipt: cannot be accounted: {error}"
    return _broken_spending(recomputed, upload, site)


def _too_much(receipts: Sequence[DpReceipt], together: Sequence[DpReceipt]) -> str:
    """Return why these receipts are more than this server adds up; empty when they are not."""
    if len(receipts) > MAX_RECEIPTS:
        return f"receipt: {len(receipts)} in one upload, at most {MAX_RECEIPTS}"
    if (steps := sum(_count(receipt) for receipt in together)) > MAX_STEPS:
        return f"receipt: {steps} steps and draws in this run, at most {MAX_STEPS}"
    return ""


def _broken_spending(recomputed: float, upload: Upload, site: Hello) -> str:
    if not recomputed <= upload.spent * (1 + TOLERANCE):
        return f"receipt: adds up to {recomputed:.4g}, the site says {upload.spent:.4g} in all"
    if not upload.spent <= site.epsilon * (1 + TOLERANCE):
        return f"receipt: spent {upload.spent:.4g} of a budget of {site.epsilon:g}"
    if not upload.spent >= site.spent * (1 - TOLERANCE):
        return f"receipt: spent {upload.spent:.4g} is less than the {site.spent:.4g} of before"
    return ""


def cost_of(upload: Upload, delta: float) -> float:
    """Return what a site has spent at the least, by its own word and by the receipts it sent, sound or not.

    A rejected upload was released all the same: it is booked at the larger of the two, infinite without receipts.
    """
    if not upload.receipts:
        return math.inf
    if _too_much(upload.receipts, upload.receipts):
        return upload.spent
    try:
        return max(upload.spent, pld.epsilon(upload.receipts, delta))
    except LedgerRefusal:
        return upload.spent


def _count(receipt: DpReceipt) -> int:
    return receipt.event.steps if isinstance(receipt.event, PoissonGaussian) else receipt.event.count
