"""Client-level differential privacy at a trusted server: DP-FedAvg over LoRA factors, every site in every round.

    update = upload - broadcast, both factors of all layers as one vector, clipped to L2 norm `clip_norm`
    merged = broadcast + (sum of updates + noise_multiplier * clip_norm * N(0, I)) / sites

The unit is one site: with or without all that it ever sends, the merged adapter and whatever is made from it (target,
broadcasts, synthetic text) look nearly the same. The uploads themselves are not hidden from this server, nor is who
took part. Example-level DP on the sites is another promise, to other people; both may be on.

| an update that                                  | counts as                                    |
|-------------------------------------------------|----------------------------------------------|
| did not come                                    | zero; the divisor stays the public `sites`   |
| is zero                                         | zero                                         |
| is NaN or infinite                              | zero, and its site is named in `rejected`    |
| moves a factor that `trains` says nobody trains | zero, and its site is named in `rejected`    |

No amplification by client sampling is claimed: it needs a secret random cohort, while here every site is asked in every
round and the server, its journal and anyone on the wire see who answered (federated-methods-and-dp.md 3.3).

Which factors get noise is read from the configuration: finding out from the uploads would itself be a release. They are
clipped jointly, as one vector, and the others stay the broadcast's to the bit:

| trains | noise on                     | learners                                         |
|--------|------------------------------|--------------------------------------------------|
| both   | a and b                      | LoRA, DP-LoRA, LA-LoRA                           |
| a      | a                            | FedSA-LoRA, whose b never travels                |
| b      | b                            | FFA-LoRA, FedASK                                 |
| rounds | b in odd rounds, a in even   | RoLoRA                                           |
| core   | the r x r core               | Fed-SB, LoRA-SB, LoRA-XS                         |

Out of scope: adaptive clipping (it costs budget of its own), secure aggregation, weights by row counts (private), and
runs of one cohort that are planned after looking at earlier ones: PLD composes a schedule fixed in advance.

Source: McMahan et al. 2018 (DP-FedAvg, 1710.06963), with a fixed denominator, and DP-DyLoRA (2405.06368), section 3,
without its rank sampling. Ours differs in the joint clip over A and B, in flat participation instead of client
sampling, and in the release through a lattice (`fl_app.privacy.gaussian`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from pydantic import Field, field_validator, model_validator

from fl_app import factors, lora
from fl_app.config import Section
from fl_app.errors import AdapterMismatch, BudgetSpent, ConfigInvalid, LedgerRefusal, RoundFailed
from fl_app.privacy import gaussian
from fl_app.privacy.accountants import pld
from fl_app.privacy.book import Book
from fl_app.privacy.chain import Committed, Reserved
from fl_app.privacy.ledger import Ledger, Reservation
from fl_app.privacy.noise import SecureNoise, SimulatedNoise
from fl_app.privacy.plan import describe, one_step
from fl_app.seeds import stream
from fl_app.types import Adapter, ClientLevelCost, DpReceipt, Gaussian, LoraFactors, Merged
from strategies import products
from strategies.aggregators.mean_factors import MeanFactors
from strategies.weighing import refuse_inner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from fl_app.privacy.noise import NoiseSource
    from fl_app.types import Broadcast, Factor, Floats, Upload
    from strategies.stages import Aggregator, Setting

    Doubles: TypeAlias = npt.NDArray[np.float64]

UNIT = "site"

REFUSED = {
    "mean_product": "products are no sum of what sites send, so clipping each update bounds nothing",
    "stacked": "a stack shows every site's own adapter, and no noise on a sum covers that",
    "residual": "the residual is quadratic in the updates, so one site moves it by more than its clip",
    "truncated_svd": "a decomposition can turn about for a small update; take it of the noised mean, which is free",
    "thresholded_svd": "a decomposition can turn about for a small update; take it of the noised mean, which is free",
    "sketched_svd": "a decomposition can turn about for a small update; take it of the noised mean, which is free",
    "ridge": "the correction is a quotient of what sites send, and no sum of it",
    "zero_padded": "a padded row is a step from the broadcast's row to zero, which the clip would take for training",
    "median_factors": "a median is no sum: leaving one site out can move it by any honest distance",
    "bounded_mean_product": "its bound is on products, and with a median it looks at all the updates to choose it",
    "krum_product": "which uploads are chosen depends on all of them, and a choice is no sum",
    "central_dp": "noise twice would be spent twice",
}
"""Why an aggregator is no sum of the sites' factors divided by a constant, by its kind."""

FINER = 2.0**-10
"""Updates are cut to the release's lattice times this: fine enough to cost nothing (2^-24 of the clip norm in all),
coarse enough that float64 adds 2^17 of them, each of 2^22 coordinates, without rounding."""


