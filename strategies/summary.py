"""`summary.json`: every figure of a run under stable names, and the model card of its target.

    exam.<model>.<metric>.{value,low,high,count,higher_is_better[,chance]}   models: base, adapter, target_round_<n>,
                                                                              professional
    epsilon.<site>.{spent,spent_is_lower_bound,budget,delta,unit,relation,sampling,accountant,rdp,by_round,noise_multiplier}
    seconds.<phase>   seconds_by_round[]   bytes.{up,down}.<site>   drafts.{written,kept,dropped,by_round}
    lessons   rounds[]   left_site[]   hashes.<artefact>   models.{local,professional}   config_digest   status

`spent` is over the life of the site's ledger as far as the server knows it: `spent_is_lower_bound` marks a site that
was asked to train and never heard of, so that its ledger may hold more. `rdp` is a second accountant's view of this
run's receipts alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fl_app import journal
from fl_app.privacy.accountants import pld, rdp
from fl_app.types import PoissonGaussian

if TYPE_CHECKING:
    from strategies.pipeline import Pipeline

SCHEMA = 1


def write_summary(pipeline: Pipeline, *, status: str, error: str = "", seconds: float) -> dict[str, Any]:
    """Write and return the summary of a run as it stands; also the card beside the target."""
    summary = {
        "schema": SCHEMA,
        "run": pipeline.run,
        "status": status,
        "error": error,
        "stamp": journal.STAMP if pipeline.shared.run.mode == "simulation" else "",
        "config_digest": pipeline.config_digest,
        "models": _models(pipeline),
        "exam": _exam(pipeline),
        "epsilon": {site: _epsilon(pipeline, site) for site in sorted(pipeline.sites)},
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
        "left_site": pipeline.released,
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
    hello = pipeline.sites[site]
    receipts = pipeline.receipts.get(site, [])
    return {
        "spent": hello.spent,
        "spent_is_lower_bound": site in pipeline.unheard,
        "budget": hello.epsilon,
        "delta": hello.delta,
        "unit": hello.unit,
        "relation": "add_or_remove_one",
        "sampling": "Poisson",
        "accountant": pld.label(),
        "rdp": rdp.epsilon(receipts, hello.delta) if receipts else 0.0,
        "by_round": [record.epsilon.get(site, 0.0) for record in pipeline.records],
        "noise_multiplier": [
            receipt.event.noise_multiplier for receipt in receipts if isinstance(receipt.event, PoissonGaussian)
        ],
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
    budgets = "\n".join(
        f"- {site}: epsilon {'at least ' if one['spent_is_lower_bound'] else ''}{one['spent']:.4g} of "
        f"{one['budget']:g} at delta {one['delta']:g}, per {one['unit']}, "
        f"{one['relation']}, {one['sampling']} sampling, {one['accountant']}"
        for site, one in summary["epsilon"].items()
    )
    stamp = f"**{summary['stamp']}**: the noise of this run came from a known seed.\n\n" if summary["stamp"] else ""
    return f"""---
base_model: {pipeline.shared.model.name}
library_name: peft
---
# Target adapter of run {pipeline.run}

{stamp}A LoRA adapter of `{pipeline.shared.model.name}` (content hash `{pipeline.spec.base[:16]}`), tuned on
{summary["lessons"]} synthetic lessons: instructions written by the local model under the sites' differentially private
adapters, answers by `{summary["models"]["professional"]["name"]}`. No row of any site was seen by the server.

## What the sites spent
{budgets}

## Exam (95 % intervals)
| model | metric | value | interval | items |
|---|---|---|---|---|
{scores}

Base model files must have the content hash above. Load with `peft.PeftModel.from_pretrained`.
"""
