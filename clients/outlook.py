"""What a data holder asks before and between rounds: is everything whole, what is spent, what would a run cost?

Values and words; `desk` prints them. Nothing here writes: the ledger is looked at (`ledger.peek`), the policy is read,
and the cost of a run is reckoned by the code that a round itself uses (`gate`, `spending`). The rows are hashed, to see
that the ledger is about them, and not read.

Out of scope: what only a round can find out, such as a row that cannot be read, or a full disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients import gate, outbox, spending
from fl_app import audit_log, models
from fl_app.errors import AuditBroken, LedgerCorrupt, StillroomError
from fl_app.privacy import plan as planning
from fl_app.privacy.accountants import pld
from fl_app.privacy.book import Book
from fl_app.privacy.chain import Committed, Filtered, Header, Planned, Reserved
from fl_app.privacy.ledger import peek
from fl_app.privacy.statement import HELD, SCHEDULE, of_receipts, of_site, rounded_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clients.config import ClientSection, SitePolicy
    from clients.site import Site
    from clients.spending import Announced
    from fl_app.config import SharedConfig
    from fl_app.privacy.chain import Entry
    from fl_app.privacy.renyi_filter import RenyiFilter
    from fl_app.types import DpReceipt

MOST_STEPS = 1 << 24
"""Where the count of steps that are left stops: no run has as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a site's ledger stands: a line for each entry, and what is spent and left, in words."""

    entries: tuple[str, ...]
    summary: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run would do to a site's budget, in words, and every rule that would refuse it."""

    words: tuple[str, ...]
    refusals: tuple[str, ...]


def standing(site: Site) -> Standing:
    """Return how the site's ledger stands, after holding it against rows, outbox and audit log.

    Raises: LedgerCorrupt, AuditBroken, ConfigInvalid or RowsInvalid: whatever would keep the site from training.
    """
    policy = site.policy
    book = peek(site.ledger_path)
    if book is None or not book.entries:
        return Standing(entries=(), summary=("nothing was ever reserved: there is no ledger yet",))
    check_book(site, policy, book)
    return Standing(entries=tuple(_lines(book, policy.privacy.delta)), summary=tuple(_summary(book, policy)))


def check_book(site: Site, policy: SitePolicy, book: Book) -> None:
    """Return when the ledger is about these rows, and outbox and audit log agree with it.

    Raises: LedgerCorrupt, AuditBroken, RowsInvalid.
    """
    header, fingerprint = book.entries[0], site.fingerprint(policy)
    assert isinstance(header, Header)  # `ledger` writes nothing else there, and `chain` reads the first line as one
    if (header.dataset, header.unit) != (fingerprint, policy.privacy.unit):
        raise LedgerCorrupt(
            f"{site.ledger_path} is the ledger of data set {header.dataset[:12]} per {header.unit!r}, here are "
            f"{fingerprint[:12]} per {policy.privacy.unit!r}; only rows that share no unit with the old ones may get "
            "their own directory"
        )
    outbox.check_witnesses(site.outbox, book.entries)
    heads = [entry.audit for entry in book.reserved if entry.audit]
    if heads:
        path = site.directory / "audit.jsonl"
        known = {entry.hash for entry in audit_log.read(path)}
        for head in heads:
            if head not in known:
                raise AuditBroken(f"{path} does not contain {head[:12]}, which the ledger names: it was cut or changed")


def forecast(site: Site, shared: SharedConfig, asked: ClientSection, config_digest: str) -> Forecast:
    """Return what a new run of this configuration would do to the site's budget.

    Raises: StillroomError when policy, ledger or rows cannot be read at all.
    """
    policy = site.policy
    privacy = policy.privacy
    learner = asked.learner.build(1)
    refusals: list[str] = []
    base = ""
    try:
        base = models.resolve(shared.model.name).sha256
        site.check_place(policy)
    except StillroomError as error:
        refusals.append(str(error))
    survey = asked.survey.build() if asked.survey else None
    request = gate.Request(
        learner=learner, survey=survey, run=shared.run, round_number=1, base=base, config_digest=config_digest
    )
    refusals += gate.objections(policy, request)
    book = peek(site.ledger_path) or Book(entries=[])
    if book.entries:
        check_book(site, policy, book)
    else:
        site.fingerprint(policy)  # are there rows?
    name = policy.site.name
    if not learner.private:
        return Forecast(words=(f"this run would make site {name}'s epsilon infinite",), refusals=tuple(refusals))
    try:
        renyi = book.settle(privacy.composition, epsilon=privacy.epsilon, delta=privacy.delta)
        cost = spending.announced(
            policy,
            book,
            renyi,
            learner,
            survey,
            spending.Round(run="", number=1, rounds=shared.run.rounds, epsilon=asked.epsilon),
        )
    except StillroomError as error:
        now = rounded_up(_spent(book, None, privacy.delta))
        words = of_site(delta=privacy.delta, unit=privacy.unit, composition=privacy.composition).words()
        said = f"site {name} stands at epsilon {now} of {privacy.epsilon:g} {words}; this run would not begin"
        return Forecast(words=(said,), refusals=(*refusals, str(error)))
    return Forecast(words=tuple(_cost(policy, book, renyi, cost, shared.run.rounds)), refusals=tuple(refusals))


