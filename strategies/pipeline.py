"""One server round, top to bottom.

    validate -> aggregate -> synthesise -> filter -> distil -> tune -> exam

Each phase writes its result into `runs/<id>/rounds/<n>/` as a whole before the next begins. Nothing here knows Flower:
uploads come in as values, the next target goes out as a value.

Everything after `validate` is post-processing of DP releases and public inputs, so it costs no budget (specs
`federated-methods-and-dp.md` 3.2, claim C), however much text is written, judged or learned. Two exceptions are told
wherever an epsilon stands: an aggregator that adds noise of its own keeps its own ledger (client level), and a site
whose release has no receipts, which only `server.accept_non_private` lets in, has spent an infinite epsilon.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fl_app import journal, lora
from fl_app.errors import RoundFailed
from fl_app.privacy.accountants import pld
from fl_app.privacy.events import receipt_to_dict
from fl_app.privacy.statement import of_receipts, of_site, rounded_up
from fl_app.seeds import stream
from fl_app.types import AdapterRelease, Broadcast, RoundRecord
from strategies.stages import Voices
from strategies.validate import broken_rule, cost_of

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    from fl_app.config import SharedConfig
    from fl_app.journal import Journal
    from fl_app.lora import LoraSpec
    from fl_app.types import Adapter, ClientLevelCost, DpReceipt, Draft, Hello, Lesson, Merged, Refusal, Score, Upload
    from strategies.exam import Exam
    from strategies.lab import Lab, TextModel
    from strategies.stages import Aggregator, Distiller, Filter, Synthesizer, Tuner


NON_PRIVATE = "not differentially private at site level"
"""On every artefact of a run that used a release without receipts, with the sites it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The five methods of a run; filters by name, in order."""

    aggregator: Aggregator
    synthesizer: Synthesizer
    filters: tuple[tuple[str, Filter], ...]
    distiller: Distiller
    tuner: Tuner


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Collected:
    """What one wave of training brought, by site: uploads, refusals, broken messages, silence, bytes, seconds."""

    uploads: tuple[Upload, ...]
    refusals: tuple[Refusal, ...]
    broken: Mapping[str, str]
    silent: tuple[str, ...]
    asked: int
    bytes_up: Mapping[str, int]
    bytes_down: Mapping[str, int]
    seconds: float


@dataclass(slots=True, kw_only=True, eq=False)
class Pipeline:
    """The server's state over the rounds of one run: the target, and all drafts and lessons so far."""

    run: str
    shared: SharedConfig
    spec: LoraSpec
    lab: Lab
    stages: Stages
    exam: Exam
    journal: Journal
    config_digest: str
    tree: dict[str, Any]
    start: Adapter
    quorum: float
    accept_non_private: bool = False
    target: Adapter = field(init=False)
    sites: dict[str, Hello] = field(default_factory=dict)
    receipts: dict[str, list[DpReceipt]] = field(default_factory=dict)
    kept: list[Draft] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)
    records: list[RoundRecord] = field(default_factory=list)
    scores: dict[str, Mapping[str, Score]] = field(default_factory=dict)
    released: list[dict[str, Any]] = field(default_factory=list)
    unheard: set[str] = field(default_factory=set)
    non_private: set[str] = field(default_factory=set)
    client_level: list[ClientLevelCost] = field(default_factory=list)
    unready: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.target = self.start

    def open(self, sites: Mapping[str, Hello], unready: Mapping[str, str]) -> None:
        """Begin the run: who is here, what is configured, and where base and professional stand before any round."""
        self.sites = dict(sites)
        self.unready = dict(unready)
        journal.write_toml(self.journal.directory / "config.toml", self.tree)
        journal.write_text(self.journal.directory / "digest.txt", self.config_digest + "\n")
        self.journal.event(
            "run_started",
            run=self.run,
            rounds=self.shared.run.rounds,
            sites=sorted(sites),
            budgets={name: {"epsilon": hello.epsilon, "spent": hello.spent} for name, hello in sites.items()},
            **of_site(
                delta=max((hello.delta for hello in sites.values()), default=0.0),
                unit=", ".join(sorted({hello.unit for hello in sites.values()})),
            ).fields(),
            unready=dict(unready),
            model=self.shared.model.name,
            accept_non_private=self.accept_non_private,
            stamp=self.stamp(),
        )
        with self.phase(0, "exam"):
            self._examine("base", self.lab.local_with(None, "base"))
            self._examine("start", self.lab.local_with(self.start, "start"))
            self._examine("professional", self.lab.professional)

    def broadcast(self, number: int) -> Broadcast:
        """Return what every site gets at the start of round `number`."""
        return Broadcast(run=self.run, round=number, adapter=self.target, config_digest=self.config_digest)

    def play(self, number: int, collected: Collected) -> RoundRecord:
        """Run the server's part of one round and return its record.

        Raises: RoundFailed when fewer uploads than the quorum are sound; the target is then what it was.
        """
        seconds: dict[str, float] = {"train": collected.seconds}
        folder = self.journal.round(number)
        merged = self._merge(number, collected, folder, seconds)
        with self.phase(number, "synthesise", seconds):
            voices = Voices.of(merged, collected.uploads)
            drafts = tuple(self.stages.synthesizer(voices, self._rng("synthesise", number), number))
            journal.write_lines(folder / "drafts.jsonl", drafts)
        with self.phase(number, "filter", seconds):
            kept, dropped = self._screen(drafts)
            journal.write_json(folder / "screened.json", {"kept": [draft.id for draft in kept], "dropped": dropped})
        with self.phase(number, "distil", seconds):
            lessons = tuple(self.stages.distiller(kept, self._rng("distil", number)))
            journal.write_lines(folder / "lessons.jsonl", lessons)
        with self.phase(number, "tune", seconds):
            everything = (*self.lessons, *lessons)
            target = self.stages.tuner(self.target, everything, self._rng("tune", number))
            self._save_target(target, folder / "target")
        self.target, self.kept, self.lessons = target, [*self.kept, *kept], list(everything)
        with self.phase(number, "exam", seconds):
            self._examine("adapter", self.lab.local_with(merged.adapter, "adapter"))
            self._examine(f"target_round_{number}", self.lab.local_with(target, "target"))
        record = self._record(number, collected, merged, drafts, dropped, lessons, seconds, folder)
        journal.write_json(folder / "record.json", record)
        self._save_target(target, self.journal.directory / "target")
        self.records.append(record)
        self.journal.event(
            "round_finished",
            round=number,
            drafts_written=len(drafts),
            drafts_kept=len(kept),
            epsilon=dict(record.epsilon),
            exam=self.scores[f"target_round_{number}"].get("choice_accuracy"),
        )
        return record

    def stamp(self) -> str:
        """Return what must stand on every artefact of this run as it is so far; empty when nothing must."""
        stamps = [journal.STAMP] if self.shared.run.mode == "simulation" else []
        if self.non_private:
            stamps.append(f"{NON_PRIVATE} ({', '.join(sorted(self.non_private))})")
        return "; ".join(stamps)

    def epsilon(self, site: str) -> float:
        """Return the PLD epsilon of what a site released in this run, recomputed from its receipts.

        Infinite once a release without receipts was used.
        """
        if site in self.non_private:
            return math.inf
        receipts = self.receipts.get(site, [])
        return pld.epsilon(receipts, self.sites[site].delta) if receipts else 0.0

    def _merge(self, number: int, collected: Collected, folder: Path, seconds: dict[str, float]) -> Merged:
        """Validate what came, enter the receipts, and aggregate the sound uploads."""
        with self.phase(number, "aggregate", seconds):
            sound: list[Upload] = []
            rejected = dict(collected.broken)
            for upload in sorted(collected.uploads, key=lambda item: item.site):
                rule = broken_rule(
                    upload,
                    spec=self.spec,
                    site=self.sites.get(upload.site),
                    round_number=number,
                    earlier=self.receipts.get(upload.site, ()),
                    accept_non_private=self.accept_non_private,
                )
                if rule:
                    rejected[upload.site] = rule
                    self._book_rejected(upload)
                else:
                    sound.append(upload)
            self._enter(number, sound, rejected, collected, folder)
            need = max(1, -(-collected.asked * self.quorum // 1))
            if len(sound) < need:
                refused = ", ".join(f"{one.site}: {one.code}" for one in collected.refusals)
                raise RoundFailed(
                    f"round {number}: {len(sound)} of {collected.asked} sites sent a sound upload, {need:g} needed "
                    f"(refused: {refused or 'none'}; rejected: {', '.join(rejected) or 'none'}; silent: "
                    f"{', '.join(collected.silent) or 'none'}; never ready: "
                    f"{', '.join(self.unready.values()) or 'none'}). The target of the last round is kept."
                )
            merged = self.stages.aggregator(sound, self.broadcast(number))
            for site, rule in merged.rejected.items():
                self._site(number, site, "rejected", code=rule)
            merged = dataclasses.replace(merged, rejected={**rejected, **merged.rejected})
            self._charge(number, merged.cost)
            lora.save_peft(merged.adapter, folder / "merged", base_name=self.shared.model.name)
        return merged

    def _enter(
        self, number: int, sound: Sequence[Upload], rejected: Mapping[str, str], collected: Collected, folder: Path
    ) -> None:
        """Write each sound release and its receipts into the run directory, and tell the journal about every site."""
        for upload in sound:
            assert isinstance(upload.release, AdapterRelease)
            receipts = upload.receipts
            if receipts is None:
                self.non_private.add(upload.site)
            self.receipts.setdefault(upload.site, []).extend(receipts or ())
            place = folder / "releases" / upload.site
            lora.save_peft(upload.release.adapter, place, base_name=self.shared.model.name)
            told = None if receipts is None else [receipt_to_dict(receipt) for receipt in receipts]
            journal.write_json(place / "receipts.json", told)
            hello = self.sites[upload.site]
            spent = self._spent(upload.site, max(upload.spent, self.epsilon(upload.site)))
            self.released.append(
                {
                    "site": upload.site,
                    "round": number,
                    "kind": upload.release.kind,
                    "bytes": collected.bytes_up.get(upload.site, 0),
                    "sha256": lora.sha256(upload.release.adapter),
                    "event": "; ".join(str(receipt.event) for receipt in receipts or ()) or "none",
                    "guarantee": f"this run so far ({rounded_up(self.epsilon(upload.site))}, {hello.delta:g})-DP per "
                    f"{hello.unit}, {receipts[0].relation}"
                    if receipts
                    else f"{NON_PRIVATE}: released without noise, epsilon is infinite",
                }
            )
            self._site(number, upload.site, "trained", bytes=collected.bytes_up.get(upload.site, 0), epsilon=spent)
        heard = {upload.site for upload in collected.uploads}
        self.unheard |= {*collected.broken, *collected.silent} - heard
        self.unheard |= {refusal.site for refusal in collected.refusals if refusal.code in {"internal", "ledger"}}
        for refusal in collected.refusals:
            self._site(number, refusal.site, "refused", code=refusal.code)
        for site, rule in rejected.items():
            self._site(number, site, "rejected", code=rule)
        for site in collected.silent:
            self._site(number, site, "silent")

    def _charge(self, number: int, cost: ClientLevelCost | None) -> None:
        """Enter what the merged adapter cost every site at the server, if its aggregator added noise."""
        if cost is None:
            return
        self.client_level.append(cost)
        self.journal.event(
            "client_level",
            round=number,
            epsilon=cost.spent,
            budget=cost.budget,
            **of_receipts([cost.receipt], delta=cost.delta, accountant=pld.label()).fields(),
            scope=cost.scope,
        )

    def _book_rejected(self, upload: Upload) -> None:
        """Raise what a site has spent by a release that nobody will use; what its ledger holds may be more."""
        hello = self.sites.get(upload.site)
        if hello is not None:
            self._spent(upload.site, cost_of(upload, hello.delta))
            self.unheard.add(upload.site)

    def _spent(self, site: str, spent: float) -> float:
        """Raise what a site is known to have spent, and return it; an upload that was rejected has cost as well."""
        hello = self.sites.get(site)
        if hello is None:
            return spent
        self.sites[site] = dataclasses.replace(hello, spent=max(hello.spent, spent))
        return self.sites[site].spent

    def _screen(self, drafts: Sequence[Draft]) -> tuple[tuple[Draft, ...], dict[str, str]]:
        """Pass the drafts through every filter in order; a reason starts with the name of its filter."""
        left = tuple(drafts)
        dropped: dict[str, str] = {}
        for name, one in self.stages.filters:
            screened = one(left, self.kept)
            for draft, reason in screened.dropped.items():
                dropped[draft] = reason if reason.startswith(name) else f"{name}: {reason}"
            left = screened.kept
        return left, dropped

    def _examine(self, name: str, model: TextModel) -> None:
        self.scores[name] = self.exam.score(model)
        self.journal.event("exam", model=name, scores={key: one.value for key, one in self.scores[name].items()})

    def _save_target(self, target: Adapter, folder: Path) -> None:
        lora.save_peft(target, folder, base_name=self.shared.model.name)

    def _record(
        self,
        number: int,
        collected: Collected,
        merged: Merged,
        drafts: Sequence[Draft],
        dropped: Mapping[str, str],
        lessons: Sequence[Lesson],
        seconds: Mapping[str, float],
        folder: Path,
    ) -> RoundRecord:
        hashes = {f"releases/{item['site']}": item["sha256"] for item in self.released if item["round"] == number}
        hashes |= {"merged": lora.sha256(merged.adapter), "target": lora.sha256(self.target)}
        hashes |= {
            name: journal.file_sha256(folder / name) for name in ("drafts.jsonl", "screened.json", "lessons.jsonl")
        }
        return RoundRecord(
            round=number,
            used=merged.used,
            refused={refusal.site: refusal.code for refusal in collected.refusals},
            rejected=dict(merged.rejected),
            silent=collected.silent,
            drafts_written=len(drafts),
            drafts_kept=len(drafts) - len(dropped),
            dropped=dict(Counter(reason.split(":")[0] for reason in dropped.values())),
            lessons=len(lessons),
            epsilon={site: hello.spent for site, hello in sorted(self.sites.items())},
            scores={name: self.scores[name] for name in ("adapter", f"target_round_{number}")},
            seconds=dict(seconds),
            bytes_up=dict(collected.bytes_up),
            bytes_down=dict(collected.bytes_down),
            hashes=hashes,
            client_epsilon=merged.cost.spent if merged.cost else None,
        )

    @contextmanager
    def phase(self, number: int, name: str, seconds: dict[str, float] | None = None) -> Generator[None]:
        """Time a phase and tell the journal when it begins and ends."""
        self.journal.event("phase_started", round=number, phase=name)
        self.lab.progress = lambda done, total: self.journal.event(
            "phase_progress", round=number, phase=name, done=done, total=total
        )
        started = time.monotonic()
        yield
        took = round(time.monotonic() - started, 3)
        if seconds is not None:
            seconds[name] = took
        self.seconds[name] = round(self.seconds.get(name, 0.0) + took, 3)
        self.journal.event("phase_finished", round=number, phase=name, seconds=took)

    def _site(self, number: int, site: str, state: str, **fields: object) -> None:
        hello = self.sites.get(site)
        budget = {"budget": hello.epsilon} if hello else {}
        self.journal.event("site", round=number, site=site, state=state, **budget, **fields)

    def _rng(self, name: str, number: int) -> Any:
        return stream(self.shared.run.seed, name, number)
