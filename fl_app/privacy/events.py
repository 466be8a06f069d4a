"""Receipts as accounting events: one event of ours is one `dp_accounting` event, and one JSON object.

    PoissonGaussian(s, q, T)   SelfComposed(PoissonSampled(q, Gaussian(s)), T)
    Gaussian(s, n)             SelfComposed(Gaussian(s), n)
    Exponential(e, n)          SelfComposed(RandomizedResponse(2 / (1 + exp(e)), 2 buckets), n)
    BoundedRange(h, n)         SelfComposed(ZCDp(h^2 / 8), n); PLD: a pair of its own (`bounded_range`)
    any of them, s = 0         NonPrivate: its epsilon is infinite

Why randomised response for `Exponential`. It promises that each draw is `epsilon`-DP under the receipt's relation, and
no more. The worst pair of output distributions of *any* epsilon-DP mechanism is the binary randomised response with
odds exp(epsilon): each of them is a post-processing of it (Kairouz, Oh & Viswanath 2015, arXiv 1311.0776, theorem 10),
so composing it bounds adaptive draws from above and epsilon never falls below the truth. `LaplaceDpEvent(1 / epsilon)`
has the same range but is not the worst pair: it would under-report. dp-accounting admits RandomizedResponse only under
a replacement relation because there it means a person's answer being flipped; here it is a bounding pair, whatever the
relation, and the accountants compose it as such.

`BoundedRange` knows more: a draw from softmax(scores), whose log-ratios between neighbours span `span`. Its Renyi curve
is bounded by span^2 / 8 zCDP (Cesar & Rogers 2021, arXiv 2004.07223), which RDP composes and PLD refuses; for PLD we
have the worst pair in closed form (`accountants.bounded_range`).

Out of scope: what an epsilon is (`accountants`), who may spend it (`ledger`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from fl_app.errors import LedgerRefusal
from fl_app.types import BoundedRange, DpReceipt, Exponential, Gaussian, MechanismEvent, PoissonGaussian, Relation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import dp_accounting

Json: TypeAlias = dict[str, Any]

EVENT_KINDS: dict[str, type[MechanismEvent]] = {
    "poisson_gaussian": PoissonGaussian,
    "gaussian": Gaussian,
    "exponential": Exponential,
    "bounded_range": BoundedRange,
}
RELATIONS: tuple[str, ...] = get_args(Relation)
RECEIPT_KEYS = frozenset({"event", "unit", "relation"})
MAX_NOISE = 1e6
MIN_SPAN = 1e-6
MAX_COUNT = 10**9
"""Far above any use, and small enough that no accountant overflows on a receipt from elsewhere."""


def to_dp_event(receipt: DpReceipt) -> dp_accounting.DpEvent:
    """Return the `dp_accounting` event of one receipt.

    Raises: LedgerRefusal for an event, a relation or a value that we do not know how to account.
    """
    import dp_accounting as dp

    check_receipt(receipt)
    event = receipt.event
    match event:
        case PoissonGaussian():
            inner = dp.PoissonSampledDpEvent(event.sample_rate, dp.GaussianDpEvent(event.noise_multiplier))
            return _repeat(inner, event.steps) if event.noise_multiplier > 0 else dp.NonPrivateDpEvent()
        case Gaussian():
            inner = dp.GaussianDpEvent(event.noise_multiplier)
            return _repeat(inner, event.count) if event.noise_multiplier > 0 else dp.NonPrivateDpEvent()
        case Exponential():
            return _repeat(dp.RandomizedResponseDpEvent(2 / (1 + math.exp(event.epsilon)), 2), event.count)
        case BoundedRange():
            return _repeat(dp.ZCDpEvent(event.span**2 / 8), event.count)


def span_of(noise: float) -> float:
    """Return 1 / noise, to nine decimals so that it survives the way back: the span of a `BoundedRange`.

    Raises: LedgerRefusal for a noise that is none, or that makes a span too small to account.
    """
    span = round(1 / noise, 9) if noise > 0 else math.inf
    _check_number("span", span, low=MIN_SPAN, high=100.0)
    return span


def noise_of(event: MechanismEvent) -> float | None:
    """Return the noise by which a mechanism was announced, from which a learner announces it again.

    None for an `Exponential`, which is never calibrated.
    """
    match event:
        case PoissonGaussian() | Gaussian():
            return event.noise_multiplier
        case BoundedRange():
            return 1 / event.span
        case Exponential():
            return None


def receipt_to_dict(receipt: DpReceipt) -> Json:
    """Return the JSON object of a receipt: {"event": {"kind", ...}, "unit", "relation"}.

    Raises: LedgerRefusal for a receipt that `receipt_from_dict` would refuse.
    """
    check_receipt(receipt)
    kind = next(name for name, cls in EVENT_KINDS.items() if isinstance(receipt.event, cls))
    return {"event": {"kind": kind, **asdict(receipt.event)}, "unit": receipt.unit, "relation": receipt.relation}


def receipt_from_dict(tree: Mapping[str, Any]) -> DpReceipt:
    """Return the receipt of a JSON object.

    Raises: LedgerRefusal for an unknown or missing key, an unknown kind, or a value out of range.
    """
    _check_keys("receipt", tree, RECEIPT_KEYS)
    event = dict(tree["event"]) if isinstance(tree["event"], dict) else {"kind": tree["event"]}
    kind = event.pop("kind", None)
    if not isinstance(kind, str) or kind not in EVENT_KINDS:
        raise LedgerRefusal(f"receipt kind {str(kind)[:80]!r} is unknown; known: {', '.join(EVENT_KINDS)}")
    cls = EVENT_KINDS[kind]
    _check_keys(f"event {kind}", event, frozenset(field.name for field in fields(cls)))
    receipt = DpReceipt(event=cls(**event), unit=tree["unit"], relation=tree["relation"])
    check_receipt(receipt)
    return receipt


def no_noise(unit: str) -> DpReceipt:
    """Return what a ledger enters for a release without noise: its epsilon is infinite, and so is every later sum."""
    return DpReceipt(event=Gaussian(noise_multiplier=0.0, clip_norm=1.0), unit=unit)


def check_receipt(receipt: DpReceipt) -> None:
    """Return when a receipt can be accounted.

    Raises: LedgerRefusal naming the value otherwise. Allowed: noise_multiplier in [0, 1e6], sample_rate in (0, 1],
    steps and count in [1, 1e9] (integers), clip_norm > 0, epsilon in (0, 500], span in [1e-6, 100]; all finite.
    """
    if not isinstance(receipt.unit, str) or not receipt.unit:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise LedgerRefusal(f"receipt unit {receipt.unit!r} is no name; write for instance 'record'")
    if receipt.relation not in RELATIONS:
        raise LedgerRefusal(f"receipt relation {receipt.relation!r} is unknown; known: {', '.join(RELATIONS)}")
    event = receipt.event
    match event:
        case PoissonGaussian():
            _check_number("noise_multiplier", event.noise_multiplier, low=0.0, high=MAX_NOISE)
            _check_number("sample_rate", event.sample_rate, low=0.0, high=1.0, open_low=True)
            _check_number("clip_norm", event.clip_norm, low=0.0, open_low=True)
            _check_count("steps", event.steps)
        case Gaussian():
            _check_number("noise_multiplier", event.noise_multiplier, low=0.0, high=MAX_NOISE)
            _check_number("clip_norm", event.clip_norm, low=0.0, open_low=True)
            _check_count("count", event.count)
        case Exponential():
            _check_number("epsilon", event.epsilon, low=0.0, high=500.0, open_low=True)
            _check_count("count", event.count)
        case BoundedRange():
            _check_number("span", event.span, low=MIN_SPAN, high=100.0)
            _check_count("count", event.count)
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            known = ", ".join(cls.__name__ for cls in EVENT_KINDS.values())
            raise LedgerRefusal(f"event {type(event).__name__} cannot be accounted; known: {known}")


def check_together(receipts: Sequence[DpReceipt]) -> None:
    """Return when the receipts may be added up: each is valid, and all share one unit and one relation.

    Raises: LedgerRefusal.
    """
    for receipt in receipts:
        check_receipt(receipt)
    for name, values in (("units", {r.unit for r in receipts}), ("relations", {r.relation for r in receipts})):
        if len(values) > 1:
            raise LedgerRefusal(f"receipts of different {name} ({', '.join(sorted(values))}) do not add up; split them")


def merged(receipts: Sequence[DpReceipt]) -> tuple[DpReceipt, ...]:
    """Return the same spending with equal mechanisms counted together, in an order that depends on values only.

    Composition is commutative, and no epsilon depends on the clip norm (the noise is a multiple of it), so that ten
    rounds of 60 steps are one event of 600: hundreds of rounds stay fast. Clip norms become 1.

    Raises: LedgerRefusal as `check_together`.
    """
    check_together(receipts)
    if not receipts:
        return ()
    poisson: dict[tuple[float, float], int] = {}
    gaussian: dict[float, int] = {}
    exponential: dict[float, int] = {}
    bounded: dict[float, int] = {}
    for receipt in receipts:
        match receipt.event:
            case PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps):
                poisson[noise, rate] = poisson.get((noise, rate), 0) + steps
            case Gaussian(noise_multiplier=noise, count=count):
                gaussian[noise] = gaussian.get(noise, 0) + count
            case Exponential(epsilon=epsilon, count=count):
                exponential[epsilon] = exponential.get(epsilon, 0) + count
            case BoundedRange(span=span, count=count):
                bounded[span] = bounded.get(span, 0) + count
    events: list[MechanismEvent] = [
        *(
            PoissonGaussian(noise_multiplier=noise, sample_rate=rate, steps=steps, clip_norm=1.0)
            for (noise, rate), steps in sorted(poisson.items())
        ),
        *(Gaussian(noise_multiplier=noise, clip_norm=1.0, count=count) for noise, count in sorted(gaussian.items())),
        *(Exponential(epsilon=epsilon, count=count) for epsilon, count in sorted(exponential.items())),
        *(BoundedRange(span=span, count=count) for span, count in sorted(bounded.items())),
    ]
    return tuple(DpReceipt(event=event, unit=receipts[0].unit, relation=receipts[0].relation) for event in events)


def check_delta(delta: float) -> None:
    """Return when 0 < delta < 1.

    Raises: LedgerRefusal naming the value, nan included.
    """
    if isinstance(delta, bool) or not 0 < delta < 1:
        raise LedgerRefusal(f"delta = {delta!r} must lie strictly between 0 and 1; below 1 / number of units")


def _repeat(event: dp_accounting.DpEvent, count: int) -> dp_accounting.DpEvent:
    import dp_accounting as dp

    return dp.SelfComposedDpEvent(event, count)


def _check_keys(what: str, tree: Mapping[str, Any], allowed: frozenset[str]) -> None:
    unknown, missing = sorted(set(tree) - allowed), sorted(allowed - set(tree))
    if unknown or missing:
        raise LedgerRefusal(f"{what} has unknown keys {unknown} and lacks {missing}; it holds {sorted(allowed)}")


def _check_number(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bounds = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise LedgerRefusal(f"receipt {name} = {value!r} is outside {bounds}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNT:
        raise LedgerRefusal(f"receipt {name} = {value!r} is no integer in [1, {MAX_COUNT}]")
