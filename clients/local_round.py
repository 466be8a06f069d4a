"""One round of a site, top to bottom.

    policy -> what the round would cost -> ledger reserves -> learn -> outbox -> ledger commits -> upload

Nothing is computed from a row before the ledger has reserved; an unfinished reservation stays spent; what was once
committed is resent from the outbox and never trained again. Before anything is asked of it the ledger must be whole,
hold every release that the outbox has, and contain the head that the server saw last: an older copy is refused. Each
step is on the audit log's record before the next. Whatever goes wrong, a `Refusal` with a code and an opaque id leaves;
the reason stays in the site's own log.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from clients import gate, outbox, spending
from clients.drawer import SiteDrawer
from clients.learners.dp_fedsa_lora import DpFedsaLora, personal
from clients.private_rows import read_private_rows
from clients.site import Site, public_head
from clients.stages import Workbench
from fl_app import factors, inference, journal, lora, lora_cut, models, releases, transport
from fl_app.errors import (
    AdapterMismatch,
    AuditBroken,
    BudgetSpent,
    ConfigInvalid,
    LedgerRefusal,
    ModelMissing,
    PolicyRefusal,
    RowsInvalid,
    RunInvalid,
    StillroomError,
    WireViolation,
)
from fl_app.hash_chain import is_digest
from fl_app.privacy.events import no_noise
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.seeds import stream
from fl_app.types import NO_HEAD, AdapterRelease, Hello, Probe, Refusal, ReleaseSpec, Upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clients.config import ClientSection, SitePolicy
    from clients.learners import AnyLearner
    from fl_app.config import SharedConfig
    from fl_app.lora import LoraSpec
    from fl_app.models import FrozenModel
    from fl_app.privacy.ledger import Ledger
    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import Adapter, Broadcast, RefusalCode, Release

ReplyT = TypeVar("ReplyT")

_CODES: tuple[tuple[type[StillroomError], RefusalCode], ...] = (
    (BudgetSpent, "budget_spent"),
    (LedgerRefusal, "ledger"),
    (AuditBroken, "ledger"),
    (PolicyRefusal, "policy"),
    (RowsInvalid, "rows"),
    (ModelMissing, "model"),
    (AdapterMismatch, "policy"),
    (ConfigInvalid, "policy"),
    (RunInvalid, "policy"),
    (WireViolation, "policy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The configuration of a run as the site reads it from its own bundle."""

    shared: SharedConfig
    asked: ClientSection


