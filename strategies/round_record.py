"""One line of the journal from what a round did."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from fl_app import journal, lora
from fl_app.types import RoundRecord

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fl_app.types import Adapter, Merged, Score
    from strategies.collected import Judged
    from strategies.spending import Spending

FILES = ("drafts.jsonl", "screened.json", "lessons.jsonl")


def record_of(
    number: int,
    judged: Judged,
    merged: Merged,
    *,
    spending: Spending,
    target: Adapter,
    written: int,
    dropped: Mapping[str, str],
    lessons: int,
    scores: Mapping[str, Mapping[str, Score]],
    seconds: Mapping[str, float],
    folder: Path,
) -> RoundRecord:
    """Return the record of round `number`, whose files lie in `folder`."""
    hashes = {f"releases/{item['site']}": item["sha256"] for item in spending.released if item["round"] == number}
    hashes |= {"merged": lora.sha256(merged.adapter), "target": lora.sha256(target)}
    hashes |= {name: journal.file_sha256(folder / name) for name in FILES}
    return RoundRecord(
        round=number,
        used=merged.used,
        refused={refusal.site: refusal.code for refusal in judged.refusals},
        rejected=dict(merged.rejected),
        silent=judged.silent,
        drafts_written=written,
        drafts_kept=written - len(dropped),
        dropped=dict(Counter(reason.split(":")[0] for reason in dropped.values())),
        lessons=lessons,
        epsilon={site: hello.spent for site, hello in sorted(spending.sites.items())},
        scores=scores,
        seconds=dict(seconds),
        bytes_up=dict(judged.bytes_up),
        bytes_down=dict(judged.bytes_down),
        hashes=hashes,
        client_epsilon=merged.cost.spent if merged.cost else None,
        rejections=tuple(asdict(one) for one in (*judged.rejected.values(), *judged.strays)),
    )
