"""What it saves that rows leave the batch when they have ended: drafts of a real run, written again.

    PYTHONPATH=. python benchmarks/ending.py runs/<id> [--repeats 3] [--rows 32] [--no-record]

The prompts are those of the run's first drafts, the model carries its merged adapter of round 1, the same stream draws
the same numbers for all three, and transformers' `generate` is the yardstick. CPU seconds turn by turn, one thread.

    generate   transformers' `generate` with our sampling: every row is computed until the last one ends
    loop       our loop, no row leaves
    leaving    our loop as it is

The last line is one JSON object; it is appended to results.jsonl with the commit, and docs/performance.md shows it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import decoding
import numpy as np
import record
import torch
from transformers import LogitsProcessorList

from fl_app import inference, journal, lora, models, peft_files

SETTINGS: dict[str, Any] = {"max_new_tokens": 48, "temperature": 0.8, "top_p": 0.95}
"""Those of configs/demo.toml."""


def by_generate(model: Any, tokenizer: Any, prompts: list[str], seed: int) -> list[str]:
    """Return the texts that transformers' `generate` writes from the same stream."""
    ids_BT, mask_BT = inference._left_padded(  # noqa: SLF001 - the very batch that ours decodes
        tokenizer, [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    )
    sampling = inference._seeded_sampling(  # noqa: SLF001
        SETTINGS["temperature"], SETTINGS["top_p"], np.random.default_rng(seed)
    )
    with torch.inference_mode():
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=SETTINGS["max_new_tokens"],
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([sampling]),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)


def ours(model: Any, tokenizer: Any, prompts: list[str], seed: int, *, shrink: float) -> list[str]:
    """Return the texts of our loop."""
    before, inference.SHRINK = inference.SHRINK, shrink
    try:
        return inference.generate(model, tokenizer, prompts, rng=np.random.default_rng(seed), **SETTINGS)
    finally:
        inference.SHRINK = before


def measure(run: Path, rows: int, repeats: int) -> dict[str, Any]:
    """Return ratios to `generate`, and how many texts are the same."""
    name = json.loads((run / "summary.json").read_text(encoding="utf-8"))["models"]["local"]["name"]
    frozen = models.load(name, "bfloat16")
    model = lora.attach(frozen, peft_files.load(run / "rounds" / "1" / "merged"))
    drafts = journal.read_lines(run / "rounds" / "1" / "drafts.jsonl")[:rows]
    prompts = sorted((draft["origin"]["prompt"] for draft in drafts), key=len)
    shrink = inference.SHRINK
    turn = [0]
    texts: dict[str, list[str]] = {"generate": [], "loop": [], "leaving": []}

    def decode(which: str) -> None:
        seed = turn[0] // len(texts)
        turn[0] += 1
        options = (model, frozen.tokenizer, prompts, seed)
        made = by_generate(*options) if which == "generate" else ours(*options, shrink=(which == "leaving") * shrink)
        texts[which] += made

    seconds = decoding.interleaved({which: lambda which=which: decode(which) for which in texts}, repeats)
    lengths = [len(frozen.tokenizer(text)["input_ids"]) for text in texts["generate"]]
    return {
        "model": name,
        "rows": len(prompts),
        "mean_new_tokens": round(float(np.mean(lengths)), 1),
        "over_generate": {which: decoding.ratio(seconds, which, "generate") for which in ("loop", "leaving")},
        "texts": len(texts["generate"]),
        "same_texts": {
            which: sum(one == other for one, other in zip(texts[which], texts["generate"], strict=True))
            for which in ("loop", "leaving")
        },
    }


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = record.commit()
    found = measure(arguments.run, arguments.rows, arguments.repeats)
    line = {"kind": "ending", "commit": begun, "repeats": arguments.repeats, **SETTINGS, **found}
    print(json.dumps(line if arguments.no_record else record.append(line), sort_keys=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