class CentralDp(Section):
    """[server.aggregator] kind = "central_dp".

    `inner` is what becomes private: the mean of the factors is their sum divided by `sites`, and the noise goes onto
    that sum. `clip_norm` bounds a site's update over all layers and both factors together; `epsilon` at `delta` is the
    budget of the ledger. `trains` is what the learner trains. `ledger`, an absolute path, counts over all runs of one
    `cohort`; empty: a ledger in the run directory, which counts this run alone.
    """

    carries: ClassVar[bool] = True
    one_rank: ClassVar[str] = "adds or orders coordinate by coordinate, and factors of different ranks share none"

    kind: Literal["central_dp"]
    inner: MeanFactors
    clip_norm: Annotated[float, Field(gt=0)]
    noise_multiplier: Annotated[float, Field(gt=0)]
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    trains: Literal["both", "a", "b", "rounds", "core"] = "both"
    cohort: str = ""
    ledger: str = ""

    @field_validator("inner", mode="before")
    @classmethod
    def _only_sums(cls, value: Any) -> Any:
        way_out = 'write inner = {kind = "mean_factors"}, or use it without central_dp'
        kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", value)
        if kind != "mean_factors" and kind not in REFUSED:
            raise ValueError(f"{repr(kind)[:40]} cannot be wrapped: there is no such aggregator; {way_out}")
        refuse_inner(value, REFUSED, way_out=way_out)
        if value.get("weights") if isinstance(value, dict) else value.weights:
            raise ValueError(
                "inner.weights cannot be wrapped: a site that counts more moves the sum by more than the clip that the "
                "noise is made for; leave them out"
            )
        return value

    @model_validator(mode="after")
    def _ledger_has_an_owner(self) -> CentralDp:
        if self.ledger and not self.cohort:
            raise ValueError("ledger counts over runs, so it must say over whose: name the cohort, cohort = 'clinics'")
        if self.ledger and not Path(self.ledger).is_absolute():
            raise ValueError(f"ledger {self.ledger!r} is no absolute path, and it outlives this run's directory")
        return self

    def build(self, setting: Setting) -> Aggregator:
        """Return the stage.

        Raises: ConfigInvalid when the planned rounds do not fit what is left of the budget, before any site is asked;
        LedgerCorrupt when the ledger is another cohort's or was changed.
        """
        if not self.delta < 1 / setting.sites:
            raise ConfigInvalid(
                f"server.aggregator.delta = {self.delta:g} is not below 1 / sites = {1 / setting.sites:g}: one site's "
                "whole update could be published at that price"
            )
        stage = PrivateMean(section=self, setting=setting, noise=lambda entry: _noise(setting, entry))
        book = stage.open_ledger().book() if stage.ledger_path.is_file() else Book(entries=[])
        past = book.receipts if self.ledger else ()  # a run directory's own ledger knows no other run
        planned = [DpReceipt(event=self.event(setting.rounds), unit=UNIT)]
        self._check_schedule(book)
        total = pld.epsilon([*past, *planned], self.delta)
        if not total <= self.epsilon:
            raise ConfigInvalid(
                f"server.aggregator: {setting.rounds} rounds at noise_multiplier = {self.noise_multiplier:g} would "
                f"make epsilon {total:.4g} of epsilon = {self.epsilon:g} at delta {self.delta:g} (unit {UNIT}, "
                f"{pld.epsilon(past, self.delta):.4g} spent before); raise noise_multiplier or epsilon, or plan fewer "
                "rounds"
            )
        return stage

    def _check_schedule(self, book: Book) -> None:
        """Raise `ConfigInvalid` when former runs of the cohort fixed another noise, or promised less."""
        held = book.mechanism
        if held is not None and held != one_step(DpReceipt(event=self.event(), unit=UNIT)):
            raise ConfigInvalid(
                f"server.aggregator.noise_multiplier = {self.noise_multiplier:g}, but the ledger of cohort "
                f"{self.cohort!r} is fixed to {describe(held)}: a noise that is chosen after looking at earlier runs "
                "is not certified; write that one"
            )
        try:
            book.settle("fixed_schedule", epsilon=self.epsilon, delta=self.delta)
        except LedgerRefusal as error:
            raise ConfigInvalid(f"server.aggregator: {error}") from None

    def event(self, count: int = 1) -> Gaussian:
        """Return what `count` merged adapters cost."""
        return Gaussian(noise_multiplier=self.noise_multiplier, clip_norm=self.clip_norm, count=count)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateMean:
    """The stage. `noise` makes the noise source of one entry of the ledger, so that no two releases share any."""

    section: CentralDp
    setting: Setting
    noise: Callable[[int], NoiseSource]

    def __call__(self, uploads: Sequence[Upload], broadcast: Broadcast) -> Merged:
        """Return the noised mean.

        Guarantee: the ledger holds one more Gaussian before any update is summed or any noise drawn.
        Raises: RoundFailed when the budget is spent or every update was rejected; AdapterMismatch; ValueError.
        """
        start, names = broadcast.adapter, trained(self.section.trains, broadcast.round)
        adapters = products.by_site(uploads)
        lora.check_alike(list(adapters.values()))
        try:
            lora.check_alike([start, *list(adapters.values())[:1]])
        except AdapterMismatch as error:
            raise AdapterMismatch(f"uploads do not answer the broadcast adapter (adapter 0): {error}") from None
        if "core" in names and not lora.has_core(start):
            raise AdapterMismatch("server.aggregator.trains = 'core', and the broadcast adapter has no cores")
        rejected = {
            site: rule for site, adapter in adapters.items() if (rule := self._broken(adapter, start, site, names))
        }
        if len(rejected) == len(adapters):
            told = "; ".join(f"{site}: {rule}" for site, rule in rejected.items())
            raise RoundFailed(f"round {broadcast.round}: no update is left to sum ({told})")

        ledger = self.open_ledger()
        reservation = self._reserve(ledger, broadcast)
        updates = (_update(adapter, start, names) for site, adapter in adapters.items() if site not in rejected)
        totals = clipped_sum(updates, like=_parts(start, names), clip_norm=self.section.clip_norm)
        released = gaussian.release(
            totals,
            clip_norm=self.section.clip_norm,
            noise_multiplier=self.section.noise_multiplier,
            noise=self.noise(reservation.stream),
        )
        del updates, totals
        merged = _moved(start, names, [part / self.setting.sites for part in released])
        if reservation.id not in _committed(ledger):
            ledger.commit(reservation.id, sha256=lora.sha256(merged))
        return Merged(
            adapter=merged,
            used=tuple(site for site in adapters if site not in rejected),
            rejected=rejected,
            cost=ClientLevelCost(
                receipt=DpReceipt(event=self.section.event(), unit=UNIT),
                spent=reservation.spent,
                budget=self.section.epsilon,
                delta=self.section.delta,
                scope=self._scope(),
            ),
        )

    @property
    def ledger_path(self) -> Path:
        """Where the cohort's spending is kept."""
        return Path(self.section.ledger or self.setting.directory / "client_level" / "ledger.jsonl")

    def open_ledger(self) -> Ledger:
        """Return the cohort's ledger; it is made when there is none. Raises: LedgerCorrupt, LedgerRefusal."""
        cohort = self.section.cohort or f"the sites of run {self.setting.run}"
        # Seeded noise protects nobody, so its spending may never be certified together with real spending.
        cohort += "+simulation" if self.setting.mode == "simulation" else ""
        return Ledger.open(self.ledger_path, dataset=cohort, unit=UNIT)

    def _mine(self, ledger: Ledger) -> list[Reserved]:
        """Return what earlier attempts of this run reserved: only in its own ledger, which the run directory guards."""
        if self.section.ledger:
            return []
        return [entry for entry in ledger.entries() if isinstance(entry, Reserved)]

    def _reserve(self, ledger: Ledger, broadcast: Broadcast) -> Reservation:
        """Spend one merged adapter, or go on with the reservation of an attempt that was stopped.

        Until the round's merged adapter is committed in the run directory nobody has seen it, so a reservation that
        became nothing is used once more. One that became an adapter is used again only under seeded noise, where it
        becomes the same one; real noise is drawn anew, and costs again. So does everything in a ledger that other runs
        share: only the run directory's own is held by one process.
        """
        section = self.section
        receipt = DpReceipt(event=section.event(), unit=UNIT)
        committed = _committed(ledger)
        for entry in self._mine(ledger):
            same = entry.round == broadcast.round and entry.receipts == (receipt,)
            if same and (entry.id not in committed or self.setting.mode == "simulation"):
                spent, stream = ledger.spent(section.delta), ledger.book().stream_of(entry.seq)
                return Reservation(id=entry.id, seq=entry.seq, spent=spent, stream=stream)
        try:
            return ledger.reserve(
                run=broadcast.run,
                round_number=broadcast.round,
                receipts=[receipt],
                epsilon=section.epsilon,
                delta=section.delta,
            )
        except BudgetSpent:
            spent, asked = ledger.spent(section.delta), pld.epsilon([receipt], section.delta)
            raise RoundFailed(
                f"round {broadcast.round}: the client-level budget is spent: epsilon {spent:.4g} of "
                f"{section.epsilon:g} at delta {section.delta:g} (unit {UNIT}, {pld.label()}, {self._scope()}), and "
                f"one more merged adapter at noise_multiplier = {section.noise_multiplier:g} (alone {asked:.4g}) does "
                "not fit. Nothing was computed and the target of the last round is kept; raise noise_multiplier or "
                "epsilon in server.aggregator, or plan fewer rounds"
            ) from None

    def _broken(self, adapter: Adapter, start: Adapter, site: str, names: tuple[Factor, ...]) -> str:
        """Return why an upload counts as zero; empty when it does not.

        Raises: AdapterMismatch for another shape, which numpy would broadcast.
        """
        for layer, origin in start.layers.items():
            began, sent = (lora.named_factors(layer, one) for one in (origin, adapter.layers[layer]))
            for tensor, values in sent.items():
                if values.shape != began[tensor].shape:
                    raise AdapterMismatch(
                        f"{site}: {tensor} is {values.shape}, the broadcast one is {began[tensor].shape}"
                    )
                if tensor.rpartition(".")[2] not in names and not np.array_equal(values, began[tensor]):
                    told = f"server.aggregator.trains = {self.section.trains!r}"
                    return f"frozen: {tensor} was changed, but {told} moves {' and '.join(names)}; choose 'both'"
                if not np.isfinite(values).all():
                    return f"finite: {tensor} holds NaN or infinity"
        return ""

    def _scope(self) -> str:
        return f"all runs in the ledger of cohort {self.section.cohort}" if self.section.ledger else "this run"


