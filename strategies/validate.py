"""What a site sent is held against the server's own spec; the first broken rule is named, nothing is repaired.

| release                                   | verdict                                                                  |
|-------------------------------------------|--------------------------------------------------------------------------|
| NaN, infinity, in one number or in all    | `finite`, whatever the bits of the NaN                                   |
| farther from the broadcast than steps go  | `norm` (`strategies.reach`), so 1e30 too; of a frozen factor, any change |
| the broadcast itself, also as -0 for 0    | `replay`: compared by value. Noise never leaves every number as it was   |
| equal to a release or target of before    | `replay`: by its hash. Noise never comes twice                           |
| a trained factor of zeros or denormals    | `zero`: noise never gives that, and denormals slow every later product   |
| a number that is zero, -0 or denormal     | sound: an honest number may be                                           |

Noise decides the three rows on it, so they hold for private releases only: plain learning may find nothing to learn.
Of a release made of scalars they say nothing: its noise is in bytes, which may all be zero.
What cannot be seen here, a hostile update within all bounds, is the aggregator's matter (T2).

Source: threats T1, T5, T11, T30 of `reliability-and-security.md` 2.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

import numpy as np

from fl_app import lora, releases
from fl_app.errors import LedgerRefusal
from fl_app.privacy.accountants import pld
from fl_app.text import one_line
from fl_app.types import AdapterRelease, HistogramRelease, PoissonGaussian, ReleaseSpec, TextRelease, VectorRelease
from strategies.reach import norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fl_app.errors import WireViolation
    from fl_app.lora import LoraSpec
    from fl_app.types import Adapter, Broadcast, DpReceipt, Factor, Floats, Hello, Upload
    from strategies.reach import UpdateCap

TOLERANCE = 1e-6
"""Relative slack between two computations of one epsilon on different machines."""

ADAPTER = ReleaseSpec()
"""What is asked when nothing is said."""

MAX_RECEIPTS, MAX_STEPS = 8, 1_000_000
"""What one upload, and one site in one run, may ask this server to account for: seconds of work, far above any use."""

Rule: TypeAlias = Literal[
    "alpha",
    "base",
    "bytes",
    "deadline",
    "dtype",
    "duplicate",
    "error",
    "finite",
    "hash",
    "keys",
    "kind",
    "layers",
    "member",
    "norm",
    "receipt",
    "replay",
    "round",
    "run",
    "shape",
    "site",
    "size",
    "spent",
    "zero",
]
"""Every reason for which a reply is turned away."""

RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A reply that is not used: whose, the rule it breaks, the tensor where there is one, and how.

    Guarantee: whatever stood in the reply, every field is one line of at most 200 characters that print.
    """

    site: str
    rule: Rule
    reason: str
    tensor: str = ""

    def __post_init__(self) -> None:
        assert self.rule in RULES
        for name in ("site", "reason", "tensor"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.rule}: {self.tensor} {self.reason}" if self.tensor else f"{self.rule}: {self.reason}"


def unreadable(site: str, error: WireViolation) -> Rejection:
    """Return the rejection of a message that `wire` could not read."""
    return Rejection(site=site, rule=cast("Rule", error.rule), tensor=error.tensor, reason=error.reason)