def _cost(policy: SitePolicy, book: Book, renyi: RenyiFilter | None, cost: Announced, rounds: int) -> list[str]:
    """Return what a run of `rounds` such rounds would do, in words."""
    privacy = policy.privacy
    after = Book(entries=[*book.entries, *_imagined(book, cost.run(rounds))])
    promised = after.promise(privacy.composition, epsilon=privacy.epsilon, delta=privacy.delta)
    statement = of_receipts(
        after.receipts, delta=privacy.delta, accountant=f"{pld.label()}, {HELD[promised.composition]}"
    )
    before, total = (rounded_up(_spent(one, renyi, privacy.delta)) for one in (book, after))
    words = [
        f"this run would take site {policy.site.name} from {before} to {total} of {privacy.epsilon:g} "
        + statement.words(),
        f"{rounds} rounds of {', '.join(map(planning.describe, cost.every))}"
        + "".join(f", once {planning.describe(receipt)}" for receipt in cost.once),
    ]
    if renyi is None and not book.reserved:
        words.append(
            f"it would fix the schedule: every later run on this ledger goes on with "
            f"{planning.describe(planning.one_step(cost.every[0]))}, or under a Renyi filter at twice the delta"
        )
    if promised.delta > privacy.delta:
        words.append(_doubled(promised.epsilon, promised.delta))
    return words


def _imagined(book: Book, receipts: Sequence[DpReceipt]) -> list[Entry]:
    """Return reservations as they would follow, for reckoning alone."""
    first = len(book.entries)
    return [
        Reserved(seq=first + n, hash="", time="", id="", run="", round=n + 1, receipts=(receipt,))
        for n, receipt in enumerate(receipts)
    ]


def _spent(book: Book, renyi: RenyiFilter | None, delta: float) -> float:
    """Return what is spent, also under a filter that the next reservation would record."""
    by_pld = pld.epsilon(book.receipts, delta)
    if book.renyi is None and renyi is not None and book.receipts:
        return max(by_pld, renyi.epsilon_equivalent(book.receipts))
    return book.spent(by_pld, delta)


def _lines(book: Book, delta: float) -> list[str]:
    """Return one line for each entry; after a reservation, what everything so far comes to."""
    words: list[str] = []
    so_far: list[DpReceipt] = []
    for entry in book.entries:
        match entry:
            case Header():
                told = f"ledger of data set {entry.dataset[:12]}, per {entry.unit}"
            case Planned():
                beside = "".join(f" and {planning.describe(side)}" for side in entry.plan.sides)
                told = (
                    f"schedule fixed to {planning.describe(entry.plan.mechanism)}{beside}, within epsilon "
                    f"{entry.plan.epsilon:g} at delta {entry.plan.delta:g}"
                )
            case Filtered():
                told = f"from here on held by a {entry.renyi.label()}, within epsilon {entry.renyi.epsilon:g}"
            case Committed():
                told = f"reservation {entry.id} became the release {entry.sha256[:12]}"
            case Reserved():
                so_far += entry.receipts
                what = ", ".join(planning.describe(receipt) for receipt in entry.receipts)
                reached = rounded_up(pld.epsilon(so_far, delta))
                told = (
                    f"reserved {entry.id} for run {entry.run!r} round {entry.round}: {what}; PLD so far {reached}"
                    + ("" if book.is_made(entry.id) else "; no release followed, and it stays spent")
                )
        words.append(f"{entry.seq:>4}  {entry.time}  {told}")
    return words


def _summary(book: Book, policy: SitePolicy) -> list[str]:
    """Return what is spent and what is left, with everything that must stand beside an epsilon."""
    privacy = policy.privacy
    if not book.receipts:
        return ["nothing was ever reserved"]
    promised = book.promise(privacy.composition, epsilon=privacy.epsilon, delta=privacy.delta)
    statement = of_receipts(
        book.receipts, delta=privacy.delta, accountant=f"{pld.label()}, {HELD[promised.composition]}"
    )
    spent = book.spent(pld.epsilon(book.receipts, privacy.delta), privacy.delta)
    words = [f"spent epsilon {rounded_up(spent)} of {privacy.epsilon:g} {statement.words()}"]
    if not spent < float("inf"):
        return [*words, "it released without noise once: nothing finite fits any more"]
    if book.renyi is not None:
        words.append(f"{book.renyi.label()}: {book.renyi.used(book.receipts):.1%} of its budget is used")
    elif (held := book.mechanism) is not None:
        left = _steps_left(_in_full(book), held, privacy.epsilon, privacy.delta)
        words.append(f"left: {left} more steps of {planning.describe(held)}, {SCHEDULE}")
    if promised.delta > privacy.delta:
        words.append(_doubled(promised.epsilon, promised.delta))
    return words


def _doubled(epsilon: float, delta: float) -> str:
    return (
        f"this ledger went from a fixed schedule to a filter, so all in all it is held within epsilon {epsilon:g} at "
        f"delta {delta:g}, twice the policy's"
    )


def _in_full(book: Book) -> tuple[DpReceipt, ...]:
    """Return what was reserved, with what the plan holds beside its mechanism counted in full."""
    return book.plan.in_full(book.receipts) if book.plan is not None else book.receipts


def _steps_left(receipts: Sequence[DpReceipt], held: DpReceipt, epsilon: float, delta: float) -> int:
    """Return how many more steps of the planned mechanism fit, by bisection on what the ledger itself computes."""

    def fits(steps: int) -> bool:
        return pld.epsilon([*receipts, *([planning.repeated(held, steps)] if steps else [])], delta) <= epsilon

    if not fits(0):
        return 0
    low, high = 0, 1
    while high < MOST_STEPS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
