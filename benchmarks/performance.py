"""`docs/performance.md` from the last `dp_step` line of `results.jsonl`: what a DP step costs, against what."""

from __future__ import annotations

from typing import Any

import record

NAMES = {
    "opacus_hooks": "Opacus hooks",
    "opacus_ghost": "Opacus ghost clipping",
    "own_plain": "ours without clip and noise",
    "own_dp": "**ours**",
}


DECODERS = {
    "plain_static": "static cache",
    "seeded": "our sampling, one stream",
    "seeded_rows": "our sampling, a stream per row",
    "steered": "our sampling, steered",
    "one_adapter": "one adapter (PEFT)",
    "own_one": "one adapter (our layers)",
    "per_row": "**an adapter per row**",
    "peft_mixed": "PEFT's mixed batch",
    "one_by_one": "one adapter after another",
}


def page() -> str:
    """Return the page; without any measurement, a page that says so."""
    lines = record.lines("dp_step")
    head = [
        "# Performance",
        "",
        "Made by `python benchmarks/results.py table` from the last `dp_step` lines of `benchmarks/results.jsonl`;",
        "measured by `make bench-step` on two cores of an AMD EPYC (AVX-512, bf16), one torch thread per process.",
        "Ratios of CPU seconds, variants interleaved step by step in one process: median [lowest, highest].",
    ]
    decoding = [*_decoding(record.lines("decoding")), *_ending(record.lines("ending"))]
    if not lines:
        return "\n".join([*head, "", "Nothing measured yet.", *decoding]) + "\n"
    found = {part: line for line in lines for part in ("step", "memory", "round") if part in line}
    sections = [*_steps(found), *_memory(found), *_round(found), *decoding]
    return "\n".join([*head, *sections]) + "\n"


def _steps(found: dict[str, Any]) -> list[str]:
    if "step" not in found:
        return []
    line = found["step"]
    step = line["step"]
    names = list(NAMES)
    rows = [
        f"| {case} | 1 | "
        + " | ".join(_span(one.get(f"{name}_over_peft")) for name in names)
        + f" | {_span(one['own_dp_over_own_plain'])} | {one['own_dp_tokens_per_s']:.0f} | "
        f"{one['own_dp_share_of_peak']:.0%} |"
        for case, one in step["cases"].items()
    ]
    columns = ["maps, rows x tokens", "peft", *NAMES.values()]
    columns += ["ours / ours without privacy", "our tokens/s", "share of GEMM peak"]
    narrow = step["bfloat16"]
    peak = step["gemm_peak_gflops"]
    return [
        "",
        "## One step",
        "",
        f"{line['model']}, LoRA of rank 8 on q and v or on all seven linear maps, float32, every token but the first",
        "carries loss, AdamW in every variant; peft is the yardstick and is *not* private.",
        f"Commit {line['commit']}, {line['repeats']} turns.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *rows,
        "",
        f"Measured peak of square products: {peak['float32']:.0f} GFLOP/s in float32, {peak['bfloat16']:.0f} in",
        "bfloat16; the share counts the products of our own step (torch's flop counter).",
        f"All maps, 8x128, bfloat16: ours / peft in float32 {_span(narrow['own_dp_bf16_over_peft'])}, ours / peft in",
        f"bfloat16 {_span(narrow['own_dp_bf16_over_peft_bf16'])}, {narrow['own_dp_tokens_per_s']:.0f} tokens/s,",
        f"{narrow['own_dp_share_of_peak']:.0%} of the peak.",
    ]


def _memory(found: dict[str, Any]) -> list[str]:
    if "memory" not in found:
        return []
    line = found["memory"]
    names = list(NAMES)
    return [
        "",
        "## Peak memory",
        "",
        f"Largest resident megabytes of a process that takes two such steps. Commit {line['commit']}.",
        "",
        f"| maps, rows x tokens | peft | {' | '.join(NAMES[name] for name in names)} |",
        f"|{'---|' * (len(names) + 2)}",
        *(
            f"| {case} | {peaks['peft']:,} | {' | '.join(f'{peaks[name]:,}' for name in names)} |"
            for case, peaks in line["memory"].items()
        ),
    ]


