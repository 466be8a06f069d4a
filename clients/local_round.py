"""One round of a site, top to bottom.

    policy -> what the round would cost -> ledger reserves -> learn -> outbox -> ledger commits -> upload

Nothing is computed from a row before the ledger has reserved; an unfinished reservation stays spent; what was once
committed is resent from the outbox and never trained again. Whatever goes wrong, a `Refusal` with a code and an
opaque id leaves; the reason stays in the site's own log.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from clients import outbox
from clients.config import SitePolicy, read_policy
from clients.private_rows import read_private_rows
from clients.stages import Workbench
from fl_app import inference, journal, lora, models
from fl_app.errors import (
    AdapterMismatch,
    BudgetSpent,
    ConfigInvalid,
    LedgerRefusal,
    ModelMissing,
    PolicyRefusal,
    RowsInvalid,
    RunInvalid,
    StillroomError,
)
from fl_app.privacy.accountants import pld
from fl_app.privacy.calibrate import noise_multiplier
from fl_app.privacy.chain import Committed, Reserved
from fl_app.privacy.events import no_noise
from fl_app.privacy.ledger import Ledger
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.seeds import stream
from fl_app.sequences import WIDTH_STEP
from fl_app.types import Hello, PoissonGaussian, Probe, Refusal, Upload

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clients.config import ClientSection
    from clients.stages import Learner
    from fl_app.config import SharedConfig
    from fl_app.models import FrozenModel
    from fl_app.privacy.noise import NoiseSource
    from fl_app.privacy.renyi_filter import RenyiFilter
    from fl_app.types import Broadcast, DpReceipt, RefusalCode

ReplyT = TypeVar("ReplyT")

_CODES: tuple[tuple[type[StillroomError], RefusalCode], ...] = (
    (BudgetSpent, "budget_spent"),
    (LedgerRefusal, "ledger"),
    (PolicyRefusal, "policy"),
    (RowsInvalid, "rows"),
    (ModelMissing, "model"),
    (AdapterMismatch, "policy"),
    (ConfigInvalid, "policy"),
    (RunInvalid, "policy"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A site's directory: `rows.jsonl`, `codes.jsonl`, `site.toml` in; `ledger/`, `outbox/`, `site.log` beside them."""

    directory: Path

    @property
    def policy(self) -> SitePolicy:
        """The site's own policy, read afresh: it may be tightened while a run goes on."""
        return read_policy(self.directory)

    def ledger(self, policy: SitePolicy) -> Ledger:
        """The site's ledger on these rows and this unit."""
        rows = self.directory / "rows.jsonl"
        if not rows.is_file():
            raise RowsInvalid(f"no rows at {rows}: a site directory holds rows.jsonl and site.toml")
        with rows.open("rb") as handle:
            fingerprint = hashlib.file_digest(handle, "sha256").hexdigest()
        # Seeded noise protects nobody, so its spending may never be certified together with real spending.
        fingerprint += "+simulation" if policy.limits.simulation else ""
        return Ledger.open(self.directory / "ledger" / "ledger.jsonl", dataset=fingerprint, unit=policy.privacy.unit)


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
    return Hello(
        site=policy.site.name,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        unit=privacy.unit,
        spent=site.ledger(policy).spent(privacy.delta),
    )


