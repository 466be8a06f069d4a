"""`summary.json`: every figure of a run under stable names, and the model card of its target.

    exam.<model>.<metric>.{value,low,high,count,higher_is_better[,chance]}   models: base, adapter, target_round_<n>,
                                                                              professional
    epsilon.<site>.{spent,spent_is_lower_bound,private,budget,delta,unit,relation,sampling,accountant,rdp,by_round,
                    noise_multiplier,mechanisms}
    client_level.{spent,budget,delta,unit,relation,sampling,accountant,rdp,by_round,noise_multiplier,clip_norm,scope,
                  protects,does_not_protect}   null unless the aggregator adds noise of its own
    seconds.<phase>   seconds_by_round[]   bytes.{up,down}.<site>   drafts.{written,kept,dropped,by_round}
    lessons   rounds[]   left_site[]   hashes.<artefact>   models.{local,professional}   config_digest   status

`spent` is over the life of the site's ledger as far as the server knows it: `spent_is_lower_bound` marks a site that
was asked to train and never heard of, so that its ledger may hold more. `rdp` is a second accountant's view of this
run's receipts alone. An infinite epsilon (a release without noise, `private` false) is the text "inf".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fl_app import journal
from fl_app.privacy.accountants import pld, rdp
from fl_app.privacy.events import merged
from fl_app.privacy.plan import describe
from fl_app.privacy.statement import of_entry, of_receipts, of_site, rounded_up
from fl_app.types import Gaussian, PoissonGaussian
from strategies.spending import NON_PRIVATE

if TYPE_CHECKING:
    from strategies.pipeline import Pipeline

SCHEMA = 1

PROTECTS = (
    "all that any one site contributed to the rounds counted, in the merged adapters and in everything made from them: "
    "targets, broadcasts, synthetic text, scores; given a server that is trusted to clip and to add the noise"
)
DOES_NOT_PROTECT = (
    "the uploads from this server, nor their copies, hashes and sizes in the run directory; who took part, and whether "
    "a round succeeded; a person whose rows lie at several sites"
)


def write_summary(pipeline: Pipeline, *, status: str, error: str = "", seconds: float) -> dict[str, Any]:
    """Write and return the summary of a run as it stands; also the card beside the target."""
    summary = {
        "schema": SCHEMA,
        "run": pipeline.run,
        "status": status,
        "error": error,
        "stamp": pipeline.stamp(),
        "config_digest": pipeline.config_digest,
        "models": _models(pipeline),
        "exam": _exam(pipeline),
        "epsilon": {site: _epsilon(pipeline, site) for site in sorted(pipeline.spending.sites)},
        "client_level": _client_level(pipeline),
        "seconds": _seconds(pipeline, seconds),
        "seconds_by_round": [dict(record.seconds) for record in pipeline.records],
        "bytes": {"up": _total(pipeline, "bytes_up"), "down": _total(pipeline, "bytes_down")},
        "drafts": _drafts(pipeline),
        "lessons": len(pipeline.lessons),
        "rounds": [
            {
                "round": record.round,
                "used": record.used,
                "refused": record.refused,
                "rejected": record.rejected,
                "silent": record.silent,
            }
            for record in pipeline.records
        ],
        "unready": pipeline.unready,
        "left_site": pipeline.spending.released,
        "hashes": {f"round_{r.round}/{name}": digest for r in pipeline.records for name, digest in r.hashes.items()},
    }
    journal.write_json(pipeline.journal.directory / "summary.json", summary)
    if pipeline.records:
        journal.write_text(pipeline.journal.directory / "target" / "README.md", _card(pipeline, summary))
    return summary


def _models(pipeline: Pipeline) -> dict[str, Any]:
    local = pipeline.lab.local.resolved
    return {
        "local": {"name": local.name, "sha256": local.sha256},
        "professional": {"name": pipeline.lab.professional.name, "sha256": pipeline.lab.professional_sha256},
    }


def _exam(pipeline: Pipeline) -> dict[str, Any]:
    table = {model: {key: asdict(score) for key, score in scores.items()} for model, scores in pipeline.scores.items()}
    for scores in table.values():
        if "choice_accuracy" in scores:
            scores["choice_accuracy"]["chance"] = pipeline.exam.chance
    return table


def _epsilon(pipeline: Pipeline, site: str) -> dict[str, Any]:
    hello = pipeline.spending.sites[site]
    receipts = pipeline.spending.receipts.get(site, [])
    return {
        "spent": hello.spent,
        "spent_is_lower_bound": site in pipeline.spending.unheard,
        "private": hello.spent < math.inf,
        "budget": hello.epsilon,
        **of_site(delta=hello.delta, unit=hello.unit, composition=hello.composition).fields(),
        "rdp": rdp.epsilon(None if site in pipeline.spending.non_private else receipts, hello.delta),
        "by_round": [record.epsilon.get(site, 0.0) for record in pipeline.records],
        "noise_multiplier": [
            receipt.event.noise_multiplier for receipt in receipts if isinstance(receipt.event, PoissonGaussian)
        ],
        "mechanisms": [describe(receipt) for receipt in merged(receipts)],
    }


def _client_level(pipeline: Pipeline) -> dict[str, Any] | None:
    """Return what the merged adapters cost every site, under the trust that the statement names."""
    if not pipeline.spending.client_level:
        return None
    last = pipeline.spending.client_level[-1]
    receipts = [cost.receipt for cost in pipeline.spending.client_level]
    events = [receipt.event for receipt in receipts if isinstance(receipt.event, Gaussian)]
    return {
        "spent": last.spent,
        "budget": last.budget,
        **of_receipts(receipts, delta=last.delta, accountant=pld.label()).fields(),
        "rdp": rdp.epsilon(receipts, last.delta),
        "by_round": [cost.spent for cost in pipeline.spending.client_level],
        "noise_multiplier": [event.noise_multiplier for event in events],
        "clip_norm": [event.clip_norm for event in events],
        "scope": last.scope,
        "protects": PROTECTS,
        "does_not_protect": DOES_NOT_PROTECT,
    }


def _seconds(pipeline: Pipeline, total: float) -> dict[str, float]:
    train = sum(record.seconds.get("train", 0.0) for record in pipeline.records)
    return {"total": round(total, 3), "train": round(train, 3), **pipeline.seconds}


def _total(pipeline: Pipeline, name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for record in pipeline.records:
        total.update(getattr(record, name))
    return dict(total)


def _drafts(pipeline: Pipeline) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    for record in pipeline.records:
        dropped.update(record.dropped)
    return {
        "written": sum(record.drafts_written for record in pipeline.records),
        "kept": sum(record.drafts_kept for record in pipeline.records),
        "dropped": dict(dropped),
        "by_round": [
            {"written": record.drafts_written, "kept": record.drafts_kept, "dropped": record.dropped}
            for record in pipeline.records
        ],
    }


def _card(pipeline: Pipeline, summary: dict[str, Any]) -> str:
    """Return the model card: what it is, how it was made, what it cost, how it scores."""
    last = f"target_round_{pipeline.records[-1].round}"
    scores = "\n".join(
        f"| {model} | {metric} | {one['value']:.3f} | {one['low']:.3f} - {one['high']:.3f} | {one['count']} |"
        for model in ("base", last, "professional")
        for metric, one in summary["exam"].get(model, {}).items()
    )
    budgets = "\n".join(_budget_line(site, one) for site, one in summary["epsilon"].items())
    seeded = ": the noise of this run came from a known seed" if pipeline.shared.run.mode == "simulation" else ""
    stamp = f"**{summary['stamp']}**{seeded}.\n\n" if summary["stamp"] else ""
    releases = "" if pipeline.spending.non_private else "differentially private "
    return f"""---
