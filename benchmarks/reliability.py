"""`docs/reliability.md` from the last `faults` line of `results.jsonl`: what was broken on purpose, and what held."""

from __future__ import annotations

import record

NAMES = {
    "B1": "malformed adapters are refused, and the round goes on without them",
    "B2": "the server is killed at every phase and resumes to the same bytes",
    "B3": "sites that die, come late or answer twice",
    "B4": "the budget ledger under crashes at every write",
    "B6": "a professional's endpoint that fails, stalls, lies or is spoken to by hostile text",
    "B7": "a full disk at every write",
    "B8": "numbers that are not finite",
    "B8b": "a server that tries to weaken a site's policy",
    "B9": "generated configurations: refused with a way out, or read",
    "B10": "hundreds of rounds in one process: memory, files, threads, disk",
    "B11": "transport and authentication: everyone who must not come in",
    "B12": "planted secrets: where they turn up outside the site (nowhere)",
    "B13": "randomness: equal where it must be, never equal where it may not be",
    "B14": "one site of five that lies",
    "B15": "code that may not be called, and what is shipped",
    "B16": "run directories and ledgers of earlier versions",
    "B17": "accounting against independent references",
}


def page() -> str:
    """Return the page; without any count, a page that says so."""
    head = [
        "# Reliability",
        "",
        "Made by `python benchmarks/results.py table` from the last complete count that `make faults` left in",
        "`benchmarks/results.jsonl`. The cases are `tests/faults`, one file per bar; each case breaks one thing on",
        "purpose and says what must hold. A case that fails, errs or is skipped counts in the second number only.",
        "",
    ]
    lines = record.lines("faults")
    if not lines:
        return "\n".join([*head, "Nothing has been counted yet."]) + "\n"
    last = ([line for line in lines if line["all"]] or lines)[-1]
    slow = "with the slow cases" if last["all"] else "without the slow cases"
    rows = [
        f"| {name} | {NAMES.get(name, '')} | {one['passed']:,} | {one['of']:,} |" for name, one in last["bars"].items()
    ]
    return (
        "\n".join(
            [
                *head,
                f"Commit {last['commit']}, {slow}, {last['seconds']} seconds.",
                "",
                "| bar | what is broken | held | cases |",
                "|---|---|---|---|",
                *rows,
            ]
        )
        + "\n"
    )