def probe(site: Site, broadcast: Broadcast, settings: Settings) -> Probe:
    """Return the broadcast model's bits per byte on the public control codes that lie beside the rows.

    Public text only: it costs nothing, and a site answers it also when its budget is spent.
    """
    policy = site.policy
    texts = list(_codes(site.directory).values())[: settings.asked.probe.items]
    if not texts:
        return Probe(site=policy.site.name, round=broadcast.round, items=0, bits_per_byte=0.0)
    frozen = models.load(settings.shared.model.name, settings.shared.model.dtype)
    model = lora.attach(frozen, broadcast.adapter)
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
    learner = asked.learner.build()
    _check_policy(policy, learner, broadcast, shared)
    # A name used again for another configuration is another run: ledger, kept noise, cap and outbox all go by this.
    broadcast = dataclasses.replace(broadcast, run=broadcast.named)
    ledger = site.ledger(policy)
    resend = _resend(site, policy, ledger, broadcast)
    if resend is not None:
        return resend

    renyi = _filter(policy, ledger)
    receipt, budget = None, math.inf
    if learner.private:
        receipt, budget = _announced(policy, ledger, renyi, learner, broadcast, shared, asked)
    frozen = models.load(shared.model.name, shared.model.dtype)
    lora.check_spec(broadcast.adapter, lora.spec_of(frozen, shared.lora))
    _check_length(policy, frozen)
    codes = _codes(site.directory)
    rows = read_private_rows(
        site.directory / "rows.jsonl", unit=policy.privacy.unit, max_rows_per_unit=policy.privacy.max_rows_per_unit
    )
    ledger = site.ledger(policy)  # once more: these rows, and not others put in their place meanwhile
    reservation = ledger.reserve(
        run=broadcast.run,
        round_number=broadcast.round,
        receipts=[receipt or no_noise(policy.privacy.unit)],
        epsilon=budget,
        delta=policy.privacy.delta,
        renyi=renyi,
    )
    bench = Workbench(
        model=frozen,
        codes=codes,
        noise=_noise(policy, shared, entry=reservation.seq),
        system=shared.model.system,
    )
    release = learner(rows, broadcast.adapter, receipt, policy.public_constants(), bench)
    del rows, bench
    sha256 = outbox.put(
        site.directory / "outbox",
        run=broadcast.run,
        round_number=broadcast.round,
        adapter=release.adapter,
        base_name=shared.model.name,
    )
    ledger.commit(reservation.id, sha256=sha256)
    return Upload(
        site=policy.site.name,
        round=broadcast.round,
        release=release,
        receipts=(receipt,) if receipt else None,
        spent=ledger.spent(policy.privacy.delta),
        run=broadcast.run,
    )


def _check_policy(policy: SitePolicy, learner: Learner, broadcast: Broadcast, shared: SharedConfig) -> None:
    """Raise `PolicyRefusal` unless the site allows what the server asks."""
    limits = policy.limits
    if learner.release_kind not in limits.release_kinds:
        raise PolicyRefusal(f"release kind {learner.release_kind!r} is not allowed; site.toml: {limits.release_kinds}")
    if not learner.private and not limits.non_private:
        raise PolicyRefusal("a learner without noise is asked; site.toml: limits.non_private = false")
    if learner.steps > limits.max_steps_per_round:
        raise PolicyRefusal(f"{learner.steps} steps a round asked, at most {limits.max_steps_per_round} allowed")
    if shared.run.rounds > limits.max_rounds or broadcast.round > shared.run.rounds:
        raise PolicyRefusal(
            f"round {broadcast.round} of {shared.run.rounds} asked, at most {limits.max_rounds} rounds allowed"
        )
    if limits.base_models and broadcast.adapter.base not in limits.base_models:
        raise PolicyRefusal(f"base model {broadcast.adapter.base[:12]} is not on the list of site.toml")
    if shared.run.mode == "simulation" and not limits.simulation:
        raise PolicyRefusal("run.mode is 'simulation' (seeded noise, no privacy); this site trains in production only")
    if shared.run.mode == "production" and limits.simulation:
        raise PolicyRefusal(
            "site.toml allows simulation, so its ledger certifies nothing; set limits.simulation = false"
        )


