"""The [server] table, and the pipeline it describes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fl_app import journal, lora, lora_start, low_rank, models, parts, peft_files, text, transport
from fl_app.audit_log import AuditLog
from fl_app.config import Section, SharedConfig, Tree, digest, parse
from fl_app.errors import ConfigInvalid
from fl_app.journal import Journal
from fl_app.seeds import stream
from strategies import agreement, ranks
from strategies.aggregators import AnyAggregator
from strategies.checkpoint import Checkpoint
from strategies.distillers import AnyDistiller
from strategies.exam import ExamSection, read_exam
from strategies.filters import AnyFilter
from strategies.lab import Lab
from strategies.pipeline import Pipeline
from strategies.ranks import AnyRanks, SameRank
from strategies.reach import read_cap
from strategies.spending import Spending
from strategies.stages import Setting, Stages
from strategies.synthesizers import AnySynthesizer
from strategies.tuners import AnyTuner

if TYPE_CHECKING:
    from fl_app.lora import LoraSpec
    from fl_app.models import FrozenModel
    from fl_app.types import Adapter
    from strategies.reach import RunCap


class NetworkSection(Section):
    """[server.network]: how many nodes to wait for, how long, and the share of them a round needs."""

    sites: Annotated[int, Field(ge=1)]
    wait_s: Annotated[float, Field(gt=0)] = 120.0
    reply_timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    poll_s: Annotated[float, Field(gt=0)] = 0.5
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5


class ProfessionalSection(Section):
    """[server.professional]: W_pro as a local model. Empty `model`: the local model's base; empty `adapter`: none.

    `public_text` is a JSON-lines file whose words are never personal data (the professional's own training text).
    """

    name: str = "professional"
    model: str = ""
    adapter: str = ""
    public_text: str = ""


class ServerSection(Section):
    """[server]. `accept_non_private` takes releases without receipts; the run is then labelled by them.

    `carries` is what the next round starts from: the tuned target, or the aggregate (`strategies.carried`).

    `max_update_norm` is the most that a site's update may measure, in L2 norm over all factors; what the optimizer of
    [client.learner] can reach in a round holds in any case (`strategies.reach`).
    """

    accept_non_private: bool = False
    carries: Literal["target", "merged"] = "target"
    ranks: AnyRanks = SameRank()
    max_update_norm: Annotated[float, Field(gt=0)] = 1e6
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    batch_rows: Annotated[int, Field(ge=1, le=4096)] = 32
    network: NetworkSection
    professional: ProfessionalSection
    aggregator: AnyAggregator
    synthesizer: AnySynthesizer
    filters: list[AnyFilter]
    distiller: AnyDistiller
    tuner: AnyTuner
    exam: ExamSection


def read_server(tree: Tree) -> ServerSection:
    """Return the [server] table of a configuration tree. Raises: ConfigInvalid."""
    server = parse(ServerSection, tree.get("server", {}), where="server")
    _check_voices(server)
    agreement.check(tree, synthesizer=server.synthesizer, filters=server.filters)
    agreement.check_task(server.distiller, server.tuner)
    agreement.check_carried(tree, server)
    return server


def _check_voices(server: ServerSection) -> None:
    """Raise `ConfigInvalid` unless aggregator, synthesizer and filters agree about who writes."""
    each_site = server.synthesizer.voices == "each_site"
    if each_site and server.aggregator.kind == "central_dp":
        raise ConfigInvalid(
            'server.synthesizer.voices = "each_site" lets single releases write, and central_dp promises that nobody '
            'can tell whether a site was there; write voices = "merged", or another aggregator'
        )
    kinds = [one.kind for one in server.filters]
    if "site_share" in kinds and not each_site:
        raise ConfigInvalid(
            'server.filters: site_share counts sites, and server.synthesizer.voices = "merged" names none; write '
            'voices = "each_site", or leave the filter out'
        )
    if "site_share" in kinds[:-1]:
        raise ConfigInvalid(
            f"server.filters: site_share is number {kinds.index('site_share') + 1} of {len(kinds)}, and filters after "
            "it change the shares that it fixed; put it last"
        )


def build_pipeline(tree: Tree, shared: SharedConfig, server: ServerSection, *, run: str) -> Pipeline:
    """Return the pipeline of one run: models loaded, stages built, the run directory opened.

    Raises: ConfigInvalid, ModelMissing, AdapterMismatch, each before anything is sent to a site.
    """
    if not shared.run.directory:
        raise ConfigInvalid("run.directory is empty: give the absolute path of the run directory")
    # First of all: whoever else plays this run must be found out before anything in its directory is touched.
    checkpoint = Checkpoint(Path(shared.run.directory), run=run, config_digest=digest(tree))
    try:
        return _build(tree, shared, server, run=run, checkpoint=checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def _build(tree: Tree, shared: SharedConfig, server: ServerSection, *, run: str, checkpoint: Checkpoint) -> Pipeline:
    exam = read_exam(server.exam, seed=shared.run.seed)
    local = models.load(shared.model.name, shared.model.dtype)
    core = agreement.schedule(tree) == "core"
    spec = dataclasses.replace(lora.spec_of(local, shared.lora), core=core)
    _check_space(shared, server, spec)
    professional = models.load(server.professional.model or shared.model.name, shared.model.dtype)
    lab = Lab(
        local=local,
        professional=professional,
        professional_adapter=_professional_adapter(server.professional, professional),
        professional_name=server.professional.name,
        system=shared.model.system,
        threads=server.threads,
        batch_rows=server.batch_rows,
        public_words=_public_words(server.professional),
        directory=Path(shared.run.directory),
    )
    setting = Setting(
        run=run,
        mode=shared.run.mode,
        seed=shared.run.seed,
        rounds=shared.run.rounds,
        sites=server.network.sites,
        directory=Path(shared.run.directory),
        init=shared.lora.init,
    )
    stages = Stages(
        aggregator=server.aggregator.build(setting),
        synthesizer=server.synthesizer.build(lab),
        filters=tuple((section.kind, section.build(lab)) for section in server.filters),
        distiller=server.distiller.build(lab),
        tuner=server.tuner.build(lab),
    )
    record = Journal(setting.directory)
    return Pipeline(
        run=run,
        shared=shared,
        spec=spec,
        lab=lab,
        stages=stages,
        exam=exam,
        journal=record,
        checkpoint=checkpoint,
        audit=AuditLog(setting.directory / "audit.jsonl", "server"),
        spending=Spending(journal=record),
        config_digest=digest(tree),
        tree=tree,
        start=_start(shared, spec, local),
        quorum=server.network.quorum,
        survey=agreement.survey(tree, stages.synthesizer.asks),
        accept_non_private=server.accept_non_private,
        cap=_cap(tree, server),
        ranks=ranks.build(
            server.ranks,
            spec=spec,
            seed=shared.run.seed,
            frozen=local,
            tokens=agreement.tokens(tree),
        ),
        carries=server.carries,
        weighed=frozenset(getattr(getattr(server.aggregator, "inner", server.aggregator), "weights", ())),
    )


def _cap(tree: Tree, server: ServerSection) -> RunCap | None:
    """Return the cap on an adapter's update; None where sites send something else, or nothing."""
    if server.synthesizer.writes_from != "adapter":
        return None
    return read_cap(tree.get("client", {}).get("learner", {}), largest=server.max_update_norm)


TEXT_BYTES = 4 << 20
"""What drafts, verdicts and lessons of a round may take: 144 drafts take 0.3 MiB. Assumption."""


def _check_space(shared: SharedConfig, server: ServerSection, spec: LoraSpec) -> None:
    """Return when the run directory has room for the run. Raises: DiskFull."""
    numbers = sum(math.prod(shape) for shape in lora.factor_shapes(spec).values())
    need = journal.run_bytes(
        rounds=shared.run.rounds,
        sites=server.network.sites,
        adapter_bytes=4 * numbers,
        text_bytes=TEXT_BYTES,
        aggregates=_aggregates(server),
    )
    journal.check_space(Path(shared.run.directory), need)


def _aggregates(server: ServerSection) -> int:
    """Return how many adapters of lora.rank a round's aggregate takes on disk at most: a stack is one of every site."""
    stack = server.network.sites if agreement.stacks(server.aggregator) else 1
    return 2 * stack + 1 if server.carries == "merged" else stack  # the aggregate, its blocks, and where to go on


def _start(shared: SharedConfig, spec: LoraSpec, local: FrozenModel) -> Adapter:
    """Return the adapter a run starts from, as it travels. Raises: ConfigInvalid, AdapterMismatch."""
    return transport.rounded(_chosen_start(shared, spec, local), parts.FACTORS, shared.lora.broadcast_precision)


def _chosen_start(shared: SharedConfig, spec: LoraSpec, local: FrozenModel) -> Adapter:
    if not shared.lora.start and shared.lora.init == "weights":
        return lora_start.from_weights(local, spec)
    if not shared.lora.start:
        return lora_start.initial(spec, stream(shared.run.seed, "initial adapter"), shared.lora.init)
    folder = Path(shared.lora.start)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigInvalid(
            f"lora.start: no PEFT adapter in {folder}; make one with `make professional`, or leave it empty"
        )
    adapter = peft_files.load(folder, base=spec.base)
    if spec.core and not lora.has_core(adapter):  # Fed-SB's bases out of a former release, which costs nothing anew
        adapter = low_rank.with_core(adapter, spec.rank)
    lora.check_spec(adapter, spec)
    return adapter


def _professional_adapter(section: ProfessionalSection, frozen: FrozenModel) -> Adapter | None:
    if not section.adapter:
        return None
    folder = Path(section.adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ConfigInvalid(
            f"server.professional.adapter: no PEFT adapter in {folder}; make one with `make professional`"
        )
    return peft_files.load(folder, base=frozen.resolved.sha256)


def _public_words(section: ProfessionalSection) -> frozenset[str]:
    if not section.public_text:
        return frozenset()
    path = Path(section.public_text)
    if not path.is_file():
        raise ConfigInvalid(f"server.professional.public_text: no file at {path}")
    words: set[str] = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line) if line.strip() else {}
        for key in ("instruction", "input", "output"):
            words.update(word.lower() for word in text.words(str(row.get(key, ""))))
    return frozenset(words)