def broken_rule(
    upload: Upload,
    *,
    broadcast: Broadcast,
    spec: LoraSpec,
    site: Hello | None,
    asked: ReleaseSpec = ADAPTER,
    cap: UpdateCap | None = None,
    earlier: Sequence[DpReceipt] = (),
    seen: Mapping[str, str] | None = None,
    accept_non_private: bool = False,
) -> Rejection | None:
    """Return the rule an upload breaks; None when it is sound.

    `broadcast` is what it must answer, `earlier` are the receipts of this site's sound uploads in former rounds of
    this run, and `seen` says by content hash what every adapter known from before is. `accept_non_private` takes a
    release without receipts, which must then say that its epsilon is infinite.
    """
    broken = (
        _broken_address(upload, broadcast, site)
        or (None if upload.release.kind == asked.kind else _no(upload, "kind", _asked(upload, asked)))
        or _broken_adapter(upload, broadcast, spec, cap)
        or _broken_numbers(upload)
    )
    if broken:
        return broken
    assert site is not None  # an unknown site has broken a rule
    if upload.receipts is None and accept_non_private:
        only_inf = f"none, but spent {upload.spent:.4g} where only inf is true"
        return None if upload.spent == math.inf else _no(upload, "receipt", only_inf)
    return (
        _noiseless(upload, broadcast, cap, seen or {})
        or _broken_receipts(upload, site, earlier, cap)
        or _broken_spending(upload, site)
    )


def _no(upload: Upload, rule: Rule, reason: str, tensor: str = "") -> Rejection:
    return Rejection(site=upload.site, rule=rule, reason=reason, tensor=tensor)


def _broken_address(upload: Upload, broadcast: Broadcast, site: Hello | None) -> Rejection | None:
    """Return why an upload is no answer of a site of this run to this broadcast."""
    if site is None:
        return _no(upload, "member", "not a member of this run")
    if upload.run != broadcast.named:
        return _no(upload, "run", f"is for run {upload.run[:80]!r}, this is {broadcast.named[:80]!r}")
    if upload.round != broadcast.round:
        return _no(upload, "round", f"is for round {upload.round}, this is {broadcast.round}")
    return None


def _broken_adapter(upload: Upload, broadcast: Broadcast, spec: LoraSpec, cap: UpdateCap | None) -> Rejection | None:
    """Return why a release cannot be an adapter that was trained from the broadcast."""
    if not isinstance(upload.release, AdapterRelease):
        return None
    adapter = upload.release.adapter
    if found := lora.difference(adapter, spec):
        return _no(upload, cast("Rule", found.rule), found.reason, found.tensor)
    return _beyond_reach(upload, upload.release, broadcast, cap) if cap else None


def _beyond_reach(upload: Upload, release: AdapterRelease, broadcast: Broadcast, cap: UpdateCap) -> Rejection | None:
    """Return why a round of this run cannot have led from the broadcast to this adapter."""
    scalars = release.scalars
    if cap.by_scalars and (scalars is None or scalars.shape != (cap.steps,)):
        return _no(upload, "shape", f"a zeroth-order update is {cap.steps} scalars, one a step", "scalars")
    total = 0.0
    for factor, tensor, sent, began in _factors(release.adapter, broadcast.adapter, _all_factors(broadcast.adapter)):
        moved, most = norm(np.subtract(sent, began, dtype=np.float64)), cap.of(factor, began)
        if not moved <= most:
            told = f"moved by {moved:.4g}, at most {most:.4g}" if most else "moved, and no step trains it"
            return _no(upload, "norm", told, tensor)
        total += moved**2
    if not (measured := math.sqrt(total)) <= cap.largest:
        return _no(upload, "norm", f"the update measures {measured:.4g}, at most {cap.largest:.4g}")
    return None


def _asked(upload: Upload, asked: ReleaseSpec) -> str:
    return f"{upload.release.kind} where {'nothing' if asked.kind is None else asked.kind} is asked"


def _broken_numbers(upload: Upload) -> Rejection | None:
    """Return which array that is no factor of an adapter holds a number that is none."""
    named = {f"survey.{name}": values for name, values in (upload.survey.vectors if upload.survey else {}).items()}
    match upload.release:
        case VectorRelease(vectors=vectors):
            named |= vectors
        case HistogramRelease(counts=counts):
            named["counts"] = counts
        case _:
            pass
    for name in sorted(named):
        if not np.isfinite(named[name]).all():
            return _no(upload, "finite", "holds NaN or infinity", name)
    return None