def guarded(site: Site, run: str, round_number: int, answer: Callable[[], ReplyT]) -> ReplyT | Refusal:
    """Return the answer, or a refusal when anything goes wrong.

    Guarantee: no exception leaves, so no text of one does: Flower sends `str(exception)` to the server verbatim.
    """
    try:
        return answer()
    except StillroomError as error:
        return _refuse(site, run, round_number, _code(error), f"{type(error).__name__}: {error}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - the wall: whatever a library raises may quote a row
        return _refuse(site, run, round_number, "internal", traceback.format_exc())


def hello(site: Site) -> Hello:
    """Return the site's name and the public part of its policy, with what its ledger has spent so far."""
    policy = site.policy
    privacy = policy.privacy
    ledger = site.ledger(policy)
    promised = ledger.book().promise(privacy.composition, epsilon=privacy.epsilon, delta=privacy.delta)
    site.note_policy(policy)
    site.audit.append("ledger_verified", policy_id=policy.id)
    return Hello(
        site=policy.site.name,
        epsilon=promised.epsilon,
        delta=promised.delta,
        unit=privacy.unit,
        spent=ledger.spent(privacy.delta),
        head=public_head(ledger, policy),
        composition=promised.composition,
        memory_mb=policy.capacity.memory_mb,
        first_layer=policy.capacity.first_layer,
        micro_batch_tokens=policy.capacity.micro_batch_tokens,
        targets=tuple(policy.capacity.targets),
    )


def probe(site: Site, broadcast: Broadcast, settings: Settings) -> Probe:
    """Return the broadcast model's bits per byte on the public control codes that lie beside the rows.

    Where sites keep a b of their own (`dp_fedsa_lora`) it is this site's own model that is scored; that b was noised
    with a, under the receipts of its rounds, so its score costs nothing either.

    Public text only: it costs nothing, and a site answers it also when its budget is spent.
    """
    policy = site.policy
    texts = list(_codes(site.directory).values())[: settings.asked.probe.items]
    if not texts:
        return Probe(site=policy.site.name, round=broadcast.round, items=0, bits_per_byte=0.0)
    frozen = models.load(settings.shared.model.name, settings.shared.model.dtype)
    adapter = broadcast.adapter
    if isinstance(settings.asked.learner, DpFedsaLora):
        adapter = personal(adapter, _drawer(site, broadcast.named).latest(broadcast.round + 1))
    model = lora.attach(frozen, adapter, broadcast.blocks)
    rows = inference.option_likelihood(model, frozen.tokenizer, [""] * len(texts), [[text] for text in texts])
    bits = -sum(row[0].log_prob for row in rows) / math.log(2)
    per_byte = bits / sum(row[0].bytes for row in rows)
    return Probe(site=policy.site.name, round=broadcast.round, items=len(texts), bits_per_byte=per_byte)


def train(site: Site, broadcast: Broadcast, settings: Settings) -> Upload:
    """Return this round's upload.

    Raises: PolicyRefusal, LedgerRefusal (BudgetSpent), RowsInvalid, ModelMissing; each before any gradient.
    """
    shared, asked = settings.shared, settings.asked
    policy = site.policy
    site.note_policy(policy)
    learner = _within(asked.learner, policy).build(broadcast.round)
    survey = asked.survey.build() if asked.survey else None
    gate.check(
        policy,
        gate.Request(
            learner=learner,
            survey=survey,
            run=shared.run,
            round_number=broadcast.round,
            base=broadcast.adapter.base,
            config_digest=broadcast.config_digest,
        ),
    )
    site.check_place(policy)
    # A name used again for another configuration is another run: ledger, kept noise, cap and outbox all go by this.
    broadcast = dataclasses.replace(broadcast, run=broadcast.named)
    note = _Notes(site=site, run=broadcast.run, round_number=broadcast.round, policy_id=policy.id)
    seen = note("run_seen", object_sha256=broadcast.config_digest)
    ledger = site.ledger(policy)
    _check_whole(site, ledger, broadcast)
    resend = _resend(site, policy, ledger, broadcast)
    if resend is not None:
        site.received.keep(broadcast)
        note("resent", object_sha256=releases.sha256(resend.release, resend.survey))
        return resend

    book = ledger.book()
    renyi = book.settle(policy.privacy.composition, epsilon=policy.privacy.epsilon, delta=policy.privacy.delta)
    cost = spending.NOTHING
    if learner.private:
        asking = spending.Round(
            run=broadcast.run, number=broadcast.round, rounds=shared.run.rounds, epsilon=asked.epsilon
        )
        cost = spending.announced(policy, book, renyi, learner, survey, asking)
    frozen = models.load(shared.model.name, shared.model.dtype)
    spec = _spec(frozen, settings)
    lora_cut.check_start(broadcast.adapter, broadcast.blocks, spec)
    _check_capacity(broadcast.adapter, spec, policy)
    if isinstance(asked.learner, DpFedsaLora):  # its own b must fit, or nothing is spent
        personal(broadcast.adapter, _drawer(site, broadcast.run).latest(broadcast.round))
    site.received.keep(broadcast)
    gate.check_length(policy, frozen)
    codes = _codes(site.directory)
    rows = read_private_rows(
        site.directory / "rows.jsonl", unit=policy.privacy.unit, max_rows_per_unit=policy.privacy.max_rows_per_unit
    )
    ledger = site.ledger(policy)  # once more: these rows, and not others put in their place meanwhile
    reservation = ledger.reserve(
        run=broadcast.run,
        round_number=broadcast.round,
        receipts=cost.receipts or (no_noise(policy.privacy.unit),),
        epsilon=cost.budget,
        delta=policy.privacy.delta,
        renyi=renyi,
        promise=policy.privacy.epsilon if cost.receipts else math.inf,
        sides=cost.sides,
        policy_id=policy.id,
        audit=seen,
    )
    note("reserved", ledger_seq=reservation.seq)
    bench = Workbench(
        model=frozen,
        codes=codes,
        noise=_noise(policy, shared, entry=reservation.stream),
        system=shared.model.system,
        material=broadcast.material,
        secret=_secret(policy, shared, ledger),
        blocks=broadcast.blocks,
        run=broadcast.run,
        site=policy.site.name,
        drawer=_drawer(site, broadcast.run),
    )
    constants = policy.public_constants()
    release = learner(rows, broadcast.adapter, cost.every, constants, bench)
    release = _as_it_travels(release, sent(settings, broadcast), broadcast.adapter)
    surveyed = survey(rows, constants, bench) if survey and cost.surveys else None
    del rows, bench
    note("trained", ledger_seq=reservation.seq)
    sha256 = outbox.put(
        site.outbox,
        run=broadcast.run,
        round_number=broadcast.round,
        release=release,
        survey=surveyed,
        base_name=shared.model.name,
        reservation=reservation,
        answers=releases.broadcast_sha256(broadcast),
    )
    note("outbox", object_sha256=sha256, ledger_seq=reservation.seq)
    committed = ledger.commit(reservation.id, sha256=sha256)
    _check_whole(site, ledger, broadcast)  # an older copy put back while we trained: nothing leaves
    note("committed", object_sha256=sha256, ledger_seq=committed)
    upload = Upload(
        site=policy.site.name,
        round=broadcast.round,
        release=release,
        receipts=cost.receipts or None,
        spent=ledger.spent(policy.privacy.delta),
        run=broadcast.run,
        head=public_head(ledger, policy),
        survey=surveyed,
    )
    note("sent", object_sha256=sha256, ledger_seq=committed)
    return upload


def _within(learner: AnyLearner, policy: SitePolicy) -> AnyLearner:
    """Return what is asked, computing no more tokens at once than the site can; that changes no result."""
    most, asked = policy.capacity.micro_batch_tokens, getattr(learner, "micro_batch_tokens", 0)
    if not most or not asked or asked <= most:
        return learner
    return learner.model_copy(update={"micro_batch_tokens": max(most, 16)})


def _spec(frozen: FrozenModel, settings: Settings) -> LoraSpec:
    """Return the shape of the run's adapters, cores included where the learner trains them."""
    learner = settings.asked.learner
    core = learner.kind in factors.KINDS and factors.schedule_of(learner.model_dump()) == "core"
    return dataclasses.replace(lora.spec_of(frozen, settings.shared.lora), core=core)


def _check_capacity(adapter: Adapter, spec: LoraSpec, policy: SitePolicy) -> None:
    """Raise `PolicyRefusal` when a server asks for layers that this site has said it does not train."""
    capacity = policy.capacity
    mine = lora_cut.narrowed(spec, first_layer=capacity.first_layer, targets=capacity.targets)
    if odd := sorted(adapter.layers.keys() - mine.shapes.keys()):
        raise PolicyRefusal(f"{odd[0]} is to be trained, which [capacity] of site.toml rules out")


def sent(settings: Settings, broadcast: Broadcast) -> ReleaseSpec:
    """Return what of an adapter travels in a round, and how; of other releases it says nothing."""
    learner = settings.asked.learner
    if learner.kind not in factors.KINDS:
        return ReleaseSpec()
    return factors.travels(learner.model_dump(), broadcast.round, settings.shared.lora.upload_precision)


def _as_it_travels(release: Release, told: ReleaseSpec, start: Adapter) -> Release:
    """Return the release as the server will read it, so that both sides keep and hash the same numbers."""
    if not isinstance(release, AdapterRelease) or release.scalars is not None:
        return release
    return dataclasses.replace(release, adapter=transport.rounded(release.adapter, told.factors, told.precision, start))


def _check_whole(site: Site, ledger: Ledger, broadcast: Broadcast) -> None:
    """Return when the ledger holds what the server and the outbox know of it. Raises: LedgerCorrupt."""
    if broadcast.head not in {"", NO_HEAD}:
        ledger.verify(broadcast.head)
    outbox.check_witnesses(site.outbox, ledger.entries())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """What one round enters into the audit log; each entry is on disk before what it stands for goes on."""

    site: Site
    run: str
    round_number: int
    policy_id: str

    def __call__(self, action: str, *, object_sha256: str = "", ledger_seq: int = -1) -> str:
        """Write one entry and return its hash. Raises: AuditBroken."""
        return self.site.audit.append(
            action,
            run=self.run,
            round=self.round_number,
            object_sha256=object_sha256 if is_digest(object_sha256) else "",
            policy_id=self.policy_id,
            ledger_seq=ledger_seq,
        )


def _resend(site: Site, policy: SitePolicy, ledger: Ledger, broadcast: Broadcast) -> Upload | None:
    """Return the upload of this run and round from the outbox, when the ledger says that it was made."""
    open_entry = (no_noise(policy.privacy.unit),)
    found = ledger.book().last_made(broadcast.run, broadcast.round)
    if found is None:
        return None
    release, survey = outbox.get(
        site.outbox,
        run=broadcast.run,
        round_number=broadcast.round,
        sha256=found.sha256,
        answers=releases.broadcast_sha256(broadcast),
    )
    return Upload(
        site=policy.site.name,
        round=broadcast.round,
        release=release,
        receipts=None if found.reserved.receipts == open_entry else found.reserved.receipts,
        spent=ledger.spent(policy.privacy.delta),
        run=broadcast.run,
        head=public_head(ledger, policy),
        survey=survey,
    )


def _noise(policy: SitePolicy, shared: SharedConfig, *, entry: int) -> NoiseSource:
    """Return seeded noise in a simulation, the operating system's everywhere else.

    The seeded stream is named after its entry in the ledger, so that no two releases of a site share noise.
    """
    if shared.run.mode == "simulation":
        return SimulatedNoise(stream(shared.run.seed, "noise", policy.site.name, entry))
    return SecureNoise()


def _secret(policy: SitePolicy, shared: SharedConfig, ledger: Ledger) -> bytes:
    """Return what nobody outside can guess and what stays the same on this ledger; seeded in a simulation."""
    if shared.run.mode == "simulation":
        return stream(shared.run.seed, "secret", policy.site.name).bytes(32)
    return ledger.secret()


def _drawer(site: Site, run: str) -> SiteDrawer:
    """Return where this site keeps what it does not share of a run, by the run's name in ledger and outbox."""
    return SiteDrawer(directory=site.directory / "personal" / outbox.folder_name(run))


def _code(error: StillroomError) -> RefusalCode:
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return "internal"


def _codes(directory: Path) -> dict[str, str]:
    """Return the public control codes that lie beside the rows; none when there is no such file."""
    path = directory / "codes.jsonl"
    return {str(row["id"]): str(row["text"]) for row in journal.read_lines(path)} if path.is_file() else {}


def _refuse(site: Site, run: str, round_number: int, code: RefusalCode, reason: str) -> Refusal:
    """Write the reason to the site's own log and return what may leave."""
    try:
        name = site.policy.site.name
    except ConfigInvalid:
        name = "unnamed"
    place = f"{name}/{run}/{round_number}/{code}"
    incident = hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    if site.directory.is_dir():
        site.log(f"run {run!r} round {round_number} {code} {incident} {reason}")
        site.note_refusal(run, round_number, code)
    logging.getLogger("stillroom.site").warning(
        "site %s answers %s (incident %s in its site.log)", name, code, incident
    )
    return Refusal(site=name, round=round_number, code=code, incident=incident)