base_model: {pipeline.shared.model.name}
library_name: peft
---
# Target adapter of run {pipeline.run}

{stamp}A LoRA adapter of `{pipeline.shared.model.name}` (content hash `{pipeline.spec.base[:16]}`), tuned on
{summary["lessons"]} synthetic lessons: instructions written by the local model under the sites' {releases}adapters,
answers by `{summary["models"]["professional"]["name"]}`. No row of any site was seen by the server.

## What the sites spent
{budgets}
{_client_level_words(summary["client_level"])}
## Exam (95 % intervals)
| model | metric | value | interval | items |
|---|---|---|---|---|
{scores}

Base model files must have the content hash above. Load with `peft.PeftModel.from_pretrained`.
"""


def _budget_line(site: str, one: dict[str, Any]) -> str:
    if not one["private"]:
        return f"- {site}: infinite epsilon: it released without noise, {NON_PRIVATE}"
    return f"- {site}: epsilon {'at least ' if one['spent_is_lower_bound'] else ''}{_statement(one)}"


def _statement(one: dict[str, Any]) -> str:
    return f"{rounded_up(one['spent'])} of {one['budget']:g} {of_entry(one).words()}"


def _client_level_words(one: dict[str, Any] | None) -> str:
    """Return the card's section on client level; nothing when no noise was added at the server."""
    if one is None:
        return ""
    return f"""
## Client level, at the server
Epsilon {_statement(one)}; counted: {one["scope"]}.

- Protects {one["protects"]}.
- Does not protect {one["does_not_protect"]}.
"""
