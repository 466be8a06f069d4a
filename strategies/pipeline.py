"""One server round, top to bottom.

    validate -> aggregate -> synthesise -> filter -> distil -> tune -> exam

Each phase writes its result into `runs/<id>/rounds/<n>/`, commits it there (`checkpoint`), and the next one reads it
back. So a run that was stopped, at whatever point, goes on by playing its rounds again: what is committed is read, the
rest is computed, from random streams that are named after run seed, phase and round and nothing else. Nothing here
knows Flower: uploads come in as values, the next target goes out as a value.

Everything after `validate` is post-processing of DP releases and public inputs, so it costs no budget (specs
`federated-methods-and-dp.md` 3.2, claim C), however much text is written, judged or learned. Two exceptions are told
wherever an epsilon stands: an aggregator that adds noise of its own keeps its own ledger (client level), and a site
whose release has no receipts, which only `server.accept_non_private` lets in, has spent an infinite epsilon.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fl_app import factors, journal, lora, parts, peft_files, releases, transport, votes
from fl_app.errors import RoundFailed
from fl_app.privacy.events import receipt_to_dict
from fl_app.privacy.statement import of_site
from fl_app.seeds import stream
from fl_app.types import Broadcast, Material, Merged, RoundRecord
from strategies import carried, readback, screening
from strategies.carried import Carried
from strategies.checkpoint import Made
from strategies.collected import from_json, judge, needed, to_json, too_few, write_release
from strategies.round_record import record_of
from strategies.spending import NON_PRIVATE
from strategies.stages import Stages, Voices

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from fl_app.audit_log import AuditLog
    from fl_app.config import SharedConfig
    from fl_app.journal import Journal
    from fl_app.lora import LoraSpec
    from fl_app.types import Adapter, Draft, Hello, Lesson, ReleaseSpec, Score, Upload, VectorRelease
    from strategies.checkpoint import Checkpoint, Done
    from strategies.collected import Collected, Judged
    from strategies.exam import Exam
    from strategies.lab import Lab, TextModel
    from strategies.ranks import Ranks
    from strategies.reach import RunCap
    from strategies.spending import Spending


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
    checkpoint: Checkpoint
    audit: AuditLog
    spending: Spending
    config_digest: str
    tree: dict[str, Any]
    start: Adapter
    quorum: float
    ranks: Ranks
    carries: Literal["target", "merged"] = "target"
    weighed: frozenset[str] = frozenset()
    survey: Mapping[str, int] = field(default_factory=dict[str, int])
    accept_non_private: bool = False
    cap: RunCap | None = None
    carried: Carried = field(init=False)
    answered: dict[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    kept: list[Draft] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)
    records: list[RoundRecord] = field(default_factory=list)
    scores: dict[str, Mapping[str, Score]] = field(default_factory=dict)
    unready: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    restored_s: float = 0.0
    materials: dict[int, Material] = field(default_factory=dict)
    surveys: dict[str, VectorRelease] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.carried = Carried(adapter=self.start)

    @property
    def target(self) -> Adapter:
        """The target: what sites train next, without what lies under it."""
        return self.carried.adapter

    def open(self, sites: Mapping[str, Hello], unready: Mapping[str, str]) -> None:
        """Begin the run: who is here, what is configured, and where base and professional stand before any round.

        A run that goes on keeps the sites it began with as they were then, and learns of new ones.
        Raises: RunInvalid when the run directory does not hold what its own commits say.
        """
        done = self.checkpoint.find(0, "open")
        if done is None:
            journal.write_toml(self.journal.directory / "config.toml", self.tree)
            journal.write_text(self.journal.directory / "digest.txt", self.config_digest + "\n")
            value = {"sites": {name: asdict(hello) for name, hello in sites.items()}, "unready": dict(unready)}
            began = self.checkpoint.commit(0, "open", files=(), value=value, seconds=0.0)
        else:
            began = done
        known = {name: readback.hello(hello) for name, hello in began.value["sites"].items()}
        self.spending.join(known)
        self.spending.join(sites)
        here = self.spending.sites
        self.unready = dict(began.value["unready"])
        self.note("run_started" if done is None else "run_resumed")
        self.journal.event(
            "run_started" if done is None else "run_resumed",
            run=self.run,
            rounds=self.shared.run.rounds,
            sites=sorted(here),
            budgets={name: {"epsilon": hello.epsilon, "spent": hello.spent} for name, hello in here.items()},
            **of_site(
                delta=max((hello.delta for hello in here.values()), default=0.0),
                unit=", ".join(sorted({hello.unit for hello in here.values()})),
            ).fields(),
            unready=dict(self.unready),
            model=self.shared.model.name,
            accept_non_private=self.accept_non_private,
            stamp=self.stamp(),
        )
        base, start = self.lab.local_with(None, "base"), self.lab.local_with(self.start, "start")
        self._examine(0, {"base": base, "start": start, "professional": self.lab.professional}, {})

    def has_collected(self, number: int) -> bool:
        """Whether the uploads of a round were collected before, so that no site needs to be asked."""
        return self.checkpoint.stands(number, "validate")

    def broadcast(self, number: int) -> Broadcast:
        """Return what every site gets at the start of round `number`."""
        return Broadcast(
            run=self.run,
            round=number,
            adapter=self.carried.adapter,
            config_digest=self.config_digest,
            material=self.materials.get(number, Material()),
            blocks=self.carried.blocks,
        )

    def unfit(self, hello: Hello) -> str:
        """Return why a site can have no part in this run; empty when it can."""
        if self.weighed and hello.site not in self.weighed:
            return "it has no weight in server.aggregator.weights"
        return self.ranks.unfit(hello)

    def spec_of(self, site: str, number: int) -> LoraSpec:
        """Return the spec that a site trains in a round; the round's own for a site that nobody knows."""
        hello = self.spending.sites.get(site)
        return self.ranks.of_round(number) if hello is None else self.ranks.of_site(hello, number)

    def broadcast_to(self, site: str, number: int, *, whole: bool = False) -> Broadcast:
        """Return what one site gets at the start of round `number`: the broadcast, or what it trains of it.

        With `whole`, all of it: a target that is scored and not trained.
        """
        if whole:
            return self.broadcast(number)
        mine, broadcast = self.carried.cut(self.spec_of(site, number)), self.broadcast(number)
        return dataclasses.replace(broadcast, adapter=mine.adapter, blocks=mine.blocks)

    @property
    def asked(self) -> ReleaseSpec:
        """What every site is asked for in a run: what the synthesizer writes from, and the survey."""
        return dataclasses.replace(self.stages.synthesizer.asks, survey=self.survey)

    def asked_in(self, number: int) -> ReleaseSpec:
        """Return what every site is asked for in a round: of an adapter, the factors that its learner moves."""
        if self.asked.kind != "adapter":
            return self.asked
        told = factors.travels(self.tree["client"]["learner"], number, self.shared.lora.upload_precision)
        return dataclasses.replace(told, survey=self.survey)

    def bins(self, number: int) -> tuple[str, ...]:
        """Return the names of a histogram's counts in round `number`: the texts that the sites were sent, in order."""
        return votes.bin_names(self.materials.get(number, Material()).texts)

    def prepare(self, number: int) -> Material:
        """Return, and keep for the broadcast, what the sites need to answer round `number`.

        Nothing where they send adapters or are not asked at all.
        """
        if self.asked.kind in {"adapter", None}:
            return Material()
        if number in self.materials:
            return self.materials[number]
        folder = self.journal.round(number)

        def work() -> Made:
            made = self.stages.synthesizer.prepare(self.target, self.kept, self._rng("prepare", number), number)
            readback.write_material(made, folder / "material")
            return Made(files=[folder / "material"])

        self._phase(number, "prepare", {}, work)
        self.materials[number] = readback.material(folder / "material")
        return self.materials[number]

    def play(self, number: int, collected: Collected | None = None) -> RoundRecord:
        """Run the server's part of one round and return its record. `collected` is not needed where it was before.

        Raises: RoundFailed when fewer uploads than the quorum are sound; the target is then what it was, and the round
        may be played again. RunInvalid when the run directory does not hold what its own commits say.
        """
        seconds: dict[str, float] = {}
        folder = self.journal.round(number)
        self.lab.under = self.carried.blocks
        material = self.prepare(number)
        judged = self._judge(number, collected, folder, seconds)
        merged = self._aggregate(number, judged, folder, seconds)
        voices = Voices.of(merged, self._whole(number, judged.sound), surveys=self.surveys, material=material)
        drafts = self._synthesise(number, voices, folder, seconds)
        kept, dropped = self._screen(number, drafts, folder, seconds)
        lessons = self._distil(number, kept, folder, seconds)
        models = {"adapter": self.lab.local_with(merged.adapter, "adapter")} if self.carries == "target" else {}
        self._carry(number, merged, lessons, folder, seconds)
        self.kept, self.lessons = [*self.kept, *kept], [*self.lessons, *lessons]
        models[f"target_round_{number}"] = self.lab.local_with(self.target, "target")
        self._examine(number, models, seconds)
        record = record_of(
            number,
            judged,
            merged,
            spending=self.spending,
            target=self.target,
            written=len(drafts),
            dropped=dropped,
            lessons=len(lessons),
            scores={name: self.scores[name] for name in models if name in self.scores},
            seconds=seconds,
            folder=folder,
        )
        self.records.append(record)
        if self.checkpoint.find(number, "publish") is None:
            journal.write_json(folder / "record.json", record)
            published = self.carried.complete()
            peft_files.save(published, self.journal.directory / "target", base_name=self.shared.model.name)
            self.note("target_published", number, object_sha256=lora.sha256(self.target))
            self.checkpoint.commit(number, "publish", files=[folder / "record.json"], value={}, seconds=0.0)
            self.journal.event(
                "round_finished",
                round=number,
                drafts_written=len(drafts),
                drafts_kept=len(kept),
                epsilon=dict(record.epsilon),
                exam=self.scores[f"target_round_{number}"].get("choice_accuracy"),
            )
        return record

    def close(self) -> None:
        """Give back threads and the run directory."""
        self.lab.close()
        self.checkpoint.close()

    def stamp(self) -> str:
        """Return what must stand on every artefact of this run as it is so far; empty when nothing must."""
        stamps = [journal.STAMP] if self.shared.run.mode == "simulation" else []
        if self.spending.non_private:
            stamps.append(f"{NON_PRIVATE} ({', '.join(sorted(self.spending.non_private))})")
        return "; ".join(stamps)

    def _judge(self, number: int, collected: Collected | None, folder: Path, seconds: dict[str, float]) -> Judged:
        """Validate what came, write down sound releases, and enter what every site has spent."""

        def work() -> Made:
            assert collected is not None, "a round whose uploads were not collected before needs them"
            judged = judge(
                collected,
                broadcast=lambda site: self.broadcast_to(site, number),
                spec=lambda site: self.spec_of(site, number),
                asked=self.asked_in(number),
                spending=self.spending,
                seen=self.spending.adapters(self.start, self.records),
                cap=self.cap.of_round(number) if self.cap else None,
                accept_non_private=self.accept_non_private,
            )
            need = needed(judged.asked, self.quorum)
            if len(judged.sound) < need:
                self.spending.enter(number, judged)
                raise RoundFailed(too_few(number, judged, need, self.unready.values()))
            shutil.rmtree(folder / "releases", ignore_errors=True)  # of an attempt that was stopped
            for upload in judged.sound:
                self.note("release_taken", number, object_sha256=releases.sha256(upload.release, upload.survey))
            for broken in judged.rejected.values():
                self.note("release_rejected", number, outcome="rejected", code=broken.rule)
            base_name = self.shared.model.name
            places = [write_release(folder, upload, base_name=base_name) for upload in judged.sound]
            return Made(files=places, value=to_json(judged), seconds=judged.seconds)

        restored = self.has_collected(number)
        done = self._phase(number, "validate", seconds, work)
        seconds["train"] = seconds.pop("validate")
        judged = from_json(done.value, folder, seconds=done.seconds)
        self.spending.enter(number, judged)
        # Who did not answer, or not this process, is sent everything: it may have lost what it had.
        self.answered = {} if restored else self._parts_by_site(number, judged.sound)
        self.surveys |= {upload.site: upload.survey for upload in judged.sound if upload.survey is not None}
        self.lab.surveys = dict(sorted(self.surveys.items()))
        return judged

    def _parts_by_site(self, number: int, uploads: Sequence[Upload]) -> dict[str, frozenset[str]]:
        """Return the hashes of what each site was sent; sites that train alike were sent the same."""
        found: dict[tuple[int, tuple[str, ...]], frozenset[str]] = {}
        by_site: dict[str, frozenset[str]] = {}
        for site in (upload.site for upload in uploads):
            spec = self.spec_of(site, number)
            key = (spec.rank, tuple(spec.shapes))
            if key not in found:
                found[key] = self.carried.cut(spec).parts()
            by_site[site] = found[key]
        return by_site

    def _aggregate(self, number: int, judged: Judged, folder: Path, seconds: dict[str, float]) -> Merged:
        def work() -> Made:
            merged = self._merged(number, judged)
            base_name = self.shared.model.name
            peft_files.save(merged.adapter, folder / "merged", base_name=base_name)
            places = [folder / "merged"]
            value: dict[str, Any] = {"used": merged.used, "rejected": dict(merged.rejected)}
            value["cost"] = merged.cost and {**asdict(merged.cost), "receipt": receipt_to_dict(merged.cost.receipt)}
            if self.carries == "merged":
                places += carried.write(merged, folder, base_name=base_name)
                value |= {"start": merged.start is not None, "blocks": len(merged.blocks)}
            return Made(files=places, value=value)

        value = self._phase(number, "aggregate", seconds, work).value
        merged = Merged(
            adapter=peft_files.load(folder / "merged"),
            used=tuple(value["used"]),
            rejected={**{site: str(broken) for site, broken in judged.rejected.items()}, **value["rejected"]},
            cost=readback.cost(value["cost"]),
        )
        merged = carried.read(merged, folder, blocks=value.get("blocks", 0), start=value.get("start", False))
        for site, rule in value["rejected"].items():
            self.spending.tell(number, site, "rejected", code=rule)
        self.spending.charge(number, merged.cost)
        return merged

    def _merged(self, number: int, judged: Judged) -> Merged:
        """Return the aggregate of the adapters; releases of another kind leave the broadcast's adapter as it was."""
        if self.asked.kind == "adapter":
            adapter = self.carried.cut(self.ranks.of_round(number)).adapter
            broadcast = dataclasses.replace(self.broadcast(number), adapter=adapter)
            return self.stages.aggregator(self._whole(number, judged.sound), broadcast)
        return Merged(adapter=self.target, used=tuple(upload.site for upload in judged.sound))

    def _whole(self, number: int, uploads: Sequence[Upload]) -> list[Upload]:
        """Return uploads with all layers, those that a site left alone as they were."""
        whole = self.carried.cut(self.ranks.of_round(number)).adapter
        return [carried.whole(one, whole) for one in uploads]

    def _synthesise(self, number: int, voices: Voices, folder: Path, seconds: dict[str, float]) -> tuple[Draft, ...]:
        path = folder / "drafts.jsonl"

        def work() -> Made:
            journal.write_lines(path, self.stages.synthesizer(voices, self._rng("synthesise", number), number))
            return Made(files=[path])

        self._phase(number, "synthesise", seconds, work)
        return readback.drafts(path)

    def _screen(
        self, number: int, drafts: Sequence[Draft], folder: Path, seconds: dict[str, float]
    ) -> tuple[tuple[Draft, ...], Mapping[str, str]]:
        """Return the drafts that passed every filter, as the filters left them, and a reason for every other one."""

        def work() -> Made:
            value = screening.screen(self.stages.filters, drafts, self.kept)
            journal.write_json(folder / "screened.json", value)
            return Made(files=[folder / "screened.json"], value=value)

        value = self._phase(number, "filter", seconds, work).value
        return screening.kept(value, drafts), value["dropped"]

    def _distil(
        self, number: int, kept: Sequence[Draft], folder: Path, seconds: dict[str, float]
    ) -> tuple[Lesson, ...]:
        path = folder / "lessons.jsonl"

        def work() -> Made:
            journal.write_lines(path, self.stages.distiller(kept, self._rng("distil", number)))
            return Made(files=[path])

        self._phase(number, "distil", seconds, work)
        return readback.lessons(path)

    def _carry(
        self, number: int, merged: Merged, lessons: Sequence[Lesson], folder: Path, seconds: dict[str, float]
    ) -> None:
        """Make the next target: tune the last one, or the round's aggregate where that is carried, on all lessons."""
        after = self.carried
        if self.carries == "merged":
            after = self.carried.after(merged, self.ranks.of_round(number))
            self.lab.under = after.blocks

        def work() -> Made:
            target = self.stages.tuner(after.adapter, (*self.lessons, *lessons), self._rng("tune", number))
            target = transport.rounded(target, parts.FACTORS, self.shared.lora.broadcast_precision)
            peft_files.save(target, folder / "target", base_name=self.shared.model.name)
            return Made(files=[folder / "target"])

        self._phase(number, "tune", seconds, work)
        self.carried = dataclasses.replace(after, adapter=peft_files.load(folder / "target"))

    def _examine(self, number: int, models: Mapping[str, TextModel], seconds: dict[str, float]) -> None:
        def work() -> Made:
            return Made(
                value={
                    name: {metric: asdict(score) for metric, score in self.exam.score(model).items()}
                    for name, model in models.items()
                    if self.exam.asks(name)
                }
            )

        for name, scores in self._phase(number, "exam", seconds, work).value.items():
            self.scores[name] = {metric: readback.score(score) for metric, score in scores.items()}
            self.journal.event("exam", model=name, scores={key: one.value for key, one in self.scores[name].items()})

    def _phase(self, number: int, name: str, seconds: dict[str, float], work: Callable[[], Made]) -> Done:
        """Return what a phase left: read, when it is done, else computed, committed and then read."""
        done = self.checkpoint.find(number, name)
        if done is not None:
            seconds[name] = done.seconds
            self.seconds[name] = round(self.seconds.get(name, 0.0) + done.seconds, 3)
            self.restored_s += done.seconds
            self.journal.event("phase_restored", round=number, phase=name, seconds=done.seconds)
            return done
        with self.phase(number, name, seconds):
            began = time.monotonic()
            made = work()
            took = round(time.monotonic() - began, 3) if made.seconds is None else made.seconds
            return self.checkpoint.commit(number, name, files=made.files, value=made.value, seconds=took)

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

    def note(
        self, action: str, number: int = 0, *, object_sha256: str = "", outcome: str = "ok", code: str = ""
    ) -> None:
        """Put on record what is about to be done: `audit.jsonl`, before it is done. Raises: AuditBroken."""
        self.audit.append(action, run=self.run, round=number, object_sha256=object_sha256, outcome=outcome, code=code)

    def _rng(self, name: str, number: int) -> Any:
        return stream(self.shared.run.seed, name, number)
