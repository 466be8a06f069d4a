"""What a site sent is held against the server's own spec; the first broken rule is named, nothing is repaired."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fl_app import lora
from fl_app.errors import AdapterMismatch
from fl_app.privacy.accountants import pld
from fl_app.types import AdapterRelease

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fl_app.lora import LoraSpec
    from fl_app.types import DpReceipt, Hello, Upload

TOLERANCE = 1e-6
"""Relative slack between two computations of one epsilon on different machines."""


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
    recomputed = pld.epsilon([*earlier, *upload.receipts], site.delta)
    if not recomputed <= upload.spent * (1 + TOLERANCE):
        return f"receipt: adds up to {recomputed:.4g}, the site says {upload.spent:.4g} in all"
    if not upload.spent <= site.epsilon * (1 + TOLERANCE):
        return f"receipt: spent {upload.spent:.4g} of a budget of {site.epsilon:g}"
    if not upload.spent >= site.spent * (1 - TOLERANCE):
        return f"receipt: spent {upload.spent:.4g} is less than the {site.spent:.4g} of before"
    return ""