def _round(found: dict[str, Any]) -> list[str]:
    if "round" not in found:
        return []
    line = found["round"]
    one = line["round"]
    first = one["seconds"]["opacus hooks"]
    rows = [
        f"| {rung} | {seconds:.1f} | {one['gain'].get(rung, 1.0):.2f} | {first / seconds:.2f} |"
        for rung, seconds in one["seconds"].items()
    ]
    return [
        "",
        "## A site's whole round, one idea at a time",
        "",
        f"{one['letters']} letters of the embedded corpus (mean {one['mean_tokens']} tokens,",
        f"{one['loss_share']:.0%} of them carry loss), 8 Poisson steps at rate 1/4, LoRA on all linear maps of the",
        f"upper third. The kernel check is made once per process and costs {one['kernel_check_s']:.1f} s; the speed-up",
        f"pays for it in full. Commit {line['commit']}.",
        "",
        "| | CPU seconds | gain of this idea | against the first |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Whole round with everything on against peft's layers with Opacus' hooks: **{_span(one['speedup'])}x**.",
    ]


def _decoding(lines: list[dict[str, Any]]) -> list[str]:
    if not lines:
        return []
    cases = {which: {**one, "line": line} for line in lines for which, one in line["cases"].items()}  # the last of each
    last = lines[-1]
    measured = {name for one in cases.values() for name in one["over_plain"]}
    names = [*(name for name in DECODERS if name in measured), *sorted(measured - set(DECODERS))]
    rows = [
        f"| {DECODERS.get(name, name.replace('_', ' '))} | "
        + " | ".join(_span(one["over_plain"].get(name)) for one in cases.values())
        + " |"
        for name in names
    ]
    columns = ["case", "ours / PEFT's one", "ours / our one", "PEFT's mixed / PEFT's one", "one by one / PEFT's one"]
    columns += ["plain, tokens/s", "turns", "commit"]
    against = [
        f"| {which} | {_span(one['over_one_adapter']['per_row'])} | {_span(one['over_own_one']['per_row'])} | "
        f"{_span(one['over_one_adapter'].get('peft_mixed'))} | {_span(one['over_one_adapter'].get('one_by_one'))} | "
        f"{one['tokens_per_s']['plain']:.0f} | {one['line']['repeats']} | {one['line']['commit']} |"
        for which, one in cases.items()
        if "over_one_adapter" in one and "over_own_one" in one
    ]
    return [
        "",
        "## Decoding",
        "",
        f"{last['model']}, {last['prompt_tokens']} tokens of prompt and {last['new_tokens']} written in every row,",
        f"{last['adapters']} adapters of rank 8 on the maps named; 8 rows, or 32. CPU seconds over those of plain",
        "`generate` of the bare model, decoders in turn in one process: `make bench-decoding`.",
        "",
        f"| decoder | {' | '.join(cases)} |",
        f"|{'---|' * (len(cases) + 1)}",
        *rows,
        "",
        "The same batch with an adapter of its own for every row, over one adapter for all rows:",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *against,
    ]


def _ending(lines: list[dict[str, Any]]) -> list[str]:
    if not lines:
        return []
    line = lines[-1]
    same = line["same_texts"]
    return [
        "",
        "## Rows that have ended leave the batch",
        "",
        f"{line['rows']} drafts of a run of the demo, {line['mean_new_tokens']:g} tokens long on average of at most",
        f"{line['max_new_tokens']}, bfloat16. CPU seconds over those of transformers' `generate` with our sampling:",
        f"our loop {_span(line['over_generate']['loop'])}, and with rows leaving",
        f"**{_span(line['over_generate']['leaving'])}**. Of {line['texts']} texts {same['loop']} and {same['leaving']}",
        f"are the same as `generate`'s. `benchmarks/ending.py`, commit {line['commit']}, {line['repeats']} turns.",
    ]


def _span(one: dict[str, float] | None) -> str:
    if one is None:
        return ""
    return f"{one['median']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