def _noiseless(
    upload: Upload, broadcast: Broadcast, cap: UpdateCap | None, seen: Mapping[str, str]
) -> Rejection | None:
    """Return why a release that is sound in shape can hold no noise of this round."""
    before = seen.get(releases.sha256(upload.release, upload.survey))
    if before and not isinstance(upload.release, TextRelease):  # two sites may both have written nothing
        return _no(upload, "replay", f"is {before} once more; noise never comes twice")
    if not isinstance(upload.release, AdapterRelease):
        return None
    if cap is not None and cap.by_scalars:  # noise is on the scalars, and a byte may say zero
        return None
    names = _all_factors(broadcast.adapter) if cap is None else cap.trains
    trained = list(_factors(upload.release.adapter, broadcast.adapter, names))
    if all(np.array_equal(sent, began) for _, _, sent, began in trained):
        return _no(upload, "replay", "is the broadcast itself; a private release holds noise")
    for _, tensor, sent, _ in trained:
        if not max(sent.max(), -sent.min()) >= np.finfo(np.float32).tiny:
            return _no(upload, "zero", "holds zeros and denormals only; a private release holds noise", tensor)
    return None


def _all_factors(adapter: Adapter) -> tuple[Factor, ...]:
    return ("a", "b", "core") if lora.has_core(adapter) else ("a", "b")


def _factors(adapter: Adapter, start: Adapter, names: Sequence[Factor]) -> Iterator[tuple[Factor, str, Floats, Floats]]:
    """Give each factor's kind, its name, what it is now, and what it was."""
    for layer, began in start.layers.items():
        for name in names:
            yield name, f"{layer}.{name}", getattr(adapter.layers[layer], name), getattr(began, name)


def _broken_receipts(
    upload: Upload, site: Hello, earlier: Sequence[DpReceipt], cap: UpdateCap | None
) -> Rejection | None:
    if not upload.receipts:
        return _no(upload, "receipt", "none, so the release is not private")
    together = [*earlier, *upload.receipts]
    if odd := _foreign(upload.receipts, site, cap) or _too_much(upload.receipts, together):
        return _no(upload, "receipt", odd)
    try:
        recomputed = pld.epsilon(together, site.delta)
    except LedgerRefusal as error:
        return _no(upload, "receipt", f"cannot be accounted: {error}")
    if not recomputed <= upload.spent * (1 + TOLERANCE):
        return _no(upload, "receipt", f"adds up to {recomputed:.4g}, the site says {upload.spent:.4g} in all")
    return None


def _foreign(receipts: Sequence[DpReceipt], site: Hello, cap: UpdateCap | None) -> str:
    """Return why these receipts are not for what this site was asked to do; empty when they are."""
    if any(receipt.unit != site.unit for receipt in receipts):
        return f"unit is not {site.unit}"
    for event in (receipt.event for receipt in receipts):
        if cap and isinstance(event, PoissonGaussian) and event.steps != cap.steps:
            return f"is for {event.steps} steps; a round of this run has {cap.steps}"
    return ""


def _too_much(receipts: Sequence[DpReceipt], together: Sequence[DpReceipt]) -> str:
    """Return why these receipts are more than this server adds up; empty when they are not."""
    if len(receipts) > MAX_RECEIPTS:
        return f"{len(receipts)} in one upload, at most {MAX_RECEIPTS}"
    if (steps := sum(_count(receipt) for receipt in together)) > MAX_STEPS:
        return f"{steps} steps and draws in this run, at most {MAX_STEPS}"
    return ""


def _broken_spending(upload: Upload, site: Hello) -> Rejection | None:
    if not upload.spent <= site.epsilon * (1 + TOLERANCE):
        return _no(upload, "spent", f"{upload.spent:.4g} of a budget of {site.epsilon:g}")
    if not upload.spent >= site.spent * (1 - TOLERANCE):
        return _no(upload, "spent", f"{upload.spent:.4g} is less than the {site.spent:.4g} of before")
    return None


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