def trained(trains: factors.Schedule | Literal["a"], round_number: int) -> tuple[Factor, ...]:
    """Return the factors that are clipped and noised in a round."""
    return ("a",) if trains == "a" else factors.moved(trains, round_number)


def clipped_sum(updates: Iterable[Sequence[Doubles]], *, like: Sequence[Floats], clip_norm: float) -> list[Doubles]:
    """Return the sum of updates, each a list of tensors with the shapes of `like`, jointly clipped.

    Guarantee: exact, so the order of updates is without effect; leaving one out moves the sum by that update alone,
    which has an L2 norm of at most `gaussian.usable_clip(clip_norm)`, to a relative 2^-50, whatever was sent. A
    non-finite update is zero.
    """
    totals = [np.zeros(part.shape) for part in like]
    grid = FINER * gaussian.lattice_step(clip_norm, sum(part.size for part in like))
    for update in updates:
        norm = math.sqrt(math.fsum(float(np.vdot(part, part)) for part in update))
        if not math.isfinite(norm):
            continue
        limit = gaussian.usable_clip(clip_norm)
        scale = limit / norm if norm > limit else 1.0
        for total, part in zip(totals, update, strict=True):
            # Cut towards zero: it never lengthens, and sums of multiples of `grid` are exact in float64.
            total += np.trunc(part * (scale / grid)) * grid  # noqa: PLW2901
    return totals