def _check_length(policy: SitePolicy, frozen: FrozenModel) -> None:
    """Raise `PolicyRefusal` when a row might be longer than the model's positions.

    Found out at a row, it would fail the round in which that row is drawn, and the failure would tell of the row; a
    model that stretches its positions on the way (dynamic RoPE) would carry one row's length into others' gradients.
    """
    most = getattr(frozen.model.config.get_text_config(), "max_position_embeddings", None)
    width = -(-policy.constants.max_tokens // WIDTH_STEP) * WIDTH_STEP
    if most is not None and width > most:
        raise PolicyRefusal(
            f"constants.max_tokens = {policy.constants.max_tokens} (padded to {width}) exceeds the {most} positions of "
            f"{frozen.resolved.name}; lower it in site.toml"
        )


def _filter(policy: SitePolicy, ledger: Ledger) -> RenyiFilter | None:
    """Return the Renyi filter that holds this site's ledger, None for PLD alone. Raises: LedgerRefusal."""
    privacy = policy.privacy
    return ledger.filter(privacy.composition, epsilon=privacy.epsilon, delta=privacy.delta)


def _announced(
    policy: SitePolicy,
    ledger: Ledger,
    renyi: RenyiFilter | None,
    learner: Learner,
    broadcast: Broadcast,
    shared: SharedConfig,
    asked: ClientSection,
) -> tuple[DpReceipt, float]:
    """Return this round's receipt and the epsilon the ledger may reach.

    The noise multiplier is chosen once, before the first round of a run, so that what remains is spread over all
    planned rounds; later rounds keep it, whatever they learned: a schedule fixed in advance is what the accountant's
    composition assumes. `client.epsilon` caps what this run adds, by PLD, to what was spent before it; a filter knows
    no such share, it holds the whole.

    Raises: BudgetSpent; PolicyRefusal when the site has raised its noise floor since the run began.
    """
    delta = policy.privacy.delta
    reserved = [entry for entry in ledger.entries() if isinstance(entry, Reserved)]
    before = [receipt for entry in reserved if entry.run != broadcast.run for receipt in entry.receipts]
    budget = min(policy.privacy.epsilon, pld.epsilon(before, delta) + asked.epsilon)
    kept = [
        r.event.noise_multiplier
        for e in reserved
        if e.run == broadcast.run
        for r in e.receipts
        if isinstance(r.event, PoissonGaussian)
    ]
    multiplier = (
        kept[0]
        if kept
        else noise_multiplier(
            ledger.receipts(),
            sample_rate=policy.constants.sample_rate,
            steps=learner.steps,
            rounds=shared.run.rounds - broadcast.round + 1,
            clip_norm=learner.clip_norm,
            unit=policy.privacy.unit,
            epsilon=budget,
            delta=delta,
            floor=policy.limits.min_noise_multiplier,
            ceiling=policy.limits.max_noise_multiplier,
            renyi=renyi,
        )
    )
    if multiplier < policy.limits.min_noise_multiplier:
        raise PolicyRefusal(
            f"run {broadcast.run} began with noise multiplier {multiplier}, site.toml now asks for at least "
            f"{policy.limits.min_noise_multiplier}; start a new run"
        )
    receipt = learner.announce(policy.public_constants(), multiplier)
    assert receipt is not None  # the learner is private
    if not (total := pld.epsilon([*ledger.receipts(), receipt], delta)) <= budget:
        raise BudgetSpent(
            f"run {broadcast.run} round {broadcast.round} would reach epsilon {total:.4g} of {budget:.4g}"
        )
    if renyi is not None:
        renyi.require([*ledger.receipts(), receipt])
    return receipt, budget


def _resend(site: Site, policy: SitePolicy, ledger: Ledger, broadcast: Broadcast) -> Upload | None:
    """Return the upload of this run and round from the outbox, when the ledger says that it was made."""
    open_entry = (no_noise(policy.privacy.unit),)
    entries = ledger.entries()
    made = {entry.id: entry.sha256 for entry in entries if isinstance(entry, Committed)}
    for entry in reversed(entries):
        if isinstance(entry, Reserved) and (entry.run, entry.round) == (broadcast.run, broadcast.round):
            if entry.id not in made:
                continue
            folder = site.directory / "outbox"
            release = outbox.get(folder, run=broadcast.run, round_number=broadcast.round, sha256=made[entry.id])
            return Upload(
                site=policy.site.name,
                round=broadcast.round,
                release=release,
                receipts=None if entry.receipts == open_entry else entry.receipts,
                spent=ledger.spent(policy.privacy.delta),
                run=broadcast.run,
            )
    return None


def _noise(policy: SitePolicy, shared: SharedConfig, *, entry: int) -> NoiseSource:
    """Return seeded noise in a simulation, the operating system's everywhere else.

    The seeded stream is named after its entry in the ledger, so that no two releases of a site share noise.
    """
    if shared.run.mode == "simulation":
        return SimulatedNoise(stream(shared.run.seed, "noise", policy.site.name, entry))
    return SecureNoise()


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
    logger = logging.getLogger("stillroom.site")
    if site.directory.is_dir():
        try:  # a key of a row may be no valid text, and the disk may be full: neither may leave
            with (site.directory / "site.log").open("a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.write(f"run {run!r} round {round_number} {code} {incident} {reason}\n")
        except OSError as error:
            logger.warning("site %s: site.log cannot be written (%s)", name, error.strerror)
    logger.warning("site %s answers %s (incident %s in its site.log)", name, code, incident)
    return Refusal(site=name, round=round_number, code=code, incident=incident)