def _parts(adapter: Adapter, names: tuple[Factor, ...]) -> list[Floats]:
    """Return the trained factors, by layer in sorted order."""
    return [getattr(adapter.layers[layer], name) for layer in sorted(adapter.layers) for name in names]


def _update(adapter: Adapter, start: Adapter, names: tuple[Factor, ...]) -> list[Doubles]:
    """Return how far a site moved every trained factor."""
    return [
        sent.astype(np.float64) - began
        for sent, began in zip(_parts(adapter, names), _parts(start, names), strict=True)
    ]


def _moved(start: Adapter, names: tuple[Factor, ...], steps: Sequence[Doubles]) -> Adapter:
    """Return `start` moved by `steps`; a factor that is not trained is the broadcast one, bit for bit."""
    step = iter(steps)
    layers: dict[str, LoraFactors] = {}
    for layer in sorted(start.layers):
        found = {
            tensor.rpartition(".")[2]: values.copy()
            for tensor, values in lora.named_factors(layer, start.layers[layer]).items()
        }
        moved = {name: (found[name] + next(step)).astype(np.float32) for name in names}
        layers[layer] = LoraFactors(**{**found, **moved})
    return Adapter(layers=layers, alpha=start.alpha, base=start.base)


def _committed(ledger: Ledger) -> frozenset[str]:
    """Return the reservations that became an adapter."""
    return frozenset(entry.id for entry in ledger.entries() if isinstance(entry, Committed))


def _noise(setting: Setting, entry: int) -> NoiseSource:
    """Return seeded noise in a simulation, the operating system's in production."""
    if setting.mode == "simulation":
        return SimulatedNoise(stream(setting.seed, "client-level noise", entry))
    return SecureNoise()
